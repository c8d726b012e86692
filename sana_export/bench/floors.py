"""Arithmetic and bytes of every stage from the model's shapes, and the least time that hardware can need for them.

`Work` is one operation: a matrix product, a convolution, an attention, or one pass over activations. Products count
two FLOP per multiply-add, padding included, as `torch.utils.flop_counter` does, which the tests hold these figures
equal to. Work that depends on the caption alone is counted once per picture (`caption`), not per step.

The floor of a stage is what no implementation can beat without another algorithm: all its FLOP at the measured rate of
the dtype each product computes in, or its weights, inputs and outputs moved once at the measured copy rate, whichever
takes longer. Activations inside a stage count nothing: they may stay on the chip.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sana_calibration.rules import LayerRule
from sana_export.bench.ceilings import Ceilings
from sana_export.bench.subjects import SHORT_CAPTION
from sana_export.reference.dc_ae import AutoencoderConfig
from sana_export.reference.transformer import TransformerConfig
from sana_runtime.contract import CAPTION_LENGTH, PIXELS_PER_LATENT

Kind = Literal["gemm", "convolution", "attention", "linear_attention", "depthwise", "pointwise"]
Rules = Mapping[str, LayerRule]
# (weight and compute dtypes of a layer by its name)
_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8e4m3fn": 8, "int8": 8, "int4": 4, "int64": 64}
_SINUSOID = 256
_KERNEL_3 = 9
_DECODER_EXPAND = 4


@dataclass(frozen=True)
class Work:
    """One operation of one call. `dtype` is what its products compute in; bytes of the weights as stored, and of the
    activations that it reads and writes when it is a kernel of its own.
    """

    name: str
    kind: Kind
    dtype: str
    flop: int
    weight_bytes: int
    activation_bytes: int

    @property
    def bytes(self) -> int:
        """Weights and activations."""
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True)
class Stage:
    """All work of one engine call, and the bytes of the call's own inputs and outputs."""

    works: tuple[Work, ...]
    io_bytes: int

    @property
    def flop(self) -> int:
        """FLOP of all products."""
        return sum(work.flop for work in self.works)

    @property
    def floor_bytes(self) -> int:
        """Weights as stored, inputs and outputs, each once."""
        return sum(work.weight_bytes for work in self.works) + self.io_bytes

    def floor_ms(self, ceilings: Ceilings) -> float:
        """The least time at these ceilings, in milliseconds. Raises KeyError for a dtype without a ceiling."""
        arithmetic = sum(work.flop / ceilings.flop_per_s(work.dtype) for work in self.works if work.flop)
        return max(arithmetic, self.floor_bytes / (ceilings.copy_gb_per_s * 1e9)) * 1e3


