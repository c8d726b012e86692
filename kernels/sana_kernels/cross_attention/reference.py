"""The specification of cross-attention: eager PyTorch, fp32 inside."""

import torch
from torch.nn import functional as F

from sana_kernels.mix_ffn_depthwise.quantization import narrow


def cross_attention_reference(
    query: torch.Tensor,
    key_value: torch.Tensor,
    bias: torch.Tensor,
    counts: torch.Tensor,
    out_scale: torch.Tensor | None,
    heads: int,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + bias) v of the first `counts` keys: query [B, N, C], key_value [B, S, 2C] packed
    [k | v], bias [B, S] fp32, counts [B] int32 -> [B, N, C] in the dtype of `query`, or quantised to `out_dtype`.
    """
    weights, (_, _, value) = _weights(query, key_value, bias, counts, heads)
    out = (weights @ value).transpose(1, 2).flatten(2)
    return narrow(out, out_scale, out_dtype or query.dtype).contiguous()


def cross_attention_backward_reference(
    grad: torch.Tensor,
    query: torch.Tensor,
    key_value: torch.Tensor,
    bias: torch.Tensor,
    counts: torch.Tensor,
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of query and key_value given that of the result, in their dtypes, fp32 inside."""
    weights, (q, k, v) = _weights(query, key_value, bias, counts, heads)
    wide = _split_heads(grad, heads)
    grad_weights = wide @ v.transpose(-1, -2)
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    grads = (grad_scores @ k, grad_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ wide)
    grad_query, grad_key, grad_value = (t.transpose(1, 2).flatten(2) for t in grads)
    return grad_query.to(query.dtype), torch.cat([grad_key, grad_value], dim=-1).to(key_value.dtype)


def _weights(
    query: torch.Tensor, key_value: torch.Tensor, bias: torch.Tensor, counts: torch.Tensor, heads: int
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Softmax weights [B, heads, N, S], and query, key, value [B, heads, ., D], all fp32."""
    key, value = key_value.chunk(2, dim=-1)
    q, k, v = (_split_heads(t, heads) for t in (query, key, value))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias[:, None, None, :]
    absent = torch.arange(bias.shape[1], device=bias.device) >= counts[:, None]
    return F.softmax(scores.masked_fill(absent[:, None, None, :], -torch.inf), dim=-1), (q, k, v)


def _split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.float().unflatten(-1, (heads, -1)).transpose(1, 2)
