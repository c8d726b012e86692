"""Triton kernel of the middle of Mix-FFN, and what turns fp32 results into the dtype of an output.

One launch. A program owns BLOCK_C channels of the value and the same channels of the gate, ROWS rows of the image and
a run of its columns. It walks along the columns: every step reads one column of ROWS + 2 pixels, puts it through SiLU
once, adds it to the three columns of the output that it touches, and finishes one of them. So no intermediate is
stored, and SiLU, which is what such a kernel could drown in, is computed (ROWS + 2) / ROWS times, not nine times.
"""

# Device code builds tuples of vectors piece by piece, from ().
# mypy: disable-error-code="assignment"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import library

from sana_kernels.machine import INTERPRETED, ON_CPU, UnsupportedByTriton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- Device code: writing results, shared with the other element-wise operators ---


@triton.jit
def _round_mantissa(x, DROPPED: tl.constexpr):
    """Round fp32 to 23 - DROPPED bits of mantissa, half to even; NaN and infinity stay what they are."""
    bits = x.to(tl.int32, bitcast=True)
    odd = (bits >> DROPPED) & 1
    rounded = (bits + ((1 << (DROPPED - 1)) - 1 + odd)) & (-(1 << DROPPED))
    return tl.where(tl.abs(x) < float("inf"), rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def _to_float8(x):
    """fp32 as float8e4nv, rounded half to even and saturated; NaN stays NaN.

    In one step: for compute capability 8.9 Triton's own cast goes through fp16 and rounds twice.
    """
    if INTERPRETED:  # it does not round half to even; below 2^-6 the steps are 2^-9, as those of fp32 at 2^14
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, _round_mantissa(x, 20))
        result = x.to(tl.float8e4nv)
    else:
        bits = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,f,f,f,f",
            [x],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
        result = bits.to(tl.float8e4nv, bitcast=True)
    return result


@triton.jit
def inverse_scale(scale_ptr, dtype: tl.constexpr):
    """What `narrow` multiplies with: 1 / scale for 8 bits, where the pointer is read; 1 otherwise."""
    inverse = 1.0
    if dtype == tl.int8 or dtype == tl.float8e4nv:
        inverse = 1.0 / tl.load(scale_ptr)
    return inverse


@triton.jit
def narrow(x, inverse, dtype: tl.constexpr):
    """fp32 `x` as `dtype`; for int8 and float8e4nv: times the inverse of the scale, rounded half to even, saturated.

    NaN stays NaN in float8e4nv; int8 has none, and what it becomes there is undefined.
    """
    if dtype == tl.int8:
        x = tl.clamp(x * inverse, -128.0, 127.0)
        # 1.5 * 2^23: fp32 has no fractions there, so the sum is rounded half to even.
        result = ((x + 12582912.0) - 12582912.0).to(dtype)
    elif dtype == tl.float8e4nv:
        result = _to_float8(x * inverse)
    elif INTERPRETED and dtype == tl.bfloat16:  # it cuts off
        result = _round_mantissa(x, 16).to(dtype)
    else:
        result = x.to(dtype)
    return result


# --- Device code: the convolution ---


@triton.jit
def _exp2(x):
    """2^x in one instruction on the GPU; a result below 2^-126 is zero."""
    if INTERPRETED:
        power = tl.exp2(x)
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return power


@triton.jit
def _reciprocal(x):
    """1 / x for a normal x whose reciprocal is normal, to one unit in the last place."""
    if INTERPRETED:
        result = 1.0 / x
    else:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _silu_terms(x):
    """(x, 1 + exp(-x)), x not below -41: SiLU of anything less is zero beside any fp32 result, and two of the second
    have a finite product. NaN stays NaN.
    """
    x = tl.maximum(x, -41.0, propagate_nan=tl.PropagateNan.ALL)
    return x, 1.0 + _exp2(x * -1.4426950408889634)


