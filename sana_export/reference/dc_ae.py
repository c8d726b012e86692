"""DC-AE f32c32: the deep-compression autoencoder of Sana, decoder and encoder.

Reference for diffusers' AutoencoderDC (Sana flavour). Channel-first [B, C, H, W] throughout; the attention block
works on tokens. Eager PyTorch, no cleverness.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from sana_export.reference.layers import MixFFN
from sana_kernels.linear_attention import linear_attention

_NORM_EPS = 1e-5
_EXPAND = 4
BlockType = Literal["ResBlock", "EfficientViTBlock"]

# What diffusers assumes when a config leaves the field out, and what Sana's flavour has.
_FLAVOUR: dict[str, tuple[object, object]] = {
    "downsample_block_type": ("pixel_unshuffle", "Conv"),
    "upsample_block_type": ("pixel_shuffle", "interpolate"),
    "decoder_norm_types": ("rms_norm", "rms_norm"),
    "decoder_act_fns": ("silu", "silu"),
    "decoder_conv_act_fn": ("relu", "relu"),
    "encoder_out_shortcut": (True, True),
    "decoder_in_shortcut": (True, True),
}


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of a DC-AE. Tuples go from high resolution (index 0) to low."""

    latent_channels: int
    head_dim: int
    encoder_channels: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    encoder_layers: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    encoder_blocks: tuple[BlockType, ...]
    decoder_blocks: tuple[BlockType, ...]
    encoder_multiscales: tuple[tuple[int, ...], ...]
    decoder_multiscales: tuple[tuple[int, ...], ...]
    scaling_factor: float

    @classmethod
    def from_upstream(cls, config: Mapping[str, Any]) -> "AutoencoderConfig":
        """From diffusers' `vae/config.json`. Raises ValueError for a flavour that Sana does not use."""
        for field, (default, expected) in _FLAVOUR.items():
            value: Any = config.get(field, default)
            per_stage_values = set(value) if isinstance(value, (list, tuple)) else {value}
            if per_stage_values != {expected}:
                raise ValueError(f"vae/config.json: {field} is {value!r}, Sana's DC-AE has {expected!r}")
        stages = len(config["decoder_block_out_channels"])

        def per_stage(value: Any) -> tuple:
            return (value,) * stages if isinstance(value, str) else tuple(value)

        return cls(
            latent_channels=config["latent_channels"],
            head_dim=config["attention_head_dim"],
            encoder_channels=tuple(config["encoder_block_out_channels"]),
            decoder_channels=tuple(config["decoder_block_out_channels"]),
            encoder_layers=tuple(config["encoder_layers_per_block"]),
            decoder_layers=tuple(config["decoder_layers_per_block"]),
            encoder_blocks=per_stage(config["encoder_block_types"]),
            decoder_blocks=per_stage(config["decoder_block_types"]),
            encoder_multiscales=tuple(map(tuple, config["encoder_qkv_multiscales"])),
            decoder_multiscales=tuple(map(tuple, config["decoder_qkv_multiscales"])),
            scaling_factor=config["scaling_factor"],
        )


class ChannelRMSNorm(nn.Module):
    """RMS norm over the channels of each pixel, with weight and bias, in fp32. `dim` is the channel axis."""

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (-1, 1, 1) if self.dim == 1 else (-1,)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(self.dim, keepdim=True) + _NORM_EPS)
        return (wide * self.weight.float().view(shape) + self.bias.float().view(shape)).to(x.dtype)


