"""A diffusers directory: the checkpoint format in which Sana is distributed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sana_export.weights import key_map
from sana_export.weights.architecture import (
    REFERENCES_OF,
    UPSTREAM_COMPONENTS,
    UPSTREAM_OF,
    Config,
    ReferenceComponent,
    UpstreamComponent,
)
from sana_export.weights.checkpoint import (
    CALIBRATION_PROMPTS,
    DEFAULT_VARIANT,
    SAMPLING,
    Checkpoint,
    Configs,
    OnBytes,
)
from sana_export.weights.lazy import LazyTensor, most_common_dtype
from sana_export.weights.provenance import needs_attention_clip
from sana_export.weights.safetensors_file import open_safetensors
from sana_export.weights.stored_files import (
    MAX_INDEX_BYTES,
    MAX_TOKENIZER_BYTES,
    content_digest,
    damaged,
    read_bytes,
    read_json,
)
from sana_export.weights.validation import problems, refuse_problems
from sana_export.weights.variants import WeightFile, choose_variants, weight_files
from sana_runtime.errors import CheckpointError
from sana_runtime.scheduler import MAX_STEPS

# Pipelines that share Sana's text-to-image components; the guidance kind comes from the transformer's config.
_PIPELINES = (
    "SanaPipeline",
    "SanaPAGPipeline",
    "SanaImg2ImgPipeline",
    "SanaSprintPipeline",
    "SanaSprintImg2ImgPipeline",
)
_CLASSES: dict[UpstreamComponent, tuple[str, ...]] = {
    "text_encoder": ("Gemma2Model", "Gemma2ForCausalLM"),
    "transformer": ("SanaTransformer2DModel",),
    "vae": ("AutoencoderDC",),
}
_MOST_GUIDANCE = 100
_SCHEDULERS = ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "SCMScheduler")


@dataclass(frozen=True)
class _Component:
    """One component's chosen files and the tensors in them."""

    files: tuple[Path, ...]
    tensors: dict[str, LazyTensor]


def open_directory(
    folder: Path,
    source: str,
    variant: str | None,
    components: Sequence[UpstreamComponent] = UPSTREAM_COMPONENTS,
) -> "DirectoryCheckpoint":
    """Open a diffusers directory, reading headers only, and check it completely.

    `source` is the name errors and manifests use. With fewer `components`, the weights of the others may be
    absent. Raises `CheckpointError`.
    """
    index = _model_index(folder, source)
    names = (source, str(folder.resolve()), str(index.get("_name_or_path", "")))
    configs = Configs(
        transformer=_component_config(folder, "transformer"),
        vae=_component_config(folder, "vae"),
        text_encoder=_component_config(folder, "text_encoder"),
        scheduler=_scheduler_config(folder),
        sampling=_sampling_config(folder),
    )
    available = {component: _available(folder, component) for component in components}
    variants = choose_variants(available, variant, source)
    opened = {
        component: _open_component(folder / component, component, available[component][variants[component]])
        for component in components
    }
    return DirectoryCheckpoint(folder, source, names, configs, variants, opened, variant)


