"""Triton kernel of DC-AE's upsampling: convolution over the small image, and everything up to the large one's codes.

One launch. It is four products, one for each place of an output pixel in its 2x2 block, whose rows are pixels of the
small image and whose depth is 4 C: a program owns BLOCK_M pixels that follow each other and BLOCK_N output channels of
one phase, walks over the four taps and the channels of each, and writes every other pixel of a row of the large image.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sana_kernels.machine import UnsupportedByTriton, shared_bytes
from sana_kernels.mix_ffn_depthwise import triton as mix_ffn_depthwise
from sana_kernels.mix_ffn_depthwise.triton import inverse_scale, launcher, narrow
from sana_kernels.scaled_linear.triton import GROUP_M, halves, product, row_of, tile_of_program

# --- Device code ---


@triton.jit
def _finish(
    total,
    x_ptr,
    bias_ptr,
    out_scale_ptr,
    out_ptr,
    codes_ptr,
    pixels,
    width,
    first_m,
    first_n,
    phase,
    C: tl.constexpr,
    N: tl.constexpr,
    HAS_CODES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Everything behind the sums [BLOCK_M, WIDTH] of the pixels from first_m, output channels from first_n."""
    REPEATS: tl.constexpr = 4 * N // C
    n = first_n + tl.arange(0, WIDTH)[None, :]
    pixel = first_m.to(tl.int32) + tl.arange(0, total.shape[0])
    inside = (pixel < pixels)[:, None]
    if N % BLOCK_N != 0:  # of the last tile whole parts may lie behind the end
        inside &= n < N
    # The general formula is the second; with the first, Triton sees that neighbours are neighbours.
    taken = n // (REPEATS // 4) if REPEATS % 4 == 0 else (4 * n + phase) // REPEATS
    shortcut = tl.load(x_ptr + pixel.to(tl.int64)[:, None] * C + taken, mask=inside, other=0.0).to(tl.float32)
    y = narrow(total + row_of(bias_ptr, first_n, N, WIDTH) + shortcut, 1.0, out_ptr.dtype.element_ty)
    row, column = pixel // width, pixel % width  # of all images below each other
    target = (2 * row + phase // 2) * (2 * width) + 2 * column + phase % 2
    offset = target.to(tl.int64)[:, None] * N + n
    tl.store(out_ptr + offset, y, mask=inside)
    if HAS_CODES:
        kept: tl.constexpr = codes_ptr.dtype.element_ty
        codes = narrow(y.to(tl.float32), inverse_scale(out_scale_ptr, kept), kept)
        tl.store(codes_ptr + offset, codes, mask=inside)


@triton.jit
def upsample_convolution_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_scale_ptr,
    out_ptr,
    codes_ptr,
    pixels,
    height,
    width,
    C: tl.constexpr,
    N: tl.constexpr,
    HAS_CODES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Program (tile). `pixels` of all small images, C input and N output channels; BLOCK_N is 1, 2 or 4 PART_N."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = tile_of_program(tl.cdiv(pixels, BLOCK_M), 4 * TILES_N, GROUP_M)
    phase = tile_n // TILES_N
    first_m, first_n = tile_m.to(tl.int64) * BLOCK_M, (tile_n % TILES_N) * BLOCK_N
    # Pixels and channels beyond the end read the last one instead and are not written.
    m = tl.minimum(tl.arange(0, BLOCK_M), (pixels - 1 - first_m).to(tl.int32))
    n = tl.arange(0, BLOCK_N)
    if N % BLOCK_N != 0:
        n = tl.minimum(n, N - 1 - first_n)
    pixel = first_m.to(tl.int32) + m
    column, row = pixel % width, (pixel // width) % height
    # Output row 2i + a takes the rows i + a - 1 and i + a; columns likewise.
    first_down, first_right = phase // 2 - 1, phase % 2 - 1
    # Bit by bit which taps of a pixel lie inside the image: comparing in the loop takes twice the instructions.
    taps = tl.zeros([BLOCK_M], tl.int32)
    for i in tl.static_range(4):
        up, left = row + (first_down + i // 2), column + (first_right + i % 2)
        taps |= ((up >= 0) & (up < height) & (left >= 0) & (left < width)).to(tl.int32) << i
    c = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + first_m * C + m[:, None] * C + c[None, :]
    weight_ptrs = weight_ptr + n[:, None] * (4 * C) + c[None, :] + (phase * N + first_n) * (4 * C)
    PARTS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(4 * PARTS):
        tap, start = step // PARTS, (step % PARTS) * BLOCK_C
        inside = ((taps >> tap) & 1 != 0)[:, None]
        shift = ((first_down + tap // 2) * width + first_right + tap % 2) * C + start
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
        left_half, right_half = halves(total)
        parts = halves(left_half) + halves(right_half)
    for i in tl.static_range(BLOCK_N // PART_N):
        _finish(
            parts[i],
            x_ptr,
            bias_ptr,
            out_scale_ptr,
            out_ptr,
            codes_ptr,
            pixels,
            width,
            first_m,
            first_n + i * PART_N,
            phase,
            C,
            N,
            HAS_CODES,
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


def tiling(pixels: int, channels: int, dtype: torch.dtype, shared: int) -> Tiling:
    """Of an upsampling of `pixels` to `channels` each, where a program has `shared` bytes of shared memory."""
    depth = 128 // dtype.itemsize
    if pixels <= 64 or channels <= 32:
        return Tiling(32, 64, depth, 4, 3, 64)
    if channels > 128 and shared >= 200 << 10:
        return Tiling(128, 256, depth, 8, 4, 64)
    return Tiling(128, 128, depth, 4, 3, 32)


def check_support(x: torch.Tensor, out_dtype: torch.dtype | None) -> None:
    """Raise `UnsupportedByTriton` unless the kernel can run: machine, dtypes, number of pixels."""
    mix_ffn_depthwise.check_support("upsample_convolution", x, out_dtype)
    if 4 * x.shape[:-1].numel() >= 2**31:
        raise UnsupportedByTriton(
            f"upsample_convolution: impl='triton' counts pixels in 32 bits, got {4 * x.shape[:-1].numel()}. "
            "Use impl='reference'."
        )


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton forward, arguments and results as in `reference`. Both results are new tensors."""
    check_support(x, out_dtype)
    batch, height, width, _ = x.shape
    channels = bias.shape[0]
    out = x.new_empty(batch, 2 * height, 2 * width, channels)
    codes = x.new_empty(0) if out_dtype is None else torch.empty_like(out, dtype=out_dtype)
    if out.numel() == 0:
        return out, codes
    pixels = batch * height * width
    tile = tiling(pixels, channels, x.dtype, shared_bytes(x.device))
    # One that is never read may be any.
    tensors = (
        x.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        x if out_scale is None else out_scale,
        out,
        codes,
    )
    grid = (-(-pixels // tile.pixels) * 4 * -(-channels // tile.channels),)
    launcher(upsample_convolution_kernel)[grid](
        *tensors, pixels, height, width, **constants(x, out_dtype, tile, channels)
    )
    return out, codes


def constants(x: torch.Tensor, out_dtype: torch.dtype | None, tile: Tiling, channels: int) -> dict[str, Any]:
    """What the kernel takes beside tensors and sizes, by name."""
    return {
        "C": x.shape[-1],
        "N": channels,
        "HAS_CODES": out_dtype is not None,
        "BLOCK_M": tile.pixels,
        "BLOCK_N": tile.channels,
        "PART_N": min(tile.channels, tile.part_channels),
        "BLOCK_C": tile.depth,
        "GROUP_M": GROUP_M,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
