"""Triton kernel of a linear layer whose INT8 weights are widened in registers, between memory and the matrix units.

A program owns a tile of weight rows (columns of the result) and of rows of x, and computes it transposed: weight times
x transposed. Hopper's units take their first factor from registers, where the codes are widened, and the second from
shared memory, where x arrives as it is. What a program widens it uses for all its rows of x. Those are two groups,
MORE_ROWS beside ROWS, for Triton's tensors have powers of two and a caption has 300 tokens: two tiles of 128 + 32 rows
waste less than three of 128.

A result of few tiles would leave multiprocessors idle: the depth is then cut into parts, whose sums are added after the
launch, in one order (by the pass that follows, where torch.compile sees it).
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sana_kernels.machine import INTERPRETED, ON_CPU, UnsupportedByTriton
from sana_kernels.mix_ffn_depthwise.triton import launcher, narrow

DTYPES = (torch.bfloat16, torch.float16)


# --- Device code ---


@triton.jit
def _widened(weight, dtype: tl.constexpr):
    """Codes as floats."""
    return weight.to(tl.float32) if INTERPRETED else weight.to(dtype)


@triton.jit
def _product(weight, x, total):
    """total [N, M] fp32 + weight [N, K] times x [M, K] transposed."""
    if INTERPRETED:  # it multiplies bf16 as the integers it keeps it in
        x = x.to(tl.float32)
    return tl.dot(weight, tl.trans(x), total, input_precision="ieee")


@triton.jit
def _row_ptrs(x_ptr, first, rows, k, K: tl.constexpr, ROWS: tl.constexpr):
    """Pointers [ROWS, BLOCK_K] to rows of x from `first` on; behind the end those of the last row."""
    m = tl.minimum(first + tl.arange(0, ROWS), rows - 1)
    return x_ptr + m.to(tl.int64)[:, None] * K + k[None, :]


@triton.jit
def _finish(total, scale, bias, out_ptr, first_m, rows, n, N: tl.constexpr, ROWS: tl.constexpr):
    """Scale the sums [BLOCK_N, ROWS] of rows of x from `first_m`, columns n, and write them."""
    y = narrow(tl.trans(total * scale[:, None] + bias[:, None]), 1.0, out_ptr.dtype.element_ty)
    m = first_m + tl.arange(0, ROWS)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + at, y, mask=(m < rows)[:, None] & (n < N)[None, :])


@triton.jit
def weight_only_linear_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    rows,
    K: tl.constexpr,
    N: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    MORE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (tile, part of the depth); out [PARTS, rows, N]. Tiles of the same weights follow each other."""
    row_tiles = tl.cdiv(rows, ROWS + MORE_ROWS)
    first_m = (tl.program_id(0) % row_tiles) * (ROWS + MORE_ROWS)
    first_n = (tl.program_id(0) // row_tiles) * BLOCK_N
    DEPTH: tl.constexpr = K // PARTS
    first_k = tl.program_id(1) * DEPTH
    out_ptr += tl.program_id(1).to(tl.int64) * rows * N
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + (first_k + k)[None, :]
    x_ptrs = _row_ptrs(x_ptr, first_m, rows, first_k + k, K, ROWS)
    more_x_ptrs = _row_ptrs(x_ptr, first_m + ROWS, rows, first_k + k, K, MORE_ROWS)
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    more_total = tl.zeros([BLOCK_N, MORE_ROWS], tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            weight = tl.load(weight_ptrs)
            x = tl.load(x_ptrs)
            more_x = tl.load(more_x_ptrs)
        else:
            inside = (start + k < DEPTH)[None, :]
            weight = tl.load(weight_ptrs, mask=inside, other=0)
            x = tl.load(x_ptrs, mask=inside, other=0.0)
            more_x = tl.load(more_x_ptrs, mask=inside, other=0.0)
        widened = _widened(weight, x.dtype)
        total = _product(widened, x, total)
        more_total = _product(widened, more_x, more_total)
        weight_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
        more_x_ptrs += BLOCK_K

    scale = tl.zeros([BLOCK_N], tl.float32)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if SCALE_PER_ROW:
        scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    else:
        scale += tl.load(scale_ptr)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    _finish(total, scale, bias, out_ptr, first_m, rows, n, N, ROWS)
    _finish(more_total, scale, bias, out_ptr, first_m + ROWS, rows, n, N, MORE_ROWS)


# --- Host code ---


@dataclass(frozen=True)
class Tiling:
    """`rows` + `more_rows` of x and `columns` of the result per program, `depth` of K at a time, `num_stages` of those
    in flight; all of K in `parts`.

    Four warps, always: with eight, one group of warps may overwrite the rows of x that the other's product still reads
    (Triton 3.6 waits for a group's own product only; wrong sums were seen on an H100 with 256 rows).
    """

    rows: int = 128
    more_rows: int = 32
    columns: int = 64
    depth: int = 64
    num_stages: int = 3
    parts: int = 1

    num_warps = 4


# Programs under which the depth is cut; an H100 has 132 multiprocessors.
_FEW_PROGRAMS = 100
_PARTS = 4


def tiling(rows: int, columns: int, depth: int) -> Tiling:
    """Of a product [rows, depth] x [columns, depth]: what was fastest on an H100 for the layers of a Gemma-2-2B."""
    tile = Tiling()
    programs = -(-rows // (tile.rows + tile.more_rows)) * -(-columns // tile.columns)
    cut = programs < _FEW_PROGRAMS and depth % (_PARTS * tile.depth) == 0
    return Tiling(parts=_PARTS) if cut else tile


def check_support(x: torch.Tensor) -> None:
    """Raise `UnsupportedByTriton` unless the kernel can run: machine, dtype."""
    problem = None
    if x.dtype not in DTYPES:
        problem = f"needs bfloat16 or float16, got {x.dtype}"
    elif x.device.type != "cuda" and not ON_CPU:
        problem = f"needs a CUDA tensor, got one on {x.device.type}"
    if problem:
        raise UnsupportedByTriton(f"weight_only_linear: impl='triton' {problem}. Use impl='reference'.")


def forward(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The Triton forward, arguments and result as in `reference`. A new tensor."""
    check_support(x)
    columns, depth = weight.shape
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], columns))
    rows = x.numel() // depth
    tile = tiling(rows, columns, depth)
    out = x.new_empty((tile.parts, *x.shape[:-1], columns), dtype=x.dtype if tile.parts == 1 else torch.float32)
    # What is added to every part would count as often.
    tensors = (x, weight, weight_scale, bias if tile.parts == 1 else None, out)
    numbers, constants = launch(tensors, tile)
    grid = (-(-rows // (tile.rows + tile.more_rows)) * -(-columns // tile.columns), tile.parts)
    pointers = [x.contiguous() if t is None else t.contiguous() for t in tensors]  # one that is never read may be any
    launcher(weight_only_linear_kernel)[grid](*pointers, *numbers, **constants)
    if tile.parts == 1:
        return out[0]
    wide = out.sum(0)
    return (wide if bias is None else wide + bias.float()).to(x.dtype)


def launch(tensors: tuple[torch.Tensor | None, ...], tile: Tiling) -> tuple[tuple[int], dict[str, Any]]:
    """What the kernel takes beside its five tensors: the number behind them, and constants by name."""
    _, weight, weight_scale, bias, out = tensors
    assert weight is not None
    assert weight_scale is not None
    assert out is not None
    constants = {
        "K": weight.shape[1],
        "N": weight.shape[0],
        "SCALE_PER_ROW": weight_scale.numel() > 1,
        "HAS_BIAS": bias is not None,
        "PARTS": tile.parts,
        "ROWS": tile.rows,
        "MORE_ROWS": tile.more_rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return (out.numel() // (tile.parts * out.shape[-1]),), constants
