"""A toy bundle and a backend of NumPy engines: nothing here needs more than the runtime itself."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sana_runtime.contract import TensorSpec, text_encoder_io, transformer_io, vae_decoder_io
from sana_runtime.engine import Backend, DeviceTensor, Engine, HostMemory
from sana_runtime.manifest import (
    SCHEMA_VERSION,
    ComponentEntry,
    EngineEntry,
    FileEntry,
    Manifest,
    ModelEntry,
    SchedulerEntry,
    TokenizerEntry,
)

FIXTURES = Path(__file__).parent / "fixtures"
CHANNELS = 8
HEIGHT, WIDTH = 64, 96
LATENT_SHAPE = (1, 32, 2, 3)
INSTRUCTION = "draw this : "
INSTRUCTION_TOKENS = 4
PADDED_LENGTH = 302
SPRINT_SCHEDULER = SchedulerEntry("trigflow", 3.0, 1000, 2, 4.5)
SCHEDULER = SchedulerEntry("flow_dpm_solver", 3.0, 1000, 4, 4.5)


def component(name: str, io: Any, targets: tuple[str, ...], file: str, dtype: str) -> ComponentEntry:
    engines = tuple(
        EngineEntry(target, (file,), "toy", "1")  # type: ignore[arg-type]
        for target in targets
    )
    return ComponentEntry(name, dtype, "", "0" * 64, *io, engines)  # type: ignore[arg-type]


def toy_manifest(
    *,
    guidance: str = "classifier_free",
    targets: tuple[str, ...] = ("onnxruntime",),
    dtype: str = "float32",
    scheduler: SchedulerEntry | None = None,
    files: tuple[FileEntry, ...] = (),
) -> Manifest:
    sprint = guidance == "embedded"
    transformer = transformer_io("float32", CHANNELS, *LATENT_SHAPE[2:], guidance)  # type: ignore[arg-type]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        digest="",
        model=ModelEntry("toy/sana", "sana-toy", None, guidance, False),  # type: ignore[arg-type]
        height=HEIGHT,
        width=WIDTH,
        targets=targets,  # type: ignore[arg-type]
        components=(
            component(
                "text_encoder",
                text_encoder_io("float32", CHANNELS, PADDED_LENGTH),
                targets,
                "text_encoder.onnx",
                dtype,
            ),
            component("transformer", transformer, targets, "transformer.onnx", dtype),
            component("vae_decoder", vae_decoder_io(*LATENT_SHAPE[2:]), targets, "vae_decoder.onnx", dtype),
        ),
        scheduler=scheduler or (SPRINT_SCHEDULER if sprint else SCHEDULER),
        tokenizer=TokenizerEntry("tokenizer.json", INSTRUCTION, INSTRUCTION_TOKENS, PADDED_LENGTH, 0),
        files=files,
        created_with={},
        notes=(),
    ).sealed()


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON of a manifest without sealing it again."""
    path = bundle / "manifest.json"
    content = msgspec.json.decode(path.read_bytes())
    change(content)
    path.write_bytes(msgspec.json.encode(content))


def reseal(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as a faulty exporter would: with a matching digest."""
    edit_manifest(bundle, change)
    path = bundle / "manifest.json"
    manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    path.write_bytes(manifest.sealed().to_json())


class RecordingEngine(Engine):
    """Keeps a copy of all inputs of every call; its outputs are distinct per call and name."""

    def __init__(self, entry: ComponentEntry, memory: HostMemory) -> None:
        super().__init__(entry)
        self.memory = memory
        self.calls: list[dict[str, np.ndarray]] = []
        self.written: list[dict[str, np.ndarray]] = []

    def _run(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> None:
        self.calls.append({name: self.memory.view(tensor).copy() for name, tensor in inputs.items()})
        written = {}
        for index, (name, tensor) in enumerate(outputs.items()):
            view = self.memory.view(tensor)
            start = 1000 * len(self.calls) + 100 * index
            view[...] = np.arange(start, start + view.size).reshape(view.shape).astype(view.dtype)
            written[name] = view.copy()
        self.written.append(written)


class CountingMemory(HostMemory):
    """Counts the copies that leave the device."""

    def __init__(self) -> None:
        self.downloads: list[TensorSpec] = []

    def download(self, tensor: DeviceTensor) -> np.ndarray:
        self.downloads.append(tensor.spec)
        return super().download(tensor)


class RecordingBackend(Backend):
    """A backend without files."""

    description = "NumPy, for tests"

    def __init__(self) -> None:
        self.memory = CountingMemory()
        self.engines: dict[str, RecordingEngine] = {}

    def load(self, bundle: Path, component: ComponentEntry, entry: EngineEntry) -> Engine:
        self.engines[component.name] = RecordingEngine(component, self.memory)
        return self.engines[component.name]
