"""`torch.ops.sana.scaled_linear_triton`: the op whose launch torch.compile and AOTInductor see."""

import torch
from torch import library

from sana_kernels.scaled_linear import triton as kernels


@library.triton_op("sana::scaled_linear_triton", mutates_args=())
def scaled_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    inverse_smooth: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    limit: float | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The arguments and the results of `torch.ops.sana.scaled_linear`."""
    return kernels.forward(
        x,
        weight,
        activation_scale,
        weight_scale,
        bias,
        residual,
        gate,
        inverse_smooth,
        out_scale,
        limit,
        dtype,
        out_dtype,
    )
