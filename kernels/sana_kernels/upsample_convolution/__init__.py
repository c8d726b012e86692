"""DC-AE's upsampling in one launch: nearest upsampling, 3x3 convolution, bias, shortcut and 8-bit codes."""

from sana_kernels.upsample_convolution.api import upsample_convolution, upsample_convolution_codes
from sana_kernels.upsample_convolution.reference import phase_weight

__all__ = ["phase_weight", "upsample_convolution", "upsample_convolution_codes"]
