"""Sana's Linear DiT over tokens [B, N, C], every released variant.

Reference for: Sana 0.6B/1.6B, SANA-1.5 (qk-norm), Sprint (guidance embedding), 2K/4K (position embedding).
Oracle: diffusers' SanaTransformer2DModel. Eager PyTorch, no cleverness.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from sana_export.reference.layers import MixFFN, RMSNorm
from sana_kernels.linear_attention import linear_attention

_TIMESTEP_CHANNELS = 256
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a Linear DiT. `sample_size` is the latent side the position embedding is based on."""

    channels: int
    depth: int
    head_dim: int
    cross_heads: int
    caption_channels: int
    latent_channels: int
    mlp_ratio: float
    qk_norm: bool
    guidance_embeds: bool
    guidance_embeds_scale: float
    timestep_scale: float
    sample_size: int
    interpolation_scale: float | None
    norm_eps: float
    attention_clip: bool = False

    @classmethod
    def from_upstream(cls, config: Mapping[str, Any], *, attention_clip: bool = False) -> "TransformerConfig":
        """From diffusers' `transformer/config.json`, in which older files miss the last five fields."""
        return cls(
            channels=config["num_attention_heads"] * config["attention_head_dim"],
            depth=config["num_layers"],
            head_dim=config["attention_head_dim"],
            cross_heads=config["num_cross_attention_heads"],
            caption_channels=config["caption_channels"],
            latent_channels=config["in_channels"],
            mlp_ratio=config["mlp_ratio"],
            qk_norm=config.get("qk_norm") is not None,
            guidance_embeds=bool(config.get("guidance_embeds", False)),
            guidance_embeds_scale=config.get("guidance_embeds_scale", 0.1),
            timestep_scale=config.get("timestep_scale", 1.0),
            sample_size=config["sample_size"],
            interpolation_scale=config.get("interpolation_scale"),
            norm_eps=config["norm_eps"],
            attention_clip=attention_clip,
        )


def position_embedding(config: TransformerConfig, latent_height: int, latent_width: int) -> torch.Tensor:
    """2-D sin-cos position embedding [1, N, C] fp32: the w half first, sin before cos (SANA.md 1.6).

    Each axis spans 0 .. sample_size / interpolation_scale whatever the grid.
    """
    assert config.interpolation_scale is not None
    quarter = config.channels // 4
    frequency = 10000.0 ** -(np.arange(quarter, dtype=np.float64) / quarter)

    def encode(size: int) -> np.ndarray:
        step = config.sample_size / size / config.interpolation_scale  # type: ignore[operator]
        angle = np.outer(np.arange(size, dtype=np.float64) * step, frequency)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # [size, C/2]

    grid = (latent_height, latent_width, 2 * quarter)
    w_half = np.broadcast_to(encode(latent_width)[None, :, :], grid)
    h_half = np.broadcast_to(encode(latent_height)[:, None, :], grid)
    table = np.concatenate([w_half, h_half], axis=-1).reshape(1, -1, config.channels)
    return torch.from_numpy(table.astype(np.float32))


class SinusoidalMLP(nn.Module):
    """Sinusoid of a scalar [B] (cos first, 256 wide, fp32), then Linear, SiLU, Linear -> [B, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(_TIMESTEP_CHANNELS, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, scalar: torch.Tensor) -> torch.Tensor:
        half = _TIMESTEP_CHANNELS // 2
        index = torch.arange(half, dtype=torch.float32, device=scalar.device)
        angle = scalar.float()[:, None] * torch.exp(index * (-math.log(10000.0) / half))[None]
        sinusoid = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


class CaptionProjection(nn.Module):
    """Linear, GELU (tanh), Linear: caption_embeds [B, S, caption_channels] -> [B, S, C]."""

    def __init__(self, caption_channels: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(caption_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, caption_embeds: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(caption_embeds), approximate="tanh"))


class LinearAttention(nn.Module):
    """ReLU linear self-attention with packed q/k/v; optionally qk-norm and the clip of fp16-era weights."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        channels = config.channels
        self.head_dim = config.head_dim
        self.attention_clip = config.attention_clip
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.norm_q = RMSNorm(channels) if config.qk_norm else None
        self.norm_k = RMSNorm(channels) if config.qk_norm else None
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norms = (self.norm_q.weight, self.norm_k.weight) if self.norm_q and self.norm_k else ()
        x = self.to_out(linear_attention(self.qkv(x), *norms, head_dim=self.head_dim))
        return x.clamp(-_FP16_MAX, _FP16_MAX) if self.attention_clip else x


