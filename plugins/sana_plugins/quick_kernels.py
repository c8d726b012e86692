"""Entry points of the linear-attention kernels in the order TensorRT's quick plugins pass arguments.

Pointers to the inputs, then int32 scalars, then pointers to the outputs. A float travels as its fp32 bits: the
scalars of a quick plugin are integers. What is computed is in `sana_kernels.linear_attention.triton`.
"""

import triton
import triton.language as tl

from sana_kernels.linear_attention.triton import apply_kernel, key_rms_kernel, state_kernel


@triton.jit
def key_rms_quick(
    qkv_ptr,
    rows,
    channels,
    norm_eps_bits,
    key_scale_ptr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """qkv -> key_scale."""
    norm_eps = norm_eps_bits.to(tl.float32, bitcast=True)
    key_rms_kernel(qkv_ptr, key_scale_ptr, rows, channels, norm_eps, BLOCK_ROWS, BLOCK_C)


@triton.jit
def state_quick(
    qkv_ptr,
    tokens,
    channels,
    rows,
    parts_ptr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """qkv -> parts. The pointers of qk-norm are not read without it."""
    state_kernel(qkv_ptr, parts_ptr, qkv_ptr, parts_ptr, tokens, channels, rows, False, HEAD_DIM, BLOCK_N, False)


@triton.jit
def normed_state_quick(
    qkv_ptr,
    key_scale_ptr,
    norm_k_weight_ptr,
    tokens,
    channels,
    rows,
    parts_ptr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """qkv, key_scale, norm_k_weight -> parts."""
    state_kernel(
        qkv_ptr, key_scale_ptr, norm_k_weight_ptr, parts_ptr, tokens, channels, rows, True, HEAD_DIM, BLOCK_N, False
    )


@triton.jit
def apply_quick(
    qkv_ptr,
    parts_ptr,
    tokens,
    channels,
    rows,
    splits,
    eps_bits,
    out_ptr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """qkv, parts -> out."""
    eps = eps_bits.to(tl.float32, bitcast=True)
    apply_kernel(
        qkv_ptr, qkv_ptr, parts_ptr, out_ptr, tokens, channels, rows, splits, eps, False, HEAD_DIM, BLOCK_N, False
    )


@triton.jit
def normed_apply_quick(
    qkv_ptr,
    parts_ptr,
    norm_q_weight_ptr,
    tokens,
    channels,
    rows,
    splits,
    eps_bits,
    out_ptr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """qkv, parts, norm_q_weight -> out."""
    eps = eps_bits.to(tl.float32, bitcast=True)
    apply_kernel(
        qkv_ptr,
        norm_q_weight_ptr,
        parts_ptr,
        out_ptr,
        tokens,
        channels,
        rows,
        splits,
        eps,
        True,
        HEAD_DIM,
        BLOCK_N,
        False,
    )
