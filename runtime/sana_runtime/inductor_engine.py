"""Engines of the target `inductor`: compiled pieces of PyTorch, on the CPU or captured in CUDA graphs.

The only module that uses torch, which it imports when the target is opened and not before: a device that runs another
target needs no torch. A .pt2 package holds native code, which loading it executes: load only bundles that you trust.
`Pipeline.load` compares every file with the manifest's digests first.
"""

import gc
import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import msgspec
import numpy as np
import numpy.typing as npt

from sana_runtime.contract import TensorSpec
from sana_runtime.engine import Backend, DeviceMemory, DeviceTensor, Engine, LoopEngine, host_dtype
from sana_runtime.errors import BundleError, InputError, TargetError
from sana_runtime.inductor_program import FORMAT_VERSION, Call, Lookup, Program, RunPiece, run_calls, value_name
from sana_runtime.manifest import ComponentEntry, EngineEntry

PROGRAM_NAME = "inductor.json"
_MIB = 1 << 20
# Captions and scalars are, latents are not.
_REMEMBERED_BYTES = 1 << 16
# A picture of 1024 px is 3 MiB.
_STAGING_BYTES = 4 << 20
# Before a capture, so that kernels are loaded and libraries have chosen theirs.
_WARM_UPS = 2
# Rows of a schedule start at multiples of this many fp32 numbers: compiled code takes its inputs to be aligned.
_ROW_ALIGNMENT = 4
# Graphs kept per component: one for single steps, and those of the last numbers of steps asked for.
_MOST_GRAPHS = 3


def torch_module() -> Any:
    """PyTorch, imported on first use. Raises `TargetError` where it is missing or broken."""
    prefer_little_memory()
    try:
        return importlib.import_module("torch")
    except Exception as error:  # a torch whose libraries are missing raises what it likes
        raise TargetError(
            "the target 'inductor' needs PyTorch",
            received=f"{type(error).__name__}: {error}",
            expected="the torch that the bundle was compiled with",
            action="pip install torch, or choose another target of the bundle with --target",
        ) from error


def machine_device() -> str:
    """What this machine compiles for and runs: "cuda sm_90", or without CUDA "cpu x86_64 AVX512". Imports torch."""
    torch = torch_module()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        return f"cuda sm_{major}{minor}"
    return cpu_device()


def cpu_device() -> str:
    """The CPU as `machine_device` names it. Imports torch."""
    return f"cpu {platform.machine()} {torch_module().backends.cpu.get_cpu_capability()}"


def inductor_problem(device: str, torch_version: str) -> str | None:
    """Why what was compiled for `device` with `torch_version` cannot run here, or None if it can."""
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed: it takes torch {torch_version}"
    try:
        torch = torch_module()
        here = cpu_device() if device.startswith("cpu") else machine_device()
    except TargetError as error:
        return str(error.received)
    if torch.__version__ != torch_version:
        return f"compiled with torch {torch_version}, here is {torch.__version__}"
    return None if here == device else f"compiled for {device}, this is {here}"


def prefer_little_memory() -> None:
    """Unless the user has chosen otherwise: without room for its counters cuBLASLt takes kernels that need none, nor a
    memset before each of them; cuBLAS gets 8 MiB per stream on every GPU, where PyTorch gives it 32 on a Hopper, at the
    same speed; and graphs of several engines fit their common memory where PyTorch maps it page by page. It reads the
    variables before it first uses the GPU: a program that has used it already keeps what it has.
    """
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


