"""The official `.pth`: a transformer in NVlabs' own naming; everything else comes from a base checkpoint."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import msgspec
import torch

from sana_export.weights import key_map
from sana_export.weights.architecture import Config, ReferenceComponent, UpstreamComponent, layout
from sana_export.weights.checkpoint import Checkpoint, Configs, OnBytes
from sana_export.weights.lazy import LazyTensor, most_common_dtype
from sana_export.weights.provenance import find_release, needs_attention_clip
from sana_export.weights.stored_files import content_digest, damaged, unreadable
from sana_export.weights.validation import problems, refuse_problems
from sana_runtime.contract import GuidanceKind
from sana_runtime.errors import CheckpointError

_BLOCK = re.compile(r"blocks\.(\d+)\.")
# Heads of the cross-attention cannot be told from shapes: width -> (heads, width of a head).
_CROSS_HEADS = {1152: (16, 72), 2240: (20, 112)}
_SIZING = ("x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight", "blocks.0.mlp.inverted_conv.conv.weight")
_QK_NORM = "blocks.0.attn.q_norm.weight"
_GUIDANCE = "cfg_embedder.mlp.0.weight"


class OfficialCheckpoint(Checkpoint):
    """The transformer of an official `.pth`, and a base checkpoint's other components.

    The transformer's configuration comes from the tensors' shapes; what shapes do not tell (resolution, heads
    of an unreleased width) comes from the file's name or from the base. Raises `CheckpointError`.
    """

    def __init__(self, path: Path, source: str, base: Checkpoint) -> None:
        official = _read_pth(path)
        config = _transformer_config(source, official, base)
        self.path = path
        self.base = base
        self._transformer = _split(source, official, config)
        configs = Configs(
            config, base.vae_config, base.text_encoder_config, base.scheduler_config, base.sampling_config
        )
        clip = needs_attention_clip(most_common_dtype(self._transformer), (str(path.resolve()),))
        super().__init__(source, configs, variant=base.variant, attention_clip=clip)

    def upstream_weights(self, component: UpstreamComponent) -> dict[str, LazyTensor]:
        """All tensors of a component under diffusers' or transformers' names, unread."""
        if component != "transformer":
            return self.base.upstream_weights(component)
        return {name: self._transformer[name] for name in self.upstream_shapes(component)}

    def digest(self, component: ReferenceComponent, on_bytes: OnBytes | None = None) -> str:
        """Hex SHA-256 over the file and the inferred configuration; other components: the base's digest."""
        if component != "transformer":
            return self.base.digest(component, on_bytes)
        config = msgspec.json.encode(self.transformer_config, order="sorted")
        return hashlib.sha256(config + content_digest([self.path], on_bytes).encode()).hexdigest()

    def calibration_prompts(self) -> Path | None:
        """The base's prompts."""
        return self.base.calibration_prompts()

    def tokenizer_json(self) -> bytes:
        """The base's tokenizer."""
        return self.base.tokenizer_json()


