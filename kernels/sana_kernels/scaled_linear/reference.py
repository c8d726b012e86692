"""The specification of the scaled linear layer: eager PyTorch, the roundings of the separate operations."""

import torch

from sana_kernels.mix_ffn_depthwise.quantization import narrow


def scaled_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    inverse_smooth: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    limit: float | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, codes): branch = x weight^T * scales + bias, y = residual + gate * branch, codes of y * inverse_smooth.

    x [..., K], weight [N, K] of one dtype -> y [..., N] in `dtype`, codes [..., N] in `out_dtype` ([0] without one).
    The scales are fp32: `activation_scale` [], `weight_scale` [] or [N]. Branch and y are rounded to `dtype` once each,
    all else is fp32; the codes are those of the rounded y.
    """
    # Sums of INT8 products are exact, in int32 on a GPU, and are rounded once to fp32.
    exact = torch.float64 if x.dtype == torch.int8 else torch.float32
    wide = (x.to(exact) @ weight.to(exact).t()).float()
    if activation_scale is not None and weight_scale is not None:
        wide = wide * (activation_scale * weight_scale)
    y = residual_sum(wide if bias is None else wide + bias.float(), residual, gate, limit, dtype)
    if out_dtype is None:
        return y, y.new_empty(0)
    unquantised = y.float() if inverse_smooth is None else y.float() * inverse_smooth.float()
    return y, narrow(unquantised, out_scale, out_dtype)


def residual_sum(
    wide: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    limit: float | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What follows the product `wide`, fp32 [..., N], up to y [..., N] in `dtype`."""
    branch = wide.to(dtype)
    if limit is not None:
        branch = branch.clamp(-limit, limit)
    if residual is None:
        return branch
    gated = branch.float() if gate is None else _by_row(gate, branch) * branch.float()
    return (residual.float() + gated).to(dtype)


def _by_row(gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[N], or [B, N] beside the tokens of y [B, ..., N]."""
    return gate.float() if gate.ndim == 1 else gate.float().reshape(gate.shape[0], *[1] * (y.ndim - 2), -1)
