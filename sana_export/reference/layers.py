"""Layers that the transformer and the autoencoder share."""

import torch
from torch import nn
from torch.nn import functional as F

from sana_kernels.linear_attention.reference import rms_norm


class RMSNorm(nn.Module):
    """RMS norm over the last axis with a weight, variance in fp32."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class DepthwiseConv3x3(nn.Module):
    """Depthwise 3x3 convolution with padding 1 over tokens [B, N, C] that lie on a height x width grid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 3, 3))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        grid = x.transpose(1, 2).unflatten(2, (height, width))
        grid = F.conv2d(grid, self.weight, self.bias, padding=1, groups=grid.shape[1])
        return grid.flatten(2).transpose(1, 2)


class MixFFN(nn.Module):
    """Mix-FFN (GLUMBConv) over tokens [B, N, C]: the 1x1 convolutions are linears.

    The first half of the expanded channels is the value, the second half the gate; SiLU stands before the
    depthwise convolution and again on the gate after it. No residual and no norm here.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv_inverted = nn.Linear(channels, 2 * hidden)
        self.conv_depth = DepthwiseConv3x3(2 * hidden)
        self.conv_point = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        x = F.silu(self.conv_inverted(x))
        value, gate = self.conv_depth(x, height, width).chunk(2, dim=-1)
        return self.conv_point(value * F.silu(gate))
