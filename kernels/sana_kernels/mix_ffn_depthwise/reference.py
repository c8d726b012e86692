"""The specification of the middle of Mix-FFN (GLUMBConv): eager PyTorch, fp32 inside."""

import torch
from torch.nn import functional as F

from sana_kernels.mix_ffn_depthwise.quantization import narrow


def mix_ffn_depthwise_reference(
    x: torch.Tensor,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor | None,
    height: int,
    width: int,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """value * SiLU(gate), where [value | gate] = depthwise 3x3 of SiLU(x + x_bias), padding 1, with bias.

    x [B, N, 2F], tokens row by row of a height x width image, x_bias [2F], weight [2F, 1, 3, 3], bias [2F] ->
    [B, N, F] in the dtype of x, or in `out_dtype`: saturate(round_half_even(y / out_scale)) of the fp32 result y.
    """
    grid = _grid(F.silu(_biased(x, x_bias)), height, width)
    grid = F.conv2d(grid, weight.float(), bias.float(), padding=1, groups=grid.shape[1])
    value, gate = _tokens(grid).chunk(2, dim=-1)
    return narrow(value * F.silu(gate), out_scale, out_dtype or x.dtype).contiguous()


def mix_ffn_depthwise_backward_reference(
    grad: torch.Tensor,
    x: torch.Tensor,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    height: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients of x, x_bias (None without it), weight and bias given that of the result [B, N, F].

    In their dtypes, fp32 inside.

    The forward is computed again. PyTorch's autograd of the forward gives the same.
    """
    active, active_slope = _silu_and_slope(_biased(x, x_bias))
    grid, wide_weight = _grid(active, height, width), weight.float()
    groups = grid.shape[1]
    convolved = F.conv2d(grid, wide_weight, bias.float(), padding=1, groups=groups)
    value, gate = _tokens(convolved).chunk(2, dim=-1)
    opened, slope = _silu_and_slope(gate)
    wide = grad.float()
    grad_grid = _grid(torch.cat([wide * opened, wide * value * slope], dim=-1), height, width)
    ones, zeros = [1, 1], [0, 0]
    grad_grid, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_grid, grid, wide_weight, [groups], ones, ones, ones, False, zeros, groups, [True, True, True]
    )
    grad_x = _tokens(grad_grid) * active_slope
    grad_x_bias = None if x_bias is None else grad_x.sum((0, 1)).to(x_bias.dtype)
    return grad_x.to(x.dtype).contiguous(), grad_x_bias, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _biased(x: torch.Tensor, x_bias: torch.Tensor | None) -> torch.Tensor:
    return x.float() if x_bias is None else x.float() + x_bias.float()


def _grid(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return tokens.transpose(1, 2).unflatten(2, (height, width))  # [B, C, height, width]


def _tokens(grid: torch.Tensor) -> torch.Tensor:
    return grid.flatten(2).transpose(1, 2)  # [B, N, C]


def _silu_and_slope(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sigmoid = torch.sigmoid(x)
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
