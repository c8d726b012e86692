"""Cross-attention for PyTorch: one op for eager and torch.export, and explicit choices.

`torch.ops.sana.cross_attention` runs the Triton kernel on CUDA tensors where Triton can be imported, and the reference
everywhere else. `torch.ops.sana.cross_attention_triton` is the Triton path alone, open to torch.compile and
AOTInductor.
"""

from typing import Literal

import torch
from torch import library

from sana_kernels.cross_attention.autograd import gradients, setup_context
from sana_kernels.cross_attention.reference import cross_attention_reference
from sana_kernels.mix_ffn_depthwise.quantization import check_quantization

# At import, not on first use: torch.compile cannot trace an import.
try:
    from sana_kernels.cross_attention import triton as kernels
    from sana_kernels.cross_attention import triton_ops
except ImportError as error:
    TRITON_PROBLEM: str | None = f"triton cannot be imported ({error})"
else:
    TRITON_PROBLEM = None

Impl = Literal["reference", "triton"]
# What a masked caption position adds to its scores.
MASKED = -10000.0


@library.custom_op("sana::cross_attention", mutates_args=())
def _cross_attention(
    query: torch.Tensor,
    key_value: torch.Tensor,
    bias: torch.Tensor,
    counts: torch.Tensor,
    out_scale: torch.Tensor | None,
    heads: int,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    return cross_attention_reference(query, key_value, bias, counts, out_scale, heads, out_dtype)


@_cross_attention.register_kernel("cuda")
def _(
    query: torch.Tensor,
    key_value: torch.Tensor,
    bias: torch.Tensor,
    counts: torch.Tensor,
    out_scale: torch.Tensor | None,
    heads: int,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    forward = cross_attention_reference if TRITON_PROBLEM else triton_ops.cross_attention_triton
    return forward(query, key_value, bias, counts, out_scale, heads, out_dtype)


@_cross_attention.register_fake
def _(
    query: torch.Tensor,
    key_value: torch.Tensor,
    bias: torch.Tensor,
    counts: torch.Tensor,
    out_scale: torch.Tensor | None,
    heads: int,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    return query.new_empty(query.shape, dtype=out_dtype or query.dtype)


_cross_attention.register_autograd(gradients, setup_context=setup_context)


def key_counts(mask: torch.Tensor) -> torch.Tensor:
    """How many keys must be read: mask [B, S] of 0 and 1 -> [B] int32, one behind the last 1; S where there is none.

    Without any valid key softmax weighs all of them alike, so then all are needed.
    """
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (positions * mask.bool()).amax(dim=1)
    return torch.where(last == 0, mask.shape[1], last).to(torch.int32)


def cross_attention(
    query: torch.Tensor,
    key_value: torch.Tensor,
    bias: torch.Tensor,
    counts: torch.Tensor,
    *,
    heads: int,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + bias) v per head: query [B, N, C] -> a new tensor [B, N, C], softmax in fp32.

    key_value [B, S, 2C] packed [k | v] in the dtype of query; bias [B, S] float32, 0 or `MASKED`; counts [B] int32 from
    1 to S: the keys from there on are not read (`key_counts`). The result has the dtype of query; with `out_dtype`
    float8_e4m3fn or int8 and `out_scale` (one float32 number on query's device, amax / 448 or amax / 127) it is
    saturate(round_half_even(result / out_scale)), without gradient. `impl`: "reference" is eager PyTorch, "triton" the
    kernel; None takes the kernel for CUDA tensors where Triton is installed, the reference otherwise, and is one op to
    torch.export.

    Raises ValueError for shapes or dtypes that do not fit each other, for a scale without 8-bit dtype or the other way
    round, and for tensors the chosen implementation cannot run; nothing falls back silently.
    """
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"cross_attention: impl must be 'reference', 'triton' or None, got {impl!r}")
    _check(query, key_value, bias, counts, heads)
    check_quantization("cross_attention", out_scale, out_dtype)
    arguments = (query, key_value, bias, counts, out_scale, heads, out_dtype)
    if impl == "reference":
        return cross_attention_reference(*arguments)
    if impl == "triton":
        if TRITON_PROBLEM:
            raise ValueError(
                f"cross_attention: impl='triton', but {TRITON_PROBLEM}. Use impl='reference', or pip install triton."
            )
        kernels.check_support(query, heads, out_dtype)
        return triton_ops.cross_attention_triton(*arguments)
    return _cross_attention(*arguments)


def _check(query: torch.Tensor, key_value: torch.Tensor, bias: torch.Tensor, counts: torch.Tensor, heads: int) -> None:
    if query.ndim != 3 or heads < 1 or query.shape[-1] % heads:
        raise ValueError(
            f"cross_attention: query must be [B, N, C] with C a multiple of heads={heads}, got {tuple(query.shape)}"
        )
    batch, _, channels = query.shape
    if key_value.ndim != 3 or (key_value.shape[0], key_value.shape[2]) != (batch, 2 * channels):
        raise ValueError(
            f"cross_attention: key_value must be [{batch}, S, {2 * channels}], got {tuple(key_value.shape)}"
        )
    if key_value.dtype != query.dtype:
        raise ValueError(f"cross_attention: key_value must be {query.dtype} like query, got {key_value.dtype}")
    keys = key_value.shape[1]
    if tuple(bias.shape) != (batch, keys) or bias.dtype != torch.float32:
        raise ValueError(
            f"cross_attention: bias must be float32 [{batch}, {keys}], got {bias.dtype} {tuple(bias.shape)}"
        )
    if tuple(counts.shape) != (batch,) or counts.dtype != torch.int32:
        raise ValueError(f"cross_attention: counts must be int32 [{batch}], got {counts.dtype} {tuple(counts.shape)}")
