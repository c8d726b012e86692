"""Triton kernels of ReLU linear attention, and the ops that launch them.

Forward, two launches (three with qk-norm): `state_kernel` reads k and v once and leaves, per head and per part of
the tokens, S = sum k v^T and z = sum k; `apply_kernel` adds the parts up in a fixed order, reads q once and writes
the result. No atomics: the same input gives the same bits. Backward, three launches (five with qk-norm).

qk-norm costs one small pass (`key_rms_kernel`), because two parts of it fold away (README.md has the argument):
the row scale of q cancels in the ratio, and a weight w leaves ReLU as |w| with the sign of w given to its input,
so that |w| multiplies the rows of the [D, D] state instead of every token.

Scratch layout, shared with the TensorRT plugin: parts [B, heads, splits, D + 1, D] fp32, rows 0..D-1 = S and
row D = z; key_scale [B, N] fp32, the reciprocal RMS of each row of k.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sana_kernels.machine import INTERPRETED, UnsupportedByTriton
from sana_kernels.mix_ffn_depthwise.triton import check_support as check_output_support
from sana_kernels.mix_ffn_depthwise.triton import inverse_scale, launcher, narrow

HEAD_DIMS = (16, 32, 64)


# --- Device code ---


@triton.jit
def _dot(short, wide):
    """short [M, K] in the dtype of the tensors times wide [K, N] in fp32, to fp32 accuracy.

    A 16-bit factor is exact in tf32, and an fp32 one is the sum of two tf32 numbers up to 2^-22 of itself.
    """
    if short.dtype == tl.float32:
        product = tl.dot(short, wide, input_precision="ieee")
    else:
        high = (wide.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        product = tl.dot(short.to(tl.float32), wide - high, input_precision="tf32")
        product = tl.dot(short.to(tl.float32), high, product, input_precision="tf32")
    return product


@triton.jit
def _accumulate(columns, rows, total):
    """total + columns [M, K] times rows [K, N], both in the dtype of the tensors, added in fp32."""
    if INTERPRETED:  # it multiplies bf16 as the integers it keeps them in
        columns = columns.to(tl.float32)
        rows = rows.to(tl.float32)
    return tl.dot(columns, rows, total, input_precision="ieee")


@triton.jit
def _fp32(number):
    """A scalar argument in fp32: torch.compile passes Python's floats as fp64, which would spread."""
    return tl.cast(number, tl.float32)


@triton.jit
def _relu(x):
    """ReLU that lets NaN through, as PyTorch does."""
    wide = x.to(tl.float32)
    return tl.where(wide < 0.0, 0.0, wide).to(x.dtype)


@triton.jit
def _signed_relu(x, weight, QK_NORM: tl.constexpr):
    """ReLU(x), or with qk-norm ReLU(sign(weight) x): what remains of ReLU(weight x) when |weight| is taken out."""
    if QK_NORM:
        sign = tl.where(weight < 0.0, -1.0, tl.where(weight > 0.0, 1.0, 0.0))[None, :]
        x = (x.to(tl.float32) * sign).to(x.dtype)
    return _relu(x)


@triton.jit
def _load_weight(weight_ptr, head, QK_NORM: tl.constexpr, HEAD_DIM: tl.constexpr):
    """This head's norm weights [D] in fp32; ones without qk-norm."""
    if QK_NORM:
        weight = tl.load(weight_ptr + head * HEAD_DIM + tl.arange(0, HEAD_DIM)).to(tl.float32)
    else:
        weight = tl.full([HEAD_DIM], 1.0, tl.float32)
    return weight


