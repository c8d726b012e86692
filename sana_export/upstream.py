"""diffusers' and transformers' modules with a checkpoint's weights: the oracle of tests, the peer of measurements."""

from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import nn
from transformers import Gemma2Config, Gemma2Model

from sana_export.weights.architecture import UpstreamComponent
from sana_export.weights.checkpoint import Checkpoint


def upstream_transformer(checkpoint: Checkpoint) -> SanaTransformer2DModel:
    """diffusers' transformer in fp32."""
    return _loaded(SanaTransformer2DModel.from_config(checkpoint.transformer_config), checkpoint, "transformer")


def upstream_autoencoder(checkpoint: Checkpoint) -> AutoencoderDC:
    """diffusers' DC-AE in fp32."""
    return _loaded(AutoencoderDC.from_config(checkpoint.vae_config), checkpoint, "vae")


def upstream_text_encoder(checkpoint: Checkpoint) -> Gemma2Model:
    """transformers' Gemma-2 in fp32."""
    return _loaded(Gemma2Model(Gemma2Config(**checkpoint.text_encoder_config)), checkpoint, "text_encoder")


def _loaded(module: nn.Module, checkpoint: Checkpoint, component: UpstreamComponent) -> nn.Module:
    weights = checkpoint.upstream_weights(component)
    # One tensor at a time: a real model in two precisions at once would not fit.
    for name, parameter in module.named_parameters():
        parameter.data.copy_(weights.pop(name).load())
    assert not weights, f"{component}: no parameter for {sorted(weights)}"
    return module.eval().requires_grad_(False)
