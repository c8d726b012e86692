"""Gemma-2's attention of a few positions on keys that were kept and on their own, in one pass over packed q, k, v."""

from sana_kernels.gemma_attention.api import gemma_attention
from sana_kernels.gemma_attention.reference import MASKED

__all__ = ["MASKED", "gemma_attention"]
