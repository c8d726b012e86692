"""A model with the outlier channels that trained diffusion transformers have and random weights lack."""

from collections.abc import Sequence

import torch
from torch import nn

_SHIFT_A, _SCALE_A, _SHIFT_M, _SCALE_M = 0, 1, 3, 4


@torch.no_grad()
def plant_outliers(transformer: nn.Module, channels: Sequence[int], factor: float) -> None:
    """Make some channels of the inputs of Sana's Linear DiT layers `factor` times larger, in place, and nothing else.

    Whatever produces a channel is multiplied and the columns that read it are divided: modulation for `qkv` and
    `conv_inverted`, the rows of v for both `to_out`, the value half of the depthwise convolution for `conv_point`
    (`to_q` reads the residual stream, which a norm reads too). For a factor that is a power of two the velocity
    stays the same to the last bit, so every loss of a quantised copy is the outliers'. fp32 weights, channels below
    the model's width.
    """
    index = list(channels)
    tables = _Modulation(transformer.timestep_modulation, index, factor)  # type: ignore[arg-type]
    tables.multiply_rows()
    for block in transformer.blocks:  # type: ignore[union-attr]
        tables.multiply_table(block.modulation)
        width = block.linear_attention.to_out.in_features
        values = [2 * width + channel for channel in index]
        block.linear_attention.qkv.weight[:, index] /= factor
        block.linear_attention.qkv.weight[values] *= factor
        block.linear_attention.to_out.weight[:, index] /= factor
        key_values = [width + channel for channel in index]
        block.cross_attention.to_kv.weight[key_values] *= factor
        block.cross_attention.to_kv.bias[key_values] *= factor
        block.cross_attention.to_out.weight[:, index] /= factor
        block.mix_ffn.conv_inverted.weight[:, index] /= factor
        block.mix_ffn.conv_depth.weight[index] *= factor
        block.mix_ffn.conv_depth.bias[index] *= factor
        block.mix_ffn.conv_point.weight[:, index] /= factor


class _Modulation:
    """x (1 + scale) + shift of some channels times a factor: shift = f shift, scale = f scale + (f - 1).

    Table and timestep rows are added up, so the constant goes into the table alone.
    """

    def __init__(self, timestep_modulation: nn.Linear, channels: list[int], factor: float) -> None:
        self._linear, self._channels, self._factor = timestep_modulation, channels, factor

    def multiply_rows(self) -> None:
        """The timestep's share of shift and scale, the same for all blocks."""
        width = self._linear.in_features
        for part in (_SHIFT_A, _SCALE_A, _SHIFT_M, _SCALE_M):
            rows = [part * width + channel for channel in self._channels]
            self._linear.weight[rows] *= self._factor
            self._linear.bias[rows] *= self._factor

    def multiply_table(self, table: torch.Tensor) -> None:
        """A block's own share [6, C]."""
        for part in (_SHIFT_A, _SCALE_A, _SHIFT_M, _SCALE_M):
            table[part, self._channels] *= self._factor
        for part in (_SCALE_A, _SCALE_M):
            table[part, self._channels] += self._factor - 1
