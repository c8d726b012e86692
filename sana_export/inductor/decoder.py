"""The DC-AE decoder over pixels [H, W, C], channels last throughout, in pieces of one stage or several.

Several processes share the compilation, and a stage ends before a convolution, across which nothing could be fused.
What a piece is given stays in memory until it ends; so large stages, which have few operators, are one piece.

A stage whose picture is larger still is computed in *windows* of rows, all of one shape, so that its piece is compiled
once: each takes a few more rows than it gives, which the zeros beyond its edges spoil, and a last piece puts the good
rows together. Exact; the memory of a stage is then that of a window and of its result.

Against `reference.dc_ae`: nearest upsampling and the convolution behind it are one 2x2 convolution with four times the
channels on the small image (exact, 4 / 9 of the products); the depthwise 5x5 is a sum of shifted products, which
Inductor makes one pass of; the grouped 1x1 is a batched product; linear attention, the middle of Mix-FFN, 3x3
convolutions over codes, those of residual blocks, and the norms behind them are our kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F

from sana_export.inductor.linear import LinearForm, Tensors, codes_of
from sana_export.inductor.piece import Piece
from sana_export.inductor.transformer import taps_view
from sana_export.reference.dc_ae import AutoencoderConfig, Window, stage_windows
from sana_kernels.linear_attention import linear_attention
from sana_kernels.mix_ffn_depthwise import mix_ffn_depthwise
from sana_kernels.modulated_norm import channel_rms_norm, channel_rms_norm_codes
from sana_kernels.modulated_norm.api import Impl
from sana_kernels.scaled_convolution import scaled_convolution, scaled_convolution_codes
from sana_runtime.contract import PIXELS_PER_LATENT
from sana_runtime.inductor_program import Call

_NORM_EPS = 1e-5
# The most that one picture of a stage may take before the stage is computed in windows. At 1024 px the last stage's
# takes twice as much.
_WINDOW_BYTES = 128 << 20
# More windows would save little of what the picture itself takes, and compute more rows twice: 32 of them, at 4096 px,
# one row in eight.
_MOST_WINDOWS = 8
Upsampling = Literal["phases", "interpolate"]
Depthwise = Literal["shifted", "library"]
Grouped = Literal["batched", "library"]
# A shifted sum of 25 products is one expression: Inductor would otherwise write it out after every eighth read.
ONE_PASS = {"realize_acc_reads_threshold": 64, "realize_reads_threshold": 64, "realize_opcount_threshold": 400}


@dataclass(frozen=True)
class DecoderLayout:
    """What the pieces are made for: latent size, dtype, kernels, and how three kinds of layers are computed.

    `forms`: of convolutions of residual blocks whose weights and activations are quantised; others are in the dtype.
    """

    config: AutoencoderConfig
    dtype: torch.dtype
    height: int
    width: int
    impl: Impl
    upsampling: Upsampling = "phases"
    depthwise: Depthwise = "shifted"
    grouped: Grouped = "batched"
    forms: Mapping[str, LinearForm] = field(default_factory=dict)


class Pair(NamedTuple):
    """Pixels [B, H, W, C] in the base dtype, and as the codes that the next convolution takes, where it takes codes."""

    x: torch.Tensor
    codes: torch.Tensor | None = None


def decoder_pieces(layout: DecoderLayout) -> tuple[Piece, ...]:
    """latent [1, 32, h, w] fp32 -> image [1, 32h, 32w, 3] uint8."""
    pieces = []
    for stages in _together(layout):
        windows = _windows(layout, stages[0])
        pieces.append(_stages_piece(layout, stages, last=stages[-1] == 0 and not windows))
        if windows:
            pieces.append(_join_piece(stages[0], len(windows)))
    return tuple(pieces)


def decoder_calls(layout: DecoderLayout) -> tuple[Call, ...]:
    """Those of one picture, for weights named as the reference names them."""
    calls = []
    value = "latent"
    for stages in _together(layout):
        result = f"stage.{stages[-1]}" if stages[-1] else "image"
        weights = [name for stage in stages for name in _stage_weights(layout, stage)]
        windows = _windows(layout, stages[0])
        parts = [f"{result}.{i}" for i in range(len(windows))]
        for part, window in zip(parts, windows, strict=True):
            rows = f"{value}[{window.first}:{window.end}]"
            calls.append(Call(_stages_name(stages), (rows, *weights), (part,)))
        if windows:
            good = [f"{p}[{w.good.start}:{w.good.stop}]" for p, w in zip(parts, windows, strict=True)]
            calls.append(Call(_join_name(stages[0]), tuple(good), (result,)))
        else:
            calls.append(Call(_stages_name(stages), (value, *weights), (result,)))
        value = result
    return tuple(calls)


def _windows(layout: DecoderLayout, stage: int) -> tuple[Window, ...]:
    largest = layout.height * layout.width * PIXELS_PER_LATENT**2 * layout.config.decoder_channels[0]
    most = max(_WINDOW_BYTES // layout.dtype.itemsize, largest // _MOST_WINDOWS)
    return stage_windows(layout.config, stage, layout.height, layout.width, most)


def decoder_weights(layout: DecoderLayout) -> list[str]:
    """The names of all weights, as the reference names them."""
    return [name for stages in _together(layout) for stage in stages for name in _stage_weights(layout, stage)]


def _together(layout: DecoderLayout) -> list[list[int]]:
    """The stages of each piece, in the order of the calls."""
    config = layout.config
    found: list[list[int]] = []
    for stage in reversed(range(len(config.decoder_channels))):
        alone = config.decoder_blocks[stage] != "ResBlock" or bool(_windows(layout, stage))
        before = found[-1][-1] if found else stage
        if alone or before == stage or config.decoder_blocks[before] != "ResBlock" or _windows(layout, before):
            found.append([stage])
        else:
            found[-1].append(stage)
    return found


def _stages_name(stages: Sequence[int]) -> str:
    return f"stages_{stages[0]}_to_{stages[-1]}"


def _join_name(stage: int) -> str:
    return f"join_{stage}"


def _stages_piece(layout: DecoderLayout, stages: Sequence[int], *, last: bool) -> Piece:
    """What the stage before gives -> [H, W, C]; the first one takes the latent, the `last` one gives the image."""
    takes_latent = stages[0] == len(layout.config.decoder_channels) - 1

    def compute(t: Tensors) -> tuple[torch.Tensor, ...]:
        x = t["x"] if takes_latent else t["x"][None]
        for stage in stages:
            x = _stage(x, t, layout, stage)
        # Without the copy, which is part of the last pass, the exporter has its own idea of a convolution's strides.
        return ((x if last else x[0]).clone(memory_format=torch.contiguous_format),)

    options = ONE_PASS if layout.depthwise == "shifted" else {}
    weights = [name for stage in stages for name in _stage_weights(layout, stage)]
    return Piece(_stages_name(stages), ("x", *weights), compute, options)


def _join_piece(stage: int, count: int) -> Piece:
    """The good rows of all windows [H', W, C] each -> [H, W, C] below each other, of the last stage the image."""
    names = tuple(f"part.{i}" for i in range(count))

    def join(t: Tensors) -> tuple[torch.Tensor, ...]:
        x = torch.cat([t[name] for name in names])
        return (x if stage else x[None],)

    return Piece(_join_name(stage), names, join)


def _stage(x: torch.Tensor, t: Tensors, layout: DecoderLayout, stage: int) -> torch.Tensor:
    config = layout.config
    first = stage == len(config.decoder_channels) - 1
    pair = Pair(_stem(x, t, layout) if first else _upsampled(x, t, f"stages.{stage}.upsample", layout))
    for i in range(config.decoder_layers[stage]):
        name, behind = f"stages.{stage}.blocks.{i}", f"stages.{stage}.blocks.{i + 1}"
        if config.decoder_blocks[stage] == "ResBlock":
            pair = _res_block(pair, t, name, layout, feeds=f"{behind}.conv1")
        else:
            pair = Pair(_attention_block(pair.x, t, name, layout, bool(config.decoder_multiscales[stage])))
    return pair.x if stage else _pixels(pair.x, t)


def _stage_weights(layout: DecoderLayout, stage: int) -> list[str]:
    """The names of all weights of a stage, as the reference names them."""
    config = layout.config

    def convolution(name: str, *parts: str) -> list[str]:
        form = layout.forms.get(name)
        return [*form.tensors(name)] if form else [f"{name}.{part}" for part in parts]

    def pair(name: str) -> list[str]:
        return [f"{name}.weight", f"{name}.bias"]

    first = stage == len(config.decoder_channels) - 1
    names = pair("conv_in" if first else f"stages.{stage}.upsample")
    for block in (f"stages.{stage}.blocks.{i}" for i in range(config.decoder_layers[stage])):
        if config.decoder_blocks[stage] == "ResBlock":
            names += [*convolution(f"{block}.conv1", "weight", "bias"), *convolution(f"{block}.conv2", "weight")]
            names += pair(f"{block}.norm")
            continue
        attention, ffn = f"{block}.linear_attention", f"{block}.mix_ffn"
        names += [f"{attention}.qkv.weight", f"{attention}.to_out.weight", *pair(f"{attention}.norm")]
        if config.decoder_multiscales[stage]:
            names += [f"{attention}.multiscale.conv_{kind}.weight" for kind in ("depth", "group")]
        names += [*pair(f"{ffn}.conv_inverted"), *pair(f"{ffn}.conv_depth"), f"{ffn}.conv_point.weight"]
        names += pair(f"{ffn}.norm")
    return names if stage else [*names, *pair("norm_out"), *pair("conv_out")]


def stored_weight(name: str, weight: torch.Tensor, upsampling: Upsampling = "phases") -> torch.Tensor:
    """A weight of the reference as the pieces take it; `name` as the reference's, in any float dtype."""
    if name.endswith(".conv_depth.weight"):
        return weight.flatten(1).t().contiguous()  # [taps, C]
    if name.endswith(".conv_group.weight"):
        inputs = weight.shape[1]
        return weight.flatten(1).unflatten(0, (-1, inputs)).contiguous()  # [groups, O, I]
    if name.endswith(".upsample.weight") and upsampling == "phases":
        weight = phase_weight(weight)
    return weight.permute(0, 2, 3, 1).contiguous() if weight.ndim == 4 else weight


def phase_weight(weight: torch.Tensor) -> torch.Tensor:
    """The 2x2 weights [4 O, I, 2, 2] of the four output pixels of a nearest-upsampled 3x3 convolution [O, I, 3, 3].

    Output row 2i sees the input rows i - 1, i, i; row 2i + 1 sees i, i, i + 1; columns likewise. Phase 2a + b is that
    of row a and column b. Sums are formed in fp32.
    """
    low = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    high = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    maps = torch.stack([low, high]).to(weight.device)  # [phase, 2, 3]
    phases = torch.einsum("aky,blx,oiyx->aboikl", maps, maps, weight.float())
    return phases.flatten(0, 2).to(weight.dtype)


def _stem(latent: torch.Tensor, t: Tensors, layout: DecoderLayout) -> torch.Tensor:
    """The first convolution plus its shortcut, the repeated channels of the latent."""
    config = layout.config
    latent = (latent / config.scaling_factor).to(layout.dtype).permute(0, 2, 3, 1).contiguous()
    repeats = config.decoder_channels[-1] // config.latent_channels
    return _convolution(latent, t, "conv_in") + latent.repeat_interleave(repeats, dim=-1)


def _pixels(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    pixels = _convolution(F.relu(_norm(x, t, "norm_out")), t, "conv_out").float() * 0.5 + 0.5
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)  # [B, C, H, W] in channels-last memory


def _last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def _convolution(x: torch.Tensor, t: Tensors, name: str) -> torch.Tensor:
    """3x3, padding 1, over [B, H, W, C]; weights are stored [O, 3, 3, I]."""
    return _last(F.conv2d(_first(x), _first(t[f"{name}.weight"]), t.get(f"{name}.bias"), padding=1))


def _norm(x: torch.Tensor, t: Tensors, name: str) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _NORM_EPS)
    return (wide * t[f"{name}.weight"].float() + t[f"{name}.bias"].float()).to(x.dtype)


