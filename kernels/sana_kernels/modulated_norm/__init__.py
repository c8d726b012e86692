"""Norms with what stands around them in one pass: modulated LayerNorm of the transformer, channel RMS norm of DC-AE."""

from sana_kernels.modulated_norm.api import (
    channel_rms_norm,
    channel_rms_norm_codes,
    modulated_norm,
    residual_modulated_norm,
)

__all__ = ["channel_rms_norm", "channel_rms_norm_codes", "modulated_norm", "residual_modulated_norm"]
