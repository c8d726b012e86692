"""The tiny model on its own denoising steps, once per session."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from sana_export.calibration_run import DenoisingRun, Feed
from sana_export.components import loaded_module
from sana_export.sensitivity_run import denoising_steps
from sana_export.weights.checkpoint import open_checkpoint


@dataclass(frozen=True)
class Denoising:
    """`feeds`: the inputs of every step; `velocities`: what the unquantised model makes of them."""

    run: DenoisingRun
    feeds: list[Feed]
    velocities: list[torch.Tensor]

    @property
    def prefix(self) -> str:
        return self.run.plans["transformer"].prefix

    def module(self) -> nn.Module:
        """A transformer of its own, to change at will."""
        return loaded_module(self.run.plans["transformer"], self.run.checkpoint)


@pytest.fixture(scope="session")
def denoising(tmp_path_factory: pytest.TempPathFactory) -> Denoising:
    folder = tmp_path_factory.mktemp("denoising")
    run = DenoisingRun(open_checkpoint("random:tiny"), ("a red circle", "un gato"), 0, 3, 96, 160, folder)
    return Denoising(run, *denoising_steps(run))


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[[str], Path]:
    """A recipe file with some text."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