def _res_block(pair: Pair, t: Tensors, name: str, layout: DecoderLayout, feeds: str) -> Pair:
    conv1, conv2, norm = f"{name}.conv1", f"{name}.conv2", f"{name}.norm"
    if conv1 in layout.forms:
        x = pair.x if pair.codes is None else pair.codes
        hidden = _scaled(x, t, conv1, layout, silu=True, feeds=conv2)
    else:
        hidden = F.silu(_convolution(pair.x, t, conv1))
    if conv2 not in layout.forms:
        # The library's convolution has strides that only the compiler knows: what reads them must be its own pass.
        return Pair(pair.x + _norm(_convolution(hidden, t, conv2), t, norm))
    out, weight, bias = _scaled(hidden, t, conv2, layout), t[f"{norm}.weight"], t[f"{norm}.bias"]
    settings: dict[str, Any] = {"residual": pair.x, "eps": _NORM_EPS, "impl": layout.impl}
    if codes := _codes_for(feeds, t, layout):
        return Pair(*channel_rms_norm_codes(out, weight, bias, **settings, **codes))
    return Pair(channel_rms_norm(out, weight, bias, **settings))


def _codes_for(feeds: str, t: Tensors, layout: DecoderLayout) -> dict[str, Any]:
    """Scale and dtype of the codes that the convolution `feeds` takes; none if it is absent, in 16 bits or smoothed."""
    form = layout.forms.get(feeds)
    if form is None or form.smooth:
        return {}
    return {"out_scale": t[f"{feeds}.activation_scale"], "out_dtype": form.activation_dtype}


