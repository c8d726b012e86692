"""ReLU linear attention over packed q/k/v tokens."""

from sana_kernels.linear_attention.api import linear_attention

__all__ = ["linear_attention"]
