"""The Gemma-2 text encoder as the engine computes it: transformers' module behind our tensor names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Gemma2Config, Gemma2Model

# Scores are soft-capped to +-50, so this is a hard zero after softmax in every dtype, fp16 included.
_MASKED = -10000.0


def gemma2_config(config: Mapping[str, Any]) -> Gemma2Config:
    """transformers' config from a `text_encoder/config.json`; eager attention, the one with the soft cap."""
    return Gemma2Config(**{**config, "use_cache": False}, attn_implementation="eager")


class TextEncoder(nn.Module):
    """caption_tokens, caption_mask [B, L] int64 -> caption_embeds [B, L, C]: the last hidden state.

    Causal, padding on the right. The caption the transformer sees is position 0 and the last 299 of the text's
    own padded length; the selection is a copy of two slices, left to the caller.
    """

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.model = Gemma2Model(config)

    def forward(self, caption_tokens: torch.Tensor, caption_mask: torch.Tensor) -> torch.Tensor:
        length = caption_tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=caption_tokens.device).tril()
        allowed = causal[None, None] & caption_mask.bool()[:, None, None, :]  # [B, 1, L, L]
        bias = torch.where(allowed, 0.0, _MASKED).to(self.model.norm.weight.dtype)
        # Every caption is far shorter than the sliding window, so both layer types see the same mask.
        masks = {"full_attention": bias, "sliding_attention": bias}
        return self.model(caption_tokens, attention_mask=masks, use_cache=False).last_hidden_state
