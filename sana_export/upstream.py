"""diffusers' and transformers' modules with a checkpoint's weights: the oracle of tests, the peer of measurements."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import nn
from transformers import Gemma2Config, Gemma2Model

from sana_export.weights.architecture import UpstreamComponent
from sana_export.weights.checkpoint import Checkpoint


def upstream_transformer(
    checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> SanaTransformer2DModel:
    """diffusers' transformer."""
    with _made_on(device, dtype):
        module = SanaTransformer2DModel.from_config(checkpoint.transformer_config)
    return _loaded(module, checkpoint, "transformer")


def upstream_autoencoder(
    checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> AutoencoderDC:
    """diffusers' DC-AE."""
    with _made_on(device, dtype):
        module = AutoencoderDC.from_config(checkpoint.vae_config)
    return _loaded(module, checkpoint, "vae")


def upstream_text_encoder(
    checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Gemma2Model:
    """transformers' Gemma-2."""
    with _made_on(device, dtype):
        module = Gemma2Model(Gemma2Config(**checkpoint.text_encoder_config))
    return _loaded(module, checkpoint, "text_encoder")


@contextmanager
def _made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Make modules on a device and in a dtype, as from_pretrained does with torch_dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _loaded(module: nn.Module, checkpoint: Checkpoint, component: UpstreamComponent) -> nn.Module:
    weights = checkpoint.upstream_weights(component)
    # One tensor at a time: a real model in two precisions at once would not fit.
    for name, parameter in module.named_parameters():
        parameter.data.copy_(weights.pop(name).load())
    assert not weights, f"{component}: no parameter for {sorted(weights)}"
    return module.eval().requires_grad_(False)
