"""A 3x3 convolution over 8-bit codes that also computes SiLU and writes the codes for the next one."""

from sana_kernels.scaled_convolution.api import scaled_convolution, scaled_convolution_codes

__all__ = ["scaled_convolution", "scaled_convolution_codes"]
