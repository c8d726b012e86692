"""`torch.ops.sana.gemma_attention_triton`: the op whose launch torch.compile and AOTInductor see."""

import torch
from torch import library

from sana_kernels.gemma_attention import triton as kernels


@library.triton_op("sana::gemma_attention_triton", mutates_args=())
def gemma_attention_triton(
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    bias: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    heads: int,
    scale: float,
    soft_cap: float | None,
) -> torch.Tensor:
    """The arguments and the result of `torch.ops.sana.gemma_attention`."""
    return kernels.forward(qkv, cosine, sine, bias, past_key, past_value, heads, scale, soft_cap)
