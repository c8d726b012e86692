"""Training scenes: sampled by a pool of processes from their seeds, kept as tensors on the device."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from sana_export.scenes.captions import captions
from sana_export.scenes.rendering import SceneBatch, pack
from sana_export.scenes.scene import sample_scene
from scripts.train_nano.captions import CaptionEncoder, learn_tokenizer

CAPTIONS = 4
_CHUNK = 2000
_TOKENIZER_SCENES = 8000
_ARRAYS = len(SceneBatch._fields)
_Result = TypeVar("_Result")
_Chunk = tuple[int, list[np.ndarray]]

_encoder: CaptionEncoder | None = None


def train_captions(seed: int) -> tuple[str, ...]:
    """The captions of one training scene."""
    return captions(sample_scene(seed, "train"), seed, CAPTIONS)


def make_tokenizer(vocabulary: int) -> bytes:
    """tokenizer.json, the same on every call."""
    return learn_tokenizer((text for seed in range(_TOKENIZER_SCENES) for text in train_captions(seed)), vocabulary)


def start_worker(tokenizer_json: bytes, rows: int) -> None:
    """Prepare a process of the pool: one thread, its own tokenizer."""
    global _encoder
    torch.set_num_threads(1)
    _encoder = CaptionEncoder(tokenizer_json, rows)


def sample_chunk(start: int, count: int) -> _Chunk:
    """Arrays of the scenes `start`..: those of `SceneBatch`, tokens [n, 4, rows - 1], fitting [n, 4] bool.

    Arrays, not tensors: tensors would travel as handles, which run out.
    """
    assert _encoder is not None
    seeds = range(start, start + count)
    batch = pack([sample_scene(seed, "train") for seed in seeds])
    tokens, lengths = _encoder.encode([text for seed in seeds for text in train_captions(seed)])
    shape = (count, CAPTIONS)
    fitting = (lengths <= tokens.shape[1]).reshape(shape)
    return start, [*(tensor.numpy() for tensor in batch), tokens.reshape(*shape, -1), fitting]


class Inline(Executor):
    """Work done where it is asked for: the pool of a machine with few cores, and of tests."""

    def submit(self, fn: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> "Future[_Result]":
        future: Future[_Result] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def start_pool(workers: int, tokenizer_json: bytes, rows: int) -> Executor:
    """`workers` processes, or none for 0. Start it before CUDA is used: nothing of it is inherited."""
    if workers == 0:
        start_worker(tokenizer_json, rows)
        return Inline()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(tokenizer_json, rows))


@dataclass
class SceneStore:
    """Scenes on the device. The first `available` (a number on the device) are there; the others are arriving.

    `scenes`: tensors of all scenes; `tokens` [n, 4, rows - 1] int16; `fitting` [n, 4] bool: captions that are not cut.
    """

    scenes: SceneBatch
    tokens: torch.Tensor
    fitting: torch.Tensor
    available: torch.Tensor
    _pending: list["Future[_Chunk]"]
    _ready: int = 0

    @classmethod
    def start(cls, pool: Executor, count: int, device: torch.device) -> "SceneStore":
        """Ask for `count` scenes and return when the first are there."""
        pending = [pool.submit(sample_chunk, start, min(_CHUNK, count - start)) for start in range(0, count, _CHUNK)]
        _, arrays = pending[0].result()
        tensors = [
            torch.empty(count, *array.shape[1:], dtype=torch.from_numpy(array[:1]).dtype, device=device)
            for array in arrays
        ]
        available = torch.zeros((), device=device)
        store = cls(SceneBatch(*tensors[:_ARRAYS]), *tensors[_ARRAYS:], available, pending)
        store.collect()
        return store

    def __len__(self) -> int:
        return len(self.tokens)

    def collect(self, wait: bool = False) -> None:
        """Move what the pool has finished, in order, to the device."""
        while self._pending and (wait or self._pending[0].done()):
            start, arrays = self._pending.pop(0).result()
            stop = start + len(arrays[0])
            for tensor, array in zip((*self.scenes, self.tokens, self.fitting), arrays, strict=True):
                tensor[start:stop].copy_(torch.from_numpy(array))
            self._ready = stop
        self.available.fill_(float(self._ready))

    def wait_for(self, count: int) -> None:
        """Return when the first `count` scenes are here."""
        while self._ready < count:
            self._pending[0].result()
            self.collect()

    def draw(self, count: int) -> torch.Tensor:
        """Indices [count] of available scenes, chosen on the device with equal chances."""
        places = torch.rand(count, device=self.available.device) * self.available
        return places.long().clamp(max=len(self) - 1)


def scenes_of(seeds: Sequence[int], split: str) -> SceneBatch:
    """Scenes of a split by their seeds, on the CPU."""
    return pack([sample_scene(seed, split) for seed in seeds])  # type: ignore[arg-type]
