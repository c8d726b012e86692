"""`torch.ops.sana.scaled_convolution_triton`: the op whose launch torch.compile and AOTInductor see."""

import torch
from torch import library

from sana_kernels.scaled_convolution import triton as kernels


@library.triton_op("sana::scaled_convolution_triton", mutates_args=())
def scaled_convolution_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    silu: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """The arguments and the result of `torch.ops.sana.scaled_convolution`."""
    return kernels.forward(x, weight, activation_scale, weight_scale, bias, out_scale, silu, dtype, out_dtype)
