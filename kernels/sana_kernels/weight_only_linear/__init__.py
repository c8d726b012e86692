"""A linear layer of INT8 weights and floats, for few rows: the weights are widened where they are multiplied."""

from sana_kernels.weight_only_linear.api import weight_only_linear

__all__ = ["weight_only_linear"]
