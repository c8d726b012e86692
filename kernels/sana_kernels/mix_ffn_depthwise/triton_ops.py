"""`torch.ops.sana.mix_ffn_depthwise_triton`: the op whose launch torch.compile and AOTInductor see."""

import torch
from torch import library

from sana_kernels.mix_ffn_depthwise import triton as kernels
from sana_kernels.mix_ffn_depthwise.autograd import gradients, setup_context


@library.triton_op("sana::mix_ffn_depthwise_triton", mutates_args=())
def mix_ffn_depthwise_triton(
    x: torch.Tensor,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor | None,
    height: int,
    width: int,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """The arguments and the result of `torch.ops.sana.mix_ffn_depthwise`."""
    return kernels.forward(x, x_bias, weight, bias, out_scale, height, width, out_dtype)


mix_ffn_depthwise_triton.register_autograd(gradients, setup_context=setup_context)
