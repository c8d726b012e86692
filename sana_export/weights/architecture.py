"""What the configuration files say about a checkpoint: its architecture, and how its key maps unroll.

Configurations come from files a user downloaded, so every field is checked before it sizes anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sana_runtime.contract import LATENT_CHANNELS, GuidanceKind
from sana_runtime.errors import CheckpointError

Config = dict[str, Any]
UpstreamComponent = Literal["text_encoder", "transformer", "vae"]
ReferenceComponent = Literal["text_encoder", "transformer", "vae_decoder", "vae_encoder"]
UPSTREAM_COMPONENTS: tuple[UpstreamComponent, ...] = ("text_encoder", "transformer", "vae")
REFERENCES_OF: dict[UpstreamComponent, tuple[ReferenceComponent, ...]] = {
    "text_encoder": ("text_encoder",),
    "transformer": ("transformer",),
    "vae": ("vae_decoder", "vae_encoder"),
}
UPSTREAM_OF: dict[ReferenceComponent, UpstreamComponent] = {
    reference: upstream for upstream, references in REFERENCES_OF.items() for reference in references
}

# Width, depth, qk-norm, embedded guidance -> the name users know.
_ARCHITECTURES = {
    (1152, 28, False, False): "sana-0.6b",
    (2240, 20, False, False): "sana-1.6b",
    (2240, 20, True, False): "sana-1.5-1.6b",
    (2240, 60, True, False): "sana-1.5-4.8b",
    (1152, 28, True, True): "sana-sprint-0.6b",
    (2240, 20, True, True): "sana-sprint-1.6b",
}

# Fields that files written before the feature existed do not have.
_TRANSFORMER_DEFAULTS: Config = {
    "interpolation_scale": None,
    "qk_norm": None,
    "guidance_embeds": False,
    "guidance_embeds_scale": 0.1,
    "timestep_scale": 1.0,
}
_VAE_DEFAULTS: Config = {
    "downsample_block_type": "pixel_unshuffle",
    "upsample_block_type": "pixel_shuffle",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "decoder_conv_act_fn": "relu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "scaling_factor": 0.41407,
}
# Read by every consumer; the value Gemma-2 was trained with where an older or newer file leaves it out.
_TEXT_ENCODER_DEFAULTS: Config = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "sliding_window": 4096,
    "attention_bias": False,
}
DEFAULTS: dict[UpstreamComponent, Config] = {
    "text_encoder": _TEXT_ENCODER_DEFAULTS,
    "transformer": _TRANSFORMER_DEFAULTS,
    "vae": _VAE_DEFAULTS,
}

# The only values our modules implement; a list in the file must hold this value for every stage.
_REQUIRED: dict[UpstreamComponent, Config] = {
    "text_encoder": {
        "model_type": "gemma2",
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "transformer": {
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "patch_size": 1,
        "attention_bias": False,
        "norm_elementwise_affine": False,
    },
    "vae": {
        "in_channels": 3,
        "latent_channels": LATENT_CHANNELS,
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "decoder_conv_act_fn": "relu",
        "encoder_out_shortcut": True,
        "decoder_in_shortcut": True,
    },
}
_QK_NORM = "rms_norm_across_heads"
_RES_BLOCK, _VIT_BLOCK = "ResBlock", "EfficientViTBlock"
_MULTISCALE_KERNEL = 5
_MAX_STAGES = 8
_MAX_EXTENT = 1 << 20
_MAX_REPEATS = 1 << 10
_MAX_NUMBER = 1 << 10

Placement = Mapping[str, int]


@dataclass(frozen=True)
class Layout:
    """How one key map unrolls: values of shape symbols, and a placement per repeat of each group."""

    symbols: Mapping[str, int]
    placements: Mapping[str, tuple[Placement, ...]]


def completed(component: UpstreamComponent, config: Config) -> Config:
    """A copy of an upstream config in which the fields that older files miss have their defaults."""
    filled = {**DEFAULTS[component], **config}
    if component == "transformer" and filled.get("cross_attention_dim") is None:
        filled["cross_attention_dim"] = _width(filled)
    return filled


def guidance_kind(transformer: Config) -> GuidanceKind:
    """How the transformer is guided: two captions per step, or the scale as a model input."""
    return "embedded" if transformer["guidance_embeds"] else "classifier_free"


def architecture_name(transformer: Config) -> str:
    """The released architecture, e.g. "sana-1.5-4.8b"; otherwise "custom 2x64" (depth x width)."""
    width, depth = _width(transformer), transformer["num_layers"]
    key = (width, depth, transformer["qk_norm"] is not None, bool(transformer["guidance_embeds"]))
    return _ARCHITECTURES.get(key, f"custom {depth}x{width}")


def layout(component: ReferenceComponent, config: Config) -> Layout:
    """How a component's key map unrolls. Raises `CheckpointError` for a config we do not implement."""
    upstream = UPSTREAM_OF[component]
    for field, value in _REQUIRED[upstream].items():
        _require(upstream, config, field, value)
    if component == "text_encoder":
        return _text_encoder_layout(config)
    if component == "transformer":
        return _transformer_layout(config)
    return _vae_layout(config, "decoder" if component == "vae_decoder" else "encoder")