def _scaled(
    x: torch.Tensor, t: Tensors, name: str, layout: DecoderLayout, *, silu: bool = False, feeds: str = ""
) -> torch.Tensor:
    """A quantised convolution of x, in the base dtype or already as codes, as what the one that it `feeds` takes."""
    form, fed = layout.forms[name], layout.forms.get(feeds)
    codes = codes_of(x, t, name, form)
    scales = t[f"{name}.activation_scale"], t[f"{name}.weight_scale"]
    bias, weight = t.get(f"{name}.bias"), t[f"{name}.weight"]
    if fed is None:
        return scaled_convolution(codes, weight, *scales, dtype=layout.dtype, bias=bias, silu=silu, impl=layout.impl)
    assert fed.activation_dtype is not None
    return scaled_convolution_codes(
        codes,
        weight,
        *scales,
        dtype=layout.dtype,
        out_scale=t[f"{feeds}.activation_scale"],
        out_dtype=fed.activation_dtype,
        bias=bias,
        silu=silu,
        impl=layout.impl,
    )


def _upsampled(x: torch.Tensor, t: Tensors, name: str, layout: DecoderLayout) -> torch.Tensor:
    """Upsampling convolution plus the shortcut: the pixel shuffle of repeated channels."""
    batch, height, width, inputs = x.shape
    outputs = t[f"{name}.bias"].shape[0]
    shortcut = x.repeat_interleave(4 * outputs // inputs, dim=-1).unflatten(-1, (outputs, 2, 2))
    shortcut = shortcut.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, outputs)
    if layout.upsampling == "interpolate":
        large = _last(F.interpolate(_first(x), scale_factor=2.0, mode="nearest"))
        return _convolution(large, t, name) + shortcut
    # [B, H + 1, W + 1, 4 O]: row i of phase a belongs to output row 2 (i - a) + a.
    phases = _last(F.conv2d(_first(x), _first(t[f"{name}.weight"]), padding=1)).unflatten(-1, (2, 2, outputs))
    rows = [
        torch.stack([phases[:, a : a + height, b : b + width, a, b] for b in (0, 1)], dim=3) for a in (0, 1)
    ]  # [B, H, W, 2, O] each
    out = torch.stack(rows, dim=2).reshape(batch, 2 * height, 2 * width, outputs)
    return out + t[f"{name}.bias"] + shortcut


