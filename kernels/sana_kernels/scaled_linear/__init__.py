"""A linear layer over 8-bit codes or floats that also adds its gated result to the residual and quantises the sum."""

from sana_kernels.scaled_linear.api import scaled_linear, scaled_linear_codes

__all__ = ["scaled_linear", "scaled_linear_codes"]
