"""How the ops find their gradients: the reference's closed form, in plain PyTorch."""

from typing import Any

import torch

from sana_kernels.cross_attention.reference import cross_attention_backward_reference


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep the inputs; a result in 8 bits has no gradient."""
    query, key_value, bias, counts, _, ctx.heads, out_dtype = inputs
    ctx.save_for_backward(query, key_value, bias, counts)
    if out_dtype is not None:
        ctx.mark_non_differentiable(output)


def gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """One gradient per argument of the op; the mask has none."""
    query, key_value, bias, counts = ctx.saved_tensors
    found = cross_attention_backward_reference(grad, query, key_value, bias, counts, ctx.heads)
    return *found, None, None, None, None, None