class TorchMemory(DeviceMemory):
    """Tensors of PyTorch on one device, on its current stream."""

    def __init__(self, device: str) -> None:
        self.torch = torch_module()
        self.device = self.torch.device(device)
        # What was uploaded last to tensors that nothing else has written since.
        self._uploaded: WeakKeyDictionary[DeviceTensor, npt.NDArray[np.generic]] = WeakKeyDictionary()

    def allocate(self, spec: TensorSpec) -> DeviceTensor:
        host_dtype(spec.dtype)
        tensor = self.torch.zeros(spec.shape, dtype=getattr(self.torch, spec.dtype), device=self.device)
        return DeviceTensor(spec, self, tensor.data_ptr(), tensor)

    def download(self, tensor: DeviceTensor) -> npt.NDArray[np.generic]:
        content = np.empty(tensor.spec.shape, host_dtype(tensor.spec.dtype))
        source = _buffer(tensor).reshape(-1).view(self.torch.uint8)
        target = self.torch.from_numpy(content.reshape(-1).view(np.uint8))
        if self.device.type == "cuda":
            copy_in_parts(source, target, self._staging, self.torch.cuda.current_stream(self.device).synchronize)
        else:
            target.copy_(source)
        return content

    @cached_property
    def _staging(self) -> Any:
        """Memory that the device writes to by itself; into any other its driver copies, which takes far longer.

        An engine may be the first to ask for it. What is made in its inference mode could not be written to outside.
        """
        with self.torch.inference_mode(False):
            pinned = self.device.type == "cuda"
            return self.torch.empty(_STAGING_BYTES, dtype=self.torch.uint8, pin_memory=pinned)

    def content(self, tensor: DeviceTensor) -> npt.NDArray[np.generic]:
        """`download` without waiting for the device where the host knows what it uploaded. Not to be written to."""
        known = self._uploaded.get(tensor)
        return self.download(tensor) if known is None else known

    def overwritten(self, tensor: DeviceTensor) -> None:
        """The device writes `tensor`."""
        self._uploaded.pop(tensor, None)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)

    def peak_mib(self) -> float | None:
        """Most memory that PyTorch has reserved on the GPU so far; CUDA's own few hundred MiB come on top."""
        return self.torch.cuda.max_memory_reserved(self.device) / _MIB if self.device.type == "cuda" else None

    def release(self) -> None:
        if self.device.type == "cuda":
            self.synchronize()
            gc.collect()  # engines and graphs refer to each other
            self.release_unused()

    def release_unused(self) -> None:
        """Give the GPU back what no tensor uses."""
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()

    def _write(self, content: npt.NDArray[np.generic], target: DeviceTensor) -> None:
        signed = content.view(np.int16) if target.spec.dtype == "bfloat16" else content
        source = self.torch.from_numpy(signed)
        if target.spec.dtype == "bfloat16":
            source = source.view(self.torch.bfloat16)
        # Pageable memory: CUDA has taken its own copy of the bytes when the call returns.
        _buffer(target).copy_(source, non_blocking=True)
        if content.nbytes <= _REMEMBERED_BYTES:
            self._uploaded[target] = content.copy()
        else:
            self.overwritten(target)

    def _copy_elements(
        self, source: DeviceTensor, target: DeviceTensor, count: int, source_start: int, target_start: int
    ) -> None:
        self.overwritten(target)
        rows = _buffer(source).view(-1)[source_start : source_start + count]
        _buffer(target).view(-1)[target_start : target_start + count].copy_(rows)

    def _copy_bytes(self, source: int, target: int, count: int) -> None:
        raise NotImplementedError("tensors of PyTorch are copied as tensors")


def copy_in_parts(source: Any, target: Any, staging: Any, wait: Callable[[], None]) -> None:
    """Copy the bytes of the tensor `source` to `target` through `staging`; `wait` until what is queued is done."""
    for start in range(0, len(target), len(staging)):
        end = min(start + len(staging), len(target))
        part = staging[: end - start]
        part.copy_(source[start:end], non_blocking=True)
        wait()
        target[start:end].copy_(part)


