"""ReLU linear attention for PyTorch: one op for eager, torch.export and the ONNX exporter, and explicit choices.

`torch.ops.sana.linear_attention` runs the Triton kernels on CUDA tensors where Triton can be imported, and the
reference everywhere else; its backward follows the same rule. `torch.ops.sana.linear_attention_triton` is the
Triton path alone, open to torch.compile and AOTInductor.
"""

import functools
from typing import Literal

import torch
from torch import library

from sana_kernels.linear_attention.autograd import gradients, setup_context
from sana_kernels.linear_attention.reference import (
    linear_attention_backward_reference,
    linear_attention_reference,
)
from sana_kernels.mix_ffn_depthwise.quantization import check_quantization

# At import, not on first use: torch.compile cannot trace an import.
try:
    from sana_kernels.linear_attention import triton as kernels
    from sana_kernels.linear_attention import triton_ops
except ImportError as error:
    TRITON_PROBLEM: str | None = f"triton cannot be imported ({error})"
else:
    TRITON_PROBLEM = None

Impl = Literal["reference", "triton"]


@library.custom_op("sana::linear_attention", mutates_args=())
def _linear_attention(
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return linear_attention_reference(qkv, norm_q_weight, norm_k_weight, head_dim, eps, norm_eps, out_scale, out_dtype)


@_linear_attention.register_kernel("cuda")
def _(
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    forward = linear_attention_reference if TRITON_PROBLEM else triton_ops.linear_attention_triton
    return forward(qkv, norm_q_weight, norm_k_weight, head_dim, eps, norm_eps, out_scale, out_dtype)


@_linear_attention.register_fake
def _(
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    batch, *_, tokens, width = qkv.shape
    channels = (width if qkv.ndim == 3 else qkv.shape[1] * width) // 3
    return qkv.new_empty((batch, tokens, channels), dtype=out_dtype or qkv.dtype)


@library.custom_op("sana::linear_attention_backward", mutates_args=())
def _linear_attention_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return linear_attention_backward_reference(grad, qkv, norm_q_weight, norm_k_weight, head_dim, eps, norm_eps)


@_linear_attention_backward.register_kernel("cuda")
def _(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    backward = linear_attention_backward_reference if TRITON_PROBLEM else triton_ops.linear_attention_backward_triton
    return backward(grad, qkv, norm_q_weight, norm_k_weight, head_dim, eps, norm_eps)


@_linear_attention_backward.register_fake
def _(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if norm_q_weight is None or norm_k_weight is None:
        return grad_qkv, qkv.new_empty(0), qkv.new_empty(0)
    return grad_qkv, torch.empty_like(norm_q_weight), torch.empty_like(norm_k_weight)


_linear_attention.register_autograd(
    functools.partial(gradients, _linear_attention_backward), setup_context=setup_context
)


def linear_attention(
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None = None,
    norm_k_weight: torch.Tensor | None = None,
    *,
    head_dim: int,
    eps: float = 1e-15,
    norm_eps: float = 1e-5,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """ReLU linear attention: qkv [B, N, 3C] packed [q | k | v] -> a new tensor [B, N, C], fp32 inside.

    Also qkv [B, 3 heads, N, head_dim]: the heads of q, those of k, those of v, as a batched product leaves them; with
    contiguous heads it is read as it is. `norm_q_weight`, `norm_k_weight` [C] are given together or not at all, with
    packed qkv alone. The result has the dtype of qkv; with `out_dtype` float8_e4m3fn or int8 and `out_scale` (one
    float32 number on qkv's device, amax / 448 or amax / 127) it is saturate(round_half_even(result / out_scale)),
    without gradient.
    `impl`: "reference" is eager PyTorch, "triton" the kernels; None takes the kernels for CUDA tensors where
    Triton is installed, the reference otherwise, and is the one op that torch.export and the ONNX exporter see.

    Raises ValueError for a channel count that is not three times a multiple of `head_dim`, for one norm weight
    without the other, or with heads one by one, for a scale without 8-bit dtype or the other way round, and for
    tensors the chosen implementation cannot run; nothing falls back silently.
    """
    _check(qkv, norm_q_weight, norm_k_weight, head_dim, impl)
    check_quantization("linear_attention", out_scale, out_dtype)
    arguments = (qkv, norm_q_weight, norm_k_weight, head_dim, eps, norm_eps, out_scale, out_dtype)
    if impl == "reference":
        return linear_attention_reference(*arguments)
    if impl == "triton":
        if TRITON_PROBLEM:
            raise ValueError(
                f"linear_attention: impl='triton', but {TRITON_PROBLEM}. Use impl='reference', or pip install triton."
            )
        kernels.check_support(qkv, head_dim, out_dtype)
        return triton_ops.linear_attention_triton(*arguments)
    return _linear_attention(*arguments)


def _check(
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    impl: str | None,
) -> None:
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"linear_attention: impl must be 'reference', 'triton' or None, got {impl!r}")
    by_head = qkv.ndim == 4 and qkv.shape[1] % 3 == 0 and qkv.shape[3] == head_dim
    if not by_head and (qkv.ndim != 3 or qkv.shape[-1] % (3 * head_dim)):
        raise ValueError(
            f"linear_attention: qkv must be [B, N, 3C] with C a multiple of head_dim={head_dim}, or [B, 3 heads, N, "
            f"{head_dim}], got {tuple(qkv.shape)}"
        )
    if (norm_q_weight is None) != (norm_k_weight is None):
        raise ValueError("linear_attention: norm_q_weight and norm_k_weight must be given together")
    if by_head and norm_q_weight is not None:
        raise ValueError(f"linear_attention: norms need packed qkv [B, N, 3C], got {tuple(qkv.shape)}")
    for weight in (norm_q_weight, norm_k_weight):
        if weight is not None and tuple(weight.shape) != (qkv.shape[-1] // 3,):
            raise ValueError(
                f"linear_attention: norm weights must be [C] with C={qkv.shape[-1] // 3}, got {tuple(weight.shape)}"
            )
