"""Child process of `plan_builder`: parse one ONNX file, compile it, write the plan.

Run as `python -m sana_runtime.plan_worker EVENTS_FD REQUEST_JSON`. Events go to EVENTS_FD as JSON lines; the
compiler's log goes to stderr; standard input closes when the parent cancels.
"""

import ctypes
import importlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from sana_runtime import tensorrt_compat
from sana_runtime.plugins import KernelFolder, PluginForm, count_plugin_layers, register_plugins
from sana_runtime.quick_plugins import register_quick_plugins

_PR_SET_PDEATHSIG = 1
_EVENT_SECONDS = 0.05


class BuildRequest(msgspec.Struct, frozen=True):
    """What to build.

    `workspace_mib`: None is TensorRT's default. `parent`: its process id. `plugins`: the folder of compiled
    kernels for the plugin; None leaves it unregistered. `plugin_form`: which plugin they are for.
    """

    module: str
    onnx: str
    output: str
    workspace_mib: int | None
    parent: int
    plugins: str | None = None
    plugin_form: PluginForm = "class"


class Phase(msgspec.Struct, frozen=True):
    """One phase of the compiler: `step` of `steps` done. `steps` may be 0 (unknown)."""

    name: str
    step: int
    steps: int


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """The open phases, outermost first."""

    phases: list[Phase]
    peak_memory_mib: int


class Built(msgspec.Struct, frozen=True, tag="built"):
    """The plan is written."""

    layers: int
    peak_memory_mib: int
    plugin_layers: int = 0


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The build ended without a plan. `errno` belongs to kind "system"."""

    kind: Literal["parse", "build", "no_memory", "system", "cancelled"]
    detail: str
    errno: int = 0


Event = Progress | Built | Failed


class _Stop(Exception):
    """Carries the last event out of the build."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.detail)
        self.failed = failed


def main() -> None:
    """Build what the command line asks for; report exactly one `Built` or `Failed`."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    request = msgspec.json.decode(sys.argv[2], type=BuildRequest)
    _die_with_parent(request.parent)
    with os.fdopen(descriptor, "wb", buffering=0) as events:
        events.write(_line(_outcome(request, events)))
    # Skip the vendor library's teardown: it frees gigabytes one by one, and may crash.
    sys.stderr.flush()
    os._exit(0)


def _outcome(request: BuildRequest, events: BinaryIO) -> Event:
    try:
        return _build(request, events)
    except _Stop as stop:
        return stop.failed
    except MemoryError as error:
        return Failed("no_memory", str(error) or "an allocation failed")
    except OSError as error:
        return Failed("system", str(error), error.errno or 0)
    except Exception as error:
        traceback.print_exc()
        return Failed("build", f"{type(error).__name__}: {error}")


def _build(request: BuildRequest, events: BinaryIO) -> Built:
    trt = importlib.import_module(request.module)
    logger = trt.Logger(trt.Logger.INFO)
    builder = trt.Builder(logger)
    kernels = _register(trt, request) if request.plugins is not None else None
    network = tensorrt_compat.create_network(trt, builder)
    parser = trt.OnnxParser(network, logger)  # owns the mapped weights: must outlive the build
    _parse(parser, network, request.onnx)
    plugin_layers = count_plugin_layers(trt, network)
    reporter = _Reporter(events)
    monitor = _progress_monitor(trt, reporter)
    config = tensorrt_compat.create_config(trt, builder, monitor, request.workspace_mib)
    with Path(request.output).open("wb") as output:
        whole = tensorrt_compat.write_plan(trt, builder, network, config, output)
    if kernels is not None and kernels.problem is not None:
        raise _Stop(Failed("build", " ".join(str(kernels.problem).split())))
    if not whole:
        raise _Stop(_build_failure(reporter))
    return Built(network.num_layers, peak_memory_mib(), plugin_layers)


def _register(trt: Any, request: BuildRequest) -> KernelFolder:
    assert request.plugins is not None
    if request.plugin_form == "class":
        return register_plugins(trt, Path(request.plugins))
    from sana_runtime.cuda import compute_capability

    # The full TensorRT builds on the GPU that will run the plan.
    major, minor = compute_capability()
    return register_quick_plugins(trt, Path(request.plugins), 10 * major + minor)


def _build_failure(reporter: "_Reporter") -> Failed:
    if reporter.cancelled:
        return Failed("cancelled", "cancelled at a step of the compiler")
    return Failed("build", "the compiler returned no plan")


def _parse(parser: Any, network: Any, onnx: str) -> None:
    if not parser.parse_from_file(onnx):
        errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise _Stop(Failed("parse", "; ".join(errors) or "the parser gave no reason"))
    if network.num_layers == 0 or network.num_outputs == 0:  # what the parser makes of a file of another kind
        raise _Stop(Failed("parse", "the file holds no graph"))


def _parser_error(error: Any) -> str:
    where = f"node '{error.node_name()}' ({error.node_operator()}): " if error.node_name() else ""
    return f"{where}{error.desc()}"


class _Reporter:
    """Turns the compiler's callbacks, from any of its threads, into throttled `Progress` events."""

    def __init__(self, events: BinaryIO) -> None:
        self.cancelled = False
        self._events = events
        self._phases: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._next = 0.0

    def start(self, name: str, steps: int) -> None:
        """A phase opens."""
        with self._lock:
            self._phases[name] = (0, steps)
            self._send()

    def step(self, name: str, step: int) -> bool:
        """Step `step`, counted from 0, is done. Returns whether to go on."""
        with self._lock:
            _, steps = self._phases.get(name, (0, 0))
            self._phases[name] = (step + 1, steps)
            self._send()
            self.cancelled = self.cancelled or _parent_cancelled()
            return not self.cancelled

    def finish(self, name: str) -> None:
        """A phase closes."""
        with self._lock:
            self._phases.pop(name, None)

    def _send(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _EVENT_SECONDS
        phases = [Phase(name, step, steps) for name, (step, steps) in self._phases.items()]
        self._events.write(_line(Progress(phases, peak_memory_mib())))


def _progress_monitor(trt: Any, reporter: _Reporter) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            reporter.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return reporter.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            reporter.finish(phase_name)

    return Monitor()


def _line(event: Event) -> bytes:
    return msgspec.json.encode(event) + b"\n"


def _parent_cancelled() -> bool:
    """The parent closed our standard input, or is gone."""
    return bool(select.select([0], [], [], 0)[0])


def peak_memory_mib() -> int:
    """This process's largest resident set so far, in MiB.

    Not `ru_maxrss`: the kernel lets that start at the size of the process that forked us.
    """
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) >> 10
    return 0


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the parent ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


if __name__ == "__main__":
    main()
