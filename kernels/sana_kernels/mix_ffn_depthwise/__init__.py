"""The middle of Mix-FFN: SiLU, depthwise 3x3 convolution and SiLU gate over tokens, in one pass."""

from sana_kernels.mix_ffn_depthwise.api import mix_ffn_depthwise, tap_major

__all__ = ["mix_ffn_depthwise", "tap_major"]
