"""How the op finds its gradients: the reference's, in plain PyTorch."""

from typing import Any

import torch

from sana_kernels.upsample_convolution.reference import upsample_convolution_backward_reference


def upsample_convolution_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Keep the inputs; codes have no gradient."""
    x, weight, bias, *_ = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.mark_non_differentiable(output[1])


def upsample_convolution_gradients(
    ctx: Any, grad: torch.Tensor, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """One gradient per argument of the op."""
    return *upsample_convolution_backward_reference(grad, *ctx.saved_tensors), None, None
