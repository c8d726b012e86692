"""Softmax attention of image tokens on caption tokens, over packed keys and values."""

from sana_kernels.cross_attention.api import cross_attention, key_counts

__all__ = ["cross_attention", "key_counts"]
