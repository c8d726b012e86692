"""Triton kernels of the norms. One launch each, one pass: a row stays in registers between its sums and its result.

A program takes ROWS rows in CHUNKS pieces of BLOCK_C channels. A whole row in one power of two would leave almost half
of the lanes idle at the transformer's 1152 and 2240 channels.
"""

# Device code builds tuples of vectors piece by piece, from ().
# mypy: disable-error-code="assignment"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sana_kernels.mix_ffn_depthwise.triton import check_support, inverse_scale, launcher, narrow, silu

# --- Device code ---


@triton.jit
def _load(ptr, offsets, inside):
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def modulated_norm_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    branch_ptr,
    gate_ptr,
    out_scale_ptr,
    out_ptr,
    updated_ptr,
    tokens,
    shift_stride,
    scale_stride,
    gate_stride,
    EPS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (block of ROWS tokens, batch). The strides are those between batches of shift, scale and gate."""
    CHUNKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    inverse_step = inverse_scale(out_scale_ptr, out_ptr.dtype.element_ty)
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = (token < tokens)[:, None]
    row = (batch * tokens + token)[:, None] * CHANNELS
    # [ROWS, BLOCK_C], also where one row is shared by all: its loads then fall on the lanes that need them.
    column = tl.zeros([ROWS, 1], tl.int32) + tl.arange(0, BLOCK_C)[None, :]
    chunks = ()
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for i in tl.static_range(CHUNKS):
        channel = i * BLOCK_C + column
        inside = present & (channel < CHANNELS)
        x = _load(x_ptr, row + channel, inside)
        if HAS_BRANCH:
            branch = _load(branch_ptr, row + channel, inside)
            if HAS_GATE:
                branch *= _load(gate_ptr, batch * gate_stride + channel, channel < CHANNELS)
            x += branch
            tl.store(updated_ptr + row + channel, narrow(x, 1.0, updated_ptr.dtype.element_ty), mask=inside)
        chunks += (x,)
        total += x
    mean = (tl.sum(total, axis=1) / CHANNELS)[:, None]
    squares = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for i in tl.static_range(CHUNKS):
        centred = tl.where(i * BLOCK_C + column < CHANNELS, chunks[i] - mean, 0.0)
        squares += centred * centred
    inverse = (1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / CHANNELS + EPS))[:, None]
    for i in tl.static_range(CHUNKS):
        channel = i * BLOCK_C + column
        scale = _load(scale_ptr, batch * scale_stride + channel, channel < CHANNELS)
        shift = _load(shift_ptr, batch * shift_stride + channel, channel < CHANNELS)
        out = tl.fma((chunks[i] - mean) * inverse, 1.0 + scale, shift)
        out = narrow(out, inverse_step, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row + channel, out, mask=present & (channel < CHANNELS))


@triton.jit
def channel_rms_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_scale_ptr,
    out_ptr,
    codes_ptr,
    rows,
    EPS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_CODES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (block of ROWS rows). ACTIVATION: "none", "silu" or "relu"."""
    CHUNKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    inverse_step = inverse_scale(out_scale_ptr, codes_ptr.dtype.element_ty)
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = (index < rows)[:, None]
    row = index.to(tl.int64)[:, None] * CHANNELS
    # [ROWS, BLOCK_C], also where one row is shared by all: its loads then fall on the lanes that need them.
    column = tl.zeros([ROWS, 1], tl.int32) + tl.arange(0, BLOCK_C)[None, :]
    chunks, residuals, weights, biases = (), (), (), ()
    squares = tl.zeros([ROWS, BLOCK_C], tl.float32)
    # All is asked for before the sum needs x: one wait for memory, not two.
    for i in tl.static_range(CHUNKS):
        channel = i * BLOCK_C + column
        inside = present & (channel < CHANNELS)
        chunks += (_load(x_ptr, row + channel, inside),)
        if HAS_RESIDUAL:
            residuals += (_load(residual_ptr, row + channel, inside),)
        weights += (_load(weight_ptr, channel, channel < CHANNELS),)
        biases += (_load(bias_ptr, channel, channel < CHANNELS),)
    for i in tl.static_range(CHUNKS):
        squares += chunks[i] * chunks[i]
    inverse = (1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / CHANNELS + EPS))[:, None]
    for i in tl.static_range(CHUNKS):
        channel = i * BLOCK_C + column
        inside = present & (channel < CHANNELS)
        out = tl.fma(chunks[i] * inverse, weights[i], biases[i])
        if ACTIVATION == "silu":
            out = silu(out)
        elif ACTIVATION == "relu":
            out = tl.where(out < 0.0, 0.0, out)  # NaN goes through
        if HAS_RESIDUAL:
            out += residuals[i]
        out = narrow(out, 1.0, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row + channel, out, mask=inside)
        if HAS_CODES:
            codes = narrow(out.to(tl.float32), inverse_step, codes_ptr.dtype.element_ty)
            tl.store(codes_ptr + row + channel, codes, mask=inside)


