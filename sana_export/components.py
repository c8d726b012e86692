"""The three engine components of a checkpoint: module, I/O, dtype, and where its weights come from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from sana_export.reference.dc_ae import AutoencoderConfig, Decoder, EfficientViTBlock, ImageDecoder
from sana_export.reference.solver_step import ClassifierFreeStep, TrigFlowStep
from sana_export.reference.text_encoder import TextEncoder, gemma2_config
from sana_export.reference.transformer import LinearTransformer, TransformerConfig
from sana_export.weights.checkpoint import Checkpoint
from sana_runtime.contract import (
    DTYPE_OF_PRECISION,
    PIXELS_PER_LATENT,
    ComponentName,
    PrecisionName,
    TensorSpec,
    text_encoder_io,
    transformer_io,
    vae_decoder_io,
)
from sana_runtime.errors import CheckpointError

# Decoder stages whose picture takes more are computed in windows: the last one from about 1500 px on, in 16 bits.
_WINDOW_BYTES = 512 << 20


@dataclass(frozen=True)
class ComponentPlan:
    """What to export. `make()` builds the module in its dtypes; `prefix` + reference name is a parameter's name."""

    name: ComponentName
    dtype: str
    dtype_reason: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    prefix: str
    make: Callable[[], nn.Module]


def component_dtype(name: ComponentName, precision: PrecisionName) -> tuple[str, str]:
    """The graph's dtype for a component and the reason where it is not simply the one asked for."""
    if precision == "fp16" and name == "text_encoder":
        return "bfloat16", "fp16 asked for: Gemma-2's residual stream overflows fp16, so bf16"
    if precision == "fp16" and name == "vae_decoder":
        return "float16", "fp16 with EfficientViT blocks and norms in fp32: they overflow fp16"
    return DTYPE_OF_PRECISION[precision], ""


def plan_components(
    checkpoint: Checkpoint, precision: PrecisionName, height: int, width: int, caption_tokens: int
) -> tuple[ComponentPlan, ...]:
    """Plans for all components at a picture size in pixels; `caption_tokens` is the padded prompt length L."""
    latent = (height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    encoder_config = gemma2_config(checkpoint.text_encoder_config)
    transformer = TransformerConfig.from_upstream(
        checkpoint.transformer_config, attention_clip=checkpoint.attention_clip
    )
    try:
        autoencoder = AutoencoderConfig.from_upstream(checkpoint.vae_config)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.source}: this autoencoder is not Sana's DC-AE",
            received=str(error),
            expected="the DC-AE f32c32 flavour of the Sana checkpoints",
            action="use the vae folder of a released Sana checkpoint",
        ) from error
    caption_dtype, encoder_reason = component_dtype("text_encoder", precision)
    transformer_dtype, transformer_reason = component_dtype("transformer", precision)
    decoder_dtype, decoder_reason = component_dtype("vae_decoder", precision)
    sigma_data = float(checkpoint.scheduler_config.get("sigma_data", 0.5))

    def make_step() -> nn.Module:
        model = LinearTransformer(transformer)
        if checkpoint.guidance == "embedded":
            return TrigFlowStep(model, sigma_data)
        return ClassifierFreeStep(model)

    def make_decoder() -> nn.Module:
        most_elements = _WINDOW_BYTES // getattr(torch, decoder_dtype).itemsize
        return in_dtype(ImageDecoder(Decoder(autoencoder, most_elements), autoencoder.scaling_factor), decoder_dtype)

    return (
        ComponentPlan(
            "text_encoder",
            caption_dtype,
            encoder_reason,
            *text_encoder_io(caption_dtype, encoder_config.hidden_size, caption_tokens),
            "model.",
            lambda: in_dtype(TextEncoder(encoder_config), caption_dtype),
        ),
        ComponentPlan(
            "transformer",
            transformer_dtype,
            transformer_reason,
            *transformer_io(caption_dtype, transformer.caption_channels, *latent, checkpoint.guidance),
            "transformer.",
            lambda: in_dtype(make_step(), transformer_dtype),
        ),
        ComponentPlan(
            "vae_decoder",
            decoder_dtype,
            decoder_reason,
            *vae_decoder_io(*latent),
            "decoder.",
            make_decoder,
        ),
    )


def in_dtype(module: nn.Module, dtype: str) -> nn.Module:
    """Cast parameters, leaving buffers alone (rotary frequencies stay fp32) and an fp16 decoder's fp32 islands."""
    target = getattr(torch, dtype)
    islands = {
        id(parameter)
        for child in module.modules()
        if isinstance(child, EfficientViTBlock) and target == torch.float16
        for parameter in child.parameters()
    }
    for parameter in module.parameters():
        wanted = torch.float32 if id(parameter) in islands else target
        parameter.data = torch.empty_like(parameter, dtype=wanted) if parameter.is_meta else parameter.to(wanted)
    return module.eval().requires_grad_(False)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules without allocating their parameters; buffers stay real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def empty_module(plan: ComponentPlan, device: str = "cpu") -> nn.Module:
    """The plan's module with parameters on `device`: on the CPU virtual memory that nothing reads or writes until used.
    Buffers are on the CPU.
    """
    with parameters_on_meta():
        module = plan.make()
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(owner, name, nn.Parameter(empty, requires_grad=False))
    return module


def loaded_module(plan: ComponentPlan, checkpoint: Checkpoint, device: str = "cpu") -> nn.Module:
    """The plan's module with the checkpoint's weights, on `device`."""
    module = empty_module(plan, device)
    weights = checkpoint.weights(plan.name)
    for name, parameter in module.named_parameters():
        # As stored: a copy would cast before it moves, and an fp32 Gemma-2 takes twice the host's memory and time.
        parameter.copy_(weights[name.removeprefix(plan.prefix)].load().to(device))
    return module.to(device)
