"""Device memory, one stream and captured graphs, through cuda-python.

No other file touches CUDA, but for `plugins`, which launches kernels.
"""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from sana_runtime.contract import TensorSpec
from sana_runtime.engine import DeviceMemory, DeviceTensor, host_dtype
from sana_runtime.errors import TargetError

_MIB = 1 << 20


def cuda_problem() -> str | None:
    """Why this machine cannot use CUDA, or None if it can."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return "cuda-python is not installed"
    try:
        error, count = runtime.cudaGetDeviceCount()
    except RuntimeError as failure:  # the libraries are loaded on the first call
        return f"the CUDA libraries cannot be loaded ({failure})"
    if error == runtime.cudaError_t.cudaErrorInsufficientDriver:
        return "there is no NVIDIA driver, or it is too old for the installed cuda-python"
    if error not in (runtime.cudaError_t.cudaSuccess, runtime.cudaError_t.cudaErrorNoDevice):
        return f"CUDA reports {error.name}"
    return None if count else "there is no CUDA device"


def compute_capability() -> tuple[int, int]:
    """(major, minor) of device 0. Raises `TargetError` without one."""
    properties = _call("cudaGetDeviceProperties", 0)
    return properties.major, properties.minor


def _call(name: str, *arguments: Any) -> Any:
    """Call `cuda.bindings.runtime.<name>`; its results without the error code. Raises `TargetError`."""
    from cuda.bindings import runtime

    error, *results = getattr(runtime, name)(*arguments)
    if error != runtime.cudaError_t.cudaSuccess:
        raise TargetError(
            f"CUDA: {name} failed",
            received=error.name,
            expected="a working NVIDIA GPU with enough free memory",
            action="close other programs that use the GPU, and check it with nvidia-smi",
        )
    return results[0] if len(results) == 1 else tuple(results)


class _Allocation:
    """Device memory that is freed with the object."""

    def __init__(self, nbytes: int) -> None:
        self.address = int(_call("cudaMalloc", max(nbytes, 1)))
        weakref.finalize(self, _call, "cudaFree", self.address)


class CudaGraph:
    """Work captured from a stream, replayed with one launch."""

    def __init__(self, stream: int, work: Callable[[], None]) -> None:
        """Capture what `work` queues on `stream`; nothing runs yet."""
        from cuda.bindings import runtime

        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        finally:
            graph = _call("cudaStreamEndCapture", stream)
        self._stream = stream
        self._executable = _call("cudaGraphInstantiate", graph, 0)
        weakref.finalize(self, _call, "cudaGraphExecDestroy", self._executable)
        _call("cudaGraphDestroy", graph)

    def replay(self) -> None:
        """Queue the captured work on its stream."""
        _call("cudaGraphLaunch", self._executable, self._stream)


class CudaMemory(DeviceMemory):
    """Memory of device 0 and one stream, on which every copy and every engine runs in order."""

    def __init__(self) -> None:
        _call("cudaSetDevice", 0)
        self.stream = int(_call("cudaStreamCreate"))
        properties = _call("cudaGetDeviceProperties", 0)
        self.device_name = f"{properties.name.decode()} (sm_{properties.major}{properties.minor})"
        self._least_free = _call("cudaMemGetInfo")[0]

    def allocate(self, spec: TensorSpec) -> DeviceTensor:
        nbytes = int(np.prod(spec.shape, dtype=np.int64)) * host_dtype(spec.dtype).itemsize
        allocation = _Allocation(nbytes)
        _call("cudaMemsetAsync", allocation.address, 0, nbytes, self.stream)
        return DeviceTensor(spec, self, allocation.address, allocation)

    def download(self, tensor: DeviceTensor) -> npt.NDArray[np.generic]:
        content = np.empty(tensor.spec.shape, host_dtype(tensor.spec.dtype))
        self._memcpy(content.ctypes.data, tensor.address, tensor.nbytes)
        self.synchronize()
        return content

    def synchronize(self) -> None:
        _call("cudaStreamSynchronize", self.stream)
        self._least_free = min(self._least_free, _call("cudaMemGetInfo")[0])

    def peak_mib(self) -> float | None:
        """Most memory in use on the whole device, other programs included, as seen at synchronisations."""
        return (_call("cudaMemGetInfo")[1] - self._least_free) / _MIB

    def _write(self, content: npt.NDArray[np.generic], target: DeviceTensor) -> None:
        # Pageable memory: CUDA has taken its own copy of the bytes when the call returns.
        self._memcpy(target.address, content.ctypes.data, content.nbytes)

    def _copy_bytes(self, source: int, target: int, count: int) -> None:
        self._memcpy(target, source, count)

    def _memcpy(self, target: int, source: int, count: int) -> None:
        from cuda.bindings import runtime

        _call("cudaMemcpyAsync", target, source, count, runtime.cudaMemcpyKind.cudaMemcpyDefault, self.stream)
