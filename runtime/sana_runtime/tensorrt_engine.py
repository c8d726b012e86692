"""Engines of the targets `tensorrt-rtx` and `tensorrt`.

This file has not been run on hardware: no machine of the project could execute a TensorRT engine. Its calls
are those of the documented Python API, exercised against a stand-in module only.

Every engine call goes to one stream. The second call with the same tensors captures a CUDA graph; later calls
replay it, so one graph serves every solver step.
"""

import importlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from sana_runtime.contract import TargetName
from sana_runtime.cuda import CudaGraph, CudaMemory
from sana_runtime.engine import Backend, DeviceTensor, Engine, check_engine_tensors
from sana_runtime.errors import BundleError, TargetError
from sana_runtime.manifest import ComponentEntry, EngineEntry
from sana_runtime.plugins import KERNEL_INDEX, KernelFolder, register_plugins, require_launcher
from sana_runtime.targets import TENSORRT_MODULES

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
}


class TensorRTBackend(Backend):
    """TensorRT or TensorRT-RTX on device 0."""

    def __init__(self, target: TargetName, memory: CudaMemory | None = None) -> None:
        self._trt: ModuleType = importlib.import_module(TENSORRT_MODULES[target])
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))
        self._target = target
        self._cuda = memory or CudaMemory()
        self.memory = self._cuda
        self.description = f"{self._cuda.device_name}, {target} {self._trt.__version__}"

    def load(self, bundle: Path, component: ComponentEntry, entry: EngineEntry) -> "TensorRTEngine":
        path = bundle / entry.files[0]
        kernels = self._register_plugins(bundle, entry)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise self._refused(path, entry, self._diagnosis(plan))
        check_engine_tensors(path, "input", component.inputs, self._io(engine, self._trt.TensorIOMode.INPUT))
        check_engine_tensors(path, "output", component.outputs, self._io(engine, self._trt.TensorIOMode.OUTPUT))
        context = engine.create_execution_context()
        if context is None:
            raise TargetError(
                f"{component.name}: no execution context",
                received="TensorRT could not allocate the engine's device memory",
                expected=f"{engine.device_memory_size_v2 >> 20} MiB of free device memory",
                action="close other programs that use the GPU, or build a smaller bundle",
            )
        return TensorRTEngine(component, engine, context, self._cuda, kernels)

    def _register_plugins(self, bundle: Path, entry: EngineEntry) -> KernelFolder | None:
        """Before a plan with plugin layers is loaded. Such an engine lists its kernels after the plan."""
        for file in entry.files[1:]:
            if Path(file).name == KERNEL_INDEX:
                require_launcher()
                return register_plugins(self._trt, (bundle / file).parent)
        return None

    def _diagnosis(self, plan: mmap.mmap) -> str:
        """What TensorRT-RTX reads in the plan's header. Asked late: it is reported to refuse good plans."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return "the plan could not be deserialised; the log above says why"
        return f"the plan could not be deserialised; validity {self._runtime.get_engine_validity(plan)}"

    def _refused(self, path: Path, entry: EngineEntry, received: str) -> BundleError:
        return BundleError(
            f"{path}: {self._target} {self._trt.__version__} refuses this plan",
            received=received,
            expected=f"a plan built by {entry.builder} {entry.builder_version}, loaded by the same version",
            action=f"install that version, or: sana-export build MODEL --output DIR --target {self._target}",
        )

    def _io(self, engine: Any, mode: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return {name: _spec(engine, name) for name in names if engine.get_tensor_mode(name) == mode}


class TensorRTEngine(Engine):
    """One deserialised plan with its execution context and captured graph."""

    def __init__(
        self,
        component: ComponentEntry,
        engine: Any,
        context: Any,
        memory: CudaMemory,
        kernels: KernelFolder | None = None,
    ) -> None:
        super().__init__(component)
        self._kernels = kernels
        self._engine = engine  # must outlive the context
        self._context = context
        self._memory = memory
        self._addresses: dict[str, int] = {}
        self._graph: CudaGraph | None = None

    def _run(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> None:
        addresses = {name: tensor.address for name, tensor in (*inputs.items(), *outputs.items())}
        if addresses != self._addresses:
            self._place(addresses)
            # The first run allocates and tunes, which a capture does not allow.
            self._enqueue()
            return
        if self._graph is None and self._capturable():
            self._graph = CudaGraph(self._memory.stream, self._enqueue)
        if self._graph is None:
            self._enqueue()
        else:
            self._graph.replay()

    def _place(self, addresses: dict[str, int]) -> None:
        self._graph = None
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise RuntimeError(f"{self.component.name}: TensorRT refused the address of '{name}'")
        self._addresses = addresses

    def _capturable(self) -> bool:
        """TensorRT-RTX may still be compiling kernels and then cannot be captured; TensorRT does not ask."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._memory.stream))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._memory.stream):
            problem = self._kernels.problem if self._kernels is not None else None
            raise RuntimeError(f"{self.component.name}: TensorRT could not enqueue the engine") from problem


def _spec(engine: Any, name: str) -> tuple[str, tuple[int, ...]]:
    dtype = engine.get_tensor_dtype(name).name
    return _DTYPES.get(dtype, dtype), tuple(engine.get_tensor_shape(name))
