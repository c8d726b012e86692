"""The middle of Mix-FFN for PyTorch: one op for eager and torch.export, and explicit choices.

`torch.ops.sana.mix_ffn_depthwise` runs the Triton kernel on CUDA tensors where Triton can be imported, and the
reference everywhere else. `torch.ops.sana.mix_ffn_depthwise_triton` is the Triton path alone, open to torch.compile
and AOTInductor.
"""

from typing import Literal

import torch
from torch import library

from sana_kernels.mix_ffn_depthwise.autograd import gradients, setup_context
from sana_kernels.mix_ffn_depthwise.quantization import check_quantization
from sana_kernels.mix_ffn_depthwise.reference import mix_ffn_depthwise_reference

# At import, not on first use: torch.compile cannot trace an import.
try:
    from sana_kernels.mix_ffn_depthwise import triton as kernels
    from sana_kernels.mix_ffn_depthwise import triton_ops
except ImportError as error:
    TRITON_PROBLEM: str | None = f"triton cannot be imported ({error})"
else:
    TRITON_PROBLEM = None

Impl = Literal["reference", "triton"]


@library.custom_op("sana::mix_ffn_depthwise", mutates_args=())
def _mix_ffn_depthwise(
    x: torch.Tensor,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor | None,
    height: int,
    width: int,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    return mix_ffn_depthwise_reference(x, x_bias, weight, bias, out_scale, height, width, out_dtype)


@_mix_ffn_depthwise.register_kernel("cuda")
def _(
    x: torch.Tensor,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor | None,
    height: int,
    width: int,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    forward = mix_ffn_depthwise_reference if TRITON_PROBLEM else triton_ops.mix_ffn_depthwise_triton
    return forward(x, x_bias, weight, bias, out_scale, height, width, out_dtype)


@_mix_ffn_depthwise.register_fake
def _(
    x: torch.Tensor,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor | None,
    height: int,
    width: int,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=out_dtype or x.dtype)


_mix_ffn_depthwise.register_autograd(gradients, setup_context=setup_context)


def mix_ffn_depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    height: int,
    width: int,
    *,
    x_bias: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """value * SiLU(gate), where [value | gate] = depthwise 3x3 (padding 1, bias) of SiLU(x + x_bias): [B, N, F].

    x [B, N, 2F]: output of `conv_inverted` before its SiLU, tokens row by row of a height x width image (in latent
    pixels, N = height * width), float32, bfloat16 or float16. weight [2F, 1, 3, 3], bias [2F], any float dtype.
    `x_bias` [2F], any float dtype: that of `conv_inverted` where x has none yet, added in fp32. The result is a new
    tensor in the dtype of x, fp32 inside. With `out_dtype` float8_e4m3fn or int8 and `out_scale` (one float32 number on
    x's device, amax / 448 or amax / 127) it is saturate(round_half_even(result / out_scale)), without gradient.

    Weights laid out by `tap_major` are read faster. `impl`: "reference" is eager PyTorch, "triton" the kernel; None
    takes the kernel for CUDA tensors where Triton is installed, the reference otherwise, and is one op to torch.export.

    Raises ValueError for shapes that do not fit each other, for a scale without 8-bit dtype or the other way round,
    and for tensors the chosen implementation cannot run; nothing falls back silently.
    """
    _check(x, x_bias, weight, bias, height, width, impl)
    check_quantization("mix_ffn_depthwise", out_scale, out_dtype)
    arguments = (x, x_bias, weight, bias, out_scale, height, width, out_dtype)
    if impl == "reference":
        return mix_ffn_depthwise_reference(*arguments)
    if impl == "triton":
        if TRITON_PROBLEM:
            raise ValueError(
                f"mix_ffn_depthwise: impl='triton', but {TRITON_PROBLEM}. Use impl='reference', or pip install triton."
            )
        kernels.check_support("mix_ffn_depthwise", x, out_dtype)
        return triton_ops.mix_ffn_depthwise_triton(*arguments)
    return _mix_ffn_depthwise(*arguments)


def tap_major(weight: torch.Tensor) -> torch.Tensor:
    """The same weight [2F, 1, 3, 3] with each of the nine taps contiguous in memory; once, when a model is loaded."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def _check(
    x: torch.Tensor,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    height: int,
    width: int,
    impl: str | None,
) -> None:
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"mix_ffn_depthwise: impl must be 'reference', 'triton' or None, got {impl!r}")
    if x.ndim != 3 or x.shape[-1] % 2:
        raise ValueError(f"mix_ffn_depthwise: x must be [B, N, 2F], got {tuple(x.shape)}")
    if x.shape[1] != height * width:
        raise ValueError(f"mix_ffn_depthwise: x must have height * width = {height} * {width} tokens, got {x.shape[1]}")
    channels = x.shape[-1]
    if tuple(weight.shape) != (channels, 1, 3, 3) or tuple(bias.shape) != (channels,):
        raise ValueError(
            f"mix_ffn_depthwise: weight must be [{channels}, 1, 3, 3] and bias [{channels}], as x has {channels} "
            f"channels, got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if x_bias is not None and tuple(x_bias.shape) != (channels,):
        raise ValueError(f"mix_ffn_depthwise: x_bias must be [{channels}], got {tuple(x_bias.shape)}")
