"""`torch.ops.sana.cross_attention_triton`: the op whose launch torch.compile and AOTInductor see."""

import torch
from torch import library

from sana_kernels.cross_attention import triton as kernels
from sana_kernels.cross_attention.autograd import gradients, setup_context


@library.triton_op("sana::cross_attention_triton", mutates_args=())
def cross_attention_triton(
    query: torch.Tensor,
    key_value: torch.Tensor,
    bias: torch.Tensor,
    counts: torch.Tensor,
    out_scale: torch.Tensor | None,
    heads: int,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """The arguments and the result of `torch.ops.sana.cross_attention`."""
    return kernels.forward(query, key_value, bias, counts, out_scale, heads, out_dtype)


cross_attention_triton.register_autograd(gradients, setup_context=setup_context)
