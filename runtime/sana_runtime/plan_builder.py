"""Compile an ONNX file into a TensorRT plan, in a child process.

    result = build_plan(onnx, plan, "tensorrt-rtx", on_progress=show)
    result.seconds, result.size, result.peak_memory_mib, result.builder, result.builder_version, result.layers

`on_progress` receives a `PlanProgress` up to 20 times a second, in the calling thread; `progress.fraction`
(0 to 1) and `progress.phase` feed a progress bar. It cancels the build by returning False.

The vendor's compiler may crash, run out of memory or be killed: it runs in `sana_runtime.plan_worker`, and
every such end becomes one `BuildError` with the compiler's last log lines. The plan appears under its name
only when it is whole. An interrupt (Ctrl-C) kills the child; so does the end of this process. Linux only.
"""

import errno
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import msgspec

from sana_runtime.contract import TargetName
from sana_runtime.environment import child_environment
from sana_runtime.errors import BuildError, InputError, TargetError
from sana_runtime.files import no_space_or, whole_file
from sana_runtime.plan_worker import BuildRequest, Built, Event, Failed, Phase, Progress
from sana_runtime.plugins import KernelFolder, PluginForm
from sana_runtime.tensorrt_library import TensorrtLibrary, find_tensorrt, signal_name, worker_command

_WORKER_MODULE = "sana_runtime.plan_worker"
_LOG_LINES = 12
_LOG_BYTES = 1 << 16
_LOG_PREFIX = re.compile(r"^\[[\d/:-]+\] \[TRT\] ")
_LOG_NOTE = "[I]"
_ACTIVATION_MEMORY = re.compile(r"Total Activation Memory: (\d+) bytes")
_CANCEL_SECONDS = 30
_events = msgspec.json.Decoder(Event)


@dataclass(frozen=True)
class PlanProgress:
    """Where the compiler is. `phases` nest, outermost first; `peak_memory_mib` is the child's so far."""

    phases: tuple[Phase, ...]
    peak_memory_mib: int

    @property
    def phase(self) -> str:
        """Name of the innermost phase."""
        return self.phases[-1].name if self.phases else ""

    @property
    def fraction(self) -> float:
        """Part of the outermost phase that is done, 0 to 1, refined by the phases inside it."""
        done, weight = 0.0, 1.0
        for phase in self.phases:
            if phase.steps > 0:
                done += weight * min(phase.step / phase.steps, 1.0)
                weight /= phase.steps
        return min(done, 1.0)


@dataclass(frozen=True)
class PlanResult:
    """A finished plan.

    `seconds`: wall clock, child start to rename. `peak_memory_mib`: the child's largest resident set, mapped
    weight files included. `size`: bytes. `layers`: of the parsed network; the engine's own count needs a GPU.
    `plugin_layers`: those of them that are plugins. `activation_bytes`: what the engine takes on the GPU beside its
    weights, by the compiler's log; None where that does not say.
    """

    seconds: float
    peak_memory_mib: int
    size: int
    builder: str
    builder_version: str
    layers: int
    plugin_layers: int = 0
    activation_bytes: int | None = None


OnProgress = Callable[[PlanProgress], bool | None]


