"""Find the TensorRT that can build plans on this machine.

For target `tensorrt-rtx`: the module `tensorrt_rtx`, then `tensorrt` if it really is RTX, then the two wheels
of `two_wheels`. For target `tensorrt`: the module `tensorrt`. Every candidate is imported and started in a
child process, because a vendor library may crash, hang, or be a placeholder. The answer is kept.
"""

import functools
import importlib.util
import json
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sana_runtime import two_wheels
from sana_runtime.contract import TargetName
from sana_runtime.environment import child_environment, prefixed_library_path
from sana_runtime.errors import TargetError

LibraryKind = Literal["vendor", "two_wheels"]
_PROBE_SECONDS = 120
_PROBE_MODULE = "sana_runtime.tensorrt_probe"
_BUILDER_NAMES = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}


@dataclass(frozen=True)
class TensorrtLibrary:
    """A TensorRT that started in a child process.

    `kind`: "vendor" is one of NVIDIA's own packages. `module`: what the child imports. `environment`:
    variables the child needs on top of this process's. `reason`: one line for people.
    """

    target: TargetName
    kind: LibraryKind
    module: str
    version: str
    bindings_version: str
    reason: str
    environment: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def builder_name(self) -> str:
        """ "TensorRT-RTX" or "TensorRT"."""
        return _BUILDER_NAMES[self.target]


@dataclass(frozen=True)
class Candidate:
    """One place looked at. `builder` is None when it cannot be used, and `reason` says why, in one line."""

    name: str
    reason: str
    builder: TensorrtLibrary | None = None


def find_tensorrt(target: TargetName) -> TensorrtLibrary:
    """The first usable candidate for `target`.

    Raises `TargetError` that lists why each candidate is not usable.
    """
    candidates = examine_tensorrt(target)
    for candidate in candidates:
        if candidate.builder is not None:
            return candidate.builder
    raise TargetError(
        f"target '{target}': no {_BUILDER_NAMES[target]} builder on this machine",
        received="\n    ".join(("", *(f"{candidate.name}: {candidate.reason}" for candidate in candidates))),
        expected=f"one usable {_BUILDER_NAMES[target]}",
        action=_REMEDIES[target],
    )


_REMEDIES = {
    "tensorrt-rtx": "pip install 'sana-export[rtx-builder]' (Linux x86-64, no GPU needed), or tensorrt-rtx "
    "from NVIDIA's package index",
    "tensorrt": "install TensorRT for this device (JetPack brings it; elsewhere: pip install tensorrt from "
    "NVIDIA's package index)",
}


@functools.cache
def examine_tensorrt(target: TargetName) -> tuple[Candidate, ...]:
    """Every candidate in order, up to and including the first usable one; later ones are not started.

    Raises `TargetError` for a target that is not compiled by TensorRT.
    """
    if target not in _BUILDER_NAMES:
        raise TargetError(
            f"target '{target}' has no plans to build",
            received=target,
            expected=" or ".join(_BUILDER_NAMES),
            action="use the ONNX files of the bundle directly",
        )
    modules = ("tensorrt_rtx", "tensorrt") if target == "tensorrt-rtx" else ("tensorrt",)
    candidates: list[Candidate] = []
    for module in modules:
        candidates.append(_examine_module(target, module))
        if candidates[-1].builder is not None:
            return tuple(candidates)
    if target == "tensorrt-rtx":
        candidates.append(_examine_two_wheels())
    return tuple(candidates)


def _examine_module(target: TargetName, module: str) -> Candidate:
    name = f"module {module}"
    if importlib.util.find_spec(module) is None:
        return Candidate(name, "not installed")
    found = _probe(module, {})
    if isinstance(found, str):
        return Candidate(name, found)
    if found.is_rtx != (target == "tensorrt-rtx"):
        is_what = "TensorRT-RTX" if found.is_rtx else "the full TensorRT"
        return Candidate(name, f"it is {is_what} {found.version}, not {_BUILDER_NAMES[target]}")
    reason = f"{_BUILDER_NAMES[target]} {found.version} from module {module}"
    library = TensorrtLibrary(target, "vendor", module, found.version, found.bindings_version, reason)
    return Candidate(name, reason, library)


def _examine_two_wheels() -> Candidate:
    name = f"wheels {two_wheels.LIBRARY_WHEEL[0]} + {two_wheels.BINDINGS_WHEEL[0]}"
    try:
        environment = prefixed_library_path(two_wheels.shared_library_folder())
    except two_wheels.NotAvailable as error:
        return Candidate(name, str(error))
    found = _probe(two_wheels.BINDINGS_MODULE, environment)
    if isinstance(found, str):
        return Candidate(name, found)
    reason = (
        f"TensorRT-RTX {found.version} of {'=='.join(two_wheels.LIBRARY_WHEEL)}, driven by "
        f"{'=='.join(two_wheels.BINDINGS_WHEEL)}"
    )
    library = TensorrtLibrary(
        target="tensorrt-rtx",
        kind="two_wheels",
        module=two_wheels.BINDINGS_MODULE,
        version=found.version,
        bindings_version=found.bindings_version,
        reason=reason,
        environment=environment,
    )
    return Candidate(name, reason, library)


@dataclass(frozen=True)
class _Found:
    """What the probe child reports."""

    version: str
    bindings_version: str
    is_rtx: bool


def worker_command(module: str, *arguments: str) -> tuple[list[str], Path]:
    """The command that runs one of our modules in a child, and the directory to run it in.

    `python -m` puts the working directory first on the import path: it must be ours, not the user's.
    """
    return [sys.executable, "-m", module, *arguments], Path(__file__).resolve().parents[1]


def _probe(module: str, environment: dict[str, str]) -> _Found | str:
    """Start the builder of `module` in a child. Returns what it found, or why it is unusable."""
    command, directory = worker_command(_PROBE_MODULE, module)
    try:
        run = subprocess.run(
            command,
            cwd=directory,
            env=child_environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"importing it did not finish within {_PROBE_SECONDS} s"
    except OSError as error:
        return f"no child process could be started: {error}"
    if run.returncode < 0:
        return f"importing it crashed with {signal_name(-run.returncode)}{_last_line(run.stderr)}"
    try:
        return _Found(**json.loads(run.stdout.rstrip().rpartition("\n")[2]))
    except (ValueError, TypeError):
        return f"it cannot be used{_last_line(run.stderr)}"


def signal_name(number: int) -> str:
    """ "SIGSEGV" of 11; "signal 35" of one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return f": {lines[-1][:300]}" if lines else ""
