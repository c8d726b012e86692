"""How an op with the arguments of `linear_attention` finds its gradients."""

from typing import Any

import torch

from sana_kernels.linear_attention.reference import packed


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep what the backward op needs: the inputs. It computes the state again. A result in 8 bits has no gradient."""
    qkv, norm_q_weight, norm_k_weight, *ctx.numbers, _, out_dtype = inputs
    ctx.save_for_backward(qkv, norm_q_weight, norm_k_weight)
    if out_dtype is not None:
        ctx.mark_non_differentiable(output)


def gradients(backward: Any, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """One gradient per argument of the op, computed by `backward`."""
    qkv, norm_q_weight, norm_k_weight = ctx.saved_tensors
    grad_qkv, grad_q, grad_k = backward(grad, packed(qkv), norm_q_weight, norm_k_weight, *ctx.numbers)
    if qkv.ndim == 4:
        grad_qkv = grad_qkv.unflatten(2, (qkv.shape[1], qkv.shape[3])).transpose(1, 2)
    without = norm_q_weight is None
    return grad_qkv, None if without else grad_q, None if without else grad_k, None, None, None, None, None
