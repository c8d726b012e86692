"""The specification of Gemma-2's attention: eager PyTorch, as transformers' Gemma2Attention with eager attention."""

import torch
from torch.nn import functional as F

# A hard zero after softmax of scores that are near zero.
MASKED = -10000.0


def gemma_attention_reference(
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    bias: torch.Tensor,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    heads: int,
    scale: float,
    soft_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed qkv [T, (heads + 2 G) D] -> out [T, heads D] and the T keys (rotated) and values [G, T, D].

    cosine, sine [T, D] of the positions, bias [P + T] fp32 of the keys; past_key and past_value [G, P, D] stand before
    the own ones, or are None. The softmax is fp32, everything else in the dtype of qkv.
    """
    query, key, value = split_heads(qkv, heads, cosine.shape[-1])
    query, key = rotated(query, cosine, sine), rotated(key, cosine, sine)
    # Compiled code takes its inputs to be laid out as its examples were, and what is kept is a copy.
    own = key.contiguous(), value.contiguous()
    key_heads, tokens, _ = key.shape
    groups = heads // key_heads
    if past_key is not None and past_value is not None:
        key, value = torch.cat([past_key, key], dim=1), torch.cat([past_value, value], dim=1)
    # The query heads of one key head as rows of one product: [G, groups * T, D].
    grouped = query.unflatten(0, (key_heads, groups)).flatten(1, 2)
    scores = torch.bmm(grouped, key.transpose(1, 2)).float() * scale
    if soft_cap is not None:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    position = torch.arange(bias.shape[0], device=qkv.device)
    seen = position[-tokens:, None] >= position[None, :]
    weights = F.softmax(scores.unflatten(1, (groups, -1)) + torch.where(seen, bias, MASKED), dim=-1).to(qkv.dtype)
    out = torch.bmm(weights.flatten(1, 2), value)  # [G, groups * T, D]
    return out.unflatten(1, (groups, -1)).flatten(0, 1).transpose(0, 1).flatten(1), *own


def split_heads(qkv: torch.Tensor, heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed qkv [T, (heads + 2 G) D] -> query [heads, T, D], key and value [G, T, D]."""
    by_head = qkv.unflatten(-1, (-1, head_dim)).transpose(0, 1)
    key_heads = (by_head.shape[0] - heads) // 2
    query, key, value = by_head.split([heads, key_heads, key_heads])
    return query, key, value


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """x [.., T, D] turned to its positions."""
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-high, low], dim=-1) * sine
