"""The shapes that are trained: `nano`, which is shipped, and `tiny`, which lets the whole run be tried on a CPU."""

from dataclasses import dataclass
from typing import Any

from sana_export.weights.architecture import Config
from sana_export.weights.checkpoint import Configs
from sana_export.weights.random_model import catalogue

# Of the noise levels in training, where most of the learning is done.
TRAINING_SHIFT = 3.0
# What the model is asked with: chosen on the validation prompts for few steps of Flow-DPM-Solver
# (scripts/measure_solvers.py).
FLOW_SHIFT, GUIDANCE = 6.0, 3.0


@dataclass(frozen=True)
class Batches:
    """Pictures per step. `autoencoder` and `diffusion` have one number per resolution."""

    autoencoder: tuple[int, int]
    contrastive: int
    diffusion: tuple[int, int]
    encode: int
    sample: int


@dataclass(frozen=True)
class Size:
    """A model's shape and how it is fed.

    `sides`: the two resolutions of the cascade, in pixels. `caption_rows`: rows that cross-attention sees, the first
    token included. `scenes`: how many training scenes are drawn. `vocabulary`: tokens.
    """

    name: str
    configs: Configs
    sides: tuple[int, int]
    vocabulary: int
    caption_rows: int
    scenes: int
    contrastive_channels: int
    batches: Batches


def _configs(transformer: Config, vae: Config, text_encoder: Config) -> Configs:
    """Upstream configurations: these fields, the rest as in every Sana."""
    table = catalogue()
    scheduler = {**table.schedulers["flow_dpm_solver"], "flow_shift": FLOW_SHIFT}
    return Configs(
        transformer={**table.transformer_common, **transformer},
        vae={**table.vae_common, **vae},
        text_encoder={**table.text_encoder_common, **text_encoder},
        scheduler=scheduler,
        sampling={"guidance_scale": GUIDANCE},
    )


def _transformer(heads: int, depth: int, cross: tuple[int, int], caption_channels: int) -> Config:
    return {
        "attention_head_dim": 32,
        "num_attention_heads": heads,
        "num_cross_attention_heads": cross[0],
        "cross_attention_head_dim": cross[1],
        "cross_attention_dim": 32 * heads,
        "num_layers": depth,
        "caption_channels": caption_channels,
        "sample_size": 16,
        # Without it six layers of 3 x 3 convolutions would have to carry positions in from the border.
        "interpolation_scale": 1.0,
    }


def _text_encoder(width: int, layers: int, hidden: int, heads: tuple[int, int], vocabulary: int) -> Config:
    head_dim = width // heads[0]
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": hidden,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "vocab_size": vocabulary,
    }


def _vae(encoder: list[int], decoder: list[int], **fields: Any) -> Config:
    return {
        "encoder_block_out_channels": encoder,
        "decoder_block_out_channels": decoder,
        "encoder_layers_per_block": [1] * 6,
        "decoder_layers_per_block": [1] * 6,
        **fields,
    }


# Input channels that groups of 64 (transformer) and 128 (text encoder) divide: what the INT4 recipe needs.
NANO = Size(
    name="nano",
    configs=_configs(
        transformer=_transformer(heads=6, depth=6, cross=(3, 64), caption_channels=128),
        vae=_vae([16, 32, 32, 64, 64, 128], [16, 32, 64, 64, 128, 128]),
        text_encoder=_text_encoder(width=128, layers=4, hidden=384, heads=(4, 2), vocabulary=1152),
    ),
    sides=(256, 512),
    vocabulary=1152,
    caption_rows=32,
    scenes=300_000,
    contrastive_channels=128,
    batches=Batches(autoencoder=(64, 24), contrastive=1024, diffusion=(512, 384), encode=128, sample=250),
)

TINY = Size(
    name="tiny",
    configs=_configs(
        transformer=_transformer(heads=2, depth=2, cross=(2, 32), caption_channels=64),
        vae=_vae([8, 8, 16, 32, 32, 32], [8, 8, 16, 32, 32, 32]),
        text_encoder=_text_encoder(width=64, layers=2, hidden=128, heads=(2, 1), vocabulary=1024),
    ),
    sides=(64, 128),
    vocabulary=1024,
    caption_rows=40,
    scenes=256,
    contrastive_channels=32,
    batches=Batches(autoencoder=(8, 4), contrastive=32, diffusion=(32, 16), encode=32, sample=8),
)

SIZES = {size.name: size for size in (NANO, TINY)}