# --- Host code ---


@dataclass(frozen=True)
class Tiling:
    """`rows` x `block_channels` elements at a time, with `num_warps` warps."""

    rows: int
    block_channels: int
    num_warps: int


def tiling(channels: int) -> Tiling:
    """Of the modulated norm, chosen by measurement on an H100: a row per program, so that short images fill the GPU."""
    return Tiling(1, min(512, triton.next_power_of_2(channels)), num_warps=2)


def rms_tiling(channels: int) -> Tiling:
    """Of the channel RMS norm, likewise: 2048 elements at a time, as its rows are short and many."""
    block = min(512, triton.next_power_of_2(channels))
    return Tiling(2048 // block, block, num_warps=8)


def modulated_norm_forward(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton forward, arguments and results as in `reference`. Both results are new tensors."""
    check_support("modulated_norm", x, out_dtype)
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    shift, scale = _with_dense_rows(shift), _with_dense_rows(scale)
    gate = None if gate is None else _with_dense_rows(gate)
    out = torch.empty_like(x, dtype=out_dtype or x.dtype)
    updated = x.new_empty(0) if branch is None else torch.empty_like(x)
    if out.numel() == 0:
        return out, updated
    batch, tokens, channels = x.shape
    tile = tiling(channels)
    launcher(modulated_norm_kernel)[(-(-tokens // tile.rows), batch)](
        x,
        shift,
        scale,
        x if branch is None else branch,
        x if gate is None else gate,
        x if out_scale is None else out_scale,  # never read when nothing is quantised
        out,
        updated,
        tokens,
        shift.stride(0),
        scale.stride(0),
        0 if gate is None else gate.stride(0),
        EPS=eps,
        HAS_BRANCH=branch is not None,
        HAS_GATE=gate is not None,
        CHANNELS=channels,
        ROWS=tile.rows,
        BLOCK_C=tile.block_channels,
        num_warps=tile.num_warps,
    )
    return out, updated


def _with_dense_rows(t: torch.Tensor) -> torch.Tensor:
    """[B, 1, C] whose channels lie side by side: a slice of a [B, 6, C] table is one without a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def channel_rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton forward, arguments and results as in `reference`. Both results are new tensors."""
    check_support("channel_rms_norm", x, out_dtype)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    codes = x.new_empty(0) if out_dtype is None else torch.empty_like(x, dtype=out_dtype)
    if out.numel() == 0:
        return out, codes
    channels = x.shape[-1]
    rows = x.numel() // channels
    tile = rms_tiling(channels)
    launcher(channel_rms_norm_kernel)[(-(-rows // tile.rows),)](
        x,
        weight.contiguous(),
        bias.contiguous(),
        x if residual is None else residual,
        x if out_scale is None else out_scale,  # never read when nothing is quantised
        out,
        codes,
        rows,
        EPS=eps,
        HAS_RESIDUAL=residual is not None,
        HAS_CODES=out_dtype is not None,
        ACTIVATION=activation,
        CHANNELS=channels,
        ROWS=tile.rows,
        BLOCK_C=tile.block_channels,
        num_warps=tile.num_warps,
    )
    return out, codes