class DirectoryCheckpoint(Checkpoint):
    """An opened diffusers directory; `variants` says which file variant each component is read from."""

    def __init__(
        self,
        folder: Path,
        source: str,
        names: tuple[str, ...],
        configs: Configs,
        variants: dict[UpstreamComponent, str | None],
        components: dict[UpstreamComponent, _Component],
        requested: str | None,
    ) -> None:
        self.folder = folder
        self.variants = variants
        self._components = components
        origin = (*names, str(configs.transformer.get("_name_or_path", "")))
        stored = most_common_dtype(components["transformer"].tensors) if "transformer" in components else None
        clip = needs_attention_clip(stored, origin)
        chosen = variants.get("transformer") if requested in (None, DEFAULT_VARIANT) else requested
        super().__init__(source, configs, variant=chosen, attention_clip=clip)
        self._validate()

    def _validate(self) -> None:
        lines = []
        for component, opened in self._components.items():
            maps = [key_map.key_map(reference) for reference in REFERENCES_OF[component]]
            drop = tuple(pattern for map_ in maps for pattern in map_.drop)
            lines += problems(component, opened.tensors, self.upstream_shapes(component), drop)
        refuse_problems(self.source, lines, f"the tensors of {self.architecture}")

    def upstream_weights(self, component: UpstreamComponent) -> dict[str, LazyTensor]:
        """All tensors of a component under diffusers' or transformers' names, unread."""
        tensors = self._components[component].tensors
        return {name: tensors[name] for name in self.upstream_shapes(component)}

    def digest(self, component: ReferenceComponent, on_bytes: OnBytes | None = None) -> str:
        """Hex SHA-256 over the component's config.json and the weight files read, by name and content."""
        upstream = UPSTREAM_OF[component]
        config = self.folder / upstream / "config.json"
        return content_digest([config, *self._components[upstream].files], on_bytes)

    def calibration_prompts(self) -> Path | None:
        """calibration_prompts.txt, if the directory holds one."""
        path = self.folder / CALIBRATION_PROMPTS
        return path if path.is_file() else None

    def tokenizer_json(self) -> bytes:
        """tokenizer/tokenizer.json, checked to be readable. Raises `CheckpointError`."""
        path = self.folder / "tokenizer" / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{self.source} has no tokenizer/tokenizer.json",
                received=", ".join(sorted(_names(path.parent))) or "no tokenizer folder",
                expected="the fast tokenizer's file",
                action="download it with the checkpoint, or write it with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
            )
        content = read_bytes(path, MAX_TOKENIZER_BYTES)
        try:
            size = Tokenizer.from_buffer(content).get_vocab_size()
        except ValueError as error:
            raise damaged(path, str(error)[:200], "a tokenizer of the tokenizers library") from error
        if size > self.text_encoder_config["vocab_size"]:
            expected = f"at most {self.text_encoder_config['vocab_size']}, the text encoder's vocabulary"
            raise damaged(path, f"{size} tokens", expected)
        return content


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _model_index(folder: Path, source: str) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.is_file():
        raise _no_model_index(folder, source)
    index = read_json(path)
    pipeline = str(index.get("_class_name"))
    if "ControlNet" in pipeline or "controlnet" in index:
        raise _not_supported(source, f"{pipeline}, a ControlNet checkpoint")
    if pipeline not in _PIPELINES:
        raise _not_supported(source, f"{pipeline} in model_index.json")
    return index


def _no_model_index(folder: Path, source: str) -> CheckpointError:
    names = _names(folder)
    action = "give a diffusers directory, an official .pth file, a Hugging Face id, nano, or random:tiny"
    if any("svdq" in name.lower() for name in (*names, source)):
        return _not_supported(source, "a 4-bit (SVDQuant) checkpoint")
    if (folder / "checkpoints").is_dir() or any(name.endswith(".pth") for name in names):
        action = "this is the official layout: give the .pth file with --base, or the name ending in _diffusers"
    elif "config.json" in names:
        action = "this is one component: give the folder above it"
    return CheckpointError(
        f"{source} is not a diffusers directory",
        received=_glimpse(folder),
        expected="a folder with model_index.json, transformer, vae, text_encoder, tokenizer and scheduler",
        action=action,
    )


def _glimpse(folder: Path) -> str:
    if not folder.exists():
        return "no such file or directory"
    return ", ".join(sorted(_names(folder))[:8]) or ("an empty folder" if folder.is_dir() else "a file")


def _not_supported(source: str, received: str) -> CheckpointError:
    return CheckpointError(
        f"{source} is not a Sana text-to-image checkpoint",
        received=received,
        expected="one of " + ", ".join(_PIPELINES) + ", with 16-bit or 32-bit weights",
        action="choose one of the Efficient-Large-Model/Sana…_diffusers repositories",
    )


