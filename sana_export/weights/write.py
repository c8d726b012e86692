"""Write any checkpoint as a diffusers directory that SanaPipeline.from_pretrained can load."""

import json
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from sana_export.weights.architecture import UPSTREAM_COMPONENTS, Config, UpstreamComponent
from sana_export.weights.checkpoint import SAMPLING, Checkpoint, OnBytes
from sana_export.weights.lazy import LazyTensor
from sana_export.weights.safetensors_file import NAMES
from sana_export.weights.variants import STEM
from sana_runtime.errors import CheckpointError
from sana_runtime.files import whole_file

MAX_SHARD_BYTES = 2 << 30
_ALIGNMENT = 8
# Tensors in memory at once while a directory is written; random ones are drawn by one thread each.
_MOST_AHEAD = 8


def write_diffusers_directory(
    checkpoint: Checkpoint,
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_bytes: OnBytes | None = None,
) -> None:
    """Write every component of `checkpoint` under `path`, which must be absent or empty.

    Weights are cast to `dtype` (None: as stored) and written tensor by tensor; the next few are loaded meanwhile, by as
    many threads as there are CPUs, up to eight.
    `on_bytes` is told the size of each tensor written. model_index.json comes last, so an interrupted write
    is not mistaken for a checkpoint. Raises `CheckpointError` and, for a full disk, `BuildError`.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(
            f"{path} exists",
            received="a file" if path.is_file() else "a directory with files in it",
            expected="a new or empty directory",
            action="choose another path, or remove this one",
        )
    for component in UPSTREAM_COMPONENTS:
        config = checkpoint.config(component)
        _write_json(path / component / "config.json", _with_dtype(component, config, dtype))
        tensors = checkpoint.upstream_weights(component)
        _write_weights(path / component, STEM[component], tensors, dtype, max_shard_bytes, on_bytes)
    _write_json(path / "scheduler" / "scheduler_config.json", checkpoint.scheduler_config)
    _write_tokenizer(path / "tokenizer", checkpoint.tokenizer_json())
    if checkpoint.sampling_config:
        _write_json(path / SAMPLING, checkpoint.sampling_config)
    _write_json(path / "model_index.json", _model_index(checkpoint))


def _model_index(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "_class_name": checkpoint.pipeline_class,
        "scheduler": ["diffusers", checkpoint.scheduler_config["_class_name"]],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }


def _with_dtype(component: UpstreamComponent, config: Config, dtype: torch.dtype | None) -> Config:
    if component != "text_encoder" or dtype is None:
        return config
    return {**config, "dtype": str(dtype).removeprefix("torch.")}


def _write_tokenizer(folder: Path, tokenizer_json: bytes) -> None:
    with whole_file(folder / "tokenizer.json") as temporary:
        temporary.write_bytes(tokenizer_json)
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "padding_side": "right",
            "tokenizer_class": "GemmaTokenizerFast",
        },
    )


def _write_json(path: Path, content: Any) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(
    folder: Path,
    stem: str,
    tensors: dict[str, LazyTensor],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    on_bytes: OnBytes | None,
) -> None:
    shards = list(_shards(tensors, dtype, max_shard_bytes))
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", tensors, dtype, on_bytes, ahead=_ahead())
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        chosen = {name: tensors[name] for name in names}
        write_safetensors(folder / file_name, chosen, dtype, on_bytes, ahead=_ahead())
        weight_map.update(dict.fromkeys(names, file_name))
    total = sum(_size(tensor, dtype) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


def _shards(tensors: dict[str, LazyTensor], dtype: torch.dtype | None, limit: int) -> Iterator[list[str]]:
    """Tensor names of each shard, in order; a tensor above the limit has a shard of its own."""
    names: list[str] = []
    filled = 0
    for name, tensor in tensors.items():
        size = _size(tensor, dtype)
        if names and filled + size > limit:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _size(tensor: LazyTensor, dtype: torch.dtype | None) -> int:
    return tensor.count * (dtype or tensor.dtype).itemsize


def write_safetensors(
    path: Path,
    tensors: dict[str, LazyTensor],
    dtype: torch.dtype | None = None,
    on_bytes: OnBytes | None = None,
    *,
    ahead: int = 0,
) -> None:
    """Write tensors in order, cast to `dtype` (None: as stored); `ahead`: how many more than one are in memory at a
    time, loaded by as many threads. Loading must then be safe from several threads.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + _size(tensor, dtype)
        stored = NAMES[dtype or tensor.dtype]
        header[name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for loaded in _loaded(tensors.values(), dtype, ahead):
            file.write(loaded.reshape(-1).view(torch.uint8).numpy().data)
            if on_bytes:
                on_bytes(loaded.nbytes)


def _ahead() -> int:
    return min(_MOST_AHEAD, len(os.sched_getaffinity(0))) - 1


def _loaded(tensors: Iterable[LazyTensor], dtype: torch.dtype | None, ahead: int) -> Iterator[torch.Tensor]:
    def load(tensor: LazyTensor) -> torch.Tensor:
        return tensor.load().to(dtype or tensor.dtype).contiguous()

    if not ahead:
        yield from map(load, tensors)
        return
    with ThreadPoolExecutor(ahead + 1) as threads:
        waiting: deque[Future[torch.Tensor]] = deque()
        try:
            for tensor in tensors:
                waiting.append(threads.submit(load, tensor))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
