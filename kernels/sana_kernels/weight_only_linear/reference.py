"""The specification of the weight-only linear layer: eager PyTorch."""

import torch
from torch.nn import functional as F


def weight_only_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, gated: bool
) -> torch.Tensor:
    """x [..., K], weight [N, K] int8, weight_scale [] or [N] fp32, bias [N] -> weight_scale * (x weight^T) + bias.

    [..., N] in the dtype of x. The codes are numbers of every float dtype; all is fp32 up to one rounding at the end.
    `gated`: the first half of it is a gate and the result gelu(gate) * rest, [..., N / 2], GELU by its tanh formula.
    """
    wide = x.float() @ weight.float().t() * weight_scale
    if bias is not None:
        wide = wide + bias.float()
    if gated:
        gate, rest = wide.chunk(2, dim=-1)
        wide = F.gelu(gate, approximate="tanh") * rest
    return wide.to(x.dtype)
