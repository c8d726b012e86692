"""`torch.ops.sana.modulated_norm_triton` and `channel_rms_norm_triton`: launches that torch.compile sees."""

import torch
from torch import library

from sana_kernels.modulated_norm import autograd
from sana_kernels.modulated_norm import triton as kernels


@library.triton_op("sana::modulated_norm_triton", mutates_args=())
def modulated_norm_triton(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The arguments and the results of `torch.ops.sana.modulated_norm`."""
    return kernels.modulated_norm_forward(x, shift, scale, branch, gate, out_scale, eps, out_dtype)


@library.triton_op("sana::channel_rms_norm_triton", mutates_args=())
def channel_rms_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The arguments and the results of `torch.ops.sana.channel_rms_norm`."""
    return kernels.channel_rms_norm_forward(x, weight, bias, residual, out_scale, activation, eps, out_dtype)


modulated_norm_triton.register_autograd(
    autograd.modulated_norm_gradients, setup_context=autograd.modulated_norm_context
)
channel_rms_norm_triton.register_autograd(
    autograd.channel_rms_norm_gradients, setup_context=autograd.channel_rms_norm_context
)
