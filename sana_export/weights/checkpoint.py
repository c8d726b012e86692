"""What a checkpoint is to the rest of the exporter, whatever it was stored as, and how one is opened."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from sana_export.weights import key_map
from sana_export.weights.architecture import (
    REFERENCES_OF,
    UPSTREAM_COMPONENTS,
    UPSTREAM_OF,
    Config,
    ReferenceComponent,
    UpstreamComponent,
    architecture_name,
    completed,
    guidance_kind,
    layout,
)
from sana_export.weights.key_map import Shape
from sana_export.weights.lazy import LazyTensor
from sana_runtime.contract import GuidanceKind
from sana_runtime.errors import CheckpointError

# The `--variant` that means: the files without a variant in their names.
DEFAULT_VARIANT = "default"
RANDOM_PREFIX = "random:"
# The trained model that this package holds. A folder of that name is "./nano".
SHIPPED_MODEL = "nano"
SHIPPED_SIDE = 512
# Beside model_index.json, where a model has prompts of its own to be calibrated with.
CALIBRATION_PROMPTS = "calibration_prompts.txt"
# The same for what the pipeline's call has defaults of, by its parameters' names: {"guidance_scale": 3.0}.
SAMPLING = "sampling.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Configs:
    """The four upstream configuration files, as stored, and sampling.json, empty where the model has none."""

    transformer: Config
    vae: Config
    text_encoder: Config
    scheduler: Config
    sampling: Config = field(default_factory=dict)


class Checkpoint(ABC):
    """A complete Sana model: weights, configurations, tokenizer.

    `source` is what the user named; `variant` the file variant chosen ("fp16", "bf16") or None;
    `attention_clip` is True for fp16-era weights, whose self-attention output must be clipped to +-65504 in
    every dtype.
    Configurations are upstream's, with the fields that older files miss filled in.
    """

    def __init__(self, source: str, configs: Configs, *, variant: str | None, attention_clip: bool) -> None:
        self.source = source
        self.variant = variant
        self.attention_clip = attention_clip
        self.transformer_config = completed("transformer", configs.transformer)
        self.vae_config = completed("vae", configs.vae)
        self.text_encoder_config = completed("text_encoder", configs.text_encoder)
        self.scheduler_config = dict(configs.scheduler)
        self.sampling_config = dict(configs.sampling)
        self._assemblies = {
            reference: key_map.assemblies(reference, layout(reference, self.config(upstream)))
            for reference, upstream in UPSTREAM_OF.items()
        }

    @property
    def architecture(self) -> str:
        """The released architecture ("sana-1.6b", ...), or "custom 2x64" (depth x width)."""
        return architecture_name(self.transformer_config)

    @property
    def guidance(self) -> GuidanceKind:
        """Two captions per step, or the guidance scale as a model input (Sprint)."""
        return guidance_kind(self.transformer_config)

    @property
    def pipeline_class(self) -> str:
        """The diffusers pipeline that runs this model."""
        return "SanaSprintPipeline" if self.guidance == "embedded" else "SanaPipeline"

    def config(self, component: UpstreamComponent) -> Config:
        """One component's upstream configuration."""
        return {
            "text_encoder": self.text_encoder_config,
            "transformer": self.transformer_config,
            "vae": self.vae_config,
        }[component]

    def upstream_shapes(self, component: UpstreamComponent) -> dict[str, Shape]:
        """The shape that the configuration implies for every upstream tensor."""
        found = [item for reference in REFERENCES_OF[component] for item in self._assemblies[reference]]
        return key_map.upstream_shapes(found)

    def reference_shapes(self, component: ReferenceComponent) -> dict[str, Shape]:
        """The shape that the configuration implies for every tensor of our reference module."""
        return {assembly.reference: assembly.shape for assembly in self._assemblies[component]}

    def weights(self, component: ReferenceComponent) -> dict[str, LazyTensor]:
        """All tensors of a component under the names of our reference module, unread."""
        upstream = self.upstream_weights(UPSTREAM_OF[component])
        return {assembly.reference: assembly.assemble(upstream) for assembly in self._assemblies[component]}

    @abstractmethod
    def upstream_weights(self, component: UpstreamComponent) -> dict[str, LazyTensor]:
        """All tensors of a component under diffusers' or transformers' names, unread."""

    @abstractmethod
    def digest(self, component: ReferenceComponent, on_bytes: OnBytes | None = None) -> str:
        """Hex SHA-256 of what a component's weights come from.

        Reads every byte the first time; `on_bytes` is told the size of each chunk.
        """

    def calibration_prompts(self) -> Path | None:
        """The model's own prompts to calibrate it with, one per line; None where it has none."""
        return None

    @abstractmethod
    def tokenizer_json(self) -> bytes:
        """The content of the `tokenizers` library's tokenizer.json."""


def open_checkpoint(model: str, *, variant: str | None = None, base: str | None = None) -> Checkpoint:
    """Open `model` and check it completely, reading headers only.

    `model`: a diffusers directory, an official `.pth` file, a Hugging Face id ("org/name", or
    "org/name@revision"), "nano" (the small trained model that is shipped), or a named random model ("random:tiny").
    `variant`: the file variant where a folder holds several; "default" means the files without one.
    `base`: where a `.pth`, which holds a transformer only, takes the other components from.
    Raises `CheckpointError`.
    """
    if Path(model).suffix != ".pth":
        _refuse("base", base, model)
        return _open_complete(model, variant, UPSTREAM_COMPONENTS)
    from sana_export.weights.official import OfficialCheckpoint

    if base is None:
        raise _no_base(model)
    others: tuple[UpstreamComponent, ...] = ("text_encoder", "vae")
    return OfficialCheckpoint(Path(model), _normalised(model), _open_complete(base, variant, others))


def _open_complete(model: str, variant: str | None, components: tuple[UpstreamComponent, ...]) -> Checkpoint:
    """A checkpoint that has every component; only the weights of `components` need to be there."""
    if model.startswith(RANDOM_PREFIX):
        from sana_export.weights.random_model import RandomCheckpoint

        _refuse("variant", variant, model)
        return RandomCheckpoint(model)
    from sana_export.weights.diffusers_directory import open_directory

    if model == SHIPPED_MODEL:
        return open_directory(shipped_directory(), model, variant, components)
    if not Path(model).exists() and _HUB_ID.fullmatch(model):
        from sana_export.weights.hub import download

        return open_directory(download(model, variant, components), model, variant, components)
    return open_directory(Path(model), _normalised(model), variant, components)


def shipped_directory() -> Path:
    """The diffusers directory of `SHIPPED_MODEL`, package data. Raises `CheckpointError` if it is not installed."""
    folder = Path(str(files("sana_export"))) / "models" / SHIPPED_MODEL
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"the model {SHIPPED_MODEL!r} is not part of this installation",
            received=f"no {folder}",
            expected="the directory that a release of sana-export holds",
            action="install a release, train it with python -m scripts.train_nano, or build random:tiny",
        )
    return folder


def _no_base(model: str) -> CheckpointError:
    return CheckpointError(
        f"{model} holds the transformer only",
        received="no --base",
        expected="a checkpoint to take the text encoder, autoencoder, tokenizer and scheduler from",
        action="--base with a diffusers directory or id of the same resolution, for example "
        "--base Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    )


def _normalised(model: str) -> str:
    return Path(model).as_posix()


def _refuse(option: str, value: str | None, model: str) -> None:
    if value is not None:
        raise CheckpointError(
            f"--{option} has no meaning for {model}",
            received=f"--{option} {value}",
            expected=f"no --{option}",
            action=f"leave out --{option}",
        )
