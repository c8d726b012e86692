"""safetensors files, checked before they are trusted and read one tensor at a time."""

import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sana_export.weights.lazy import LazyTensor
from sana_export.weights.stored_files import damaged, unreadable
from sana_runtime.errors import CheckpointError

_PREFIX_BYTES = 8
# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000
_LFS_POINTER = b"version https://git-lfs"
_SHOWN_CHARACTERS = 200

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of a file, unread. Reads and checks the header only.

    Raises `CheckpointError` when the header is no safetensors header, or does not describe exactly the bytes
    that the file has.
    """
    header, data_start, size = _header(path)
    slots = {name: _slot(path, name, fields) for name, fields in header.items()}
    tensors, end = {}, 0
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end)):
        tensor = LazyTensor(slot.shape, slot.dtype, _Reader(path, slot, data_start, size))
        if slot.begin != end or slot.end - slot.begin != tensor.size:
            raise damaged(path, f"{name}: bytes {slot.begin}..{slot.end}", f"{tensor.size} bytes from {end}")
        end = slot.end
        tensors[name] = tensor
    if data_start + end != size:
        raise damaged(path, f"{size} bytes", f"{data_start + end} bytes")
    return tensors


class _Reader:
    """Maps one tensor's bytes into memory, privately: the file is never written, and never mapped whole."""

    def __init__(self, path: Path, slot: "_Slot", data_start: int, file_size: int) -> None:
        self._path, self._slot, self._file_size = path, slot, file_size
        self._begin = data_start + slot.begin

    def __call__(self) -> torch.Tensor:
        slot, count = self._slot, self._slot.end - self._slot.begin
        if count == 0:
            return torch.empty(slot.shape, dtype=slot.dtype)
        before = self._begin % mmap.ALLOCATIONGRANULARITY
        try:
            with self._path.open("rb") as file:
                self._refuse_changed(os.fstat(file.fileno()).st_size)
                mapped = mmap.mmap(file.fileno(), before + count, access=mmap.ACCESS_COPY, offset=self._begin - before)
        except OSError as error:
            raise unreadable(self._path, error) from error
        stored = torch.frombuffer(mapped, dtype=torch.uint8, count=count, offset=before)
        aligned = stored if self._begin % slot.dtype.itemsize == 0 else stored.clone()
        return aligned.view(slot.dtype).reshape(slot.shape)

    def _refuse_changed(self, size: int) -> None:
        if size != self._file_size:
            raise CheckpointError(
                f"{self._path} changed while it was in use",
                received=f"{size} bytes",
                expected=f"{self._file_size} bytes, as when it was opened",
                action="let the download or copy finish, then run the command again",
            )


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The tensors' part of the header, where the data starts, and the file's size, both in bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_PREFIX_BYTES)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == _PREFIX_BYTES else 0
            if (prefix + file.read(len(_LFS_POINTER))).startswith(_LFS_POINTER):
                raise _lfs_pointer(path)
            if not 2 <= length <= _MAX_HEADER_BYTES:
                received = f"a header of {length} bytes in a file of {size} bytes"
                raise damaged(path, received, "a safetensors header")
            if _PREFIX_BYTES + length > size:
                raise damaged(path, f"{size} bytes", f"more than {_PREFIX_BYTES + length} bytes")
            file.seek(_PREFIX_BYTES)
            header = json.loads(file.read(length))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"no JSON header: {error}", "a safetensors header") from error
    if not isinstance(header, dict):
        raise damaged(path, f"a JSON {type(header).__name__} as header", "a JSON object")
    header.pop("__metadata__", None)
    return header, _PREFIX_BYTES + length, size


@dataclass(frozen=True)
class _Slot:
    """A header entry. `begin` and `end` in bytes from the start of the data."""

    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def _slot(path: Path, name: str, fields: object) -> _Slot:
    entry: Mapping[str, Any] = fields if isinstance(fields, Mapping) else {}
    dtype, shape, offsets = str(entry.get("dtype")), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or not _sizes([*shape, *offsets]):
        offsets = []
    if len(offsets) != 2:
        raise damaged(path, f"{name}: {fields}"[:_SHOWN_CHARACTERS], "dtype, shape and data_offsets of a tensor")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{path} holds a tensor in a format that cannot be read",
            received=f"{name}: {dtype}"[:_SHOWN_CHARACTERS],
            expected="F32, F16 or BF16",
            action="use the 16-bit or 32-bit checkpoint",
        )
    return _Slot(offsets[0], offsets[1], tuple(shape or ()), DTYPES[dtype])


def _sizes(values: list) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 63 for item in values)


def _lfs_pointer(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a Git LFS pointer, not the weights",
        received="a text file of a clone made without Git LFS",
        expected="the safetensors file itself",
        action="run `git lfs pull` in the clone, or download with `hf download`",
    )