def _attention_block(x: torch.Tensor, t: Tensors, name: str, layout: DecoderLayout, multiscale: bool) -> torch.Tensor:
    """The EfficientViT block: linear attention over pixels, then Mix-FFN, each with norm and residual."""
    _, height, width, _ = x.shape
    tokens = x.flatten(1, 2)  # [B, N, C]
    attention, ffn = f"{name}.linear_attention", f"{name}.mix_ffn"
    head_dim = layout.config.head_dim
    qkv = F.linear(tokens, t[f"{attention}.qkv.weight"])
    out = linear_attention(qkv, head_dim=head_dim, impl=layout.impl)
    if multiscale:
        mixed = _mixed(qkv.unflatten(1, (height, width)), t, f"{attention}.multiscale", layout)
        out = torch.cat([out, linear_attention(mixed, head_dim=head_dim, impl=layout.impl)], dim=-1)
    tokens = tokens + _norm(F.linear(out, t[f"{attention}.to_out.weight"]), t, f"{attention}.norm")
    hidden = F.linear(tokens, t[f"{ffn}.conv_inverted.weight"])
    hidden = mix_ffn_depthwise(
        hidden,
        taps_view(t[f"{ffn}.conv_depth.weight"]),
        t[f"{ffn}.conv_depth.bias"],
        height,
        width,
        x_bias=t[f"{ffn}.conv_inverted.bias"],
        impl=layout.impl,
    )
    tokens = tokens + _norm(F.linear(hidden, t[f"{ffn}.conv_point.weight"]), t, f"{ffn}.norm")
    return tokens.unflatten(1, (height, width))


