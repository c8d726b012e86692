"""`torch.ops.sana.weight_only_linear_triton`: the op whose launch torch.compile and AOTInductor see."""

import torch
from torch import library

from sana_kernels.weight_only_linear import triton as kernels


@library.triton_op("sana::weight_only_linear_triton", mutates_args=())
def weight_only_linear_triton(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, gated: bool
) -> torch.Tensor:
    """The arguments and the result of `torch.ops.sana.weight_only_linear`."""
    return kernels.forward(x, weight, weight_scale, bias, gated)
