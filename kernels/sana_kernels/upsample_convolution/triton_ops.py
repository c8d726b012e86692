"""`torch.ops.sana.upsample_convolution_triton`: the op whose launch torch.compile and AOTInductor see."""

import torch
from torch import library

from sana_kernels.upsample_convolution import autograd
from sana_kernels.upsample_convolution import triton as kernels


@library.triton_op("sana::upsample_convolution_triton", mutates_args=())
def upsample_convolution_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The arguments and the results of `torch.ops.sana.upsample_convolution`."""
    return kernels.forward(x, weight, bias, out_scale, out_dtype)


upsample_convolution_triton.register_autograd(
    autograd.upsample_convolution_gradients, setup_context=autograd.upsample_convolution_context
)