@triton.jit
def _silu_pair(first, second):
    """SiLU of two fp32 vectors with one reciprocal: 1/a = b/(ab)."""
    first, a = _silu_terms(first)
    second, b = _silu_terms(second)
    reciprocal = _reciprocal(a * b)
    return first * (b * reciprocal), second * (a * reciprocal)


@triton.jit
def silu(x):
    """SiLU of an fp32 vector."""
    x, a = _silu_terms(x)
    return x * _reciprocal(a)


@triton.jit
def _rough_silu(x):
    """SiLU of an fp32 vector off by 2^-12 |x| at most."""
    return _rough_silu_of_twice(0.5 * x)


@triton.jit
def _rough_silu_of_twice(half):
    """SiLU of x = 2 half, as half + half tanh(half), with one slow instruction."""
    if INTERPRETED:
        tanh = 2.0 / (1.0 + tl.exp2(half * -2.8853900817779268)) - 1.0
    else:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.fma(half, tanh, half)


@triton.jit
def _silu_pixel(pixel, ROUGH: tl.constexpr):
    """SiLU of (value, gate)."""
    value, gate = pixel[0].to(tl.float32), pixel[1].to(tl.float32)
    return (_rough_silu(value), _rough_silu(gate)) if ROUGH else _silu_pair(value, gate)


@triton.jit
def _silu_biased_pixel(pixel, biases, ROUGH: tl.constexpr):
    """SiLU of (value, gate) + `biases`; zero where `_outside` says that the pixel is none. ROUGH: half the biases."""
    value, gate = pixel[0].to(tl.float32), pixel[1].to(tl.float32)
    if ROUGH:
        first = _rough_silu_of_twice(tl.fma(value, 0.5, biases[0]))
        second = _rough_silu_of_twice(tl.fma(gate, 0.5, biases[1]))
    else:
        first, second = _silu_pair(value + biases[0], gate + biases[1])
        first = tl.where(value == -float("inf"), 0.0, first)
        second = tl.where(gate == -float("inf"), 0.0, second)
    return first, second


@triton.constexpr_function
def _outside(biased: bool, rough: bool) -> float:
    """What stands for a pixel outside the image: its SiLU is zero. With a bias too: far below zero tanh is -1."""
    if not biased:
        return 0.0
    return -1e30 if rough else -float("inf")


@triton.jit
def _read_column(ptrs, masks, present, HIDDEN: tl.constexpr, ROWS: tl.constexpr, OUTSIDE: tl.constexpr):
    """Value and gate of ROWS + 2 pixels of one column: ((value, gate), ...), OUTSIDE the image as said."""
    pixels = ()
    for i in tl.static_range(ROWS + 2):
        mask = (masks[i] & present) != 0  # the interpreter makes a bool of it only here
        value = tl.load(ptrs[i], mask=mask, other=OUTSIDE)
        pixels += ((value, tl.load(ptrs[i] + HIDDEN, mask=mask, other=OUTSIDE)),)
    return pixels


@triton.jit
def _advance(ptrs, step, COUNT: tl.constexpr):
    moved = ()
    for i in tl.static_range(COUNT):
        moved += (ptrs[i] + step,)
    return moved


