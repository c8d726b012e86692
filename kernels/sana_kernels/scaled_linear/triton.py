"""Triton kernel of a linear layer with everything that follows it up to the next product.

One launch. A program owns a tile of BLOCK_M rows and BLOCK_N columns, walks along K with several loads in flight
(plain pointers, which become asynchronous copies: they work the same in every Triton and inside AOTInductor), and
finishes the tile in registers: scales, bias, gate, residual and the codes for the next product. Tiles are taken in
groups of GROUP_M rows of tiles, so that programs that run at once share rows and weights in the L2 cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sana_kernels.machine import INTERPRETED, ON_CPU, UnsupportedByTriton
from sana_kernels.mix_ffn_depthwise.triton import DTYPES, inverse_scale, launcher, narrow

QUANTIZED = (torch.float8_e4m3fn, torch.int8)
GROUP_M = 8


# --- Device code ---


@triton.jit
def product(x, weight, total):
    """total + x [M, K] times weight [N, K] transposed; int8 adds in int32, everything else in fp32."""
    if INTERPRETED and x.dtype != tl.int8:  # it multiplies bf16 and float8 as the integers it keeps them in
        x = x.to(tl.float32)
        weight = weight.to(tl.float32)
    return tl.dot(x, tl.trans(weight), total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def tile_of_program(row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """(row, column) of this program's tile: GROUP_M rows of tiles column by column, then the next GROUP_M."""
    program = tl.program_id(0)
    group_size = GROUP_M * column_tiles
    first = (program // group_size) * GROUP_M
    height = tl.minimum(row_tiles - first, GROUP_M)
    return first + (program % group_size) % height, (program % group_size) // height


@triton.jit
def halves(tile):
    """A tile [M, N] as its left and its right half."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def row_of(ptr, first_n, N: tl.constexpr, WIDTH: tl.constexpr):
    """Columns first_n to first_n + WIDTH of a vector [N] as [1, WIDTH] fp32, zero behind its end."""
    n = first_n + tl.arange(0, WIDTH)
    return tl.load(ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _finish(
    total,
    activation_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    inverse_smooth_ptr,
    out_scale_ptr,
    out_ptr,
    codes_ptr,
    rows,
    rows_per_gate,
    first_m,
    first_n,
    N: tl.constexpr,
    SCALES: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATES: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Everything behind the product, for the sums [BLOCK_M, WIDTH] of the rows from first_m, columns from first_n."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    # Within a tile 32 bits are enough: 64 everywhere would cost the registers of another program.
    m, n = tl.arange(0, total.shape[0]), tl.arange(0, WIDTH)
    inside = (m < (rows - first_m).to(tl.int32))[:, None]
    if N % BLOCK_N != 0:  # of the last tile whole parts may lie behind the end
        inside &= (n < N - first_n)[None, :]
    first = first_m * N + first_n
    at = m[:, None] * N + n[None, :]
    if HAS_RESIDUAL:  # on its way while the sums are scaled
        residual = tl.load(residual_ptr + first + at, mask=inside, other=0.0)
    wide = total.to(tl.float32)
    if SCALES == "tensor":
        wide *= tl.load(activation_scale_ptr) * tl.load(weight_scale_ptr)
    elif SCALES == "row":
        wide *= tl.load(activation_scale_ptr) * row_of(weight_scale_ptr, first_n, N, WIDTH)
    if HAS_BIAS:
        wide += row_of(bias_ptr, first_n, N, WIDTH)
    y = narrow(wide, 1.0, dtype)
    if LIMIT > 0:
        y = narrow(tl.clamp(y.to(tl.float32), -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL), 1.0, dtype)
    if HAS_RESIDUAL:
        wide = y.to(tl.float32)
        if GATES == "shared":
            wide *= row_of(gate_ptr, first_n, N, WIDTH)
        elif GATES == "batch":
            batch = ((first_m + m) // rows_per_gate).to(tl.int32)
            wide *= tl.load(gate_ptr + first_n + batch[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
        y = narrow(wide + residual.to(tl.float32), 1.0, dtype)
    tl.store(out_ptr + first + at, y, mask=inside)
    if HAS_CODES:
        wide = y.to(tl.float32)
        if HAS_SMOOTH:
            wide *= row_of(inverse_smooth_ptr, first_n, N, WIDTH)
        codes = narrow(wide, inverse_scale(out_scale_ptr, codes_ptr.dtype.element_ty), codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + first + at, codes, mask=inside)


@triton.jit
def scaled_linear_kernel(
    x_ptr,
    weight_ptr,
    activation_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    inverse_smooth_ptr,
    out_scale_ptr,
    out_ptr,
    codes_ptr,
    rows,
    rows_per_gate,
    K: tl.constexpr,
    N: tl.constexpr,
    SCALES: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATES: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Program (tile). SCALES: "none", "tensor" or "row" (of the weight); GATES: "none", "shared" or "batch";
    LIMIT 0: none; BLOCK_N is 1, 2 or 4 times PART_N.
    """
    tile_m, tile_n = tile_of_program(tl.cdiv(rows, BLOCK_M), (N + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    first_m, first_n = tile_m.to(tl.int64) * BLOCK_M, tile_n * BLOCK_N
    k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end read the last one instead and are not written.
    m = tl.minimum(tl.arange(0, BLOCK_M), (rows - 1 - first_m).to(tl.int32))
    n = tl.arange(0, BLOCK_N)
    if N % BLOCK_N != 0:
        n = tl.minimum(n, N - 1 - first_n)
    x_ptrs = x_ptr + first_m * K + m[:, None] * K + k[None, :]
    weight_ptrs = weight_ptr + first_n.to(tl.int64) * K + n[:, None] * K + k[None, :]
    if x_ptr.dtype.element_ty == tl.int8:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            inside_k = (start + k < K)[None, :]
            x = tl.load(x_ptrs, mask=inside_k, other=0.0)
            weight = tl.load(weight_ptrs, mask=inside_k, other=0.0)
        total = product(x, weight, total)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    # A quarter or half of a wide tile at a time: the whole one takes so many registers that one program less fits.
    parts = (total,)
    if BLOCK_N == 2 * PART_N:
        parts = halves(total)
    elif BLOCK_N == 4 * PART_N:
        left, right = halves(total)
        parts = halves(left) + halves(right)
    for i in tl.static_range(BLOCK_N // PART_N):
        _finish(
            parts[i],
            activation_scale_ptr,
            weight_scale_ptr,
            bias_ptr,
            residual_ptr,
            gate_ptr,
            inverse_smooth_ptr,
            out_scale_ptr,
            out_ptr,
            codes_ptr,
            rows,
            rows_per_gate,
            first_m,
            first_n + i * PART_N,
            N,
            SCALES,
            LIMIT,
            HAS_BIAS,
            HAS_RESIDUAL,
            GATES,
            HAS_CODES,
            HAS_SMOOTH,
            BLOCK_N,
            PART_N,
        )


# --- Host code ---


@dataclass(frozen=True)
class Tiling:
    """`rows` x `columns` results per program, `depth` of K at a time, `num_stages` of them in flight; results are
    finished `part_columns` at a time, a quarter of `columns` or more.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    part_columns: int = 64


def tiling(rows: int, columns: int, depth: int, itemsize: int, *, residual: bool = False) -> Tiling:
    """Of a product [rows, depth] x [columns, depth] whose factors have `itemsize` bytes; `residual`: one is added.

    What was fastest on an H200 for the FP8 products of a block of the 0.6B and the 1.6B model, 1024 and 4096 px, of
    those whose factors in flight take at most 96 KiB of shared memory: every GPU since compute capability 8.0 has it.
    """
    if itemsize == 4:  # no matrix units: fp32 is for checks
        return Tiling(32, 32, 32, 4, 2)
    tile_depth = 128 // itemsize
    if rows <= 32:
        return Tiling(32, 64, tile_depth, 4, 4)
    if residual and depth * itemsize <= 1536:
        # Short sums: finishing the tile, which waits for memory, is as long as the product.
        return Tiling(64, 128, tile_depth, 4, 3)
    if -(-rows // 128) * -(-columns // 128) >= 512:
        # Two programs to a multiprocessor, so that one multiplies while the other finishes its tile.
        return Tiling(128, 128, tile_depth, 4, 3, part_columns=32)
    return Tiling(128, 64, tile_depth, 4, 3, part_columns=32)


def check_support(x: torch.Tensor, dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    """Raise `UnsupportedByTriton` unless the kernel can run: machine, kind of factors, dtype of results."""
    problem = None
    if x.dtype not in (*DTYPES, *QUANTIZED):
        problem = f"needs float32, bfloat16, float16, float8_e4m3fn or int8, got {x.dtype}"
    elif dtype not in DTYPES:
        problem = f"writes float32, bfloat16 or float16, not {dtype}"
    elif x.device.type != "cuda" and not ON_CPU:
        problem = f"needs a CUDA tensor, got one on {x.device.type}"
    elif torch.float8_e4m3fn in (x.dtype, out_dtype) and not ON_CPU:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < (8, 9):
            problem = f"needs compute capability 8.9 or more for float8_e4m3fn, got {capability[0]}.{capability[1]}"
    if problem:
        raise UnsupportedByTriton(f"scaled_linear: impl='triton' {problem}. Use impl='reference'.")


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    inverse_smooth: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    limit: float | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton forward, arguments and results as in `reference`. Both results are new tensors."""
    check_support(x, dtype, out_dtype)
    columns, depth = weight.shape
    out = x.new_empty((*x.shape[:-1], columns), dtype=dtype)
    codes = x.new_empty(0, dtype=dtype) if out_dtype is None else torch.empty_like(out, dtype=out_dtype)
    if out.numel() == 0:
        return out, codes
    rows = out.numel() // columns
    tile = tiling(rows, columns, depth, x.element_size(), residual=residual is not None)
    tensors = (x, weight, activation_scale, weight_scale, bias, residual, gate, inverse_smooth, out_scale, out, codes)
    numbers, constants = launch(tensors, limit, tile)
    pointers = [x if t is None else t.contiguous() for t in tensors]  # one that is never read may be any
    launcher(scaled_linear_kernel)[(-(-rows // tile.rows) * -(-columns // tile.columns),)](
        *pointers, *numbers, **constants
    )
    return out, codes


def launch(
    tensors: tuple[torch.Tensor | None, ...], limit: float | None, tile: Tiling
) -> tuple[tuple[int, int], dict[str, Any]]:
    """What the kernel takes beside its eleven tensors: the numbers behind them, and constants by name."""
    _, weight, _, weight_scale, bias, residual, gate, inverse_smooth, _, out, codes = tensors
    assert weight is not None
    assert out is not None
    assert codes is not None
    rows = out.numel() // out.shape[-1]
    constants = {
        "K": weight.shape[1],
        "N": weight.shape[0],
        "SCALES": "none" if weight_scale is None else "tensor" if weight_scale.numel() == 1 else "row",
        "LIMIT": limit or 0.0,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "GATES": "none" if gate is None else "shared" if gate.ndim == 1 else "batch",
        "HAS_CODES": codes.numel() > 0,
        "HAS_SMOOTH": inverse_smooth is not None,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "PART_N": min(tile.columns, tile.part_columns),
        "BLOCK_K": tile.depth,
        "GROUP_M": GROUP_M,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return (rows, rows // gate.shape[0] if gate is not None and gate.ndim == 2 else rows), constants
