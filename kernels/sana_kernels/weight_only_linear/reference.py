"""The specification of the weight-only linear layer: eager PyTorch."""

import torch


def weight_only_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [..., K], weight [N, K] int8, weight_scale [] or [N] fp32, bias [N] -> weight_scale * (x weight^T) + bias.

    [..., N] in the dtype of x. The codes are numbers of every float dtype; all is fp32 up to one rounding at the end.
    """
    wide = x.float() @ weight.float().t() * weight_scale
    return (wide if bias is None else wide + bias.float()).to(x.dtype)
