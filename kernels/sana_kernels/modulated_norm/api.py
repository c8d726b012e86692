"""The norms for PyTorch: one op each for eager and torch.export, and explicit choices.

`torch.ops.sana.modulated_norm` and `torch.ops.sana.channel_rms_norm` run the Triton kernels on CUDA tensors where
Triton can be imported, and the references everywhere else. The same names with `_triton` are the Triton paths alone,
open to torch.compile and AOTInductor.
"""

from typing import Any, Literal

import torch
from torch import library

from sana_kernels.mix_ffn_depthwise.quantization import check_quantization
from sana_kernels.modulated_norm import autograd
from sana_kernels.modulated_norm.reference import (
    Activation,
    channel_rms_norm_reference,
    modulated_norm_reference,
)

# At import, not on first use: torch.compile cannot trace an import.
try:
    from sana_kernels.mix_ffn_depthwise.triton import check_support
    from sana_kernels.modulated_norm import triton_ops
except ImportError as error:
    TRITON_PROBLEM: str | None = f"triton cannot be imported ({error})"
else:
    TRITON_PROBLEM = None

Impl = Literal["reference", "triton"]


@library.custom_op("sana::modulated_norm", mutates_args=())
def _modulated_norm(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return modulated_norm_reference(x, shift, scale, branch, gate, out_scale, eps, out_dtype)


@_modulated_norm.register_kernel("cuda")
def _(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    forward = modulated_norm_reference if TRITON_PROBLEM else triton_ops.modulated_norm_triton
    return forward(x, shift, scale, branch, gate, out_scale, eps, out_dtype)


@_modulated_norm.register_fake
def _(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = x.new_empty(x.shape, dtype=out_dtype or x.dtype)
    return out, x.new_empty(0) if branch is None else x.new_empty(x.shape)


@library.custom_op("sana::channel_rms_norm", mutates_args=())
def _channel_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    results = channel_rms_norm_reference(x, weight, bias, residual, out_scale, activation, eps, out_dtype)
    return results[0].contiguous(), results[1].contiguous()


@_channel_rms_norm.register_kernel("cuda")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    forward = channel_rms_norm_reference if TRITON_PROBLEM else triton_ops.channel_rms_norm_triton
    results = forward(x, weight, bias, residual, out_scale, activation, eps, out_dtype)
    return results[0].contiguous(), results[1].contiguous()


@_channel_rms_norm.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if out_dtype is None else x.new_empty(x.shape, dtype=out_dtype)


_modulated_norm.register_autograd(autograd.modulated_norm_gradients, setup_context=autograd.modulated_norm_context)
_channel_rms_norm.register_autograd(
    autograd.channel_rms_norm_gradients, setup_context=autograd.channel_rms_norm_context
)


def modulated_norm(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    eps: float = 1e-6,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """LayerNorm(x) (1 + scale) + shift: x [B, N, C] -> a new tensor [B, N, C], fp32 inside.

    x: float32, bfloat16 or float16; shift, scale [B, 1, C] or [B, C], any float dtype, slices of a [B, 6, C] table
    without a copy. The result has the dtype of x; with `out_dtype` float8_e4m3fn or int8 and `out_scale` (one float32
    number on x's device, amax / 448 or amax / 127) it is saturate(round_half_even(result / out_scale)), without
    gradient. `impl`: "reference" is eager PyTorch, "triton" the kernel; None takes the kernel for CUDA tensors where
    Triton is installed, the reference otherwise, and is one op to torch.export.

    Raises ValueError for shapes that do not fit each other, for a scale without 8-bit dtype or the other way round,
    and for tensors the chosen implementation cannot run; nothing falls back silently.
    """
    return _run_modulated_norm(x, shift, scale, None, None, out_scale, eps, out_dtype, impl)[0]


def residual_modulated_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    eps: float = 1e-6,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(modulated norm of x', x') with x' = x + gate * branch, in one pass; without a gate x' = x + branch.

    branch [B, N, C], gate [B, 1, C] or [B, C]; the rest as in `modulated_norm`. The norm takes the fp32 x', not the
    rounded one that is returned in the dtype of x. With 8-bit output only x' has a gradient.
    """
    return _run_modulated_norm(x, shift, scale, branch, gate, out_scale, eps, out_dtype, impl)


def channel_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    activation: Activation = "none",
    eps: float = 1e-5,
    impl: Impl | None = None,
) -> torch.Tensor:
    """activation(x / rms(x) * weight + bias) + residual, rms over the last axis: x [..., C] -> a new tensor [..., C].

    x, residual: float32, bfloat16 or float16; of pixels [B, C, H, W] in channels-last memory give permute(0, 2, 3, 1).
    weight, bias [C], any float dtype. `activation`: "none", "silu" or "relu". The result has the dtype of x, fp32
    inside. `impl` as in `modulated_norm`.

    Raises ValueError for shapes that do not fit each other and for tensors the chosen implementation cannot run.
    """
    return _run_channel_rms_norm(x, weight, bias, residual, None, activation, eps, None, impl)[0]


def channel_rms_norm_codes(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    out_scale: torch.Tensor,
    out_dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    activation: Activation = "none",
    eps: float = 1e-5,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the result of `channel_rms_norm`, saturate(round_half_even(result / out_scale))), in one pass.

    The codes are those of the result as it is returned, rounded to x's dtype. `out_dtype` float8_e4m3fn or int8,
    `out_scale` one float32 number on x's device (amax / 448 or amax / 127). The codes have no gradient.
    """
    check_quantization("channel_rms_norm", out_scale, out_dtype)
    return _run_channel_rms_norm(x, weight, bias, residual, out_scale, activation, eps, out_dtype, impl)


def _run_channel_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    eps: float,
    out_dtype: torch.dtype | None,
    impl: Impl | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_impl("channel_rms_norm", impl)
    if tuple(weight.shape) != tuple(x.shape[-1:]) or tuple(bias.shape) != tuple(x.shape[-1:]):
        raise ValueError(
            f"channel_rms_norm: weight and bias must be [C] with C={x.shape[-1]}, "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"channel_rms_norm: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    if activation not in ("none", "silu", "relu"):
        raise ValueError(f"channel_rms_norm: activation must be 'none', 'silu' or 'relu', got {activation!r}")
    arguments = (x, weight, bias, residual, out_scale, activation, eps, out_dtype)
    if impl == "reference":
        return channel_rms_norm_reference(*arguments)
    if impl == "triton":
        check_support("channel_rms_norm", x, out_dtype)
        return triton_ops.channel_rms_norm_triton(*arguments)
    return _channel_rms_norm(*arguments)


def _run_modulated_norm(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
    impl: Impl | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_impl("modulated_norm", impl)
    check_quantization("modulated_norm", out_scale, out_dtype)
    if x.ndim != 3 or (branch is not None and branch.shape != x.shape):
        raise ValueError(
            f"modulated_norm: x and branch must be [B, N, C], got {tuple(x.shape)}"
            + ("" if branch is None else f" and {tuple(branch.shape)}")
        )
    shift, scale = (_per_batch(name, t, x) for name, t in (("shift", shift), ("scale", scale)))
    gate = None if gate is None else _per_batch("gate", gate, x)
    arguments: tuple[Any, ...] = (x, shift, scale, branch, gate, out_scale, eps, out_dtype)
    if impl == "reference":
        return modulated_norm_reference(*arguments)
    if impl == "triton":
        check_support("modulated_norm", x, out_dtype)
        return triton_ops.modulated_norm_triton(*arguments)
    return _modulated_norm(*arguments)


def _check_impl(op: str, impl: str | None) -> None:
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"{op}: impl must be 'reference', 'triton' or None, got {impl!r}")
    if impl == "triton" and TRITON_PROBLEM:
        raise ValueError(f"{op}: impl='triton', but {TRITON_PROBLEM}. Use impl='reference', or pip install triton.")


def _per_batch(name: str, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    batch, _, channels = x.shape
    if tuple(t.shape) not in ((batch, channels), (batch, 1, channels)):
        raise ValueError(
            f"modulated_norm: {name} must be [{batch}, 1, {channels}] or [{batch}, {channels}], got {tuple(t.shape)}"
        )
    return t.unsqueeze(1) if t.ndim == 2 else t
