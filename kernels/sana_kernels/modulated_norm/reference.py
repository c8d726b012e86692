"""The specification of the norms: eager PyTorch, fp32 inside, one rounding per result."""

from typing import Literal

import torch
from torch.nn import functional as F

from sana_kernels.mix_ffn_depthwise.quantization import narrow

Activation = Literal["none", "silu", "relu"]


def modulated_norm_reference(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(LayerNorm(x') (1 + scale) + shift, x') with x' = x + gate branch; x' is empty without a branch.

    x, branch [B, N, C]; shift, scale, gate [B, 1, C]. The norm takes the fp32 x', not the rounded one. The first
    result has the dtype of x or is quantised to `out_dtype` with `out_scale`; x' has the dtype of x.
    """
    wide = _add_branch(x, branch, gate)
    normed = F.layer_norm(wide, wide.shape[-1:], eps=eps) * (1 + scale.float()) + shift.float()
    updated = x.new_empty(0) if branch is None else wide.to(x.dtype)
    return narrow(normed, out_scale, out_dtype or x.dtype), updated


def modulated_norm_backward_reference(
    grad: torch.Tensor | None,
    grad_updated: torch.Tensor | None,
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (x, shift, scale, branch, gate), in their dtypes, given those of both results (None: zero)."""
    wide = _add_branch(x, branch, gate)
    grad_x = torch.zeros_like(wide) if grad_updated is None or branch is None else grad_updated.float()
    grad_shift, grad_scale = torch.zeros_like(shift), torch.zeros_like(scale)
    if grad is not None:
        centred = wide - wide.mean(-1, keepdim=True)
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        unit, wide_grad = centred * inverse, grad.float()
        grad_unit = wide_grad * (1 + scale.float())
        along = (grad_unit * unit).mean(-1, keepdim=True)
        grad_x = grad_x + inverse * (grad_unit - grad_unit.mean(-1, keepdim=True) - unit * along)
        grad_shift = wide_grad.sum(1, keepdim=True).to(shift.dtype)
        grad_scale = (wide_grad * unit).sum(1, keepdim=True).to(scale.dtype)
    grad_branch = grad_gate = None
    if branch is not None:
        grad_branch = (grad_x if gate is None else grad_x * gate.float()).to(branch.dtype)
        if gate is not None:
            grad_gate = (grad_x * branch.float()).sum(1, keepdim=True).to(gate.dtype)
    return grad_x.to(x.dtype), grad_shift, grad_scale, grad_branch, grad_gate


def _add_branch(x: torch.Tensor, branch: torch.Tensor | None, gate: torch.Tensor | None) -> torch.Tensor:
    if branch is None:
        return x.float()
    return x.float() + (branch.float() if gate is None else gate.float() * branch.float())


def channel_rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(activation(x / rms(x) weight + bias) + residual over the last axis, its codes): x, residual [..., C].

    The codes are those of the result in x's dtype, quantised to `out_dtype` with `out_scale`; empty without.
    """
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out = unit * weight.float() + bias.float()
    if activation != "none":
        out = F.silu(out) if activation == "silu" else F.relu(out)
    out = (out if residual is None else out + residual.float()).to(x.dtype)
    return out, x.new_empty(0) if out_dtype is None else narrow(out.float(), out_scale, out_dtype)


def channel_rms_norm_backward_reference(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (x, weight, bias), in their dtypes; that of the residual is `grad`."""
    wide, wide_grad = x.float(), grad.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit = wide * inverse
    before = unit * weight.float() + bias.float()
    if activation == "relu":
        wide_grad = wide_grad * (before > 0)
    elif activation == "silu":
        sigmoid = torch.sigmoid(before)
        wide_grad = wide_grad * sigmoid * (1 + before * (1 - sigmoid))
    grad_unit = wide_grad * weight.float()
    grad_x = inverse * (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True))
    rows = tuple(range(x.ndim - 1))
    return grad_x.to(x.dtype), (wide_grad * unit).sum(rows).to(weight.dtype), wide_grad.sum(rows).to(bias.dtype)
