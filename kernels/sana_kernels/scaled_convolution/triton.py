"""Triton kernel of a 3x3 convolution over channels-last codes, with everything up to the next convolution's codes.

One launch. It is a product whose rows are pixels and whose depth is 9 C: a program owns BLOCK_M pixels that follow each
other and BLOCK_N output channels, and walks over the nine taps and the channels of each. What a tap reads beyond the
picture is zero and is not loaded. Nothing is written out in between: the nine reads of a pixel come from the L2 cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sana_kernels.machine import ON_CPU, UnsupportedByTriton, shared_bytes
from sana_kernels.mix_ffn_depthwise.triton import DTYPES, inverse_scale, launcher, narrow, silu
from sana_kernels.scaled_linear.triton import GROUP_M, QUANTIZED, halves, product, row_of, tile_of_program

# --- Device code ---


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """fp32 x rounded to "float32", "bfloat16" or "float16", again as fp32."""
    if DTYPE == "bfloat16":
        x = narrow(x, 1.0, tl.bfloat16).to(tl.float32)
    elif DTYPE == "float16":
        x = narrow(x, 1.0, tl.float16).to(tl.float32)
    return x


@triton.jit
def _finish(
    total,
    activation_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_scale_ptr,
    out_ptr,
    pixels,
    first_m,
    first_n,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Everything behind the sums [BLOCK_M, WIDTH] of the pixels from first_m, output channels from first_n."""
    m, n = tl.arange(0, total.shape[0]), tl.arange(0, WIDTH)
    inside = (m < (pixels - first_m).to(tl.int32))[:, None]
    if N % BLOCK_N != 0:  # of the last tile whole parts may lie behind the end
        inside &= (n < N - first_n)[None, :]
    wide = total.to(tl.float32)
    if PER_CHANNEL:
        wide *= tl.load(activation_scale_ptr) * row_of(weight_scale_ptr, first_n, N, WIDTH)
    else:
        wide *= tl.load(activation_scale_ptr) * tl.load(weight_scale_ptr)
    if HAS_BIAS:
        wide += row_of(bias_ptr, first_n, N, WIDTH)
    y = _rounded(wide, DTYPE)
    if SILU:
        y = _rounded(silu(y), DTYPE)
    kept: tl.constexpr = out_ptr.dtype.element_ty
    y = narrow(y, inverse_scale(out_scale_ptr, kept), kept)
    tl.store(out_ptr + first_m * N + first_n + m[:, None] * N + n[None, :], y, mask=inside)


