"""What every backend provides: memory on its device, and engines that read and write that memory.

A tensor stays where its `DeviceMemory` put it until somebody calls `numpy()`: between the first engine call
of a picture and the last nothing leaves the device.
"""

import ctypes
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sana_runtime.contract import TensorSpec
from sana_runtime.errors import BundleError, InputError
from sana_runtime.manifest import ComponentEntry, EngineEntry

# bfloat16 has no NumPy type: the host sees its 16 bits and never computes with them.
_HOST_DTYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "uint8": np.uint8,
}


def host_dtype(dtype: str) -> np.dtype[np.generic]:
    """The NumPy type that carries `dtype` on the host; uint16 for bfloat16. Raises `BundleError`."""
    if dtype not in _HOST_DTYPES:
        raise BundleError(
            "the manifest names an unknown dtype",
            received=dtype,
            expected=", ".join(_HOST_DTYPES),
            action="rebuild the bundle with the sana-export of the same version as this runtime",
        )
    return np.dtype(_HOST_DTYPES[dtype])


@dataclass(frozen=True, eq=False)
class DeviceTensor:
    """A contiguous tensor at `address` in `memory`; `buffer` owns the bytes and frees them when it goes."""

    spec: TensorSpec
    memory: "DeviceMemory"
    address: int
    buffer: object

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.spec.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return host_dtype(self.spec.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.size * self.itemsize

    def numpy(self) -> npt.NDArray[np.generic]:
        """A copy on the host, owned by the caller; bfloat16 arrives as its bits in uint16."""
        return self.memory.download(self)


class DeviceMemory(ABC):
    """Allocation and copies on one device, in order on one stream."""

    @abstractmethod
    def allocate(self, spec: TensorSpec) -> DeviceTensor:
        """A new tensor of zeros."""

    @abstractmethod
    def download(self, tensor: DeviceTensor) -> npt.NDArray[np.generic]:
        """Wait for the work that was queued before and copy the tensor to the host."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything queued so far is done."""

    @abstractmethod
    def peak_mib(self) -> float | None:
        """Most device memory in use so far, in MiB; None if the device does not tell."""

    def release(self) -> None:
        """Give memory that nothing uses any more back to the device, where the backend keeps such memory."""
        return

    @abstractmethod
    def _write(self, content: npt.NDArray[np.generic], target: DeviceTensor) -> None: ...

    @abstractmethod
    def _copy_bytes(self, source: int, target: int, count: int) -> None: ...

    def upload(self, content: npt.ArrayLike, target: DeviceTensor) -> None:
        """Copy a host array of the tensor's shape into `target`. The array may be reused at once."""
        array = np.ascontiguousarray(content, host_dtype(target.spec.dtype)).reshape(np.shape(content))
        if array.shape != target.spec.shape:
            raise ValueError(f"{target.spec.name}: array {array.shape} for a tensor {target.spec.shape}")
        self._write(array, target)

    def tensor(self, content: npt.ArrayLike, spec: TensorSpec) -> DeviceTensor:
        """A new tensor that holds a host array."""
        tensor = self.allocate(spec)
        self.upload(content, tensor)
        return tensor

    def copy(
        self,
        source: DeviceTensor,
        target: DeviceTensor,
        *,
        count: int | None = None,
        source_start: int = 0,
        target_start: int = 0,
    ) -> None:
        """Copy `count` consecutive elements (default: all of `source`) on the device; all in elements."""
        count = source.size if count is None else count
        if source.spec.dtype != target.spec.dtype:
            raise ValueError(f"copy of {source.spec.dtype} into {target.spec.dtype} ({target.spec.name})")
        for tensor, start in ((source, source_start), (target, target_start)):
            if start < 0 or count < 0 or start + count > tensor.size:
                raise ValueError(f"copy of {start}+{count} elements leaves {tensor.spec}")
        self._copy_elements(source, target, count, source_start, target_start)

    def _copy_elements(
        self, source: DeviceTensor, target: DeviceTensor, count: int, source_start: int, target_start: int
    ) -> None:
        self._copy_bytes(
            source.address + source_start * source.itemsize,
            target.address + target_start * target.itemsize,
            count * source.itemsize,
        )


class HostMemory(DeviceMemory):
    """The CPU's memory; `buffer` is the NumPy array itself."""

    def allocate(self, spec: TensorSpec) -> DeviceTensor:
        array = np.zeros(spec.shape, host_dtype(spec.dtype))
        return DeviceTensor(spec, self, array.ctypes.data, array)

    def view(self, tensor: DeviceTensor) -> npt.NDArray[np.generic]:
        """The tensor itself as an array, not a copy."""
        assert isinstance(tensor.buffer, np.ndarray)
        return tensor.buffer

    def download(self, tensor: DeviceTensor) -> npt.NDArray[np.generic]:
        return self.view(tensor).copy()

    def synchronize(self) -> None:
        return

    def peak_mib(self) -> float | None:
        return None

    def _write(self, content: npt.NDArray[np.generic], target: DeviceTensor) -> None:
        self.view(target)[...] = content

    def _copy_bytes(self, source: int, target: int, count: int) -> None:
        ctypes.memmove(target, source, count)


class Engine(ABC):
    """One component, loaded. `execute` reads and writes tensors of one `DeviceMemory`."""

    def __init__(self, component: ComponentEntry) -> None:
        self.component = component

    def execute(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> None:
        """Run once, in order with the copies of the same memory; outputs are overwritten.

        Raises `InputError` if a name, dtype or shape is not the one of the manifest.
        """
        _check_tensors(self.component.name, "input", self.component.inputs, inputs)
        _check_tensors(self.component.name, "output", self.component.outputs, outputs)
        self._run(inputs, outputs)

    @abstractmethod
    def _run(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> None: ...


class LoopEngine(Engine):
    """An engine of solver steps that can also run a whole denoising loop at once."""

    def execute_loop(
        self,
        inputs: Mapping[str, DeviceTensor],
        outputs: Mapping[str, DeviceTensor],
        schedule: Mapping[str, DeviceTensor],
        num_steps: int,
    ) -> None:
        """Run `num_steps` steps: next_latent and x0 of one are latent and previous_x0 of the next.

        `schedule` holds one row [num_steps, ...] per step for some of the inputs, which are then not read. `outputs`
        are those of the last step. Raises `InputError` as `execute` does.
        """
        _check_tensors(self.component.name, "input", self.component.inputs, inputs)
        _check_tensors(self.component.name, "output", self.component.outputs, outputs)
        self._run_loop(inputs, outputs, schedule, num_steps)

    @abstractmethod
    def _run_loop(
        self,
        inputs: Mapping[str, DeviceTensor],
        outputs: Mapping[str, DeviceTensor],
        schedule: Mapping[str, DeviceTensor],
        num_steps: int,
    ) -> None: ...


class Backend(ABC):
    """A target opened on this machine. `description` names the device and the library, for people."""

    description: str
    memory: DeviceMemory

    @abstractmethod
    def load(self, bundle: Path, component: ComponentEntry, entry: EngineEntry) -> Engine:
        """Load one component. Raises `BundleError` or `TargetError`."""


def _check_tensors(component: str, kind: str, specs: Sequence[TensorSpec], tensors: Mapping[str, DeviceTensor]) -> None:
    expected = {spec.name: spec for spec in specs}
    if tensors.keys() != expected.keys():
        raise InputError(
            f"{component}: wrong {kind} tensors",
            received=", ".join(sorted(tensors)) or "none",
            expected=", ".join(sorted(expected)),
        )
    for name, tensor in tensors.items():
        if (tensor.spec.dtype, tensor.spec.shape) != (expected[name].dtype, expected[name].shape):
            raise InputError(
                f"{component}: {kind} tensor '{name}' does not fit the engine",
                received=f"{tensor.spec.dtype} {list(tensor.spec.shape)}",
                expected=f"{expected[name].dtype} {list(expected[name].shape)}",
            )


def check_engine_tensors(
    path: Path, kind: str, specs: Sequence[TensorSpec], actual: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Compare an engine's own io tensors (name -> dtype, shape) with the manifest. Raises `BundleError`."""
    expected = {spec.name: (spec.dtype, spec.shape) for spec in specs}
    if dict(actual) == expected:
        return
    raise BundleError(
        f"{path}: the engine's {kind} tensors are not those of the manifest",
        received=_listed(actual),
        expected=_listed(expected),
        action="run the build command again: it rebuilds what is damaged",
    )


def _listed(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in sorted(tensors.items()))
