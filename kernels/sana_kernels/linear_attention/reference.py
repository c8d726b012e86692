"""The specification of ReLU linear attention: eager PyTorch, fp32 inside."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last axis, in fp32; the result has the dtype of `x`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def linear_attention_reference(
    qkv: torch.Tensor,
    norm_q_weight: torch.Tensor | None,
    norm_k_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    norm_eps: float,
) -> torch.Tensor:
    """out_n = (sum_m v_m k_m^T) q_n / (sum_m k_m . q_n + eps), with q and k after ReLU.

    qkv [B, N, 3C], packed [q | k | v], each with its heads in order -> [B, N, C] in the dtype of `qkv`.
    With norm weights [C], q and k pass an RMS norm over all C channels first (SANA-1.5, Sprint).
    Source: Sana paper (ReLU linear attention), in the sum form that needs no padding of v.
    """
    query, key, value = qkv.chunk(3, dim=-1)
    if norm_q_weight is not None and norm_k_weight is not None:
        query = rms_norm(query, norm_q_weight, norm_eps)
        key = rms_norm(key, norm_k_weight, norm_eps)
    query, key, value = (_split_heads(x.float(), head_dim) for x in (query.relu(), key.relu(), value))
    state = key.transpose(-1, -2) @ value  # [B, heads, D, D]
    key_sum = key.sum(dim=-2, keepdim=True)  # [B, heads, 1, D]
    denominator = query @ key_sum.transpose(-1, -2) + eps  # [B, heads, N, 1]
    out = (query @ state) / denominator
    return out.transpose(1, 2).flatten(2).to(qkv.dtype)


def _split_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # [B, heads, N, D]