def _require(component: UpstreamComponent, config: Config, field: str, expected: object) -> None:
    value = config.get(field)
    values = value if isinstance(value, list | tuple) else [value]
    if not values or any(item != expected for item in values):
        raise unsupported(component, field, value, repr(expected))


def unsupported(component: str, field: str, received: object, expected: str) -> CheckpointError:
    """The error for a configuration field our modules do not implement."""
    return CheckpointError(
        f"{component}/config.json: {field} has a value that Sana's released models do not have",
        received=repr(received),
        expected=expected,
        action="check that the folder holds an unmodified Sana checkpoint",
    )


def _extent(component: str, config: Config, field: str, limit: int = _MAX_EXTENT) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise unsupported(component, field, value, f"a whole number in 1..{limit}")
    return value


def _number(component: str, config: Config, field: str) -> float:
    value = config.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= _MAX_NUMBER:
        raise unsupported(component, field, value, f"a number above 0, at most {_MAX_NUMBER}")
    return float(value)


def _width(transformer: Config) -> int:
    heads = _extent("transformer", transformer, "num_attention_heads")
    return heads * _extent("transformer", transformer, "attention_head_dim")


def _transformer_layout(config: Config) -> Layout:
    width = _width(config)
    depth = _extent("transformer", config, "num_layers", _MAX_REPEATS)
    cross_heads = _extent("transformer", config, "num_cross_attention_heads")
    cross = cross_heads * _extent("transformer", config, "cross_attention_head_dim")
    if cross != width:
        raise unsupported("transformer", "width of the cross-attention heads together", cross, str(width))
    _require("transformer", config, "cross_attention_dim", width)
    _extent("transformer", config, "sample_size")
    if config["qk_norm"] not in (None, _QK_NORM):
        raise unsupported("transformer", "qk_norm", config["qk_norm"], f"null or {_QK_NORM!r}")
    if not isinstance(config["guidance_embeds"], bool):
        raise unsupported("transformer", "guidance_embeds", config["guidance_embeds"], "true or false")
    for field in ("norm_eps", "timestep_scale", "guidance_embeds_scale"):
        _number("transformer", config, field)
    if config["interpolation_scale"] is not None:
        _number("transformer", config, "interpolation_scale")
    symbols = {
        "D": width,
        "F": int(_number("transformer", config, "mlp_ratio") * width),
        "in": config["in_channels"],
        "out": config["out_channels"],
        "caption": _extent("transformer", config, "caption_channels"),
    }
    blocks = tuple({"i": i} for i in range(depth))
    timestep = "timestep_and_guidance" if config["guidance_embeds"] else "timestep"
    return Layout(
        symbols,
        {"once": ({},), timestep: ({},), "block": blocks, "qk_norm": blocks if config["qk_norm"] else ()},
    )


