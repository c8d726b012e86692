"""From a prepared component to files: the weights, one AOTInductor package per piece, and the program."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sana_export.inductor.piece import Exported, Look, Piece, export_piece, look
from sana_export.inductor.prepare import Prepared
from sana_export.inductor.workers import Packaging, Workers
from sana_export.weights.lazy import LazyTensor
from sana_export.weights.write import write_safetensors
from sana_runtime.contract import TensorSpec
from sana_runtime.errors import BuildError
from sana_runtime.files import whole_file
from sana_runtime.inductor_engine import PROGRAM_NAME, load_piece, machine_device
from sana_runtime.inductor_program import FORMAT_VERSION, Program, RunPiece, run_calls, value_name

WEIGHTS_NAME = "inductor.safetensors"
TABLES_NAME = "tables.safetensors"
OnPiece = Callable[[int, int, str], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Begun:
    """A component whose pieces are being compiled: what for, each piece's package, who writes it, and what its results
    must look like.
    """

    prepared: Prepared
    inputs: Sequence[TensorSpec]
    device: str
    packages: Mapping[str, Path]
    packaging: Mapping[str, Packaging]
    outputs: Mapping[str, Sequence[Look]]


def begin_component(prepared: Prepared, inputs: Sequence[TensorSpec], folder: Path, workers: Workers) -> Begun:
    """Have `workers` compile the pieces for this machine (its GPU, or the CPU where there is none) into `folder`.

    Raises `BuildError` where a piece cannot be exported.
    """
    device = machine_device()
    folder.mkdir(parents=True, exist_ok=True)
    # The packager insists on the ending.
    packages = {name: folder / f"{name}.partial.pt2" for name in prepared.pieces}
    found, outputs = _exported(prepared, inputs, _kind(device))
    packaging = {
        name: workers.package(exported, packages[name], prepared.pieces[name].options)
        for name, exported in found.items()
    }
    return Begun(prepared, inputs, device, packages, packaging, outputs)


def finish_component(begun: Begun, folder: Path, on_piece: OnPiece = lambda done, total, name: None) -> list[Path]:
    """The component's files in `folder`, the program first, when its pieces are compiled and were run once, on zeros.

    `on_piece` is told how many of how many pieces are done and which is waited for. Raises `BuildError` where the
    compiler or a compiled piece fails.
    """
    prepared, device = begun.prepared, begun.device
    write_safetensors(folder / WEIGHTS_NAME, dict(prepared.weights))
    if prepared.tables:
        write_safetensors(folder / TABLES_NAME, dict(prepared.tables))
    for done, (name, piece) in enumerate(begun.packaging.items()):
        on_piece(done, len(begun.packaging), name)
        _guarded(name, piece.result)
    pieces: dict[str, RunPiece] = {
        name: _Guarded(name, load_piece(path), begun.outputs[name]) for name, path in begun.packages.items()
    }
    _run_once(prepared, begun.inputs, pieces, _kind(device), nullcontext())
    files = {name: f"{name}.pt2" for name in pieces}
    for name, path in begun.packages.items():
        with whole_file(folder / files[name]) as temporary:
            path.rename(temporary)
    program = Program(
        FORMAT_VERSION,
        device,
        str(torch.__version__),
        files,
        WEIGHTS_NAME,
        prepared.prepare,
        prepared.step,
        TABLES_NAME if prepared.tables else "",
        prepared.lookups,
        prepared.short_step,
    )
    content = msgspec.json.format(msgspec.json.encode(dataclasses.asdict(program)), indent=1)
    with whole_file(folder / PROGRAM_NAME) as temporary:
        temporary.write_bytes(content + b"\n")
    tables = [TABLES_NAME] if prepared.tables else []
    return [folder / name for name in (PROGRAM_NAME, WEIGHTS_NAME, *tables, *files.values())]


def _kind(device: str) -> str:
    """ "cuda" of "cuda sm_90"."""
    return device.partition(" ")[0]


def _exported(
    prepared: Prepared, inputs: Sequence[TensorSpec], device: str
) -> tuple[dict[str, Exported], dict[str, list[Look]]]:
    """The graph of every piece, for what its first call passes, and what its results look like; nothing is computed."""
    found: dict[str, Exported] = {}
    looks: dict[str, list[Look]] = {}
    virtual = FakeTensorMode()

    def exporting(piece: Piece) -> RunPiece:
        def call(*examples: torch.Tensor) -> list[torch.Tensor]:
            exported = found[piece.name] = _guarded(piece.name, lambda: export_piece(piece, examples))
            with virtual:
                made = looks[piece.name] = [*map(look, exported.outputs())]
                return [
                    torch.empty_strided(shape, strides, dtype=dtype, device=at) for shape, strides, dtype, at in made
                ]

        return call

    _run_once(prepared, inputs, {name: exporting(piece) for name, piece in prepared.pieces.items()}, device, virtual)
    return found, looks


class _Guarded:
    """A compiled piece whose failure is a `BuildError`, and so are results that do not look like `outputs`: nothing
    checks later what one piece gives the next.
    """

    def __init__(self, name: str, piece: RunPiece, outputs: Sequence[Look]) -> None:
        self._name, self._piece, self._outputs = name, piece, outputs

    def __call__(self, *arguments: torch.Tensor) -> Sequence[torch.Tensor]:
        found = _guarded(self._name, lambda: self._piece(*arguments))
        for number, (tensor, wanted) in enumerate(zip(found, self._outputs, strict=True)):
            if not _looks_like(tensor, wanted):
                raise BuildError(
                    f"inductor: result {number} of the piece '{self._name}' is not laid out as its graph says",
                    received=str(look(tensor)[:3]),
                    expected=str(wanted[:3]),
                    action="report this with the output of sana-export doctor, or choose another target",
                )
        return found


def _looks_like(tensor: torch.Tensor, wanted: Look) -> bool:
    """Strides of axes of one element mean nothing."""
    shape, strides, dtype, _ = wanted
    if (tensor.shape, tensor.dtype) != (shape, dtype):
        return False
    return all(a == b or n == 1 for a, b, n in zip(tensor.stride(), strides, shape, strict=True))


def _guarded(name: str, work: Callable[[], Result]) -> Result:
    try:
        return work()
    except Exception as error:  # exporter, compilers and linker raise what they like
        raise BuildError(
            f"inductor: the piece '{name}' cannot be compiled or run",
            received=f"{type(error).__name__}: {error}",
            expected="a package that runs on this machine",
            action="check the C++ compiler (g++) and torch with sana-export doctor, or choose another target",
        ) from error


class _Zeros(Mapping[str, torch.Tensor]):
    """The stored tensors by name, as zeros on the device, each made in `mode` when it is read."""

    def __init__(self, weights: Mapping[str, LazyTensor], device: str, mode: AbstractContextManager) -> None:
        self._weights, self._device, self._mode = weights, device, mode

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._weights[name]
        with self._mode:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=self._device)

    def __iter__(self) -> Any:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _run_once(
    prepared: Prepared,
    inputs: Sequence[TensorSpec],
    pieces: Mapping[str, RunPiece],
    device: str,
    mode: AbstractContextManager,
) -> None:
    """Call every piece for the first time, on zeros made in `mode`; of several blocks of one piece only the first is
    needed.
    """
    zeros = _Zeros(prepared.weights, device, mode)
    with mode:
        values: dict[str, Any] = {
            spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for spec in inputs
        }
        for lookup in prepared.lookups:
            table = prepared.tables[lookup.table]
            shape = (1, lookup.end - lookup.first, *table.shape[1:])
            values[lookup.output] = torch.zeros(shape, dtype=table.dtype, device=device)
    made = {name: name for call in prepared.calls for name in call.outputs}
    skipped: dict[str, str] = {}
    seen: set[str] = set()
    for call in prepared.calls:
        if call.piece in seen:
            # The same piece again: its outputs look like those of its first call.
            first = next(other for other in prepared.calls if other.piece == call.piece)
            skipped.update({name: skipped.get(old, old) for name, old in zip(call.outputs, first.outputs, strict=True)})
            continue
        seen.add(call.piece)
        names = {value_name(name) for name in call.inputs}
        known = {name: values[skipped.get(name, name)] for name in names if name in made or name in values}
        known |= {name: zeros[name] for name in names if name not in known}
        with torch.no_grad():
            run_calls((call,), pieces, known, frozenset(call.outputs))
        values.update({name: known[name] for name in call.outputs})
