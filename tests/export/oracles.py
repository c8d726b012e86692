"""The upstream modules of a checkpoint, loaded with its weights: nobody here wrote them."""

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import nn
from transformers import Gemma2Config, Gemma2Model

from sana_export.weights.architecture import UpstreamComponent
from sana_export.weights.checkpoint import Checkpoint


def upstream_transformer(checkpoint: Checkpoint) -> SanaTransformer2DModel:
    return _loaded(SanaTransformer2DModel.from_config(checkpoint.transformer_config), checkpoint, "transformer")


def upstream_autoencoder(checkpoint: Checkpoint) -> AutoencoderDC:
    return _loaded(AutoencoderDC.from_config(checkpoint.vae_config), checkpoint, "vae")


def upstream_text_encoder(checkpoint: Checkpoint) -> Gemma2Model:
    return _loaded(Gemma2Model(Gemma2Config(**checkpoint.text_encoder_config)), checkpoint, "text_encoder")


def _loaded(module: nn.Module, checkpoint: Checkpoint, component: UpstreamComponent) -> nn.Module:
    weights = {name: tensor.load() for name, tensor in checkpoint.upstream_weights(component).items()}
    module.load_state_dict(weights, strict=True)
    return module.to(torch.float32).eval().requires_grad_(False)