class _Tally:
    """Collects work, with every layer's dtypes from the recipe's rules."""

    def __init__(self, rules: Rules, base_dtype: str) -> None:
        self.works: list[Work] = []
        self._rules, self.base = rules, base_dtype

    def width(self, dtype: str | None = None) -> int:
        """Bytes of one activation."""
        return _BITS[dtype or self.base] // 8

    def compute_dtype(self, layer: str) -> str:
        """What the product of a layer computes in."""
        rule = self._rules.get(layer)
        return (rule.activation_dtype if rule else None) or self.base

    def product(
        self, layer: str, rows: int, inputs: int, outputs: int, *, kind: Kind = "gemm", taps: int = 1, groups: int = 1
    ) -> None:
        """A layer with a weight: [rows, inputs] -> [rows, outputs], `taps` input positions per output position."""
        weights = outputs * (inputs // groups) * taps
        rule = self._rules.get(layer)
        stored = rule.weight_dtype if rule else self.base
        dtype = self.compute_dtype(layer)
        activations = rows * (inputs * self.width(dtype) + outputs * self.width())
        self.works.append(Work(layer, kind, dtype, 2 * rows * weights, weights * _BITS[stored] // 8, activations))

    def operation(self, name: str, kind: Kind, flop: int, elements: int, extra_bytes: int = 0) -> None:
        """An operation without a weight that reads and writes `elements` activations of the base dtype."""
        self.works.append(Work(name, kind, self.base, flop, 0, elements * self.width() + extra_bytes))


def step_stage(
    config: TransformerConfig, latent: tuple[int, int], batch: int, rules: Rules, base_dtype: str = "bfloat16"
) -> Stage:
    """One solver step at latent height and width; `batch` 2 with classifier-free guidance, else 1."""
    tally = _Tally(rules, base_dtype)
    channels, tokens = config.channels, latent[0] * latent[1]
    rows = batch * tokens
    tally.product("patch_embed", rows, config.latent_channels, channels)
    for name in ("timestep_embedder", *(("guidance_embedder",) if config.guidance_embeds else ())):
        tally.product(f"{name}.linear_1", batch, _SINUSOID, channels)
        tally.product(f"{name}.linear_2", batch, channels, channels)
    tally.product("timestep_modulation", batch, channels, 6 * channels)
    for index in range(config.depth):
        _transformer_block(tally, f"blocks.{index}", config, batch, tokens)
    tally.operation("modulated_norm", "pointwise", 0, 2 * rows * channels)
    tally.product("proj_out", rows, channels, config.latent_channels)
    # latent and previous_x0 in; next_latent, x0 and velocity out, fp32; the caption's keys and values are inputs too.
    keys_and_values = config.depth * batch * CAPTION_LENGTH * 2 * channels * tally.width()
    return Stage(tuple(tally.works), 5 * tokens * config.latent_channels * 4 + keys_and_values)


def _transformer_block(tally: _Tally, name: str, config: TransformerConfig, batch: int, tokens: int) -> None:
    channels, rows = config.channels, batch * tokens
    hidden = int(config.mlp_ratio * channels)
    stream = rows * channels
    # Norm, modulation, and the gate and residual of the branch before: two reads and two writes of the stream.
    tally.operation(f"{name}.modulated_norm_1", "pointwise", 0, 4 * stream)
    tally.product(f"{name}.linear_attention.qkv", rows, channels, 3 * channels)
    _linear_attention(tally, f"{name}.linear_attention", rows, channels, config.head_dim)
    tally.product(f"{name}.linear_attention.to_out", rows, channels, channels)
    tally.operation(f"{name}.gate_residual", "pointwise", 0, 3 * stream)
    tally.product(f"{name}.cross_attention.to_q", rows, channels, channels)
    pairs = 2 * 2 * batch * tokens * CAPTION_LENGTH * channels
    tally.operation(f"{name}.cross_attention", "attention", pairs, 2 * stream + 2 * batch * CAPTION_LENGTH * channels)
    tally.product(f"{name}.cross_attention.to_out", rows, channels, channels)
    tally.operation(f"{name}.modulated_norm_2", "pointwise", 0, 4 * stream)
    tally.product(f"{name}.mix_ffn.conv_inverted", rows, channels, 2 * hidden)
    _depthwise(tally, f"{name}.mix_ffn.conv_depth", rows, 2 * hidden, hidden, _KERNEL_3)
    tally.product(f"{name}.mix_ffn.conv_point", rows, hidden, channels)


def _linear_attention(tally: _Tally, name: str, rows: int, channels: int, head_dim: int) -> None:
    """Per head and token: K V^T and Q (K V) of D x D, and the normaliser of D; q, k, v read, the result written."""
    flop = rows * channels * (4 * head_dim + 2)
    tally.operation(f"{name}.attention", "linear_attention", flop, 4 * rows * channels)


def _depthwise(tally: _Tally, layer: str, rows: int, channels: int, outputs: int, taps: int) -> None:
    """A depthwise convolution, fused with the gate that leaves `outputs` of its channels."""
    weights = channels * taps
    elements = rows * (channels + outputs)
    tally.works.append(
        Work(
            layer,
            "depthwise",
            tally.base,
            2 * rows * weights,
            weights * tally.width(),
            elements * tally.width(),
        )
    )


def caption_stage(config: TransformerConfig, batch: int, rules: Rules, base_dtype: str = "bfloat16") -> Stage:
    """What the transformer does with the caption alone, once per picture: projection, and every block's K and V."""
    tally = _Tally(rules, base_dtype)
    channels, rows = config.channels, batch * CAPTION_LENGTH
    tally.product("caption_projection.linear_1", rows, config.caption_channels, channels)
    tally.product("caption_projection.linear_2", rows, channels, channels)
    for index in range(config.depth):
        tally.product(f"blocks.{index}.cross_attention.to_kv", rows, channels, 2 * channels)
    outputs = config.depth * rows * 2 * channels * tally.width()
    return Stage(tuple(tally.works), rows * config.caption_channels * tally.width() + outputs)


def decoder_stage(
    config: AutoencoderConfig, latent: tuple[int, int], rules: Rules, base_dtype: str = "bfloat16"
) -> Stage:
    """Decoding one latent to a uint8 picture."""
    tally = _Tally(rules, base_dtype)
    channels = config.decoder_channels
    lowest = len(channels) - 1
    pixels = latent[0] * latent[1]
    latent_pixels = pixels
    _convolution(tally, "conv_in", pixels, config.latent_channels, channels[lowest])
    for stage in range(lowest, -1, -1):
        if stage != lowest:
            pixels *= 4
            _convolution(tally, f"stages.{stage}.upsample", pixels, channels[stage + 1], channels[stage])
        for block in range(config.decoder_layers[stage]):
            name = f"stages.{stage}.blocks.{block}"
            _DECODER_BLOCKS[config.decoder_blocks[stage]](tally, name, config, stage, pixels)
    tally.operation("norm_out", "pointwise", 0, 2 * pixels * channels[0])
    _convolution(tally, "conv_out", pixels, channels[0], 3)
    assert pixels == latent_pixels * PIXELS_PER_LATENT**2, "DC-AE multiplies each side by 32"
    return Stage(tuple(tally.works), latent_pixels * config.latent_channels * 4 + pixels * 3)


def _convolution(tally: _Tally, layer: str, pixels: int, inputs: int, outputs: int) -> None:
    tally.product(layer, pixels, inputs, outputs, kind="convolution", taps=_KERNEL_3)


def _res_block(tally: _Tally, name: str, config: AutoencoderConfig, stage: int, pixels: int) -> None:
    channels = config.decoder_channels[stage]
    _convolution(tally, f"{name}.conv1", pixels, channels, channels)
    _convolution(tally, f"{name}.conv2", pixels, channels, channels)
    # RMS norm and residual: the branch and the stream read, the stream written.
    tally.operation(f"{name}.norm", "pointwise", 0, 3 * pixels * channels)


def _vit_block(tally: _Tally, name: str, config: AutoencoderConfig, stage: int, pixels: int) -> None:
    channels, head_dim = config.decoder_channels[stage], config.head_dim
    scales = config.decoder_multiscales[stage]
    attention, ffn = f"{name}.linear_attention", f"{name}.mix_ffn"
    tally.product(f"{attention}.qkv", pixels, channels, 3 * channels)
    _linear_attention(tally, attention, pixels, channels, head_dim)
    for kernel in scales:
        mixed = 3 * channels
        _depthwise(tally, f"{attention}.multiscale.conv_depth", pixels, mixed, mixed, kernel * kernel)
        tally.product(
            f"{attention}.multiscale.conv_group", pixels, mixed, mixed, kind="convolution", groups=mixed // head_dim
        )
        _linear_attention(tally, f"{attention}.multiscale", pixels, channels, head_dim)
    tally.product(f"{attention}.to_out", pixels, channels * (1 + len(scales)), channels)
    tally.operation(f"{attention}.norm", "pointwise", 0, 3 * pixels * channels)
    hidden = _DECODER_EXPAND * channels
    tally.product(f"{ffn}.conv_inverted", pixels, channels, 2 * hidden)
    _depthwise(tally, f"{ffn}.conv_depth", pixels, 2 * hidden, hidden, _KERNEL_3)
    tally.product(f"{ffn}.conv_point", pixels, hidden, channels)
    tally.operation(f"{ffn}.norm", "pointwise", 0, 3 * pixels * channels)


_DecoderBlock = Callable[[_Tally, str, AutoencoderConfig, int, int], None]
_DECODER_BLOCKS: dict[str, _DecoderBlock] = {"ResBlock": _res_block, "EfficientViTBlock": _vit_block}


def text_encoder_stage(
    config: Mapping[str, Any],
    tokens: int,
    rules: Rules,
    base_dtype: str = "bfloat16",
    *,
    kept: int = 0,
    causal: bool = True,
) -> Stage:
    """One prompt of `tokens` padded positions through Gemma-2; keys and values of the first `kept` are there already.

    `causal` counts each position's own past alone; without it the whole square, as a masked product computes it. Of the
    embedding only the looked-up rows count.
    """
    tally = _Tally(rules, base_dtype)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    embedding = rules.get("embed_tokens")
    stored = _BITS[embedding.weight_dtype if embedding else base_dtype]
    rows = tokens - kept
    lookup = rows * hidden * stored // 8
    tally.works.append(Work("embed_tokens", "pointwise", base_dtype, 0, lookup, rows * hidden * tally.width()))
    pairs = (tokens * (tokens + 1) - kept * (kept + 1)) // 2 if causal else rows * tokens
    for index in range(config["num_hidden_layers"]):
        name = f"layers.{index}"
        # Two norms around each branch, and its residual.
        tally.operation(f"{name}.norms", "pointwise", 0, 8 * rows * hidden)
        tally.product(f"{name}.self_attn.q_proj", rows, hidden, queries)
        tally.product(f"{name}.self_attn.k_proj", rows, hidden, keys)
        tally.product(f"{name}.self_attn.v_proj", rows, hidden, keys)
        tally.operation(f"{name}.self_attn", "attention", 2 * 2 * pairs * queries, 2 * (rows * queries + tokens * keys))
        tally.product(f"{name}.self_attn.o_proj", rows, queries, hidden)
        tally.product(f"{name}.mlp.gate_proj", rows, hidden, inner)
        tally.product(f"{name}.mlp.up_proj", rows, hidden, inner)
        tally.operation(f"{name}.mlp.act", "pointwise", 0, 3 * rows * inner)
        tally.product(f"{name}.mlp.down_proj", rows, inner, hidden)
    ids = 2 * tokens * _BITS["int64"] // 8
    return Stage(tuple(tally.works), ids + rows * hidden * tally.width())


@dataclass(frozen=True)
class PictureWork:
    """All stages of one picture. `text_encoder` is one prompt: the empty negative prompt's caption is kept.
    `short_caption` is that of a picture's prompt, where engines compute less for it.
    """

    text_encoder: Stage
    caption: Stage
    step: Stage
    vae_decoder: Stage
    short_caption: Stage | None = None

    def stage(self, name: str) -> Stage | None:
        """The work of a row's stage; None for rows that are not one call."""
        stages = {"text_encoder": self.text_encoder, "step": self.step, "vae_decoder": self.vae_decoder}
        return self.short_caption if name == SHORT_CAPTION else stages.get(name)

    def calls(self, num_steps: int) -> Iterator[Stage]:
        """Every call of a picture, in order: each must wait for the one before."""
        yield self.short_caption or self.text_encoder
        yield self.caption
        yield from (self.step for _ in range(num_steps))
        yield self.vae_decoder
