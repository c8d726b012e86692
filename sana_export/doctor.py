"""What this machine has and lacks for building and running bundles.

Every check is a function that returns `Finding`s and never raises: a broken machine is what it is for.
"""

import importlib
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from sana_export.inductor.toolchain import choose_cxx
from sana_export.system_memory import system_memory
from sana_runtime.environment import c_compiler
from sana_runtime.errors import BuildError, SanaError
from sana_runtime.manifest import read_manifest, verify_files
from sana_runtime.targets import examine_targets, rtx_supports
from sana_runtime.tensorrt_library import Candidate, examine_tensorrt

Status = Literal["ok", "warn", "FAIL"]
_SEVERITY: dict[Status, int] = {"ok": 0, "warn": 1, "FAIL": 2}

_SUPPORTED_PYTHON = ((3, 10), (3, 13))
_REQUIRED = ("torch", "transformers", "diffusers", "onnx", "onnxscript", "onnxruntime")
_SMI_QUERY = "name,compute_cap,driver_version,memory.free,memory.total"
_SMI_SECONDS = 20
# The largest component, a bf16 text encoder, has 4.9 GiB of weights. Compiling it maps its file and holds one
# copy; its ONNX file and its plan stay in the bundle beside those of the transformer and the decoder.
_ENOUGH_MEMORY_GIB = 12
_ENOUGH_DISK_GIB = 20
_GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` is empty when nothing needs to be done."""

    component: str
    status: Status
    detail: str
    remedy: str = ""


def examine_machine() -> Iterable[Finding]:
    """Every check of this machine, each run when its turn comes."""
    checks: tuple[Callable[[], tuple[Finding, ...]], ...] = (
        check_python,
        check_distributions,
        *(lambda name=name: (check_package(name),) for name in _REQUIRED),
        check_triton,
        check_rtx_builder,
        check_tensorrt,
        check_gpus,
        check_memory,
        check_disk,
        check_compiler,
        check_cxx_compiler,
    )
    for check in checks:
        yield from check()


def exit_code(findings: Iterable[Finding]) -> int:
    """1 when anything FAILs, else 0."""
    return int(any(finding.status == "FAIL" for finding in findings))


def worst(findings: Iterable[Finding]) -> Status:
    """The most severe status; "ok" of nothing."""
    return max((finding.status for finding in findings), key=_SEVERITY.__getitem__, default="ok")


def check_python() -> tuple[Finding, ...]:
    """The interpreter's version."""
    low, high = _SUPPORTED_PYTHON
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if low <= sys.version_info[:2] <= high:
        return (Finding("Python", "ok", detail),)
    remedy = f"use Python {'.'.join(map(str, low))} to {'.'.join(map(str, high))}"
    return (Finding("Python", "FAIL", detail, remedy),)


def check_distributions() -> tuple[Finding, ...]:
    """Our two distributions must have the same version."""
    versions = {name: installed_version(name) for name in ("sana-export", "sana-runtime")}
    detail = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    if None not in versions.values() and len({*versions.values()}) == 1:
        return (Finding("sana", "ok", detail),)
    return (Finding("sana", "FAIL", detail, "install both from one checkout: pip install -e runtime -e ."),)


def installed_version(distribution: str) -> str | None:
    """The installed version, from metadata alone."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_package(name: str) -> Finding:
    """A package we cannot work without: it must import, and be new enough."""
    try:
        module = importlib.import_module(name)
    except Exception as error:
        return Finding(name, "FAIL", f"{type(error).__name__}: {error}", f"pip install '{requirement_of(name)}'")
    version = str(getattr(module, "__version__", "unknown"))
    if numbers(version) < numbers(requirement_of(name).partition(">=")[2]):
        return Finding(name, "FAIL", version, f"pip install '{requirement_of(name)}'")
    return Finding(name, "ok", _with_extras(name, module, version))


def requirement_of(name: str) -> str:
    """Our own requirement on a package, such as "torch>=2.11"; its bare name if we declare none."""
    for distribution in ("sana-export", "sana-runtime"):
        if installed_version(distribution) is None:
            continue
        for line in metadata.requires(distribution) or ():
            requirement = line.partition(";")[0].strip()
            if requirement.partition(">=")[0] == name:
                return requirement
    return name


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"; empty for text without leading numbers."""
    parts = []
    for part in version.partition("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def _with_extras(name: str, module: Any, version: str) -> str:
    if name == "torch":
        return f"{version}, CUDA {'available' if module.cuda.is_available() else 'not available'}"
    if name == "onnxruntime":
        providers = (provider.removesuffix("ExecutionProvider") for provider in module.get_available_providers())
        return f"{version}, providers: {', '.join(providers)}"
    return version


def check_triton() -> tuple[Finding, ...]:
    """Optional: only the fused kernels of PyTorch models need it."""
    version = installed_version("triton")
    if version is not None:
        return (Finding("triton", "ok", version),)
    return (Finding("triton", "warn", "not installed", "optional: kernels run as plain PyTorch without it"),)


def check_rtx_builder() -> tuple[Finding, ...]:
    """The compiler of the default target: which one, and why not the others."""
    candidates = examine_tensorrt("tensorrt-rtx")
    remedy = "pip install 'sana-export[rtx-builder]' (Linux x86-64); until then: build --target onnxruntime"
    return (_builder_finding("TensorRT-RTX builder", candidates, remedy),)


def check_tensorrt() -> tuple[Finding, ...]:
    """The compiler of the target `tensorrt`, which belongs on the device itself."""
    remedy = "only needed for --target tensorrt, on the device that runs the plan (JetPack brings it)"
    return (_builder_finding("TensorRT", examine_tensorrt("tensorrt"), remedy),)


def _builder_finding(name: str, candidates: tuple[Candidate, ...], remedy: str) -> Finding:
    unused = [f"{candidate.name}: {candidate.reason}" for candidate in candidates if candidate.builder is None]
    chosen = [candidate.reason for candidate in candidates if candidate.builder is not None]
    if chosen:
        return Finding(name, "ok", "; not used: ".join(filter(None, (chosen[0], "; ".join(unused)))))
    return Finding(name, "warn", "; ".join(unused), remedy)


def check_gpus() -> tuple[Finding, ...]:
    """Every NVIDIA GPU that `nvidia-smi` lists, and what it can run."""
    command = ["nvidia-smi", f"--query-gpu={_SMI_QUERY}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except FileNotFoundError:
        return (_no_gpu("no nvidia-smi found"),)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (_no_gpu(f"nvidia-smi cannot be run: {error}"),)
    lines = run.stdout.strip().splitlines()
    if run.returncode != 0 or not lines:
        return (_no_gpu((lines or run.stderr.strip().splitlines() or ["nvidia-smi lists no GPU"])[-1]),)
    return tuple(_gpu_finding(line) for line in lines)


def _no_gpu(detail: str) -> Finding:
    remedy = "works without: build for tensorrt-rtx and onnxruntime, and generate with ONNX Runtime"
    return Finding("GPU", "warn", detail, remedy)


def _gpu_finding(line: str) -> Finding:
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(_SMI_QUERY.split(",")):
        return _no_gpu(f"nvidia-smi answered: {line}")
    name, capability, driver, free, total = values
    detail = f"{name}, compute capability {capability}, driver {driver}, {free} of {total} MiB free"
    if rtx_supports(_pair(capability)):
        return Finding("GPU", "ok", detail)
    remedy = "runs no TensorRT-RTX plan (needs 8.0, 8.6, 8.9 or 12.0 and later): use tensorrt or onnxruntime"
    return Finding("GPU", "warn", detail, remedy)


def _pair(capability: str) -> tuple[int, int]:
    major, minor = (*numbers(capability), 0, 0)[:2]
    return major, minor


def check_memory() -> tuple[Finding, ...]:
    """System memory."""
    found = system_memory()
    if found is None:
        return (Finding("system memory", "warn", "this system does not tell", ""),)
    free, total = (size / _GIB for size in found)
    detail = f"{free:.1f} of {total:.1f} GiB free"
    if free >= _ENOUGH_MEMORY_GIB:
        return (Finding("system memory", "ok", detail),)
    remedy = f"the released models in bf16 need about {_ENOUGH_MEMORY_GIB} GiB to build: close programs, add swap"
    return (Finding("system memory", "warn", detail, remedy),)


def check_disk() -> tuple[Finding, ...]:
    """Free space where bundles are written by default: the working directory."""
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free / _GIB
    detail = f"{free:.1f} GiB free in {folder}"
    if free >= _ENOUGH_DISK_GIB:
        return (Finding("disk", "ok", detail),)
    remedy = f"a bundle of a released model in bf16 needs about {_ENOUGH_DISK_GIB} GiB: choose another --output"
    return (Finding("disk", "warn", detail, remedy),)


def check_compiler() -> tuple[Finding, ...]:
    """The C compiler, which the RTX builder made of two wheels and Triton need once."""
    command = c_compiler()
    if command is not None:
        return (Finding("C compiler", "ok", " ".join(command)),)
    remedy = "install gcc or clang: the RTX builder of 'sana-export[rtx-builder]' and Triton need one"
    return (Finding("C compiler", "warn", "none found", remedy),)


def check_cxx_compiler() -> tuple[Finding, ...]:
    """The C++ compiler, which the target `inductor` needs while it builds."""
    try:
        return (Finding("C++ compiler", "ok", shlex.join(choose_cxx())),)
    except BuildError as error:
        remedy = "for the target inductor: install g++ with its libstdc++.so, or name another compiler in CXX"
        return (Finding("C++ compiler", "warn", str(error.received), remedy),)


def check_bundle(bundle: Path) -> tuple[Finding, ...]:
    """Whether the bundle is whole (sizes, not digests) and which of its targets this machine can run."""
    try:
        manifest = read_manifest(bundle)
        verify_files(bundle, manifest.files, digests=False)
    except SanaError as error:
        received = f" ({error.received})" if error.received is not None else ""
        return (Finding("bundle", "FAIL", f"{error.failed}{received}", error.action),)
    verdicts = examine_targets(manifest)
    runs = any(verdict.usable for verdict in verdicts)
    size = sum(entry.size for entry in manifest.files) >> 20
    detail = f"{manifest.model.source}, {manifest.width} x {manifest.height} px, {size} MiB, all files present"
    return (
        Finding("bundle", "ok", detail)
        if runs
        else Finding("bundle", "FAIL", "no target of it runs here", "rebuild with a --target that runs here"),
        *(
            Finding(f"target {verdict.target}", "ok" if verdict.usable else "warn", verdict.reason)
            for verdict in verdicts
        ),
    )
