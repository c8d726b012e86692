"""Pieces: functions over named tensors, each compiled once and called as often as the program says."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana_export.inductor.linear import Tensors

Function = Callable[[Tensors], tuple[torch.Tensor, ...]]
_ARGUMENTS = "arguments.json"


@dataclass(frozen=True)
class Piece:
    """`function` takes the tensors of `inputs` by name and returns new ones. `options`: Inductor's, where special."""

    name: str
    inputs: tuple[str, ...]
    function: Function
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run it eagerly."""
        return self.function(dict(zip(self.inputs, tensors, strict=True)))


class PieceModule(nn.Module):
    """A piece as what torch.export takes."""

    def __init__(self, piece: Piece) -> None:
        super().__init__()
        self._piece = piece

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._piece(*tensors)


# Of a tensor: shape, strides, dtype and device.
Look = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


def look(x: torch.Tensor) -> Look:
    """What compiled code takes for granted of a tensor."""
    return x.shape, x.stride(), x.dtype, x.device


@dataclass(frozen=True)
class Exported:
    """A piece as a graph, and what its arguments look like."""

    program: torch.export.ExportedProgram
    arguments: tuple[Look, ...]

    def outputs(self) -> list[torch.Tensor]:
        """What it returns, without values."""
        (node,) = (node for node in self.program.graph.nodes if node.op == "output")
        return [output.meta["val"] for output in node.args[0]]


@torch.no_grad()
def export_piece(piece: Piece, examples: Sequence[torch.Tensor]) -> Exported:
    """The graph of the piece for the shapes and the device of `examples`, which may have no values."""
    program = torch.export.export(PieceModule(piece), tuple(examples), strict=False)
    # They would be kept and saved with the graph.
    program._example_inputs = None
    return Exported(program, tuple(map(look, examples)))


def save_exported(exported: Exported, path: Path) -> None:
    """For another process."""
    torch.export.save(exported.program, path, extra_files={_ARGUMENTS: json.dumps(_described(exported.arguments))})


def load_exported(path: Path) -> Exported:
    """What `save_exported` wrote."""
    extra = {_ARGUMENTS: ""}
    program = torch.export.load(path, extra_files=extra)
    arguments = [
        (torch.Size(shape), tuple(stride), getattr(torch, dtype), torch.device(device))
        for shape, stride, dtype, device in json.loads(extra[_ARGUMENTS])
    ]
    return Exported(program, tuple(arguments))


@torch.no_grad()
def package_exported(exported: Exported, path: Path, options: Mapping[str, Any]) -> None:
    """Compile with Inductor's `options` and write an AOTInductor package (.pt2).

    Products go to the libraries unless `options` say otherwise: to measure Inductor's own templates (up to 106 for each
    FP8 product) takes most of a build, and hardly any of them is faster.
    """
    zeros = [
        torch.empty_strided(*layout, dtype=dtype, device=device).zero_()
        for *layout, dtype, device in exported.arguments
    ]
    exported.program._example_inputs = (tuple(zeros), {})
    if zeros[0].is_cuda:
        # The C++ code only launches kernels. To find out which vector instructions g++ and the CPU know takes each
        # process half a minute, one process after the other, and a package that has them needs such a CPU.
        options = {"cpp.vec_isa_ok": False, **options}
    with warnings.catch_warnings():
        # PyTorch's own packager uses what PyTorch deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        torch._inductor.aoti_compile_and_package(
            exported.program, package_path=str(path), inductor_configs=dict(options)
        )


def _described(arguments: Sequence[tuple]) -> list[tuple]:
    return [
        (tuple(shape), stride, str(dtype).removeprefix("torch."), str(device))
        for shape, stride, dtype, device in arguments
    ]