def _text_encoder_layout(config: Config) -> Layout:
    def extent(field: str, limit: int = _MAX_EXTENT) -> int:
        return _extent("text_encoder", config, field, limit)

    head_dim = extent("head_dim")
    symbols = {
        "D": extent("hidden_size"),
        "F": extent("intermediate_size"),
        "vocab": extent("vocab_size"),
        "query": extent("num_attention_heads") * head_dim,
        "key": extent("num_key_value_heads") * head_dim,
    }
    layers = tuple({"i": i} for i in range(extent("num_hidden_layers", _MAX_REPEATS)))
    return Layout(symbols, {"once": ({},), "layer": layers})


@dataclass(frozen=True)
class _Stage:
    """One resolution of the autoencoder. `multiscale` is 1 where the attention has the 5x5 scale."""

    channels: int
    depth: int
    block: str
    multiscale: int


def _vae_layout(config: Config, side: Literal["decoder", "encoder"]) -> Layout:
    stages = _stages(config, side)
    head_dim = _extent("vae", config, "attention_head_dim")
    _number("vae", config, "scaling_factor")
    last = len(stages) - 1
    placements: dict[str, list[dict[str, int]]] = {
        group: [] for group in ("resample", "res_block", "efficient_vit_block", "multiscale")
    }
    for s, stage in enumerate(stages):
        symbols = {"s": s, "C": stage.channels, "scales": 1 + stage.multiscale}
        if s < last:
            # The resampler is the last element of an encoder stage and element 0 of a decoder stage.
            placements["resample"].append({**symbols, "k": stage.depth, "C_next": stages[s + 1].channels})
        shift = 1 if side == "decoder" and s < last else 0
        blocks = [{**symbols, "j": j, "k": j + shift} for j in range(stage.depth)]
        if stage.block == _VIT_BLOCK:
            placements["efficient_vit_block"] += blocks
            placements["multiscale"] += blocks if stage.multiscale else []
            if stage.channels % head_dim:
                raise unsupported("vae", f"{side} channels", stage.channels, f"a multiple of {head_dim}")
        else:
            placements["res_block"] += blocks
    symbols = {
        "image": config["in_channels"],
        "latent": config["latent_channels"],
        "head_dim": head_dim,
        "C_shallow": stages[0].channels,
        "C_deep": stages[-1].channels,
    }
    return Layout(symbols, {"once": ({},), **{group: tuple(found) for group, found in placements.items()}})


def _stages(config: Config, side: str) -> list[_Stage]:
    def field(name: str) -> list:
        value = config.get(f"{side}_{name}")
        if isinstance(value, str):
            value = [value] * len(config.get(f"{side}_block_out_channels") or ())
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= _MAX_STAGES:
            raise unsupported("vae", f"{side}_{name}", value, f"a list of 1..{_MAX_STAGES} stages")
        return list(value)

    columns = [field(n) for n in ("block_out_channels", "layers_per_block", "block_types", "qkv_multiscales")]
    if len({len(column) for column in columns}) != 1:
        raise unsupported("vae", f"{side} stages", [len(c) for c in columns], "lists of one length")
    return [_stage(side, *row) for row in zip(*columns, strict=True)]


def _stage(side: str, channels: object, depth: object, block: object, scales: object) -> _Stage:
    numbers = {f"{side}_block_out_channels": channels, f"{side}_layers_per_block": depth}
    if block not in (_RES_BLOCK, _VIT_BLOCK):
        raise unsupported("vae", f"{side}_block_types", block, f"{_RES_BLOCK} or {_VIT_BLOCK}")
    if not isinstance(scales, list | tuple) or list(scales) not in ([], [_MULTISCALE_KERNEL]):
        raise unsupported("vae", f"{side}_qkv_multiscales", scales, f"[] or [{_MULTISCALE_KERNEL}]")
    return _Stage(
        channels=_extent("vae", numbers, f"{side}_block_out_channels"),
        depth=_extent("vae", numbers, f"{side}_layers_per_block", _MAX_REPEATS),
        block=str(block),
        multiscale=len(scales),
    )
