"""`torch.ops.sana.linear_attention`: one op for eager PyTorch, torch.export and the ONNX exporter."""

import torch

from sana_kernels.linear_attention.reference import linear_attention_reference


@torch.library.custom_op("sana::linear_attention", mutates_args=())
def _linear_attention(
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
) -> torch.Tensor:
    return linear_attention_reference(qkv, norm_q_weight, norm_k_weight, head_dim, eps, norm_eps)


@_linear_attention.register_fake
def _(
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
) -> torch.Tensor:
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


def linear_attention(
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None = None,
    norm_k_weight: torch.Tensor | None = None,
    *,
    head_dim: int,
    eps: float = 1e-15,
    norm_eps: float = 1e-5,
) -> torch.Tensor:
    """ReLU linear attention: qkv [B, N, 3C] packed [q | k | v] -> [B, N, C], dtype of `qkv`, fp32 inside.

    `norm_q_weight`, `norm_k_weight` [C] are given together or not at all. Raises ValueError otherwise, and for
    a channel count that is not three times a multiple of `head_dim`.
    """
    if qkv.ndim != 3 or qkv.shape[-1] % (3 * head_dim):
        raise ValueError(
            f"linear_attention: qkv must be [B, N, 3C] with C a multiple of head_dim={head_dim}, "
            f"got {tuple(qkv.shape)}"
        )
    if (norm_q_weight is None) != (norm_k_weight is None):
        raise ValueError("linear_attention: norm_q_weight and norm_k_weight must be given together")
    return _linear_attention(qkv, norm_q_weight, norm_k_weight, head_dim, eps, norm_eps)
