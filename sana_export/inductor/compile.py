"""From a prepared component to files: the weights, one AOTInductor package per piece, and the program."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from sana_export.inductor.piece import Piece, compile_piece
from sana_export.inductor.prepare import Prepared
from sana_export.weights.lazy import LazyTensor
from sana_export.weights.write import write_safetensors
from sana_runtime.contract import TensorSpec
from sana_runtime.errors import BuildError
from sana_runtime.files import whole_file
from sana_runtime.inductor_engine import PROGRAM_NAME, load_piece, machine_device
from sana_runtime.inductor_program import FORMAT_VERSION, Program, RunPiece, run_calls

WEIGHTS_NAME = "inductor.safetensors"
OnPiece = Callable[[int, int, str], None]


def compile_component(
    prepared: Prepared,
    inputs: Sequence[TensorSpec],
    folder: Path,
    on_piece: OnPiece = lambda done, total, name: None,
    options: dict[str, Any] | None = None,
) -> list[Path]:
    """Compile for this machine (its GPU, or the CPU where there is none) into `folder`; the program comes first.

    Every piece is run once, on zeros, as soon as it is compiled: its outputs are the next one's examples. `options`
    replace Inductor's. Raises `BuildError` where the compiler or a compiled piece fails.
    """
    device = machine_device()
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_NAME, dict(prepared.weights))
    files = {name: f"{name}.pt2" for name in prepared.pieces}
    pieces: dict[str, RunPiece] = {}
    for name, piece in prepared.pieces.items():
        pieces[name] = _CompiledOnUse(piece, folder / files[name], options, on_piece, pieces, len(files))
    _run_once(prepared, inputs, pieces, device.partition(" ")[0])
    program = Program(
        FORMAT_VERSION, device, str(torch.__version__), files, WEIGHTS_NAME, prepared.prepare, prepared.step
    )
    content = msgspec.json.format(msgspec.json.encode(dataclasses.asdict(program)), indent=1)
    with whole_file(folder / PROGRAM_NAME) as temporary:
        temporary.write_bytes(content + b"\n")
    return [folder / name for name in (PROGRAM_NAME, WEIGHTS_NAME, *files.values())]


class _CompiledOnUse:
    """A piece that is compiled by its first call, for the arguments of that call."""

    def __init__(
        self,
        piece: Piece,
        path: Path,
        options: dict[str, Any] | None,
        on_piece: OnPiece,
        pieces: Mapping[str, RunPiece],
        total: int,
    ) -> None:
        self._piece, self._path, self._options = piece, path, options
        self._on_piece, self._pieces, self._total = on_piece, pieces, total
        self._compiled: RunPiece | None = None

    @property
    def done(self) -> bool:
        """Whether the piece is compiled."""
        return self._compiled is not None

    def __call__(self, *arguments: torch.Tensor) -> Sequence[torch.Tensor]:
        if self._compiled is None:
            done = sum(piece.done for piece in self._pieces.values() if isinstance(piece, _CompiledOnUse))
            self._on_piece(done, self._total, self._piece.name)
            self._compiled = self._compile(arguments)
        return self._compiled(*arguments)

    def _compile(self, arguments: Sequence[torch.Tensor]) -> RunPiece:
        # The packager insists on the ending.
        partial = self._path.with_name(f"{self._path.stem}.partial.pt2")
        try:
            compile_piece(self._piece, arguments, partial, self._options)
            compiled = load_piece(partial)
            compiled(*arguments)
        except Exception as error:  # exporter, compilers and linker raise what they like
            raise BuildError(
                f"inductor: the piece '{self._piece.name}' cannot be compiled or run",
                received=f"{type(error).__name__}: {error}",
                expected="a package that runs on this machine",
                action="check the C++ compiler (g++) and torch with sana-export doctor, or choose another target",
            ) from error
        with whole_file(self._path) as temporary:
            partial.rename(temporary)
        return compiled


class _Zeros(Mapping[str, torch.Tensor]):
    """The stored tensors by name, as zeros on the device, each made when it is read."""

    def __init__(self, weights: Mapping[str, LazyTensor], device: str) -> None:
        self._weights, self._device = weights, device

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._weights[name]
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=self._device)

    def __iter__(self) -> Any:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _run_once(prepared: Prepared, inputs: Sequence[TensorSpec], pieces: Mapping[str, RunPiece], device: str) -> None:
    """Call every piece for the first time; of several blocks of one piece only the first is needed."""
    zeros = _Zeros(prepared.weights, device)
    values: dict[str, Any] = {
        spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for spec in inputs
    }
    made = {name: name for call in (*prepared.prepare, *prepared.step) for name in call.outputs}
    skipped: dict[str, str] = {}
    seen: set[str] = set()
    for call in (*prepared.prepare, *prepared.step):
        if call.piece in seen:
            # The same piece again: its outputs look like those of its first call.
            first = next(other for other in (*prepared.prepare, *prepared.step) if other.piece == call.piece)
            skipped.update({name: skipped.get(old, old) for name, old in zip(call.outputs, first.outputs, strict=True)})
            continue
        seen.add(call.piece)
        names = {name.partition("[")[0] for name in call.inputs}
        known = {name: values[skipped.get(name, name)] for name in names if name in made or name in values}
        known |= {name: zeros[name] for name in names if name not in known}
        with torch.inference_mode():
            run_calls((call,), pieces, known, frozenset(call.outputs))
        values.update({name: known[name] for name in call.outputs})