def _mixed(x: torch.Tensor, t: Tensors, name: str, layout: DecoderLayout) -> torch.Tensor:
    """Depthwise 5x5, then grouped 1x1, over the packed q/k/v [B, H, W, 3C] -> q/k/v for linear attention."""
    taps, groups = t[f"{name}.conv_depth.weight"], t[f"{name}.conv_group.weight"]
    channels = x.shape[-1]
    if layout.depthwise == "library":
        size = int(taps.shape[0] ** 0.5)
        weight = taps.view(size, size, 1, channels).permute(3, 2, 0, 1)
        x = _last(F.conv2d(_first(x), weight, padding=size // 2, groups=channels))
    else:
        x = shifted_sum(x, taps)
    if layout.grouped == "library":
        weight = groups.flatten(0, 1)[:, :, None, None]
        return _last(F.conv2d(_first(x), weight, groups=groups.shape[0])).flatten(1, 2)
    rows = x.flatten(0, 2).unflatten(-1, groups.shape[::2]).transpose(0, 1)  # [groups, N, I]
    # A group is one head of q, k or v: linear attention reads it where the product leaves it.
    return torch.bmm(rows, groups.transpose(1, 2)).unflatten(1, (x.shape[0], -1)).transpose(0, 1)


def shifted_sum(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Depthwise convolution of [B, H, W, C] with taps [k * k, C] as one sum in fp32."""
    _, height, width, _ = x.shape
    size = int(taps.shape[0] ** 0.5)
    margin = size // 2
    padded = F.pad(x, (0, 0, margin, margin, margin, margin))
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for tap in range(size * size):
        dy, dx = divmod(tap, size)
        total = total + padded[:, dy : dy + height, dx : dx + width].float() * taps[tap].float()
    return total.to(x.dtype)
