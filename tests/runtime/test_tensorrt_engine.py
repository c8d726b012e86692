"""The TensorRT backend against a stand-in module: call order, checks and errors, not TensorRT itself."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sana_runtime import tensorrt_engine
from sana_runtime.engine import DeviceTensor, HostMemory
from sana_runtime.errors import BundleError, TargetError
from sana_runtime.manifest import ComponentEntry
from sana_runtime.tensorrt_engine import TensorRTBackend, TensorRTEngine
from tests.runtime.toys import toy_manifest

DTYPE_NAMES = {"float32": "FLOAT", "int64": "INT64", "uint8": "UINT8", "bfloat16": "BF16"}
STREAM = 77


class FakeContext:
    """Counts what is enqueued; `capturable` is TensorRT-RTX's answer."""

    def __init__(self, capturable: bool = True) -> None:
        self.addresses: dict[str, int] = {}
        self.enqueued: list[int] = []
        self.capturable = capturable

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.enqueued.append(stream)
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.capturable


class FakeEngine:
    device_memory_size_v2 = 5 << 20

    def __init__(self, component: ComponentEntry, context: FakeContext | None) -> None:
        self.context = context
        self.tensors = [(spec, "INPUT") for spec in component.inputs]
        self.tensors += [(spec, "OUTPUT") for spec in component.outputs]
        self.num_io_tensors = len(self.tensors)

    def _of(self, name: str) -> tuple[Any, str]:
        return next(entry for entry in self.tensors if entry[0].name == name)

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index][0].name

    def get_tensor_mode(self, name: str) -> str:
        return self._of(name)[1]

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=DTYPE_NAMES[self._of(name)[0].dtype])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._of(name)[0].shape

    def create_execution_context(self) -> FakeContext | None:
        return self.context


class FakeMemory(HostMemory):
    stream = STREAM
    device_name = "Pretended GPU (sm_89)"


class FakeGraph:
    """Records a capture and its replays."""

    made: list["FakeGraph"]

    def __init__(self, stream: int, work: Callable[[], None]) -> None:
        self.stream, self.replays = stream, 0
        work()
        type(self).made.append(self)

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture(autouse=True)
def fake_graph(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    FakeGraph.made = []
    monkeypatch.setattr(tensorrt_engine, "CudaGraph", FakeGraph)
    return FakeGraph


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a stand-in whose runtime answers every plan with `engine`; `validity` makes it TensorRT-RTX."""

    def put(name: str, engine: FakeEngine | None, validity: object = None) -> None:
        class Runtime:
            def __init__(self, logger: object) -> None:
                self.plans: list[bytes] = []

            def deserialize_cuda_engine(self, plan: Any) -> FakeEngine | None:
                assert bytes(memoryview(plan)) == b"plan"
                return engine

        if validity is not None:
            Runtime.get_engine_validity = lambda self, plan: validity  # type: ignore[attr-defined]
        module = SimpleNamespace(
            __version__="1.7.1",
            Logger=type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None}),
            Runtime=Runtime,
            TensorIOMode=SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT"),
        )
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]

    return put


def component(name: str = "transformer", target: str = "tensorrt-rtx") -> ComponentEntry:
    return toy_manifest(targets=(target,)).component(name)  # type: ignore[arg-type]


def load(folder: Path, entry: ComponentEntry, target: str = "tensorrt-rtx") -> TensorRTEngine:
    (folder / entry.engines[0].files[0]).write_bytes(b"plan")
    backend = TensorRTBackend(target, FakeMemory())  # type: ignore[arg-type]
    return backend.load(folder, entry, entry.engines[0])


def tensors(entry: ComponentEntry) -> tuple[dict[str, DeviceTensor], dict[str, DeviceTensor]]:
    memory = FakeMemory()
    inputs = {spec.name: memory.allocate(spec) for spec in entry.inputs}
    return inputs, {spec.name: memory.allocate(spec) for spec in entry.outputs}


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt"])
def test_one_graph_serves_every_step(tmp_path: Path, install: Any, target: str) -> None:
    entry, context = component(target=target), FakeContext()
    install(target.replace("-", "_"), FakeEngine(entry, context))
    engine = load(tmp_path, entry, target)
    inputs, outputs = tensors(entry)
    for _ in range(20):
        engine.execute(inputs, outputs)
    assert context.addresses == {name: tensor.address for name, tensor in (inputs | outputs).items()}
    # One plain run to warm up, one inside the capture; the graph runs the other 19 steps.
    assert context.enqueued == [STREAM, STREAM]
    assert [(graph.stream, graph.replays) for graph in FakeGraph.made] == [(STREAM, 19)]


def test_other_tensors_mean_a_new_graph(tmp_path: Path, install: Any) -> None:
    entry, context = component(), FakeContext()
    install("tensorrt_rtx", FakeEngine(entry, context))
    engine = load(tmp_path, entry)
    first, second = tensors(entry), tensors(entry)
    for inputs, outputs in (first, first, second, second):
        engine.execute(inputs, outputs)
    assert [graph.replays for graph in FakeGraph.made] == [1, 1]
    assert context.addresses["latent"] == second[0]["latent"].address


def test_a_context_that_cannot_be_captured_is_enqueued_every_time(tmp_path: Path, install: Any) -> None:
    entry, context = component(), FakeContext(capturable=False)
    install("tensorrt_rtx", FakeEngine(entry, context))
    engine = load(tmp_path, entry)
    inputs, outputs = tensors(entry)
    for _ in range(3):
        engine.execute(inputs, outputs)
    assert context.enqueued == [STREAM] * 3
    assert FakeGraph.made == []


def test_a_refused_plan_names_versions_and_diagnosis(tmp_path: Path, install: Any) -> None:
    install("tensorrt_rtx", None, validity=("INVALID", 2))
    with pytest.raises(BundleError) as caught:
        load(tmp_path, component())
    assert "tensorrt-rtx 1.7.1 refuses this plan" in str(caught.value)
    assert "('INVALID', 2)" in str(caught.value)
    assert "built by toy 1" in str(caught.value)


def test_a_refused_plan_without_the_validity_api(tmp_path: Path, install: Any) -> None:
    install("tensorrt", None)
    with pytest.raises(BundleError, match="could not be deserialised"):
        load(tmp_path, component(target="tensorrt"), "tensorrt")


def test_a_plan_with_other_io_tensors_is_refused(tmp_path: Path, install: Any) -> None:
    install("tensorrt_rtx", FakeEngine(component("vae_decoder"), FakeContext()))
    with pytest.raises(BundleError, match="input tensors are not those of the manifest"):
        load(tmp_path, component("transformer"))


def test_no_room_for_a_context(tmp_path: Path, install: Any) -> None:
    entry = component()
    install("tensorrt_rtx", FakeEngine(entry, None))
    with pytest.raises(TargetError, match="5 MiB of free device memory"):
        load(tmp_path, entry)


def test_description_names_gpu_and_version(install: Any) -> None:
    install("tensorrt_rtx", None)
    backend = TensorRTBackend("tensorrt-rtx", FakeMemory())  # type: ignore[arg-type]
    assert backend.description == "Pretended GPU (sm_89), tensorrt-rtx 1.7.1"
    assert np.array_equal(backend.memory.allocate(component().inputs[0]).numpy(), np.zeros((1, 32, 2, 3)))
