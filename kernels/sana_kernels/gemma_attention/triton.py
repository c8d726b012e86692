"""Triton kernel of Gemma-2's attention: rotary positions, grouped queries, soft-capped scores, kept keys and own ones.

A program owns BLOCK_M positions of one query head and walks over the kept keys and the own ones up to its last position
with the online softmax; both lie where they are, and each row's address says which it is. Queries are rotated where
they are loaded, in two halves: the two columns that a rotation mixes lie half a head apart. Own keys, which every
program reads, are rotated by a pass before.

A few hundred positions give fewer programs than a GPU runs at once, and each waits for its next keys. So a walk is cut
into parts, each a program that writes its sums and the score they are relative to; a pass behind puts them together.

Loads have no masks: behind the last key that one is read again, with a score that weighs nothing.
"""

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sana_kernels.cross_attention.triton import ABSENT, product
from sana_kernels.gemma_attention.reference import rotated, split_heads
from sana_kernels.machine import ON_CPU, UnsupportedByTriton
from sana_kernels.mix_ffn_depthwise.triton import launcher, narrow

DTYPES = (torch.bfloat16, torch.float16)

# --- Device code ---


@triton.jit
def gemma_attention_kernel(
    qkv_ptr,
    cosine_ptr,
    sine_ptr,
    key_ptr,
    bias_ptr,
    past_key_ptr,
    past_value_ptr,
    out_ptr,
    sums_ptr,
    tokens,
    past,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (block of positions, query head, part of their keys); key [G, T, D] are the own ones.

    out [PARTS, T, HEADS, D]: for one part the result, else sums of values by weights e^(score - largest), with those of
    the weights and the largest score in sums [2, PARTS, T, HEADS] fp32. SOFT_CAP is 0 where there is none.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = (HEADS + 2 * KEY_HEADS) * HEAD_DIM
    # The longest walks first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    key_head = head // (HEADS // KEY_HEADS)
    half = tl.arange(0, HALF)[None, :]
    d = tl.arange(0, HEAD_DIM)[None, :]
    n = tl.arange(0, BLOCK_N)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(m, tokens - 1)[:, None]

    query_ptrs = qkv_ptr + head * HEAD_DIM + row * WIDTH + half
    low = tl.load(query_ptrs)
    high = tl.load(query_ptrs + HALF)
    cosine = tl.load(cosine_ptr + row * HEAD_DIM + half).to(tl.float32)
    sine = tl.load(sine_ptr + row * HEAD_DIM + half).to(tl.float32)
    turned_low = narrow(low.to(tl.float32) * cosine - high.to(tl.float32) * sine, 1.0, low.dtype)
    turned_high = narrow(high.to(tl.float32) * cosine + low.to(tl.float32) * sine, 1.0, low.dtype)

    past_key_ptr += key_head * past * HEAD_DIM
    past_value_ptr += key_head * past * HEAD_DIM
    key_ptr += key_head * tokens * HEAD_DIM
    value_ptr = qkv_ptr + (HEADS + KEY_HEADS + key_head) * HEAD_DIM
    out = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    largest = tl.full([BLOCK_M], ABSENT, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    end = past + tl.minimum(tokens, (block + 1) * BLOCK_M)
    steps = tl.cdiv(end, BLOCK_N)
    part = tl.program_id(2)
    for step in range(steps * part // PARTS, steps * (part + 1) // PARTS):
        start = step * BLOCK_N
        at = tl.minimum(start + n, end - 1)
        kept = (at < past)[:, None]
        kept_row = at[:, None] * HEAD_DIM
        own_row = tl.maximum(at - past, 0)[:, None]
        key_ptrs = tl.where(kept, past_key_ptr + kept_row, key_ptr + own_row * HEAD_DIM) + half
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        scores = product(turned_low, tl.trans(tl.load(key_ptrs)), scores)
        scores = product(turned_high, tl.trans(tl.load(key_ptrs + HALF)), scores) * SCALE
        if SOFT_CAP > 0:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), right for infinities too.
            scores = SOFT_CAP * (1.0 - 2.0 / (tl.exp(scores * (2.0 / SOFT_CAP)) + 1.0))
        seen = (start + n)[None, :] <= past + m[:, None]
        scores = tl.where(seen & (start + n < end)[None, :], scores + tl.load(bias_ptr + at)[None, :], ABSENT)
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(largest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        value = tl.load(tl.where(kept, past_value_ptr + kept_row, value_ptr + own_row * WIDTH) + d)
        out = product(narrow(weights, 1.0, value.dtype), value, out * shrink[:, None])
        largest = higher

    at = (part * tokens + m) * HEADS + head
    if PARTS == 1:
        out = narrow(out / total[:, None], 1.0, out_ptr.dtype.element_ty)
    else:
        tl.store(sums_ptr + at, total, mask=m < tokens)
        tl.store(sums_ptr + PARTS * tokens * HEADS + at, largest, mask=m < tokens)
    tl.store(out_ptr + at[:, None] * HEAD_DIM + d, out, mask=(m < tokens)[:, None])


# --- Host code ---


@dataclass(frozen=True)
class Tiling:
    """`positions` x `keys` scores at a time, with `num_warps` warps and `num_stages` loads in flight; all keys in
    `parts`.
    """

    positions: int = 64
    keys: int = 32
    num_warps: int = 4
    num_stages: int = 2
    parts: int = 1


# An H100 has 132 multiprocessors. More parts gain less than it takes to put them together (README.md).
_PROGRAMS = 132
_MOST_PARTS = 6


def tiling(tokens: int, heads: int) -> Tiling:
    """As many parts of the keys as fill a GPU."""
    tile = Tiling()
    programs = -(-tokens // tile.positions) * heads
    return dataclasses.replace(tile, parts=min(_MOST_PARTS, max(1, _PROGRAMS // programs)))


def check_support(qkv: torch.Tensor, head_dim: int) -> None:
    """Raise `UnsupportedByTriton` unless the kernel can run: machine, dtype, width of a head."""
    problem = None
    if qkv.dtype not in DTYPES:
        problem = f"needs bfloat16 or float16, got {qkv.dtype}"
    elif head_dim < 32 or head_dim > 256 or head_dim & (head_dim - 1):
        problem = f"needs heads 32, 64, 128 or 256 wide, got {head_dim}"
    elif qkv.device.type != "cuda" and not ON_CPU:
        problem = f"needs a CUDA tensor, got one on {qkv.device.type}"
    if problem:
        raise UnsupportedByTriton(f"gemma_attention: impl='triton' {problem}. Use impl='reference'.")


def forward(
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    bias: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    heads: int,
    scale: float,
    soft_cap: float | None,
) -> torch.Tensor:
    """The Triton forward, arguments as in `reference`; out alone, a new tensor."""
    out, sums = in_parts(qkv, cosine, sine, bias, past_key, past_value, heads, scale, soft_cap)
    whole = out[0] if out.shape[0] == 1 else together(out, *sums).to(qkv.dtype)
    return whole.flatten(1)


def in_parts(
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    bias: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    heads: int,
    scale: float,
    soft_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel writes: out [P, T, H, D], for one part the result, and sums [2, P, T, H] fp32 for `together`."""
    key_heads, past, head_dim = past_key.shape
    check_support(qkv, head_dim)
    tokens = qkv.shape[0]
    tile = tiling(tokens, heads)
    out = qkv.new_empty(tile.parts, tokens, heads, head_dim, dtype=qkv.dtype if tile.parts == 1 else torch.float32)
    sums = bias.new_empty(2, tile.parts, tokens, heads)
    if tokens == 0:
        return out, sums
    key = rotated(split_heads(qkv, heads, head_dim)[1], cosine, sine)
    tensors = (t.contiguous() for t in (qkv, cosine, sine, key, bias, past_key, past_value))
    launcher(gemma_attention_kernel)[(-(-tokens // tile.positions), heads, tile.parts)](
        *tensors,
        out,
        sums,
        tokens,
        past,
        HEADS=heads,
        KEY_HEADS=key_heads,
        HEAD_DIM=head_dim,
        SCALE=scale,
        SOFT_CAP=soft_cap or 0.0,
        PARTS=tile.parts,
        BLOCK_M=tile.positions,
        BLOCK_N=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, sums


def together(out: torch.Tensor, total: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Parts' sums out [P, T, H, D], weights' sums and largest scores [P, T, H] -> their mean [T, H, D]; all fp32.

    Where a part has no key that a position sees, its largest score is `ABSENT`, and its sums weigh nothing.
    """
    weight = (largest - largest.amax(0)).exp()
    return (out * weight[..., None]).sum(0) / (total * weight).sum(0)[..., None]