def build_plan(
    onnx: Path,
    plan: Path,
    target: TargetName,
    *,
    on_progress: OnProgress | None = None,
    workspace_mib: int | None = None,
    plugins: Path | None = None,
    plugin_form: PluginForm = "class",
) -> PlanResult:
    """Compile `onnx` (external data beside it) into `plan`.

    `workspace_mib` limits the compiler's scratch memory on the GPU; None is TensorRT's default. `on_progress`
    returning False cancels. `plugins`: a folder of compiled kernels (see `sana_runtime.plugins`); every
    linear-attention node becomes a plugin layer. Without it the node's function is inlined. `plugin_form` "quick": the
    kernels are PTX and the graph holds the nodes of `sana_runtime.quick_plugins`; not for `tensorrt-rtx`.

    Raises `TargetError` when no builder for `target` is here, `InputError` for a bad `workspace_mib`,
    `BundleError` for damaged kernels in `plugins`, `BuildError` for a missing ONNX file and for every failure or
    cancellation of the compiler. No temporary file is left.
    """
    _check_inputs(onnx, workspace_mib)
    if plugins is not None:
        KernelFolder.open(plugins, plugin_form).verify()
        check_plugin_form(target, plugin_form)
    library = find_tensorrt(target)
    started = time.monotonic()
    with whole_file(plan) as temporary:
        request = BuildRequest(
            module=library.module,
            onnx=str(onnx.absolute()),
            output=str(temporary.absolute()),
            workspace_mib=workspace_mib,
            parent=os.getpid(),
            plugins=str(plugins.absolute()) if plugins is not None else None,
            plugin_form=plugin_form,
        )
        built, activation_bytes = _run_worker(request, library, onnx, on_progress)
    return PlanResult(
        seconds=time.monotonic() - started,
        peak_memory_mib=built.peak_memory_mib,
        size=plan.stat().st_size,
        builder=library.builder_name,
        builder_version=library.version,
        layers=built.layers,
        plugin_layers=built.plugin_layers,
        activation_bytes=activation_bytes,
    )


def check_plugin_form(target: TargetName, form: PluginForm) -> None:
    """Raise `TargetError` for the quick form on TensorRT-RTX."""
    if form == "quick" and target == "tensorrt-rtx":
        raise TargetError(
            "target 'tensorrt-rtx' takes no quick plugins",
            received="--plugin-form quick --target tensorrt-rtx",
            expected="--plugin-form class: its parser asks for creators of version V3One, and its network crashes on "
            "any other (1.7.1)",
            action="--plugin-form class, or --target tensorrt",
        )


def _check_inputs(onnx: Path, workspace_mib: int | None) -> None:
    if not onnx.is_file():
        raise BuildError(
            f"{onnx}: no such ONNX file",
            received=onnx,
            expected="an ONNX file written by `sana-export`",
            action="run the build command again: it writes what is missing",
        )
    if workspace_mib is not None and workspace_mib < 1:
        raise InputError(
            "the compiler's workspace limit is not a size",
            received=f"{workspace_mib} MiB",
            expected="1 MiB or more",
            action="leave the limit out, or give a larger one",
        )


def _run_worker(
    request: BuildRequest, library: TensorrtLibrary, onnx: Path, on_progress: OnProgress | None
) -> tuple[Built, int | None]:
    """The worker's report, and the activation bytes that the compiler's log speaks of."""
    with tempfile.TemporaryFile() as log, _worker(request, library, log) as (child, events):
        last = _follow(child, events, on_progress)
        exit_code = child.wait()
        if isinstance(last, Built) and exit_code == 0:
            found = _ACTIVATION_MEMORY.findall(_end_of(log))
            return last, int(found[-1]) if found else None
        raise _failure(onnx, library, last, exit_code, _tail(log))