@triton.jit
def _first_row(batch, head, row, tokens, channels, BY_HEAD: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Of one head, from token `row`: (offset of its q, numbers from one token to the next, from q to k and k to v)."""
    if BY_HEAD:  # [B, 3 heads, N, D]
        heads = channels // HEAD_DIM
        offset = (tl.cast(batch * 3 * heads + head, tl.int64) * tokens + row) * HEAD_DIM
        return offset, HEAD_DIM, tl.cast(channels, tl.int64) * tokens
    else:
        return (tl.cast(batch, tl.int64) * tokens + row) * (3 * channels) + head * HEAD_DIM, 3 * channels, channels


@triton.jit
def _sum_parts(parts_ptr, sequence, splits, HEAD_DIM: tl.constexpr):
    """S [D, D] and z [D] of one head: its parts added in order, so that the result does not depend on timing."""
    d = tl.arange(0, HEAD_DIM)
    parts_ptr += sequence.to(tl.int64) * splits * ((HEAD_DIM + 1) * HEAD_DIM)
    state = tl.zeros([HEAD_DIM, HEAD_DIM], tl.float32)
    mass = tl.zeros([HEAD_DIM], tl.float32)
    for _ in range(splits):
        state += tl.load(parts_ptr + d[:, None] * HEAD_DIM + d[None, :])
        mass += tl.load(parts_ptr + HEAD_DIM * HEAD_DIM + d)
        parts_ptr += (HEAD_DIM + 1) * HEAD_DIM
    return state, mass


@triton.jit
def _store_part(parts_ptr, sequence, split, splits, state, mass, HEAD_DIM: tl.constexpr):
    d = tl.arange(0, HEAD_DIM)
    parts_ptr += (sequence.to(tl.int64) * splits + split) * ((HEAD_DIM + 1) * HEAD_DIM)
    tl.store(parts_ptr + d[:, None] * HEAD_DIM + d[None, :], state)
    tl.store(parts_ptr + HEAD_DIM * HEAD_DIM + d, mass)


@triton.jit
def key_rms_kernel(qkv_ptr, key_scale_ptr, rows, channels, norm_eps, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """key_scale[row] = 1 / sqrt(mean(k^2) + norm_eps) over all C channels of each of the B*N rows."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_C)
    key_ptrs = qkv_ptr + channels + row.to(tl.int64)[:, None] * (3 * channels) + column[None, :]
    squares = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for start in range(0, channels, BLOCK_C):
        inside = (row < rows)[:, None] & (start + column < channels)[None, :]
        key = tl.load(key_ptrs + start, mask=inside, other=0.0).to(tl.float32)
        squares += key * key
    scale = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / channels + _fp32(norm_eps))
    tl.store(key_scale_ptr + row, scale, mask=row < rows)


