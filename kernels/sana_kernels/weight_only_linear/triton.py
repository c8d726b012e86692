"""Triton kernel of a linear layer whose INT8 weights are widened between memory and the matrix units.

A program owns a tile of rows of x and columns of the result and walks along K with several loads in flight. Codes
arrive as they are stored, are widened in registers and go back to shared memory, where Hopper's units take both
factors from.

Those units could take the widened codes from registers, as the first factor of the transposed product. Triton 3.6 lets
such products run on while the next codes are widened, and on an H100 some sums came out wrong: it looks as if registers
are written that a product still reads. Factors in shared memory are waited for.

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
def _product(x, weight, total):
    """total [M, N] fp32 + x [M, K] times the codes of weight [N, K] transposed."""
    if INTERPRETED:  # it multiplies bf16 as the integers it keeps it in
        x = x.to(tl.float32)
    return tl.dot(x, tl.trans(weight.to(x.dtype)), total, input_precision="ieee")


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
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (tile, part of the depth); out [PARTS, rows, COLUMNS]. Tiles of the same weights follow each other.

    GATED: a tile takes rows of the gate and of the rest by turns, so that what is multiplied lies in one thread.
    """
    COLUMNS: tl.constexpr = N // 2 if GATED else N
    OUT_BLOCK: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    row_tiles = tl.cdiv(rows, BLOCK_M)
    m = (tl.program_id(0) % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = (tl.program_id(0) // row_tiles) * OUT_BLOCK
    n = tl.arange(0, BLOCK_N)
    if GATED:
        n = tl.minimum(first_column + n // 2, COLUMNS - 1) + n % 2 * COLUMNS
    else:
        n = tl.minimum(first_column + n, COLUMNS - 1)
    DEPTH: tl.constexpr = K // PARTS
    k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end read the last one instead and are not written.
    x_ptrs = x_ptr + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * K + k[None, :]
    weight_ptrs = weight_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    x_ptrs += tl.program_id(1) * DEPTH
    weight_ptrs += tl.program_id(1) * DEPTH
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            inside = (start + k < DEPTH)[None, :]
            x = tl.load(x_ptrs, mask=inside, other=0.0)
            weight = tl.load(weight_ptrs, mask=inside, other=0)
        total = _product(x, weight, total)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    if SCALE_PER_ROW:
        total *= tl.load(scale_ptr + n)[None, :]
    else:
        total *= tl.load(scale_ptr)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    if GATED:
        gate, rest = tl.split(tl.reshape(total, [BLOCK_M, OUT_BLOCK, 2]))
        # sqrt(8 / pi) (g + 0.044715 g^3): GELU by tanh is g times the sigmoid of it.
        inner = gate * (1.5957691216057308 + 0.07135481627260 * gate * gate)
        total = gate / (1.0 + tl.exp(-inner)) * rest
    columns = first_column + tl.arange(0, OUT_BLOCK)
    at = (tl.program_id(1) * rows + m).to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    inside = (m < rows)[:, None] & (columns < COLUMNS)[None, :]
    tl.store(out_ptr + at, narrow(total, 1.0, out_ptr.dtype.element_ty), mask=inside)


# --- Host code ---


@dataclass(frozen=True)
class Tiling:
    """`rows` of x and `columns` of the product per program, `depth` of K at a time, `num_stages` of those in flight;
    all of K in `parts`.
    """

    rows: int = 64
    columns: int = 128
    depth: int = 64
    num_warps: int = 4
    num_stages: int = 4
    parts: int = 1


# Programs under which the depth is cut; an H100 has 132 multiprocessors.
_FEW_PROGRAMS = 100
_PARTS = 4


def tiling(rows: int, columns: int, depth: int, gated: bool = False) -> Tiling:
    """Of a product [rows, depth] x [columns, depth]: by `benchmarks/weight_only_linear.py --sweep` on an H100 for the
    layers of a Gemma-2-2B (README.md). What is gated needs whole sums.
    """
    tile = Tiling(num_stages=3) if gated else Tiling()
    programs = -(-rows // tile.rows) * -(-columns // tile.columns)
    cut = not gated and programs < _FEW_PROGRAMS and depth % (_PARTS * tile.depth) == 0
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
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, gated: bool
) -> torch.Tensor:
    """The Triton forward, arguments and result as in `reference`. A new tensor."""
    check_support(x)
    columns, depth = weight.shape
    wanted = (*x.shape[:-1], columns // 2 if gated else columns)
    if x.numel() == 0:
        return x.new_empty(wanted)
    rows = x.numel() // depth
    tile = tiling(rows, columns, depth, gated)
    out = x.new_empty((tile.parts, *wanted), dtype=x.dtype if tile.parts == 1 else torch.float32)
    # What is added to every part would count as often.
    tensors = (x, weight, weight_scale, bias if tile.parts == 1 else None, out)
    numbers, constants = launch(tensors, tile, gated)
    grid = (-(-rows // tile.rows) * -(-columns // tile.columns), tile.parts)
    pointers = [x.contiguous() if t is None else t.contiguous() for t in tensors]  # one that is never read may be any
    launcher(weight_only_linear_kernel)[grid](*pointers, *numbers, **constants)
    if tile.parts == 1:
        return out[0]
    wide = out.sum(0)
    return (wide if bias is None else wide + bias.float()).to(x.dtype)


def launch(
    tensors: tuple[torch.Tensor | None, ...], tile: Tiling, gated: bool = False
) -> tuple[tuple[int], dict[str, Any]]:
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
        "GATED": gated,
        "PARTS": tile.parts,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return (out.numel() // (tile.parts * out.shape[-1]),), constants