@contextmanager
def _worker(
    request: BuildRequest, library: TensorrtLibrary, log: IO[bytes]
) -> Iterator[tuple["subprocess.Popen[bytes]", BinaryIO]]:
    """Start the worker; yield it and its event stream; whatever happens, leave no child behind."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as events:
        try:
            command, directory = worker_command(_WORKER_MODULE, str(write_end), msgspec.json.encode(request).decode())
            child = subprocess.Popen(
                command,
                cwd=directory,
                env=child_environment(library.environment),
                pass_fds=(write_end,),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches only this process, which then kills the child
            )
        finally:
            os.close(write_end)
        try:
            yield child, events
        finally:
            child.kill()
            child.wait()
            if child.stdin:
                child.stdin.close()


def _follow(
    child: "subprocess.Popen[bytes]", events: BinaryIO, on_progress: OnProgress | None
) -> Built | Failed | Progress | None:
    """Pass progress on until the worker closes the stream. Returns its last event."""
    last: Built | Failed | Progress | None = None
    killer: threading.Timer | None = None
    for line in events:
        try:
            last = _events.decode(line)
        except msgspec.DecodeError:  # cut short by a crash
            continue
        if not isinstance(last, Progress) or on_progress is None or killer is not None:
            continue
        if on_progress(PlanProgress(tuple(last.phases), last.peak_memory_mib)) is False:
            killer = _cancel(child)
    if killer is not None:
        killer.cancel()
        last = last if isinstance(last, Built) else Failed("cancelled", "on_progress returned False")
    return last


def _cancel(child: "subprocess.Popen[bytes]") -> threading.Timer:
    """Ask the worker to stop at its next step; kill it if that step does not end."""
    assert child.stdin is not None
    child.stdin.close()
    killer = threading.Timer(_CANCEL_SECONDS, child.kill)
    killer.daemon = True
    killer.start()
    return killer


def _tail(log: IO[bytes]) -> str:
    """The last log lines of the compiler, indented for an error message. Plain notes are left out."""
    lines = [_LOG_PREFIX.sub("", line).strip() for line in _end_of(log).splitlines()]
    telling = [line for line in lines if line and not line.startswith(_LOG_NOTE)]
    return "".join(f"\n    {line[:300]}" for line in telling[-_LOG_LINES:]) or " none"


def _end_of(log: IO[bytes]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
    return log.read().decode(errors="replace")


def _failure(
    onnx: Path, library: TensorrtLibrary, last: Built | Failed | Progress | None, exit_code: int, log: str
) -> Exception:
    """The error for the person: what ended the compiler, and its last words."""
    name = f"{library.builder_name} {library.version}"
    if isinstance(last, Failed):
        return _reported_failure(f"{onnx}: {name}", onnx, last, log)
    if exit_code == -signal.SIGKILL:
        memory = f" at {last.peak_memory_mib} MiB" if isinstance(last, Progress) else ""
        return _out_of_memory(f"{onnx}: {name} was killed{memory}", "SIGKILL, as the kernel sends when memory is full")
    end = signal_name(-exit_code) if exit_code < 0 else f"exit code {exit_code}"
    return BuildError(
        f"{onnx}: {name} crashed",
        received=f"{end}, {_where(last)}; last log lines:{log}",
        expected="a plan",
        action="sana-export doctor shows the compiler's versions; report the log lines with the ONNX file",
    )


def _where(last: Built | Failed | Progress | None) -> str:
    if isinstance(last, Progress) and last.phases:
        return f"in phase '{last.phases[-1].name}'"
    return "after the build" if isinstance(last, Built) else "before the first phase"


def _reported_failure(what: str, onnx: Path, failed: Failed, log: str) -> Exception:
    if failed.kind == "no_memory":
        return _out_of_memory(f"{what} ran out of memory", failed.detail)
    if failed.kind == "system":
        return _system_failure(what, onnx, failed)
    if failed.kind == "cancelled":
        return BuildError(f"{what} was cancelled", received=failed.detail)
    if failed.kind == "parse":
        return BuildError(
            f"{what} cannot read the graph",
            received=f"{failed.detail}; last log lines:{log}",
            expected="a whole ONNX file with its external data, made of operators this compiler knows",
            action="run the build command again to write the ONNX file anew",
        )
    return BuildError(
        f"{what} refused to build",
        received=f"{failed.detail}; last log lines:{log}",
        expected="a plan",
        action="the first [E] line names the layer; sana-export doctor shows the compiler's versions",
    )


def _system_failure(what: str, onnx: Path, failed: Failed) -> Exception:
    error = OSError(failed.errno, failed.detail)
    if failed.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space_or(error, onnx.with_suffix(".plan"))
    return BuildError(
        f"{what} could not write the plan",
        received=failed.detail,
        expected="a writable file on a file system that holds files of this size",
        action="choose another --output",
    )


def _out_of_memory(failed: str, received: str) -> BuildError:
    return BuildError(
        failed,
        received=received,
        expected="memory for about three times the weights of this component",
        action="close other programs, add swap, or build on a machine with more memory",
    )