@triton.jit
def state_kernel(
    qkv_ptr,
    key_scale_ptr,
    norm_k_weight_ptr,
    parts_ptr,
    tokens,
    channels,
    rows,
    QK_NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    """One part of S and z: program (b * heads + head, split) sums tokens [split * rows, + rows).

    qkv is packed, or with BY_HEAD each head of q, k and v for itself; the TensorRT plugin has packed ones.
    """
    sequence, split = tl.program_id(0), tl.program_id(1)
    heads = channels // HEAD_DIM
    batch, head = sequence // heads, sequence % heads
    stop = tl.minimum(rows, tokens - split * rows)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    row = batch.to(tl.int64) * tokens + split * rows
    offset, step, part_step = _first_row(batch, head, split * rows, tokens, channels, BY_HEAD, HEAD_DIM)
    key_ptrs = qkv_ptr + offset + part_step + n[:, None] * step + d[None, :]
    weight = _load_weight(norm_k_weight_ptr, head, QK_NORM, HEAD_DIM)
    state = tl.zeros([HEAD_DIM, HEAD_DIM], tl.float32)
    masses = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for start in range(0, stop, BLOCK_N):
        inside = (start + n < stop)[:, None]
        key = tl.load(key_ptrs, mask=inside, other=0.0)
        value = tl.load(key_ptrs + part_step, mask=inside, other=0.0)
        key = _signed_relu(key, weight, QK_NORM)
        if QK_NORM:
            scale = tl.load(key_scale_ptr + row + start + n, mask=start + n < stop, other=0.0)
            key = (key.to(tl.float32) * scale[:, None]).to(key.dtype)
        state = _accumulate(tl.trans(key), value, state)
        masses += key.to(tl.float32)
        key_ptrs += BLOCK_N * step
    mass = tl.sum(masses, axis=0)
    if QK_NORM:
        state *= tl.abs(weight)[:, None]
        mass *= tl.abs(weight)
    _store_part(parts_ptr, sequence, split, tl.num_programs(1), state, mass, HEAD_DIM)


@triton.jit
def _apply_part(
    qkv_ptr,
    norm_q_weight_ptr,
    parts_ptr,
    inverse,
    out_ptr,
    tokens,
    channels,
    rows,
    splits,
    eps,
    QK_NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    """Program (b * heads + head, i) writes tokens [i * rows, + rows), times `inverse` where the output has 8 bits."""
    sequence, block = tl.program_id(0), tl.program_id(1)
    heads = channels // HEAD_DIM
    batch, head = sequence // heads, sequence % heads
    stop = tl.minimum(rows, tokens - block * rows)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    row = batch.to(tl.int64) * tokens + block * rows
    offset, step, _ = _first_row(batch, head, block * rows, tokens, channels, BY_HEAD, HEAD_DIM)
    query_ptrs = qkv_ptr + offset + n[:, None] * step + d[None, :]
    out_ptrs = out_ptr + row * channels + head * HEAD_DIM + n[:, None] * channels + d[None, :]
    weight = _load_weight(norm_q_weight_ptr, head, QK_NORM, HEAD_DIM)
    state, mass = _sum_parts(parts_ptr, sequence, splits, HEAD_DIM)
    if QK_NORM:
        state *= tl.abs(weight)[:, None]
        mass *= tl.abs(weight)
    for start in range(0, stop, BLOCK_N):
        inside = (start + n < stop)[:, None]
        query = _signed_relu(tl.load(query_ptrs, mask=inside, other=0.0), weight, QK_NORM)
        denominator = tl.sum(query.to(tl.float32) * mass[None, :], axis=1) + _fp32(eps)
        out = _dot(query, state) / denominator[:, None]
        if out_ptr.dtype.element_ty == query.dtype:
            result = out.to(query.dtype)
        else:
            result = narrow(out, inverse, out_ptr.dtype.element_ty)
        tl.store(out_ptrs, result, mask=inside)
        query_ptrs += BLOCK_N * step
        out_ptrs += BLOCK_N * channels


@triton.jit
def apply_kernel(
    qkv_ptr,
    norm_q_weight_ptr,
    parts_ptr,
    out_ptr,
    tokens,
    channels,
    rows,
    splits,
    eps,
    QK_NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    """out = (q S) / (q . z + eps), in the dtype of qkv; the TensorRT plugin launches it with these arguments."""
    _apply_part(
        qkv_ptr,
        norm_q_weight_ptr,
        parts_ptr,
        1.0,
        out_ptr,
        tokens,
        channels,
        rows,
        splits,
        eps,
        QK_NORM,
        HEAD_DIM,
        BLOCK_N,
        BY_HEAD,
    )


@triton.jit
def apply_codes_kernel(
    qkv_ptr,
    norm_q_weight_ptr,
    parts_ptr,
    scale_ptr,
    out_ptr,
    tokens,
    channels,
    rows,
    splits,
    eps,
    QK_NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    """`apply_kernel` whose result is divided by the scale and written in 8 bits."""
    inverse = inverse_scale(scale_ptr, out_ptr.dtype.element_ty)
    _apply_part(
        qkv_ptr,
        norm_q_weight_ptr,
        parts_ptr,
        inverse,
        out_ptr,
        tokens,
        channels,
        rows,
        splits,
        eps,
        QK_NORM,
        HEAD_DIM,
        BLOCK_N,
        BY_HEAD,
    )


@triton.jit
def query_backward_kernel(
    qkv_ptr,
    grad_ptr,
    norm_q_weight_ptr,
    parts_ptr,
    grad_qkv_ptr,
    grad_parts_ptr,
    grad_weight_ptr,
    tokens,
    channels,
    rows,
    splits,
    eps,
    QK_NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad of q, one part of the grads of S and z, and with qk-norm one part of the grad of norm_q_weight."""
    sequence, split = tl.program_id(0), tl.program_id(1)
    heads = channels // HEAD_DIM
    batch, head = sequence // heads, sequence % heads
    stop = tl.minimum(rows, tokens - split * rows)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    row = batch.to(tl.int64) * tokens + split * rows
    packed = row * (3 * channels) + head * HEAD_DIM + n[:, None] * (3 * channels) + d[None, :]
    query_ptrs, grad_query_ptrs = qkv_ptr + packed, grad_qkv_ptr + packed
    grad_ptrs = grad_ptr + row * channels + head * HEAD_DIM + n[:, None] * channels + d[None, :]
    weight = _load_weight(norm_q_weight_ptr, head, QK_NORM, HEAD_DIM)
    size = tl.abs(weight)
    state, mass = _sum_parts(parts_ptr, sequence, splits, HEAD_DIM)
    state_columns = tl.trans(state)
    grad_state = tl.zeros([HEAD_DIM, HEAD_DIM], tl.float32)
    grad_masses = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    grad_weights = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for start in range(0, stop, BLOCK_N):
        inside = (start + n < stop)[:, None]
        raw = tl.load(query_ptrs, mask=inside, other=0.0)
        grad = tl.load(grad_ptrs, mask=inside, other=0.0)
        query = _signed_relu(raw, weight, QK_NORM)
        wide = query.to(tl.float32)
        scale = 1.0 / (tl.sum(wide * (mass * size)[None, :], axis=1) + _fp32(eps))
        numerator = _dot(query, state * size[:, None])
        along = tl.sum(grad.to(tl.float32) * numerator, axis=1) * scale  # grad . out
        # With respect to ReLU's output; masked rows have grad = 0 and a finite scale.
        grad_query = (_dot(grad, state_columns) - along[:, None] * mass[None, :]) * scale[:, None]
        grad_query = tl.where(wide > 0.0, grad_query, 0.0)
        tl.store(grad_query_ptrs, (grad_query * weight[None, :]).to(raw.dtype), mask=inside)
        grad_state += _dot(tl.trans(query), grad.to(tl.float32) * scale[:, None])
        grad_masses -= wide * (along * scale)[:, None]
        if QK_NORM:
            grad_weights += grad_query * raw.to(tl.float32)
        query_ptrs += BLOCK_N * 3 * channels
        grad_query_ptrs += BLOCK_N * 3 * channels
        grad_ptrs += BLOCK_N * channels
    part_splits = tl.num_programs(1)
    grad_mass = tl.sum(grad_masses, axis=0) * size
    _store_part(grad_parts_ptr, sequence, split, part_splits, grad_state * size[:, None], grad_mass, HEAD_DIM)
    if QK_NORM:
        weight_row = (batch * part_splits + split) * channels + head * HEAD_DIM
        tl.store(grad_weight_ptr + weight_row + d, tl.sum(grad_weights, axis=0))


@triton.jit
def key_value_backward_kernel(
    qkv_ptr,
    key_scale_ptr,
    norm_k_weight_ptr,
    grad_parts_ptr,
    grad_qkv_ptr,
    grad_weight_ptr,
    row_dots_ptr,
    tokens,
    channels,
    rows,
    splits,
    QK_NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad of v and of k; with qk-norm of the normalised k, whose norm `key_norm_backward_kernel` undoes."""
    sequence, block = tl.program_id(0), tl.program_id(1)
    heads = channels // HEAD_DIM
    batch, head = sequence // heads, sequence % heads
    stop = tl.minimum(rows, tokens - block * rows)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    row = batch.to(tl.int64) * tokens + block * rows
    packed = row * (3 * channels) + channels + head * HEAD_DIM + n[:, None] * (3 * channels) + d[None, :]
    key_ptrs, grad_key_ptrs = qkv_ptr + packed, grad_qkv_ptr + packed
    weight = _load_weight(norm_k_weight_ptr, head, QK_NORM, HEAD_DIM)
    grad_state, grad_mass = _sum_parts(grad_parts_ptr, sequence, splits, HEAD_DIM)
    grad_state_columns = tl.trans(grad_state)
    if QK_NORM:
        grad_state *= tl.abs(weight)[:, None]
    grad_weights = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for start in range(0, stop, BLOCK_N):
        inside = (start + n < stop)[:, None]
        raw = tl.load(key_ptrs, mask=inside, other=0.0)
        value = tl.load(key_ptrs + channels, mask=inside, other=0.0)
        key = _signed_relu(raw, weight, QK_NORM)
        positive = key.to(tl.float32) > 0.0
        if QK_NORM:
            scale = tl.load(key_scale_ptr + row + start + n, mask=start + n < stop, other=0.0)
            key = (key.to(tl.float32) * scale[:, None]).to(key.dtype)
        grad_value = _dot(key, grad_state)
        grad_key = tl.where(positive, _dot(value, grad_state_columns) + grad_mass[None, :], 0.0)
        if QK_NORM:
            unit = raw.to(tl.float32) * scale[:, None]
            grad_weights += grad_key * unit
            grad_key = (grad_key * weight[None, :]).to(raw.dtype)
            dots = tl.sum(grad_key.to(tl.float32) * unit, axis=1)
            tl.store(row_dots_ptr + (row + start + n) * heads + head, dots, mask=start + n < stop)
        tl.store(grad_key_ptrs, grad_key.to(raw.dtype), mask=inside)
        tl.store(grad_key_ptrs + channels, grad_value.to(raw.dtype), mask=inside)
        key_ptrs += BLOCK_N * 3 * channels
        grad_key_ptrs += BLOCK_N * 3 * channels
    if QK_NORM:
        weight_row = (batch * tl.num_programs(1) + block) * channels + head * HEAD_DIM
        tl.store(grad_weight_ptr + weight_row + d, tl.sum(grad_weights, axis=0))


@triton.jit
def key_norm_backward_kernel(
    qkv_ptr,
    key_scale_ptr,
    row_dots_ptr,
    grad_qkv_ptr,
    rows,
    channels,
    heads,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Carry grad of k back through its RMS norm, in place."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = row < rows
    head = tl.arange(0, BLOCK_HEADS)
    dots_ptrs = row_dots_ptr + row.to(tl.int64)[:, None] * heads + head[None, :]
    dots = tl.load(dots_ptrs, mask=valid[:, None] & (head < heads)[None, :], other=0.0)
    mean = tl.sum(dots, axis=1) / channels
    scale = tl.load(key_scale_ptr + row, mask=valid, other=0.0)
    column = tl.arange(0, BLOCK_C)
    packed = row.to(tl.int64)[:, None] * (3 * channels) + channels + column[None, :]
    for start in range(0, channels, BLOCK_C):
        inside = valid[:, None] & (start + column < channels)[None, :]
        unit = tl.load(qkv_ptr + packed + start, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        grad = tl.load(grad_qkv_ptr + packed + start, mask=inside, other=0.0)
        grad_key = scale[:, None] * (grad.to(tl.float32) - unit * mean[:, None])
        tl.store(grad_qkv_ptr + packed + start, grad_key.to(grad.dtype), mask=inside)


# --- Shape of the launches ---


@dataclass(frozen=True)
class Tiling:
    """How one kernel covers the tokens.

    `block_rows`: tokens per loop step. `programs`: about how many programs a launch should have; each one takes
    an equal run of tokens, a multiple of `block_rows`.
    """

    block_rows: int
    programs: int
    num_warps: int
    num_stages: int

    def split(self, tokens: int, sequences: int) -> tuple[int, int]:
        """(number of parts, tokens per part) for `sequences` = batch * heads independent sequences."""
        wanted = max(1, min(-(-self.programs // sequences), -(-tokens // self.block_rows)))
        rows = -(-tokens // (wanted * self.block_rows)) * self.block_rows
        return -(-tokens // rows), rows


@dataclass(frozen=True)
class Tilings:
    """The tilings of every kernel for one element size and head width."""

    state: Tiling
    apply: Tiling
    backward: Tiling
    norm_block_rows: int = 4
    norm_block_channels: int = 512


def tilings(itemsize: int, head_dim: int) -> Tilings:
    """What was fastest of those tried on an H100 and on an H200 for head_dim 32; wider heads and elements take fewer
    rows.
    """
    wide = max(1, itemsize * head_dim // 64)
    backward = Tiling(max(16, 128 // wide), 1152, num_warps=4, num_stages=2)
    if itemsize == 4:
        return Tilings(
            state=Tiling(128 // wide, 576, num_warps=4, num_stages=1),
            apply=Tiling(128 // wide, 576, num_warps=8, num_stages=1),
            backward=backward,
        )
    return Tilings(
        state=Tiling(64 // wide, 288, num_warps=4, num_stages=3),
        apply=Tiling(64 // wide, 576, num_warps=4, num_stages=1),
        backward=backward,
    )


# --- Host code ---


def check_support(qkv: torch.Tensor, head_dim: int, out_dtype: torch.dtype | None = None) -> None:
    """Raise `UnsupportedByTriton` unless the kernels can run: machine, dtypes and head width."""
    if head_dim not in HEAD_DIMS:
        raise UnsupportedByTriton(
            f"linear_attention: impl='triton' needs head_dim in {HEAD_DIMS}, got {head_dim}. Use impl='reference'."
        )
    check_output_support("linear_attention", qkv, out_dtype)


def forward(
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    tiles: Tilings | None = None,
) -> torch.Tensor:
    """The Triton forward: qkv -> a new tensor [B, N, C] of its dtype or `out_dtype`. Arguments as in `api`;
    `tiles` takes the place of `tilings` where others are to be measured.
    """
    check_support(qkv, head_dim, out_dtype)
    call = _Call.of(qkv, norm_q_weight, norm_k_weight, head_dim, norm_eps, tiles)
    out = qkv.new_empty(call.batch, call.tokens, call.channels, dtype=out_dtype or qkv.dtype)
    if out.numel() == 0:
        return out
    parts, splits = call.state()
    tiling = call.tilings.apply
    blocks, rows = tiling.split(call.tokens, call.sequences)
    kernel, scale = (apply_kernel, ()) if out_scale is None else (apply_codes_kernel, (out_scale,))
    sizes = (call.tokens, call.channels, rows, splits, eps)
    arguments = (call.qkv, call.norm_q_weight, parts, *scale, out, *sizes)
    call.launch(kernel, (call.sequences, blocks), tiling, arguments, BY_HEAD=call.by_head)
    return out


def backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of qkv and of both norm weights (empty tensors without qk-norm), given grad [B, N, C].

    The state is computed again: reading k and v once more is cheaper than keeping it for every layer.
    """
    check_support(qkv, head_dim)
    call = _Call.of(qkv, norm_q_weight, norm_k_weight, head_dim, norm_eps)
    grad_qkv = torch.empty_like(call.qkv)
    if grad_qkv.numel() == 0:
        weight = qkv.new_zeros(call.channels if call.qk_norm else 0)
        return grad_qkv, weight, weight.clone()
    parts, splits = call.state()
    tiling = call.tilings.backward
    blocks, rows = tiling.split(call.tokens, call.sequences)
    grad_parts = call.new_parts(blocks)
    weight_parts = [call.new_fp32(call.batch * blocks if call.qk_norm else 0, call.channels) for _ in "qk"]
    grid = (call.sequences, blocks)
    query_tensors = (call.qkv, grad.contiguous(), call.norm_q_weight, parts)
    query_outputs = (grad_qkv, grad_parts, weight_parts[0])
    sizes = (call.tokens, call.channels, rows)
    call.launch(query_backward_kernel, grid, tiling, (*query_tensors, *query_outputs, *sizes, splits, eps))
    row_dots = call.new_fp32(call.batch * call.tokens, call.heads if call.qk_norm else 0)
    key_tensors = (call.qkv, call.key_scale, call.norm_k_weight, grad_parts)
    key_outputs = (grad_qkv, weight_parts[1], row_dots)
    call.launch(key_value_backward_kernel, grid, tiling, (*key_tensors, *key_outputs, *sizes, blocks))
    if not call.qk_norm:
        return grad_qkv, qkv.new_empty(0), qkv.new_empty(0)
    call.key_norm_backward(row_dots, grad_qkv)
    grads = [part.sum(0).to(call.norm_q_weight.dtype) for part in weight_parts]
    return grad_qkv, grads[0], grads[1]


@dataclass(frozen=True)
class _Call:
    """The tensors and sizes that every launch of one call shares. Without qk-norm the weights are stand-ins."""

    qkv: torch.Tensor
    norm_q_weight: torch.Tensor
    norm_k_weight: torch.Tensor
    key_scale: torch.Tensor
    qk_norm: bool
    head_dim: int
    norm_eps: float
    tilings: Tilings

    @staticmethod
    def of(
        qkv: torch.Tensor,
        norm_q_weight: torch.Tensor | None,
        norm_k_weight: torch.Tensor | None,
        head_dim: int,
        norm_eps: float,
        tiles: Tilings | None = None,
    ) -> "_Call":
        """Make the tensors contiguous and allocate the scale of k. Never read when there is no qk-norm."""
        qkv = qkv.contiguous()
        tiles = tiles or tilings(qkv.element_size(), head_dim)
        if norm_q_weight is None or norm_k_weight is None:
            return _Call(qkv, qkv, qkv, qkv, False, head_dim, norm_eps, tiles)
        key_scale = qkv.new_empty(qkv.shape[:2], dtype=torch.float32)
        weights = (norm_q_weight.contiguous(), norm_k_weight.contiguous())
        return _Call(qkv, *weights, key_scale, True, head_dim, norm_eps, tiles)

    @property
    def batch(self) -> int:
        return self.qkv.shape[0]

    @property
    def by_head(self) -> bool:
        return self.qkv.ndim == 4

    @property
    def tokens(self) -> int:
        return self.qkv.shape[2 if self.by_head else 1]

    @property
    def channels(self) -> int:
        return self.qkv.shape[1] * self.head_dim // 3 if self.by_head else self.qkv.shape[2] // 3

    @property
    def heads(self) -> int:
        return self.channels // self.head_dim

    @property
    def sequences(self) -> int:
        return self.batch * self.heads

    def new_fp32(self, *shape: int) -> torch.Tensor:
        return self.qkv.new_empty(shape, dtype=torch.float32)

    def new_parts(self, splits: int) -> torch.Tensor:
        return self.new_fp32(self.sequences, splits, self.head_dim + 1, self.head_dim)

    def state(self) -> tuple[torch.Tensor, int]:
        """Launch the state kernel, after the scale of k where there is qk-norm. Returns the parts, their number."""
        if self.qk_norm:
            self._key_rms()
        tiling = self.tilings.state
        splits, rows = tiling.split(self.tokens, self.sequences)
        parts = self.new_parts(splits)
        tensors = (self.qkv, self.key_scale, self.norm_k_weight, parts)
        arguments = (*tensors, self.tokens, self.channels, rows)
        self.launch(state_kernel, (self.sequences, splits), tiling, arguments, BY_HEAD=self.by_head)
        return parts, splits

    def launch(
        self, kernel: Any, grid: tuple[int, int], tiling: Tiling, arguments: tuple[Any, ...], **constants: bool
    ) -> None:
        """Queue one of the kernels that work per head."""
        launcher(kernel)[grid](
            *arguments,
            QK_NORM=self.qk_norm,
            HEAD_DIM=self.head_dim,
            BLOCK_N=tiling.block_rows,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            **constants,
        )

    def _key_rms(self) -> None:
        rows, block = self.batch * self.tokens, self.tilings.norm_block_rows
        launcher(key_rms_kernel)[(-(-rows // block),)](
            self.qkv,
            self.key_scale,
            rows,
            self.channels,
            self.norm_eps,
            BLOCK_ROWS=block,
            BLOCK_C=self.tilings.norm_block_channels,
            num_warps=4,
        )

    def key_norm_backward(self, row_dots: torch.Tensor, grad_qkv: torch.Tensor) -> None:
        """Turn the gradient of the normalised k into that of k, inside `grad_qkv`."""
        rows, block = self.batch * self.tokens, self.tilings.norm_block_rows
        launcher(key_norm_backward_kernel)[(-(-rows // block),)](
            self.qkv,
            self.key_scale,
            row_dots,
            grad_qkv,
            rows,
            self.channels,
            self.heads,
            BLOCK_ROWS=block,
            BLOCK_C=self.tilings.norm_block_channels,
            BLOCK_HEADS=triton.next_power_of_2(self.heads),
            num_warps=4,
        )