class InductorBackend(Backend):
    """The compiled pieces' device: what the bundle was made for, `device` "cuda" or "cpu"."""

    memory: TorchMemory

    def __init__(self, device: str) -> None:
        self.memory = TorchMemory(device)
        torch = self.memory.torch
        name = torch.cuda.get_device_name(0) if device == "cuda" else platform.machine()
        self.description = (
            f"{name} ({machine_device() if device == 'cuda' else cpu_device()}), torch {torch.__version__}"
        )
        # The decoder's convolutions have few shapes; which kernel is fastest is found in the runs before a capture.
        torch.backends.cudnn.benchmark = True
        self._pool = _GraphPool(torch)

    def load(self, bundle: Path, component: ComponentEntry, entry: EngineEntry) -> Engine:
        path = bundle / entry.files[0]
        program = read_program(path)
        pieces = {name: load_piece(path.parent / file) for name, file in program.pieces.items()}
        weights = self._stored(path.parent / program.weights, self.memory.device)
        tables = self._stored(path.parent / program.tables, "cpu") if program.lookups else {}
        looked_up = _HostTables(self.memory, program.lookups, tables)
        own = {spec.name: _buffer(self.memory.allocate(spec)) for spec in (*component.inputs, *component.outputs)}
        inputs = {spec.name: own[spec.name] for spec in component.inputs}
        outputs = {spec.name: own[spec.name] for spec in component.outputs}
        work = _Work(self.memory, program, pieces, weights, self._pool, inputs, outputs, looked_up)
        return _ENGINES.get(component.name, InductorEngine)(component, work)

    def _stored(self, path: Path, device: Any) -> dict[str, Any]:
        """A file's tensors; those for the CPU are read from the file as they are used."""
        from_file = importlib.import_module("safetensors.torch").load_file
        try:
            return dict(from_file(str(path), device=str(device)))
        except Exception as error:  # safetensors raises its own type, which derives from Exception
            raise _damaged(path, error) from error


def read_program(path: Path) -> Program:
    """The program of a component. Raises `BundleError` for a file that is none, or of another version."""
    try:
        program = msgspec.json.decode(path.read_bytes(), type=Program)
    except (OSError, msgspec.DecodeError) as error:
        raise _damaged(path, error) from error
    if program.version != FORMAT_VERSION:
        raise _damaged(path, f"format {program.version}, this runtime reads {FORMAT_VERSION}")
    return program


def load_piece(path: Path) -> RunPiece:
    """A compiled piece. Executes native code of the file. Raises `BundleError` where it cannot be loaded."""
    torch = torch_module()
    try:
        # What torch's `aoti_load_package` ends in. Before that it compiles programs to find out what the CPU can do,
        # which takes a minute where nothing is cached and needs a compiler; `inductor_problem` has asked the device.
        # Single-threaded: without its locks and events, which a capture of its kernels does not survive.
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
    except Exception as error:  # the loader raises what the C++ behind it does
        raise _damaged(path, error) from error

    def run(*tensors: Any) -> Sequence[Any]:
        found: Sequence[Any] = loader.boxed_run([*tensors])
        return found

    return run


def _damaged(path: Path, error: object) -> BundleError:
    return BundleError(
        f"{path} cannot be loaded",
        received=str(error),
        expected="the file as `sana-export build` wrote it, and the torch it was compiled with",
        action="copy the bundle again, or run the build command again on this machine",
    )


def _buffer(tensor: DeviceTensor) -> Any:
    return tensor.buffer