@triton.jit
def scaled_convolution_kernel(
    x_ptr,
    weight_ptr,
    activation_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_scale_ptr,
    out_ptr,
    pixels,
    height,
    width,
    C: tl.constexpr,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Program (tile). `pixels` of all pictures, C input and N output channels; PER_CHANNEL: scales of the weight;
    DTYPE: name of what results are rounded to; BLOCK_N is 1, 2 or 4 times PART_N.
    """
    tile_m, tile_n = tile_of_program(tl.cdiv(pixels, BLOCK_M), (N + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    first_m, first_n = tile_m.to(tl.int64) * BLOCK_M, tile_n * BLOCK_N
    # Pixels and channels beyond the end read the last one instead and are not written.
    m = tl.minimum(tl.arange(0, BLOCK_M), (pixels - 1 - first_m).to(tl.int32))
    n = tl.arange(0, BLOCK_N)
    if N % BLOCK_N != 0:
        n = tl.minimum(n, N - 1 - first_n)
    pixel = first_m.to(tl.int32) + m
    column, row = pixel % width, (pixel // width) % height
    # Bit by bit which taps of a pixel lie inside the picture: comparing in the loop takes twice the instructions.
    taps = tl.zeros([BLOCK_M], tl.int32)
    for i in tl.static_range(9):
        up, left = row + (i // 3 - 1), column + (i % 3 - 1)
        taps |= ((up >= 0) & (up < height) & (left >= 0) & (left < width)).to(tl.int32) << i
    c = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + first_m * C + m[:, None] * C + c[None, :]
    weight_ptrs = weight_ptr + n[:, None] * (9 * C) + c[None, :] + first_n * (9 * C)
    PARTS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    if x_ptr.dtype.element_ty == tl.int8:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(9 * PARTS):
        tap, start = step // PARTS, (step % PARTS) * BLOCK_C
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = ((taps >> tap) & 1 != 0)[:, None]
        shift = (down * width + right) * C + start
        if C % BLOCK_C == 0:
            weight = tl.load(weight_ptrs + (tap * C + start))
        else:
            inside_c = (start + c < C)[None, :]
            inside &= inside_c
            weight = tl.load(weight_ptrs + (tap * C + start), mask=inside_c, other=0.0)
        x = tl.load(x_ptrs + shift, mask=inside, other=0.0)
        total = product(x, weight, total)

    parts = (total,)
    if BLOCK_N == 2 * PART_N:
        parts = halves(total)
    elif BLOCK_N == 4 * PART_N:
        left, right_half = halves(total)
        parts = halves(left) + halves(right_half)
    for i in tl.static_range(BLOCK_N // PART_N):
        _finish(
            parts[i],
            activation_scale_ptr,
            weight_scale_ptr,
            bias_ptr,
            out_scale_ptr,
            out_ptr,
            pixels,
            first_m,
            first_n + i * PART_N,
            N,
            PER_CHANNEL,
            HAS_BIAS,
            SILU,
            DTYPE,
            BLOCK_N,
            PART_N,
        )


# --- Host code ---


@dataclass(frozen=True)
class Tiling:
    """`pixels` x `channels` results per program, `depth` input channels at a time, `num_stages` of them in flight;
    results are finished `part_channels` at a time, a quarter of `channels` or more.
    """

    pixels: int
    channels: int
    depth: int
    num_warps: int
    num_stages: int
    part_channels: int


def tiling(pixels: int, channels: int, shared: int) -> Tiling:
    """Of a convolution of `pixels` with `channels` results each, where a program has `shared` bytes of shared memory.

    What was fastest on an H200 for the FP8 convolutions of the decoder's last three stages, 1024 px, or within 4 % of
    it; where less than 200 KiB is to be had, within 11 %, of those whose factors in flight take at most 96 KiB.
    """
    if pixels <= 64 or channels <= 32:
        return Tiling(32, 64, 128, 4, 3, 64)
    if channels > 128 and shared >= 200 << 10:
        return Tiling(128, 256, 128, 8, 4, 64)
    return Tiling(128, 128, 128, 4, 3, 32)


def check_support(x: torch.Tensor, dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    """Raise `UnsupportedByTriton` unless the kernel can run: machine, kind of codes, dtype of results."""
    problem = None
    if x.dtype not in QUANTIZED:
        problem = f"needs float8_e4m3fn or int8, got {x.dtype}"
    elif dtype not in DTYPES:
        problem = f"rounds to float32, bfloat16 or float16, not {dtype}"
    elif x.device.type != "cuda" and not ON_CPU:
        problem = f"needs a CUDA tensor, got one on {x.device.type}"
    elif torch.float8_e4m3fn in (x.dtype, out_dtype) and not ON_CPU:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < (8, 9):
            problem = f"needs compute capability 8.9 or more for float8_e4m3fn, got {capability[0]}.{capability[1]}"
    elif x.shape[:-1].numel() >= 2**31:
        problem = f"counts pixels in 32 bits, got {x.shape[:-1].numel()}"
    if problem:
        raise UnsupportedByTriton(f"scaled_convolution: impl='triton' {problem}. Use impl='reference'.")


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    silu: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """The Triton forward, arguments and result as in `reference`. The result is a new tensor."""
    check_support(x, dtype, out_dtype)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype or dtype)
    if out.numel() == 0:
        return out
    channels = out.shape[-1]
    pixels = out.numel() // channels
    tile = tiling(pixels, channels, shared_bytes(x.device))
    tensors = (x, weight, activation_scale, weight_scale, bias, out_scale, out)
    numbers, constants = launch(tensors, silu, dtype, tile)
    pointers = [x if t is None else t.contiguous() for t in tensors]  # one that is never read may be any
    launcher(scaled_convolution_kernel)[(-(-pixels // tile.pixels) * -(-channels // tile.channels),)](
        *pointers, *numbers, **constants
    )
    return out


def launch(
    tensors: tuple[torch.Tensor | None, ...], silu: bool, dtype: torch.dtype, tile: Tiling
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """What the kernel takes beside its seven tensors: the numbers behind them, and constants by name."""
    x, weight, _, weight_scale, bias, _, _ = tensors
    assert x is not None
    assert weight is not None
    assert weight_scale is not None
    batch, height, width, inputs = x.shape
    constants = {
        "C": inputs,
        "N": weight.shape[0],
        "PER_CHANNEL": weight_scale.numel() > 1,
        "HAS_BIAS": bias is not None,
        "SILU": silu,
        "DTYPE": str(dtype).removeprefix("torch."),
        "BLOCK_M": tile.pixels,
        "BLOCK_N": tile.channels,
        "PART_N": min(tile.channels, tile.part_channels),
        "BLOCK_C": tile.depth,
        "GROUP_M": GROUP_M,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return (batch * height * width, height, width), constants
