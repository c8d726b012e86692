"""How the ops find their gradients: the references', in plain PyTorch."""

from typing import Any

import torch

from sana_kernels.modulated_norm.reference import (
    channel_rms_norm_backward_reference,
    modulated_norm_backward_reference,
)


def modulated_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Keep the inputs; a first result in 8 bits has no gradient, an empty second one neither."""
    x, shift, scale, branch, gate, _, ctx.eps, out_dtype = inputs
    ctx.save_for_backward(x, shift, scale, branch, gate)
    ctx.quantized = out_dtype is not None
    without = [t for t, none in zip(output, (ctx.quantized, branch is None), strict=True) if none]
    ctx.mark_non_differentiable(*without)


def modulated_norm_gradients(
    ctx: Any, grad: torch.Tensor | None, grad_updated: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """One gradient per argument of the op."""
    grad = None if ctx.quantized else grad
    x, shift, scale, branch, gate = ctx.saved_tensors
    found = modulated_norm_backward_reference(grad, grad_updated, x, shift, scale, branch, gate, ctx.eps)
    return *found, None, None, None


def channel_rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Keep the inputs but the residual, whose gradient is that of the result; codes have none."""
    x, weight, bias, residual, _, ctx.activation, ctx.eps, _ = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, weight, bias)
    ctx.mark_non_differentiable(output[1])


def channel_rms_norm_gradients(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """One gradient per argument of the op."""
    x, weight, bias = ctx.saved_tensors
    found = channel_rms_norm_backward_reference(grad, x, weight, bias, ctx.activation, ctx.eps)
    residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
    return *found, residual, None, None, None, None
