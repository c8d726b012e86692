"""The graph contract: component names, I/O tensor names, shapes and dtypes of every engine.

One name per tensor, from the PyTorch reference through ONNX to the engine. The exporter imports this
module; it must stay free of heavy dependencies.
"""

from typing import Literal

import msgspec

ComponentName = Literal["text_encoder", "transformer", "vae_decoder"]
COMPONENTS: tuple[ComponentName, ...] = ("text_encoder", "transformer", "vae_decoder")

TargetName = Literal["tensorrt-rtx", "tensorrt", "onnxruntime", "inductor"]
TARGETS: tuple[TargetName, ...] = ("tensorrt-rtx", "tensorrt", "onnxruntime", "inductor")

PrecisionName = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "bf16", "fp16")
DTYPE_OF_PRECISION = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# Pixels per latent position (DC-AE f32), latent channels (c32), caption positions the transformer attends
# to, and the width of a Gemma-2-2B hidden state: the same in every released Sana model.
PIXELS_PER_LATENT = 32
LATENT_CHANNELS = 32
CAPTION_LENGTH = 300

GuidanceKind = Literal["classifier_free", "embedded"]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One I/O tensor of an engine. `dtype` is a NumPy name, or "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def text_encoder_io(
    caption_dtype: str, caption_channels: int, tokens: int
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """I/O of `text_encoder`: batch 1, `tokens` padded positions [1, L] -> caption_embeds [1, L, C]."""
    inputs = (
        TensorSpec("caption_tokens", "int64", (1, tokens)),
        TensorSpec("caption_mask", "int64", (1, tokens)),
    )
    return inputs, (TensorSpec("caption_embeds", caption_dtype, (1, tokens, caption_channels)),)


def transformer_io(
    caption_dtype: str, caption_channels: int, latent_height: int, latent_width: int, guidance: GuidanceKind
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """I/O of `transformer`: one engine call is one solver step of one picture.

    classifier_free: captions carry the batch [negative, positive]; `sigma` and `guidance_scale` are inputs.
    embedded (Sprint): captions have batch 1; `previous_x0` carries the step's fresh noise; the angle follows
    from `timestep`.
    """
    latent = (1, LATENT_CHANNELS, latent_height, latent_width)
    captions = 2 if guidance == "classifier_free" else 1
    inputs = [
        TensorSpec("latent", "float32", latent),
        TensorSpec("previous_x0", "float32", latent),
        TensorSpec("caption_embeds", caption_dtype, (captions, CAPTION_LENGTH, caption_channels)),
        TensorSpec("caption_mask", "int64", (captions, CAPTION_LENGTH)),
        TensorSpec("timestep", "float32", ()),
    ]
    if guidance == "classifier_free":
        inputs.append(TensorSpec("sigma", "float32", ()))
    inputs.append(TensorSpec("step_coefficients", "float32", (3,)))
    inputs.append(TensorSpec("guidance_scale" if guidance == "classifier_free" else "guidance_embeds", "float32", ()))
    return tuple(inputs), tuple(TensorSpec(name, "float32", latent) for name in ("next_latent", "x0", "velocity"))


def vae_decoder_io(latent_height: int, latent_width: int) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """I/O of `vae_decoder`: latent [1, 32, h, w] fp32 -> image [1, 32h, 32w, 3] uint8."""
    latent = TensorSpec("latent", "float32", (1, LATENT_CHANNELS, latent_height, latent_width))
    image = (1, latent_height * PIXELS_PER_LATENT, latent_width * PIXELS_PER_LATENT, 3)
    return (latent,), (TensorSpec("image", "uint8", image),)