class CrossAttention(nn.Module):
    """Softmax attention of image tokens on caption tokens; scores and softmax in fp32."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        channels = config.channels
        self.heads = config.cross_heads
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(channels, 2 * channels)
        self.norm_q = RMSNorm(channels) if config.qk_norm else None
        self.norm_k = RMSNorm(channels) if config.qk_norm else None
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, caption: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        query = self.to_q(x)
        key, value = self.to_kv(caption).chunk(2, dim=-1)
        if self.norm_q and self.norm_k:
            query, key = self.norm_q(query), self.norm_k(key)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        # The scale goes on q, before the product, so that fp16 scores stay in range.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        weights = F.softmax(scores.float() + bias, dim=-1).to(x.dtype)
        return self.to_out((weights @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Modulated linear attention, plain cross-attention (no norm, no gate), modulated Mix-FFN."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.modulation = nn.Parameter(torch.empty(6, config.channels))
        self.linear_attention = LinearAttention(config)
        self.cross_attention = CrossAttention(config)
        self.mix_ffn = MixFFN(config.channels, int(config.mlp_ratio * config.channels))

    def forward(
        self,
        x: torch.Tensor,
        caption: torch.Tensor,
        bias: torch.Tensor,
        timestep_modulation: torch.Tensor,
        grid: tuple[int, int],
    ) -> torch.Tensor:
        table = self.modulation[None] + timestep_modulation  # [B, 6, C]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table.split(1, dim=1)
        x = x + gate_a * self.linear_attention(modulated_norm(x, shift_a, scale_a, self.norm_eps))
        x = x + self.cross_attention(x, caption, bias)
        return x + gate_m * self.mix_ffn(modulated_norm(x, shift_m, scale_m, self.norm_eps), *grid)


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm without affine, then scale and shift: x [B, N, C], shift and scale [B, 1, C]."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class LinearTransformer(nn.Module):
    """The Linear DiT: (latent, caption, timestep) -> velocity."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.patch_embed = nn.Linear(config.latent_channels, channels)
        self.timestep_embedder = SinusoidalMLP(channels)
        self.guidance_embedder = SinusoidalMLP(channels) if config.guidance_embeds else None
        self.timestep_modulation = nn.Linear(channels, 6 * channels)
        self.caption_projection = CaptionProjection(config.caption_channels, channels)
        self.caption_norm = RMSNorm(channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.modulation = nn.Parameter(torch.empty(2, channels))
        self.proj_out = nn.Linear(channels, config.latent_channels)

    def forward(
        self,
        latent: torch.Tensor,
        caption_embeds: torch.Tensor,
        caption_mask: torch.Tensor,
        timestep: torch.Tensor,
        guidance_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """latent [B, 32, h, w], caption_embeds [B, S, C], caption_mask [B, S] 0/1, timestep and guidance_embeds
        [B] -> velocity [B, 32, h, w] in the latent's dtype. `guidance_embeds` is the plain guidance scale.
        """
        height, width = latent.shape[-2:]
        x = self.patch_embed(latent.flatten(2).transpose(1, 2))
        if self.config.interpolation_scale is not None:
            x = x + position_embedding(self.config, height, width).to(x.device, x.dtype)
        embedding, timestep_modulation = self._embed_timestep(timestep, guidance_embeds)
        caption = self.caption_norm(self.caption_projection(caption_embeds.to(x.dtype)))
        bias = (1 - caption_mask.float())[:, None, None, :] * -10000.0  # [B, 1, 1, S]
        for block in self.blocks:
            x = block(x, caption, bias, timestep_modulation, (height, width))
        shift, scale = (self.modulation[None] + embedding[:, None]).split(1, dim=1)
        x = self.proj_out(modulated_norm(x, shift, scale, self.config.norm_eps))
        return x.transpose(1, 2).unflatten(2, (height, width))

    def _embed_timestep(
        self, timestep: torch.Tensor, guidance_embeds: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = self.timestep_embedder(timestep * self.config.timestep_scale)
        if self.guidance_embedder is not None:
            assert guidance_embeds is not None, "a guidance-embedded model needs guidance_embeds"
            embedding = embedding + self.guidance_embedder(guidance_embeds * self.config.guidance_embeds_scale)
        modulation = self.timestep_modulation(F.silu(embedding)).unflatten(-1, (6, -1))
        return embedding, modulation
