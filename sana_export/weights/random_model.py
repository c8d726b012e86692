"""Named models with random weights, for tests, measurements and trying things without a download.

Every tensor is a pure function of the generator version, its component and its name, so one tensor can be
made without the others, and twice the same.
"""

import hashlib
from functools import cache
from importlib.resources import files
from math import prod, sqrt
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from sana_export.weights.architecture import UPSTREAM_OF, Config, ReferenceComponent, UpstreamComponent
from sana_export.weights.checkpoint import Checkpoint, Configs, OnBytes
from sana_export.weights.key_map import Shape
from sana_export.weights.lazy import LazyTensor
from sana_export.weights.tokenizer import tokenizer_json
from sana_runtime.errors import CheckpointError

# Elements made at once: bounds the float32 copy of a large tensor to 4 MiB.
_CHUNK = 1 << 20
_NORM_SPREAD = 0.1
_BIAS_SPREAD = 0.02


class ModelRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One named model. "full" is stored as bf16 and has the released text encoder and autoencoder shapes."""

    size: Literal["tiny", "full"]
    transformer: str
    features: tuple[str, ...] = ()
    flow_shift: float = 3.0


class Catalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of random_models.json."""

    generator_version: int
    transformers: dict[str, Config]
    transformer_common: Config
    transformer_features: dict[str, Config]
    vaes: dict[str, Config]
    vae_common: Config
    text_encoders: dict[str, Config]
    text_encoder_common: Config
    schedulers: dict[str, Config]
    models: dict[str, ModelRow]


@cache
def catalogue() -> Catalogue:
    """The stored table of random models."""
    content = (files("sana_export.weights") / "random_models.json").read_bytes()
    return msgspec.json.decode(content, type=Catalogue)


def random_model_names() -> tuple[str, ...]:
    """Every name that `RandomCheckpoint` accepts."""
    return tuple(catalogue().models)


class RandomCheckpoint(Checkpoint):
    """A named model whose weights are made when loaded. Raises `CheckpointError` for another name."""

    def __init__(self, name: str) -> None:
        row = catalogue().models.get(name)
        if row is None:
            raise CheckpointError(
                "no random model has this name",
                received=name,
                expected=", ".join(random_model_names()),
                action="choose one of the names",
            )
        super().__init__(name, _configs(row), variant=None, attention_clip=False)
        self.dtype = torch.float32 if row.size == "tiny" else torch.bfloat16

    def upstream_weights(self, component: UpstreamComponent) -> dict[str, LazyTensor]:
        """All tensors of a component under upstream's names, made when loaded."""
        return {
            name: _random_tensor(component, name, shape, self.dtype)
            for name, shape in self.upstream_shapes(component).items()
        }

    def digest(self, component: ReferenceComponent, on_bytes: OnBytes | None = None) -> str:
        """Hex SHA-256 of the generator version, the model's name and the component's configuration."""
        upstream = UPSTREAM_OF[component]
        facts = (catalogue().generator_version, self.source, upstream, str(self.dtype), self.config(upstream))
        return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()

    def tokenizer_json(self) -> bytes:
        """A small tokenizer with Gemma's conventions."""
        return tokenizer_json()


def _configs(row: ModelRow) -> Configs:
    table = catalogue()
    transformer: Config = {**table.transformer_common, **table.transformers[row.transformer]}
    for feature in row.features:
        transformer.update(table.transformer_features[feature])
    scheduler = dict(table.schedulers["trigflow" if transformer["guidance_embeds"] else "flow_dpm_solver"])
    if "flow_shift" in scheduler:
        scheduler["flow_shift"] = row.flow_shift
    vae, text_encoder = ("tiny", "tiny") if row.size == "tiny" else ("dc-ae-f32c32", "gemma-2-2b")
    return Configs(
        transformer=transformer,
        vae={**table.vae_common, **table.vaes[vae]},
        text_encoder={**table.text_encoder_common, **table.text_encoders[text_encoder]},
        scheduler=scheduler,
    )


def _random_tensor(component: UpstreamComponent, name: str, shape: Shape, dtype: torch.dtype) -> LazyTensor:
    mean, spread = _distribution(component, name, shape)
    return LazyTensor(shape, dtype, lambda: _normal(_generator(component, name), shape, dtype, mean, spread))


def _distribution(component: UpstreamComponent, name: str, shape: Shape) -> tuple[float, float]:
    """Mean and standard deviation that keep activations near unit scale through the full depth."""
    if name.endswith("scale_shift_table"):
        return 0.0, 1 / sqrt(shape[-1])
    if name.endswith(".bias"):
        return 0.0, _BIAS_SPREAD
    if len(shape) == 1:
        # Gemma's RMS norm multiplies by 1 + weight.
        return (0.0 if component == "text_encoder" else 1.0), _NORM_SPREAD
    return 0.0, 1 / sqrt(prod(shape[1:]))


def _generator(component: UpstreamComponent, name: str) -> np.random.Generator:
    text = f"{catalogue().generator_version}/{component}/{name}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
    return np.random.Generator(np.random.PCG64(seed))


def _normal(
    generator: np.random.Generator, shape: Shape, dtype: torch.dtype, mean: float, spread: float
) -> torch.Tensor:
    result = torch.empty(prod(shape), dtype=dtype)
    for chunk in result.split(_CHUNK):
        values: Any = generator.standard_normal(len(chunk), dtype=np.float32)
        values *= np.float32(spread)
        values += np.float32(mean)
        chunk.copy_(torch.from_numpy(values))
    return result.reshape(shape)
