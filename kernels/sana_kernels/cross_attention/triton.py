"""Triton kernel of cross-attention: few keys, heads whose width is no power of two.

One launch. A program owns BLOCK_N tokens of one head; it keeps their queries and walks over the keys with the online
softmax. A head of width D is taken in two pieces, its first columns up to the largest power of two in D and its last
REST columns: 72 = 64 + 8 costs 80 columns of the matrix units instead of 128. Keys behind the last valid one are not
read.

The loads of keys and values have no masks, whose predicates and pointers cost registers, and with them programs per
multiprocessor: behind the last key its row is read again, with a score that weighs nothing, and the two pieces overlap
instead of reaching beyond the head, with queries of zero where they do.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sana_kernels.machine import INTERPRETED, ON_CPU, UnsupportedByTriton
from sana_kernels.mix_ffn_depthwise.triton import check_support as check_output_support
from sana_kernels.mix_ffn_depthwise.triton import inverse_scale, launcher, narrow

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST_PIECE = 16
_LOG2_E = 1.4426950408889634
# What a key outside the block gets for a score: its weight is zero beside any other.
ABSENT = tl.constexpr(-1.0e30)


# --- Device code ---


@triton.jit
def product(left, right, total):
    """total + left [M, K] times right [K, N], multiplied in their own dtype and added in fp32."""
    if INTERPRETED:  # it multiplies bf16 as the integers it keeps them in
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def cross_attention_kernel(
    query_ptr,
    key_value_ptr,
    bias_ptr,
    counts_ptr,
    scale_ptr,
    out_ptr,
    tokens,
    keys,
    channels,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (block of tokens, head, batch). SCALE is log2(e) / sqrt(D); REST is 0 where D is a power of two."""
    inverse = inverse_scale(scale_ptr, out_ptr.dtype.element_ty)
    batch = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, PIECE)
    head = tl.program_id(1) * HEAD_DIM
    query_ptr += batch.to(tl.int64) * tokens * channels + head
    out_ptr += batch.to(tl.int64) * tokens * channels + head
    key_value_ptr += batch.to(tl.int64) * keys * (2 * channels) + head
    bias_ptr += batch * keys
    row = n[:, None] * channels
    present = (n < tokens)[:, None]
    query = tl.load(query_ptr + row + d[None, :], mask=present, other=0.0)
    out = tl.zeros([BLOCK_N, PIECE], tl.float32)
    if REST > 0:
        e = HEAD_DIM - REST + tl.arange(0, REST)
        rest_query = tl.load(query_ptr + row + e[None, :], mask=present & (e >= PIECE)[None, :], other=0.0)
        rest_out = tl.zeros([BLOCK_N, REST], tl.float32)
    largest = tl.full([BLOCK_N], ABSENT, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    count = tl.load(counts_ptr + batch)
    for start in range(0, count, BLOCK_S):
        at = tl.minimum(start + s, count - 1)
        ptrs = key_value_ptr + at[:, None] * (2 * channels)
        key = tl.load(ptrs + d[None, :])
        scores = product(query, tl.trans(key), tl.zeros([BLOCK_N, BLOCK_S], tl.float32))
        if REST > 0:
            rest_key = tl.load(ptrs + e[None, :])
            scores = product(rest_query, tl.trans(rest_key), scores)
        bias = tl.load(bias_ptr + at) * 1.4426950408889634  # log2(e)
        bias = tl.where(start + s < count, bias, ABSENT)
        scores = scores * SCALE + bias[None, :]
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        value = tl.load(ptrs + channels + d[None, :])
        narrow_weights = narrow(weights, 1.0, value.dtype)
        out = product(narrow_weights, value, out * shrink[:, None])
        if REST > 0:
            rest_value = tl.load(ptrs + channels + e[None, :])
            rest_out = product(narrow_weights, rest_value, rest_out * shrink[:, None])
        largest = higher
    out = narrow(out / total[:, None], inverse, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row + d[None, :], out, mask=present)
    if REST > 0:
        rest_out = narrow(rest_out / total[:, None], inverse, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row + e[None, :], rest_out, mask=present & (e >= PIECE)[None, :])


# --- Host code ---


@dataclass(frozen=True)
class Tiling:
    """`tokens` x `keys` scores at a time, with `num_warps` warps and `num_stages` loads in flight."""

    tokens: int
    keys: int
    num_warps: int
    num_stages: int


def tiling(itemsize: int) -> Tiling:
    """By the width of the dtype: fp32 tiles take twice the shared memory and its products no matrix units.

    16 bits: what was fastest on an H200 for 300 keys, or within 2 % of it: D = 72 at 1024 and 4096 px, 112 at 1024 px.
    """
    return Tiling(128, 32, 4, 3) if itemsize == 2 else Tiling(32, 32, 4, 1)


def pieces(head_dim: int) -> tuple[int, int]:
    """Columns of a head's two pieces, which may overlap: 72 -> (64, 16), 112 -> (64, 64), 32 -> (32, 0)."""
    piece = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - piece
    return piece, max(_SMALLEST_PIECE, triton.next_power_of_2(rest)) if rest else 0


def check_support(query: torch.Tensor, heads: int, out_dtype: torch.dtype | None) -> None:
    """Raise `UnsupportedByTriton` for what the kernel cannot run."""
    check_output_support("cross_attention", query, out_dtype)
    head_dim = query.shape[-1] // heads
    if head_dim < _SMALLEST_PIECE or head_dim > 256:
        raise UnsupportedByTriton(
            f"cross_attention: impl='triton' needs heads 16 to 256 wide, got {head_dim}. Use impl='reference'."
        )


def forward(
    query: torch.Tensor,
    key_value: torch.Tensor,
    bias: torch.Tensor,
    counts: torch.Tensor,
    out_scale: torch.Tensor | None,
    heads: int,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """The Triton forward, arguments and result as in `reference`. The result is a new tensor."""
    check_support(query, heads, out_dtype)
    query, key_value, bias, counts = (t.contiguous() for t in (query, key_value, bias, counts))
    out = torch.empty_like(query, dtype=out_dtype or query.dtype)
    if out.numel() == 0:
        return out
    batch, tokens, channels = query.shape
    head_dim = channels // heads
    piece, rest = pieces(head_dim)
    tile = tiling(query.element_size())
    launcher(cross_attention_kernel)[(-(-tokens // tile.tokens), heads, batch)](
        query,
        key_value,
        bias,
        counts,
        bias if out_scale is None else out_scale,  # never read when nothing is quantised
        out,
        tokens,
        key_value.shape[1],
        channels,
        SCALE=_LOG2_E * head_dim**-0.5,
        HEAD_DIM=head_dim,
        PIECE=piece,
        REST=rest,
        BLOCK_N=tile.tokens,
        BLOCK_S=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


__all__ = ["DTYPES", "ON_CPU", "Tiling", "check_support", "cross_attention_kernel", "forward", "pieces", "tiling"]