class _GraphPool:
    """The memory and the stream of captured graphs. They never run at the same time and keep nothing between runs, so
    they share both: libraries keep tens of MiB for every stream that they have seen.

    PyTorch takes a pool back together with its last graph, and refuses its handle from then on.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._alive: WeakSet[Any] = WeakSet()
        self._handle: Any = None

    @cached_property
    def _stream(self) -> Any:
        return self._torch.cuda.Stream()

    def captured(self, work: Callable[[], None], warm_up: Callable[[], None]) -> Any:
        """A graph of what `work` does on the GPU, after runs of `warm_up`. The graph has memory of its own: PyTorch
        gives back what those runs took before it captures.
        """
        cuda = self._torch.cuda
        self._stream.wait_stream(cuda.current_stream())
        with cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                warm_up()
        cuda.current_stream().wait_stream(self._stream)
        if not self._alive:
            self._handle = cuda.graph_pool_handle()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, pool=self._handle, stream=self._stream):
            work()
        self._alive.add(graph)
        return graph


class _HostTables:
    """Rows that the host reads from tables which the device has no copy of. A captured graph reads `values`."""

    def __init__(self, memory: TorchMemory, lookups: Sequence[Lookup], tables: Mapping[str, Any]) -> None:
        self._lookups = lookups
        self._tables = {name: _host_array(memory.torch, table) for name, table in tables.items()}
        self.values: dict[str, Any] = {}
        # On a GPU page-locked, so that a copy need not be waited for, with the event of the last one.
        self._staged: dict[str, tuple[Any, Any]] = {}
        self._arrays: dict[str, npt.NDArray[np.generic]] = {}
        torch, on_gpu = memory.torch, memory.device.type == "cuda"
        for lookup in lookups:
            table, name = tables[lookup.table], lookup.output
            shape = (1, lookup.end - lookup.first, *table.shape[1:])
            self.values[name] = torch.zeros(shape, dtype=table.dtype, device=memory.device)
            if on_gpu:
                self._staged[name] = torch.zeros(shape, dtype=table.dtype, pin_memory=True), torch.cuda.Event()
            self._arrays[name] = _host_array(torch, self._staged[name][0] if on_gpu else self.values[name])

    def read(self, indices: Mapping[str, npt.NDArray[np.generic]], outputs: frozenset[str]) -> None:
        """Read those of `outputs` that are looked up. Raises `InputError` for an index that the table does not have."""
        for lookup in self._lookups:
            if lookup.output in outputs:
                self._read(lookup, indices[lookup.index][0, lookup.first : lookup.end].astype(np.int64))

    def _read(self, lookup: Lookup, index: npt.NDArray[np.int64]) -> None:
        table = self._tables[lookup.table]
        if index.min() < 0 or index.max() >= len(table):
            raise InputError(
                f"{lookup.index}: no row of '{lookup.table}' has this number",
                received=f"{index.min()} to {index.max()}",
                expected=f"0 to {len(table) - 1}",
                action="use the tokenizer of the bundle",
            )
        staged, copied = self._staged.get(lookup.output, (None, None))
        if copied is not None:
            copied.synchronize()
        # By NumPy, in this thread: to wake PyTorch's for a few hundred rows takes longer than to copy them. The numbers
        # are in range; asking for it again would make a copy more.
        np.take(table, index, axis=0, out=self._arrays[lookup.output][0], mode="clip")
        if copied is not None:
            self.values[lookup.output].copy_(staged, non_blocking=True)
            copied.record()


def _host_array(torch: Any, tensor: Any) -> npt.NDArray[np.generic]:
    """The memory of a tensor on the host, in whole numbers of its width where NumPy has no such dtype."""
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    array: npt.NDArray[np.generic] = tensor.view(widths[tensor.element_size()]).numpy()
    return array


@dataclass
class _Work:
    """A component's calls on one device, its own copies of inputs and outputs, and the graphs captured over them."""

    memory: TorchMemory
    program: Program
    pieces: Mapping[str, RunPiece]
    weights: Mapping[str, Any]
    pool: "_GraphPool"
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    tables: _HostTables
    graphs: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def run(self, key: tuple[Any, ...], work: Callable[[], None], warm_up: Callable[[], None]) -> None:
        """Run `work`; on a GPU capture it on the first call of a key and replay it from then on."""
        if self.memory.device.type != "cuda":
            work()
            return
        if key not in self.graphs:
            while len(self.graphs) >= _MOST_GRAPHS:
                del self.graphs[next(iter(self.graphs))]
            self.graphs[key] = self.pool.captured(work, warm_up)
        self.graphs[key].replay()

    def prepared(self) -> dict[str, Any]:
        """All values that a step reads, but for what changes from step to step."""
        values = {**self.weights, **self.inputs, **self.tables.values}
        run_calls(self.program.prepare, self.pieces, values, _made_for_steps(self.program))
        return values

    # Walked through once: to do so for every prompt takes a tenth of a millisecond.
    @cached_property
    def read_by_prepare(self) -> frozenset[str]:
        """The values that the program's preparation reads."""
        return _read_by(self.program.prepare)

    @cached_property
    def read_by_step(self) -> frozenset[str]:
        """The values that its step reads."""
        return _read_by(self.program.step)

    def look_up(self, inputs: Mapping[str, DeviceTensor], wanted: frozenset[str]) -> None:
        """Read those of `wanted` that come from tables on the host."""
        if self.tables.values:
            indices = {lookup.index for lookup in self.program.lookups}
            # A download from the GPU would wait for it.
            content = {name: self.memory.content(inputs[name]) for name in indices}
            self.tables.read(content, wanted)

    def finish(self, values: Mapping[str, Any]) -> None:
        """Copy the outputs to where they are read."""
        for name, tensor in self.outputs.items():
            tensor.copy_(values[name])