def _read_pth(path: Path) -> dict[str, LazyTensor]:
    """The file's state dict, memory-mapped."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise unreadable(path, error) from error
    except UnpicklingError as error:
        raise _refused(path, error) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        if "unable to mmap" in str(error):
            raise _too_large(path) from error
        raise damaged(path, str(error).splitlines()[0][:200], "a file written by torch.save") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise _not_official(str(path), f"a {type(content).__name__} of other things than tensors")
    return {str(name): _in_memory_map(tensor) for name, tensor in content.items()}


def _in_memory_map(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach())


def _transformer_config(source: str, official: Mapping[str, LazyTensor], base: Checkpoint) -> Config:
    """diffusers' configuration of the official weights. Raises `CheckpointError`."""
    if any("controlnet" in name for name in official):
        raise _not_official(source, "ControlNet weights")
    for name in _SIZING:
        if name not in official or len(official[name].shape) < 2:
            raise _not_official(source, f"no {name} among {len(official)} tensors: {', '.join(list(official)[:4])}")
    guidance: GuidanceKind = "embedded" if _GUIDANCE in official else "classifier_free"
    if guidance != base.guidance:
        raise _base_mismatch(source, f"{base.source}: {base.guidance} guidance", f"{guidance} guidance")
    embed, caption, ffn = (official[name].shape for name in _SIZING)
    width, head_dim = embed[0], base.transformer_config["attention_head_dim"]
    cross_heads, cross_dim = _cross_heads(source, width, base)
    return {
        **base.transformer_config,
        **_resolution(source, base),
        "num_attention_heads": width // head_dim,
        "num_layers": 1 + max(int(match[1]) for name in official if (match := _BLOCK.match(name))),
        "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": cross_dim,
        "cross_attention_dim": width,
        "caption_channels": caption[1],
        "in_channels": embed[1],
        "out_channels": embed[1],
        "mlp_ratio": _mlp_ratio(ffn[0] // 2, width),
        "qk_norm": "rms_norm_across_heads" if _QK_NORM in official else None,
        "guidance_embeds": guidance == "embedded",
    }


def _mlp_ratio(hidden: int, width: int) -> float:
    """The ratio from which int(ratio * width) is `hidden`."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else (hidden + 0.5) / width


def _cross_heads(source: str, width: int, base: Checkpoint) -> tuple[int, int]:
    config = base.transformer_config
    of_base = (config["num_cross_attention_heads"], config["cross_attention_head_dim"])
    heads = _CROSS_HEADS.get(width, of_base)
    if heads[0] * heads[1] != width:
        raise _base_mismatch(source, f"{base.source}: cross-attention of {of_base[0]} x {of_base[1]}", f"{width} wide")
    return heads


def _resolution(source: str, base: Checkpoint) -> Config:
    """Latent side and position embedding: of the release the file is named for, which the base must match."""
    release = find_release((source,))
    if release is None:
        return {}
    if release.sample_size != base.transformer_config["sample_size"]:
        raise _base_mismatch(
            source,
            f"{base.source}: sample_size {base.transformer_config['sample_size']}",
            f"sample_size {release.sample_size}, because the base's scheduler is used",
        )
    return {"sample_size": release.sample_size, "interpolation_scale": release.interpolation_scale}


def _split(source: str, official: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """The diffusers tensors in official ones, after checking that they are all there."""
    unrolled = layout("transformer", config)
    upstream = key_map.upstream_shapes(key_map.assemblies("transformer", unrolled))
    parts = key_map.official_parts(unrolled)
    expected = key_map.official_shapes(parts, upstream)
    lines = problems("transformer", official, expected, key_map.official_key_map().drop)
    refuse_problems(source, lines, "the tensors of an official Sana transformer")
    return key_map.split_official(official, parts)


def _base_mismatch(source: str, received: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"--base does not fit {source}",
        received=received,
        expected=expected,
        action="choose the base of the same name, ending in _diffusers",
    )


def _not_official(source: str, received: str) -> CheckpointError:
    return CheckpointError(
        f"{source} is not an official Sana transformer",
        received=received,
        expected="the state dict of a Sana text-to-image model, bare or under 'state_dict'",
        action="choose checkpoints/<name>.pth of an Efficient-Large-Model/Sana… repository",
    )


def _too_large(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is too large to be mapped into this machine's memory",
        received=f"{path.stat().st_size >> 20} MiB",
        expected="a file smaller than memory and swap together",
        action="use the repository ending in _diffusers, whose files are mapped in parts, or add swap",
    )


def _refused(path: Path, error: UnpicklingError) -> CheckpointError:
    return CheckpointError(
        f"{path} was not opened: it holds more than tensors and could run code",
        received=str(error).splitlines()[0][:200],
        expected="tensors in plain dictionaries",
        action="use the safetensors checkpoint, or save its state_dict alone where you trust the file",
    )
