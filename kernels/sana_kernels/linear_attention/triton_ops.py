"""`torch.ops.sana.linear_attention_triton`: the kernels as ops whose launches torch.compile and AOTInductor see."""

import functools

import torch
from torch import library

from sana_kernels.linear_attention import triton as kernels
from sana_kernels.linear_attention.autograd import gradients, setup_context


@library.triton_op("sana::linear_attention_triton", mutates_args=())
def linear_attention_triton(
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The arguments and the result of `torch.ops.sana.linear_attention`."""
    return kernels.forward(qkv, norm_q_weight, norm_k_weight, head_dim, eps, norm_eps, out_scale, out_dtype)


@library.triton_op("sana::linear_attention_backward_triton", mutates_args=())
def linear_attention_backward_triton(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of qkv and of both norm weights, which are empty without qk-norm."""
    return kernels.backward(grad, qkv, norm_q_weight, norm_k_weight, head_dim, eps, norm_eps)


linear_attention_triton.register_autograd(
    functools.partial(gradients, linear_attention_backward_triton), setup_context=setup_context
)