class ResBlock(nn.Module):
    """x + norm(conv2(SiLU(conv1(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))


class Multiscale(nn.Module):
    """Depthwise 5x5 then grouped 1x1 convolution over the packed q/k/v channels [B, 3C, H, W]."""

    def __init__(self, channels: int, head_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv_depth = nn.Conv2d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False
        )
        self.conv_group = nn.Conv2d(channels, channels, 1, groups=channels // head_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_group(self.conv_depth(x))


class MultiscaleLinearAttention(nn.Module):
    """ReLU linear attention over the pixels and, where the stage has it, over a locally mixed copy of q/k/v.

    Weights are packed [all heads' q | k | v]; upstream interleaves them per head (`weights/` permutes).
    """

    def __init__(self, channels: int, head_dim: int, multiscales: tuple[int, ...]) -> None:
        super().__init__()
        assert len(multiscales) <= 1, "Sana's DC-AE has at most one extra scale"
        self.head_dim = head_dim
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.multiscale = Multiscale(3 * channels, head_dim, multiscales[0]) if multiscales else None
        self.to_out = nn.Linear(channels * (1 + len(multiscales)), channels, bias=False)
        self.norm = ChannelRMSNorm(channels, dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        qkv = self.qkv(x.flatten(2).transpose(1, 2))
        out = linear_attention(qkv, head_dim=self.head_dim)
        if self.multiscale is not None:
            mixed = self.multiscale(qkv.transpose(1, 2).unflatten(2, (height, width)))
            mixed = mixed.flatten(2).transpose(1, 2)
            out = torch.cat([out, linear_attention(mixed, head_dim=self.head_dim)], dim=-1)
        out = self.norm(self.to_out(out))
        return x + out.transpose(1, 2).unflatten(2, (height, width))


class AutoencoderMixFFN(MixFFN):
    """Mix-FFN with a channel RMS norm and a residual, over [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, _EXPAND * channels)
        self.norm = ChannelRMSNorm(channels, dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        height, width = x.shape[-2:]
        tokens = super().forward(x.flatten(2).transpose(1, 2), height, width)
        return x + self.norm(tokens).transpose(1, 2).unflatten(2, (height, width))


class EfficientViTBlock(nn.Module):
    """Multiscale linear attention, then Mix-FFN, each with its residual.

    The block runs in the dtype of its own weights, so that an fp16 decoder can keep it in fp32: its attention sums
    and the product in its Mix-FFN overflow fp16, and it is 15 % of the decoder's arithmetic.
    """

    def __init__(self, channels: int, head_dim: int, multiscales: tuple[int, ...]) -> None:
        super().__init__()
        self.linear_attention = MultiscaleLinearAttention(channels, head_dim, multiscales)
        self.mix_ffn = AutoencoderMixFFN(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(self.linear_attention.qkv.weight.dtype)
        return self.mix_ffn(self.linear_attention(wide)).to(x.dtype)


def _block(kind: BlockType, channels: int, head_dim: int, multiscales: tuple[int, ...]) -> nn.Module:
    return ResBlock(channels) if kind == "ResBlock" else EfficientViTBlock(channels, head_dim, multiscales)


def upsample_shortcut(x: torch.Tensor, out_channels: int) -> torch.Tensor:
    """Pixel shuffle of repeated channels: [B, C, H, W] -> [B, out_channels, 2H, 2W]."""
    x = x.repeat_interleave(4 * out_channels // x.shape[1], dim=1)
    return F.pixel_shuffle(x, 2)


def downsample_shortcut(x: torch.Tensor, out_channels: int) -> torch.Tensor:
    """Pixel unshuffle, then the mean of consecutive channels: [B, C, H, W] -> [B, out_channels, H/2, W/2]."""
    return F.pixel_unshuffle(x, 2).unflatten(1, (out_channels, -1)).mean(dim=2)


class DecoderStage(nn.Module):
    """Upsample by two (except the lowest stage), then blocks."""

    def __init__(self, config: AutoencoderConfig, stage: int) -> None:
        super().__init__()
        channels = config.decoder_channels[stage]
        lowest = stage == len(config.decoder_channels) - 1
        below = channels if lowest else config.decoder_channels[stage + 1]
        self.upsample = None if lowest else nn.Conv2d(below, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            _block(config.decoder_blocks[stage], channels, config.head_dim, config.decoder_multiscales[stage])
            for _ in range(config.decoder_layers[stage])
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.upsample is not None:
            shortcut = upsample_shortcut(x, self.upsample.out_channels)
            x = self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest")) + shortcut
        for block in self.blocks:
            x = block(x)
        return x


@dataclass(frozen=True)
class Window:
    """Rows `first` to `end` of a decoder stage's small input, and which rows of what they give are good."""

    first: int
    end: int
    good: slice


def stage_windows(
    config: AutoencoderConfig, stage: int, height: int, width: int, most_elements: int
) -> tuple[Window, ...]:
    """The windows of a decoder stage whose picture has more than `most_elements` numbers, for a latent of `height` x
    `width`; none where one pass is enough.

    All are of one size, and their good rows are all rows in order. Stages of linear attention have none: it sums over
    the whole picture. The last stage is taken together with the decoder's norm_out and conv_out.
    """
    upsampled = len(config.decoder_channels) - 1 - stage
    if config.decoder_blocks[stage] != "ResBlock" or not upsampled:
        return ()
    elements = (height << upsampled) * (width << upsampled) * config.decoder_channels[stage]
    rows = height << upsampled >> 1
    # A row beyond the edge is wrong, and each 3x3 convolution carries that one row inwards: two of every ResBlock, the
    # upsampling one and conv_out, in rows of the large picture.
    margin = config.decoder_layers[stage] + 1
    kept = max(-(-rows // -(-elements // most_elements)), margin)
    size = kept + 2 * margin
    if size >= rows:
        return ()
    found = []
    for first_kept in range(0, rows, kept):
        end_kept = min(first_kept + kept, rows)
        first = min(max(first_kept - margin, 0), rows - size)
        found.append(Window(first, first + size, slice(2 * (first_kept - first), 2 * (end_kept - first))))
    return tuple(found)


class Decoder(nn.Module):
    """latent [B, 32, h, w] (autoencoder scale) -> pixels [B, 3, 32h, 32w], nominally in -1..1, not clamped.

    Stages whose picture has more than `most_elements` numbers (None: any) are computed in windows of rows, one after
    the other: the same result with less memory.
    """

    def __init__(self, config: AutoencoderConfig, most_elements: int | None = None) -> None:
        super().__init__()
        self.config, self.most_elements = config, most_elements
        channels = config.decoder_channels
        self.repeats = channels[-1] // config.latent_channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.stages = nn.ModuleList(DecoderStage(config, stage) for stage in range(len(channels)))
        self.norm_out = ChannelRMSNorm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(latent) + latent.repeat_interleave(self.repeats, dim=1)
        for stage in reversed(range(len(self.stages))):
            windows = self._windows(stage, *latent.shape[-2:])
            if windows:
                parts = [self._stage(x[:, :, w.first : w.end], stage)[:, :, w.good] for w in windows]
                x = torch.cat(parts, dim=2)
            else:
                x = self._stage(x, stage)
        return x

    def _stage(self, x: torch.Tensor, stage: int) -> torch.Tensor:
        x = self.stages[stage](x)
        return x if stage else self.conv_out(F.relu(self.norm_out(x)))

    def _windows(self, stage: int, height: int, width: int) -> tuple[Window, ...]:
        if self.most_elements is None:
            return ()
        return stage_windows(self.config, stage, height, width, self.most_elements)


class ImageDecoder(nn.Module):
    """What the `vae_decoder` engine computes: latent [1, 32, h, w] fp32 -> image [1, H, W, 3] uint8.

    The scaling factor, the clamp, rounding and the cast are inside. The permutation stands before the cast: a
    TensorRT uint8 output must come straight from a Cast.
    """

    def __init__(self, decoder: Decoder, scaling_factor: float) -> None:
        super().__init__()
        self.decoder = decoder
        self.scaling_factor = scaling_factor

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        scaled = (latent / self.scaling_factor).to(self.decoder.conv_in.weight.dtype)
        pixels = self.decoder(scaled).float() * 0.5 + 0.5
        return (pixels.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)


class EncoderStage(nn.Module):
    """Blocks, then downsample by two (except the lowest stage)."""

    def __init__(self, config: AutoencoderConfig, stage: int) -> None:
        super().__init__()
        channels = config.encoder_channels[stage]
        lowest = stage == len(config.encoder_channels) - 1
        self.blocks = nn.ModuleList(
            _block(config.encoder_blocks[stage], channels, config.head_dim, config.encoder_multiscales[stage])
            for _ in range(config.encoder_layers[stage])
        )
        self.downsample = (
            None if lowest else nn.Conv2d(channels, config.encoder_channels[stage + 1], 3, stride=2, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x) + downsample_shortcut(x, self.downsample.out_channels)
        return x


class Encoder(nn.Module):
    """pixels [B, 3, H, W] in -1..1 -> latent [B, 32, H/32, W/32], not yet multiplied by the scaling factor."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.encoder_channels
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.stages = nn.ModuleList(EncoderStage(config, stage) for stage in range(len(channels)))
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(pixels)
        for stage in self.stages:
            x = stage(x)
        return self.conv_out(x) + x.unflatten(1, (self.conv_out.out_channels, -1)).mean(dim=2)
