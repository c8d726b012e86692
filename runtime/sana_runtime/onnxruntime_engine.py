"""Engines of the target `onnxruntime`, on the CPU or through CUDA.

Tensors are bound by address, so the same loop serves both providers and bfloat16, which NumPy does not know.
Weights in external data files are memory-mapped by ONNX Runtime.
"""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from sana_runtime.contract import TensorSpec
from sana_runtime.engine import Backend, DeviceTensor, Engine, HostMemory, check_engine_tensors
from sana_runtime.errors import BundleError, TargetError
from sana_runtime.manifest import ComponentEntry, EngineEntry

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"

# The numbers of onnx.TensorProto.DataType.
_ONNX_TYPES = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16}
_ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
}
_ERROR_SEVERITY = 3

# Q/DQ pairs say exactly what to compute. These optimisers, made for INT8 graphs of ONNX Runtime's own quantiser, build
# invalid graphs from FP8 pairs and quantise activations that the graph does not.
_QDQ_REWRITERS = ("QDQSelectorActionTransformer", "QDQPropagationTransformer")


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime with one execution provider. `threads` applies to the CPU; 0 lets ONNX Runtime choose."""

    def __init__(self, provider: str = CPU_PROVIDER, *, threads: int = 0) -> None:
        self.provider = provider
        self._threads = threads
        self._provider_options: dict[str, str] = {}
        if provider == CUDA_PROVIDER:
            self._open_cuda()
        else:
            self._device_type = "cpu"
            self.memory = HostMemory()
            cpu = f"CPU ({_processor()}, {_threads(threads)} threads)"
            self.description = f"{cpu}, ONNX Runtime {ort.__version__} {provider}"

    def _open_cuda(self) -> None:
        from sana_runtime.cuda import CudaMemory

        if hasattr(ort, "preload_dlls"):
            # Finds CUDA and cuDNN where pip put them; without it only the system's libraries are seen.
            ort.preload_dlls()
        memory = CudaMemory()
        self._device_type = "cuda"
        # Without the last one, fp32 products are rounded to TF32 (ten bits of mantissa).
        self._provider_options = {"device_id": "0", "user_compute_stream": str(memory.stream), "use_tf32": "0"}
        self.memory = memory
        self.description = f"{memory.device_name}, ONNX Runtime {ort.__version__} {CUDA_PROVIDER}"

    def load(self, bundle: Path, component: ComponentEntry, entry: EngineEntry) -> "OnnxRuntimeEngine":
        path = bundle / entry.files[0]
        session = self._session(path, component)
        if self.provider not in session.get_providers():
            raise TargetError(
                f"{component.name} cannot run on {self.provider}",
                received=f"ONNX Runtime fell back to {', '.join(session.get_providers())}",
                expected="the CUDA and cuDNN libraries that this onnxruntime-gpu was built for",
                action="install them, or uninstall onnxruntime-gpu and install onnxruntime to run on the CPU",
            )
        check_engine_tensors(path, "input", component.inputs, _io(session.get_inputs()))
        check_engine_tensors(path, "output", component.outputs, _io(session.get_outputs()))
        return OnnxRuntimeEngine(component, session, self._device_type)

    def _session(self, path: Path, component: ComponentEntry) -> ort.InferenceSession:
        try:
            return ort.InferenceSession(
                str(path),
                self._session_options(),
                providers=[(self.provider, self._provider_options)],
                disabled_optimizers=list(_QDQ_REWRITERS),
            )
        except Exception as error:  # the binding's exceptions share no base below Exception
            if "NOT_IMPLEMENTED" in str(error):
                raise TargetError(
                    f"{component.name} ({component.dtype}) cannot run on {self.provider}",
                    received=str(error),
                    expected="a graph whose operators this provider implements",
                    action="sana-export build MODEL --output DIR --target onnxruntime --precision fp32",
                ) from error
            raise BundleError(
                f"{path}: ONNX Runtime cannot load this engine",
                received=str(error),
                expected="the ONNX file and its external data, as `sana-export build` wrote them",
                action="copy the bundle again, or run the build command again",
            ) from error

    def _session_options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = _ERROR_SEVERITY
        # Each picture uses the same shapes; an arena would keep the decoder's peak allocated for good.
        options.enable_cpu_mem_arena = False
        return options


class OnnxRuntimeEngine(Engine):
    """One ONNX Runtime session."""

    def __init__(self, component: ComponentEntry, session: ort.InferenceSession, device_type: str) -> None:
        super().__init__(component)
        self._session = session
        self._device_type = device_type

    def _run(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> None:
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *self._location(tensor))
        for name, tensor in outputs.items():
            binding.bind_output(name, *self._location(tensor))
        self._session.run_with_iobinding(binding)

    def _location(self, tensor: DeviceTensor) -> tuple[str, int, int, tuple[int, ...], int]:
        spec: TensorSpec = tensor.spec
        return self._device_type, 0, _ONNX_TYPES[spec.dtype], spec.shape, tensor.address


def _io(arguments: Sequence[Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        argument.name: (_ORT_TYPES.get(argument.type, argument.type), tuple(argument.shape)) for argument in arguments
    }


def _threads(threads: int) -> int:
    if threads:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The processor's name; only its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
