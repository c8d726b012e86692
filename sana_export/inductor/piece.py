"""Pieces: functions over named tensors, each compiled once and called as often as the program says."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana_export.inductor.linear import Tensors

Function = Callable[[Tensors], tuple[torch.Tensor, ...]]


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


@torch.no_grad()
def compile_piece(
    piece: Piece, examples: Sequence[torch.Tensor], path: Path, options: dict[str, Any] | None = None
) -> None:
    """Write the piece, compiled for the shapes and the device of `examples`, as an AOTInductor package (.pt2).

    Products go to the libraries unless `options` say otherwise: to measure Inductor's own templates (up to 106 for each
    FP8 product) takes most of a build, and hardly any of them is faster.
    """
    chosen = {**(options or {}), **piece.options}
    with warnings.catch_warnings():
        # PyTorch's own packager uses what PyTorch deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        exported = torch.export.export(PieceModule(piece), tuple(examples), strict=False)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=chosen)