def _component_config(folder: Path, component: UpstreamComponent) -> Config:
    path = folder / component / "config.json"
    if not path.is_file():
        raise _incomplete(folder, f"{component}/config.json")
    config = read_json(path)
    if "quantization_config" in config:
        raise _not_supported(str(folder / component), "quantization_config in config.json: quantised weights")
    classes = config.get("architectures") if component == "text_encoder" else [config.get("_class_name")]
    if isinstance(classes, list) and classes and classes[0] not in (*_CLASSES[component], None):
        raise _not_supported(str(folder / component), f"class {classes[0]} in config.json")
    return config


def _scheduler_config(folder: Path) -> Config:
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise _incomplete(folder, "scheduler/scheduler_config.json")
    config = read_json(path)
    if config.get("_class_name") not in _SCHEDULERS:
        raise _not_supported(str(path), f"class {config.get('_class_name')}")
    return config


def _sampling_config(folder: Path) -> Config:
    """sampling.json, checked: nothing that it says may go unheard."""
    path = folder / SAMPLING
    if not path.is_file():
        return {}
    config = read_json(path)
    for name, value in config.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "num_inference_steps" and number and value in range(1, MAX_STEPS + 1):
            continue
        if name == "guidance_scale" and number and 0 <= value <= _MOST_GUIDANCE:
            continue
        raise CheckpointError(
            f"{path} has a setting that is not understood",
            received=f"{name}: {value!r}",
            expected=f"guidance_scale, a number from 0 to {_MOST_GUIDANCE}, or num_inference_steps, a whole number "
            f"from 1 to {MAX_STEPS}",
            action="correct the file, or remove it: then diffusers' defaults are the model's",
        )
    return config


def _incomplete(folder: Path, missing: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is incomplete",
        received=f"no {missing}",
        expected="a whole diffusers directory",
        action="download the checkpoint again; an interrupted download leaves such a folder",
    )


def _available(folder: Path, component: UpstreamComponent) -> dict[str | None, WeightFile]:
    return weight_files(component, _names(folder / component), str(folder / component))


def _open_component(folder: Path, component: UpstreamComponent, file: WeightFile) -> _Component:
    paths, tensors = (_open_shards if file.is_index else _open_single)(folder / file.name)
    prefix = key_map.key_map(REFERENCES_OF[component][0]).strip_prefix
    return _Component(tuple(paths), {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})


def _open_single(path: Path) -> tuple[list[Path], dict[str, LazyTensor]]:
    return [path], open_safetensors(path)


def _open_shards(index: Path) -> tuple[list[Path], dict[str, LazyTensor]]:
    """The index and its shards, and the tensors where the index says they are."""
    weight_map = shard_map(index)
    shards = {name: open_safetensors(_shard(index, name)) for name in sorted(set(weight_map.values()))}
    absent = [f"{tensor} in {shard}" for tensor, shard in weight_map.items() if tensor not in shards[shard]]
    if absent:
        received = f"no {absent[0]} ({len(absent)} such entries)"
        raise damaged(index, received, "shards that hold what the index says")
    return [index, *(index.parent / name for name in shards)], {
        tensor: shards[shard][tensor] for tensor, shard in weight_map.items()
    }


def shard_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name beside an index. Raises `CheckpointError` for one that leaves the folder."""
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index, "no weight_map", "a JSON object with weight_map: tensor name -> file name")
    for tensor, shard in weight_map.items():
        plain = isinstance(shard, str) and Path(shard).name == shard and "\\" not in shard and "\0" not in shard
        if not plain or not shard.endswith(".safetensors"):
            raise damaged(index, f"{tensor} -> {shard!r}", "the name of a .safetensors file beside the index")
    return weight_map


def _shard(index: Path, name: str) -> Path:
    path = index.parent / name
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing",
            received=f"{index.name} names it, {index.parent} does not have it",
            expected="every shard that the index names",
            action="download the checkpoint again; an interrupted download leaves such a folder",
        )
    return path
