"""A tiny checkpoint written by diffusers and transformers, and bundles built from it once per session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sana_export.build import build
from sana_export.build_request import BuildRequest
from sana_export.bundle import StageRecord
from sana_export.weights.checkpoint import open_checkpoint
from sana_export.weights.write import write_diffusers_directory
from sana_runtime.manifest import MANIFEST_NAME, read_manifest, verify_files


class Recorder:
    """A reporter that remembers what happened to each stage."""

    def __init__(self) -> None:
        self.built: dict[str, str] = {}
        self.reused: dict[str, str] = {}
        self.notes: list[str] = []

    def stage_started(self, stage: str, reason: str) -> None:
        self.built[stage] = reason

    def stage_progress(self, stage: str, fraction: float, detail: str) -> None:
        assert 0.0 <= fraction <= 1.0, (stage, fraction)

    def stage_finished(self, stage: str, record: StageRecord) -> None:
        assert record.files, stage

    def stage_reused(self, stage: str, record: StageRecord, reason: str) -> None:
        self.reused[stage] = reason

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(request: BuildRequest) -> Recorder:
    """Build; what happened to each stage."""
    recorder = Recorder()
    build(request, recorder)
    return recorder


def assert_whole(bundle: Path) -> None:
    """The bundle holds the files of its manifest, intact, and nothing else."""
    manifest = read_manifest(bundle)
    verify_files(bundle, manifest.files, digests=True)
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert found == {entry.path for entry in manifest.files} | {MANIFEST_NAME}


@pytest.fixture(scope="session")
def checkpoint_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A named random model as a directory that SanaPipeline.from_pretrained loads."""
    written: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in written:
            written[name] = tmp_path_factory.mktemp("checkpoint") / name.replace(":", "-")
            write_diffusers_directory(open_checkpoint(name), written[name])
        return written[name]

    return write


@pytest.fixture(scope="session")
def tiny_bundle(
    tmp_path_factory: pytest.TempPathFactory, checkpoint_directory: Callable[[str], Path]
) -> Callable[..., Path]:
    """An fp32 ONNX Runtime bundle of a named model at a size, built once per session: treat it as read-only."""
    built: dict[tuple[str, int, int], Path] = {}

    def make(name: str = "random:tiny", height: int = 128, width: int = 128) -> Path:
        key = (name, height, width)
        if key not in built:
            output = tmp_path_factory.mktemp("bundles") / f"{height}x{width}"
            model = str(checkpoint_directory(name))
            build(BuildRequest(model, "fp32", ("onnxruntime",), height, width, output), Recorder())
            built[key] = output
        return built[key]

    return make