class InductorEngine(Engine):
    """A component that is run as a whole."""

    def __init__(self, component: ComponentEntry, work: _Work) -> None:
        super().__init__(component)
        self._work = work

    def _run(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> None:
        with self._work.memory.torch.inference_mode():
            self._feed(inputs)
            self._work.look_up(inputs, self._work.read_by_prepare | self._work.read_by_step)
            self._work.run(("once",), self._step, self._step)
            self._fetch(outputs)

    def _step(self) -> None:
        values = self._work.prepared()
        run_calls(self._work.program.step, self._work.pieces, values, frozenset(self._work.outputs))
        self._work.finish(values)

    def _feed(self, inputs: Mapping[str, DeviceTensor]) -> None:
        for name, tensor in inputs.items():
            self._work.inputs[name].copy_(_buffer(tensor))

    def _fetch(self, outputs: Mapping[str, DeviceTensor]) -> None:
        for name, tensor in outputs.items():
            self._work.memory.overwritten(tensor)
            _buffer(tensor).copy_(self._work.outputs[name])


class InductorTextEncoder(InductorEngine):
    """The text encoder. What the positions before the caption give, where the program tells them apart, is kept until
    their tokens change: before most prompts stands the same instruction. Short captions have calls of their own.
    """

    def __init__(self, component: ComponentEntry, work: _Work) -> None:
        super().__init__(component, work)
        # The inputs' first positions, and what they gave. A captured graph reads the latter's very tensors.
        self._prefix: dict[str, npt.NDArray[np.generic]] = {}
        self._kept: dict[str, Any] = {}
        short = work.program.short_step
        # Without a program for short captions none is short. What each step reads is found once.
        self._short_end = short.end if short else 0
        self._steps = {
            is_short: (calls, _read_by(calls))
            for is_short, calls in ((False, work.program.step), (True, short.calls if short else ()))
        }

    def _run(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> None:
        with self._work.memory.torch.inference_mode():
            self._feed(inputs)
            if self._work.program.prepare:
                self._keep_prefix(inputs)
            is_short = self._is_short(inputs)
            calls, read = self._steps[is_short]
            self._work.look_up(inputs, read)
            self._work.run(("once", is_short), lambda: self._step_by(calls), lambda: self._step_by(calls))
            self._fetch(outputs)

    def _is_short(self, inputs: Mapping[str, DeviceTensor]) -> bool:
        """Whether no token is valid from the end of short captions on."""
        if not self._short_end:
            return False
        return not self._work.memory.content(inputs["caption_mask"])[0, self._short_end :].any()

    def _step_by(self, calls: Sequence[Call]) -> None:
        values = {**self._work.weights, **self._work.inputs, **self._work.tables.values, **self._kept}
        run_calls(calls, self._work.pieces, values, frozenset(self._work.outputs))
        self._work.finish(values)

    def _keep_prefix(self, inputs: Mapping[str, DeviceTensor]) -> None:
        # A comparison on the GPU would keep it waiting for the host to read the answer.
        content = {name: self._work.memory.content(tensor) for name, tensor in inputs.items()}
        if self._prefix and all(
            np.array_equal(content[name][:, : part.shape[1]], part) for name, part in self._prefix.items()
        ):
            return
        self._work.look_up(inputs, self._work.read_by_prepare)
        length = self._make_kept()
        self._prefix = {name: array[:, :length].copy() for name, array in content.items()}
        # Nothing outside of graphs needs as much again.
        self._work.memory.release_unused()

    def _make_kept(self) -> int:
        """Compute what is kept; the number of positions it is of. None of the computation's own tensors outlives it."""
        values = self._work.prepared()
        made = {name: values[name] for name in _made_for_steps(self._work.program)}
        if not self._kept:
            self._kept = {name: tensor.clone() for name, tensor in made.items()}
        for name, tensor in made.items():
            self._kept[name].copy_(tensor)
        # Keys and values [key_heads, prefix, D], results [1, prefix, C].
        return int(next(iter(made.values())).shape[1])


class InductorLoopEngine(InductorEngine, LoopEngine):
    """The transformer: one solver step, or a whole denoising loop as one graph."""

    def __init__(self, component: ComponentEntry, work: _Work) -> None:
        super().__init__(component, work)
        self._rows: dict[tuple[int, str], Any] = {}

    def _run_loop(
        self,
        inputs: Mapping[str, DeviceTensor],
        outputs: Mapping[str, DeviceTensor],
        schedule: Mapping[str, DeviceTensor],
        num_steps: int,
    ) -> None:
        rows = {name: self._own_rows(name, num_steps) for name in schedule}
        with self._work.memory.torch.inference_mode():
            self._feed(inputs)
            for name, tensor in schedule.items():
                content = _buffer(tensor).reshape(num_steps, -1)
                rows[name][:, : content.shape[1]].copy_(content)
            key = ("loop", num_steps, *sorted(rows))
            self._work.run(key, lambda: self._loop(rows, num_steps), lambda: self._loop(rows, 1))
            self._fetch(outputs)

    def _loop(self, rows: Mapping[str, Any], num_steps: int) -> None:
        values = self._work.prepared()
        for index in range(num_steps):
            values.update({name: self._row(name, content, index) for name, content in rows.items()})
            run_calls(self._work.program.step, self._work.pieces, values, frozenset(self._work.outputs))
            values["latent"] = values["next_latent"]
            values["previous_x0"] = values["x0"]
        self._work.finish(values)

    def _own_rows(self, name: str, num_steps: int) -> Any:
        """Memory for a schedule that stays where it is, as a captured graph needs it."""
        key = (num_steps, name)
        if key not in self._rows:
            memory = self._work.memory
            padded = -(-self._work.inputs[name].numel() // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
            self._rows[key] = memory.torch.zeros((num_steps, padded), device=memory.device)
        return self._rows[key]

    def _row(self, name: str, content: Any, index: int) -> Any:
        like = self._work.inputs[name]
        return content[index, : like.numel()].view(like.shape)


_ENGINES: dict[str, type[InductorEngine]] = {"text_encoder": InductorTextEncoder, "transformer": InductorLoopEngine}


def _made_for_steps(program: Program) -> frozenset[str]:
    made = {name for call in program.prepare for name in call.outputs}
    short = program.short_step.calls if program.short_step else ()
    return frozenset(made & (_read_by(program.step) | _read_by(short)))


def _read_by(calls: Sequence[Call]) -> frozenset[str]:
    return frozenset(value_name(name) for call in calls for name in call.inputs)
