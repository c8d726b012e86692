"""How an op with the arguments of `mix_ffn_depthwise` finds its gradients: the reference's, in plain PyTorch."""

from typing import Any

import torch

from sana_kernels.mix_ffn_depthwise.reference import mix_ffn_depthwise_backward_reference


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep the inputs; the backward computes the forward again. A result in 8 bits has no gradient."""
    x, x_bias, weight, bias, _, ctx.height, ctx.width, out_dtype = inputs
    if out_dtype is None:
        ctx.save_for_backward(x, x_bias, weight, bias)
    else:
        ctx.mark_non_differentiable(output)


def gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """One gradient per argument of the op."""
    x, x_bias, weight, bias = ctx.saved_tensors
    found = mix_ffn_depthwise_backward_reference(grad, x, x_bias, weight, bias, ctx.height, ctx.width)
    return *found, None, None, None, None