@triton.jit
def _read_weights(weight_ptr, bias_ptr, channel, inside, weight_channel_stride, weight_tap_stride):
    """(nine taps, row by row, and the bias), each [BLOCK_C] fp32."""
    ptrs = weight_ptr + channel.to(tl.int64) * weight_channel_stride
    taps = ()
    for tap in tl.static_range(9):
        taps += (tl.load(ptrs + tap * weight_tap_stride, mask=inside, other=0.0).to(tl.float32),)
    taps += (tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _fma3(weights, COLUMN: tl.constexpr, above, here, below, total):
    """total + one column of the weights times three pixels above each other."""
    total = tl.fma(weights[COLUMN], above, total)
    total = tl.fma(weights[COLUMN + 3], here, total)
    return tl.fma(weights[COLUMN + 6], below, total)


@triton.jit
def _add_column(pending, pixels, weights, HALF: tl.constexpr, ROWS: tl.constexpr):
    """Add one column of pixels to the three columns of the output it touches.

    `pending`: per row (sum of the column before, sum of this column). Returns (per row the finished column before,
    the new `pending`: this column and the next).
    """
    finished = ()
    following = ()
    for r in tl.static_range(ROWS):
        above, here, below = pixels[r][HALF], pixels[r + 1][HALF], pixels[r + 2][HALF]
        before, this = pending[r]
        finished += (_fma3(weights, 2, above, here, below, before),)
        this = _fma3(weights, 1, above, here, below, this)
        following += ((this, _fma3(weights, 0, above, here, below, weights[9])),)
    return finished, following


@triton.jit
def mix_ffn_depthwise_kernel(
    x_ptr,
    x_bias_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    height,
    width,
    columns,
    weight_channel_stride,
    weight_tap_stride,
    BIASED: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (channel block, strip of rows and run of columns, batch). ROWS is even."""
    # Rounding to bf16 has moved x by up to 2^-9 |x| already.
    ROUGH: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    OUTSIDE: tl.constexpr = _outside(BIASED, ROUGH)
    runs = tl.cdiv(width, columns)
    first_row = (tl.program_id(1) // runs) * ROWS
    first = (tl.program_id(1) % runs) * columns
    stop = tl.minimum(first + columns, width)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < HIDDEN
    if HIDDEN % BLOCK_C == 0:
        inside = channel == channel  # the compiler drops it
    inverse = inverse_scale(scale_ptr, out_ptr.dtype.element_ty)
    image = tl.program_id(2).to(tl.int64) * height * width
    value_weights = _read_weights(weight_ptr, bias_ptr, channel, inside, weight_channel_stride, weight_tap_stride)
    gate_weights = _read_weights(
        weight_ptr, bias_ptr, HIDDEN + channel, inside, weight_channel_stride, weight_tap_stride
    )
    x_biases = ()
    if BIASED:
        for half in tl.static_range(2):
            x_bias = tl.load(x_bias_ptr + half * HIDDEN + channel, mask=inside, other=0.0).to(tl.float32)
            x_biases += (0.5 * x_bias if ROUGH else x_bias,)
    values = ()
    gates = ()
    out_ptrs = ()
    out_masks = ()
    for r in tl.static_range(ROWS):
        values += ((value_weights[9], value_weights[9]),)
        gates += ((gate_weights[9], gate_weights[9]),)
        token = image + (first_row + r) * width + first - 2
        out_ptrs += (out_ptr + token * HIDDEN + channel,)
        out_masks += (inside & (first_row + r < height),)
    ptrs = ()
    masks = ()
    for i in tl.static_range(ROWS + 2):
        row = first_row - 1 + i
        token = image + row * width + first - 1
        ptrs += (x_ptr + token * (2 * HIDDEN) + channel,)
        masks += (inside & ((row >= 0) & (row < height)),)
    ahead = _read_column(ptrs, masks, first > 0, HIDDEN, ROWS, OUTSIDE)
    for column in range(first - 1, stop + 1):
        pixels = ()
        for i in tl.static_range(ROWS + 2):
            if BIASED:
                pixels += (_silu_biased_pixel(ahead[i], x_biases, ROUGH),)
            else:
                pixels += (_silu_pixel(ahead[i], ROUGH),)
        # The next column is on its way while this one is worked on.
        ptrs = _advance(ptrs, 2 * HIDDEN, ROWS + 2)
        ahead = _read_column(ptrs, masks, column + 1 < tl.minimum(stop + 1, width), HIDDEN, ROWS, OUTSIDE)
        value, values = _add_column(values, pixels, value_weights, 0, ROWS)
        gate, gates = _add_column(gates, pixels, gate_weights, 1, ROWS)
        # What is finished is the column before, and nothing in the first two steps.
        for r in tl.static_range(ROWS):
            opened = _rough_silu(gate[r]) if ROUGH else silu(gate[r])
            out = narrow(value[r] * opened, inverse, out_ptr.dtype.element_ty)
            tl.store(out_ptrs[r], out, mask=(out_masks[r] & (column > first)) != 0)
        out_ptrs = _advance(out_ptrs, HIDDEN, ROWS)


# --- Host code ---


@dataclass(frozen=True)
class Tiling:
    """How the kernel covers an image: `rows` (even) x a run of columns x `block_channels` per program.

    `programs`: about how many programs run at once; the length of the runs is chosen to fill them evenly.
    """

    rows: int = 4
    block_channels: int = 64
    num_warps: int = 1
    programs: int = 2048

    def runs(self, batch: int, height: int, width: int, hidden: int) -> int:
        """Into how many runs to cut a row. A run of L columns costs about L + 8 steps: overlap, weights, filling."""
        others = batch * -(-height // self.rows) * -(-hidden // self.block_channels)

        def cost(runs: int) -> int:
            return -(-others * runs // self.programs) * (-(-width // runs) + 8)

        return min(range(1, -(-width // 4) + 1), key=cost)


TILING = Tiling()


def check_support(op: str, x: torch.Tensor, out_dtype: torch.dtype | None) -> None:
    """Raise `UnsupportedByTriton` unless the kernels can run: machine, dtype of x and dtype of the output."""
    problem = None
    if x.dtype not in DTYPES:
        problem = f"needs float32, bfloat16 or float16, got {x.dtype}"
    elif x.device.type != "cuda" and not ON_CPU:
        problem = f"needs a CUDA tensor, got one on {x.device.type}"
    elif out_dtype == torch.float8_e4m3fn and not ON_CPU:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < (8, 9):
            problem = f"needs compute capability 8.9 or more for float8_e4m3fn, got {capability[0]}.{capability[1]}"
    if problem:
        raise UnsupportedByTriton(f"{op}: impl='triton' {problem}. Use impl='reference'.")


def forward(
    x: torch.Tensor,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor | None,
    height: int,
    width: int,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """The Triton forward: x [B, N, 2F] -> a new tensor [B, N, F]. Arguments as in `api`."""
    check_support("mix_ffn_depthwise", x, out_dtype)
    x, bias = x.contiguous(), bias.contiguous()
    x_bias = None if x_bias is None else x_bias.contiguous()
    batch, tokens, channels = x.shape
    out = x.new_empty(batch, tokens, channels // 2, dtype=out_dtype or x.dtype)
    if out.numel() == 0:
        return out
    if weight.stride(2) != 3 * weight.stride(3):
        weight = weight.contiguous()
    runs = TILING.runs(batch, height, width, channels // 2)
    columns = -(-width // runs)
    blocks = -(-(channels // 2) // TILING.block_channels)
    grid = (blocks, -(-height // TILING.rows) * -(-width // columns), batch)
    launcher(mix_ffn_depthwise_kernel)[grid](
        x,
        bias if x_bias is None else x_bias,  # never read when there is none
        weight,
        bias,
        bias if out_scale is None else out_scale,  # never read when nothing is quantised
        out,
        height,
        width,
        columns,
        weight.stride(0),
        weight.stride(3),
        BIASED=x_bias is not None,
        HIDDEN=channels // 2,
        ROWS=TILING.rows,
        BLOCK_C=TILING.block_channels,
        num_warps=TILING.num_warps,
        num_stages=1,
    )
    return out


def launcher(kernel: Any) -> Any:
    """The kernel as torch.compile and AOTInductor can see it; Triton's interpreter takes it as it is.

    Only for use inside a `triton_op`: outside one, torch puts every launch into a table for good, and every later
    compilation walks through that table.
    """
    return kernel if ON_CPU else library.wrap_triton(kernel)
