"""What a measurement depends on, found without opening the GPU: the process that writes rows must not use it."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "onnxruntime-gpu", "onnxruntime", "torch-tensorrt")
# CUDA's device 0, which is what is measured: the first that this process may see. nvidia-smi sees all.
_FIRST_GPU = f"--id={os.environ.get('CUDA_VISIBLE_DEVICES', '').partition(',')[0].strip() or 0}"
_SMI_SECONDS = 20
_WRITTEN_BY_US = ("benchmarks/results", "README.md", "docs/images")


@dataclass(frozen=True)
class Machine:
    """`device` is the GPU's name, or the processor's; `versions` of what computes; `run` names one invocation."""

    device: str
    driver: str
    power_limit: str
    versions: str
    commit: str
    run: str

    @property
    def date(self) -> str:
        """The day of the run."""
        return self.run[:10]


def describe_machine(device: str, commit: str = "") -> Machine:
    """This machine; `device` "cuda" or "cpu". `commit` replaces what git says, where git cannot tell."""
    name, driver, limit = _gpu() if device == "cuda" else (_processor(), "", "")
    now = datetime.datetime.now(datetime.timezone.utc)
    return Machine(name, driver, limit, _versions(device), commit or _commit(), now.strftime("%Y-%m-%dT%H:%M:%SZ"))


def used_memory_mib() -> float:
    """Memory in use on the GPU before a measurement, in MiB; 0 where nvidia-smi does not tell."""
    line = _first_line(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", _FIRST_GPU])
    return float(line) if line.replace(".", "", 1).isdigit() else 0.0


def _gpu() -> tuple[str, str, str]:
    query = "--query-gpu=name,driver_version,power.limit"
    fields = _first_line(["nvidia-smi", query, "--format=csv,noheader", _FIRST_GPU]).split(", ")
    name, driver, limit, *_ = (*fields, "", "", "")
    return name or "unknown GPU", driver, limit


def _processor() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{cores} x {names[0] if names else platform.machine()}"


def _versions(device: str) -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        import torch

        found.append(f"CUDA {torch.version.cuda}")
    return "; ".join(found)


def _commit() -> str:
    head = _first_line(["git", "rev-parse", "--short", "HEAD"])
    if not head:
        return "unknown"
    # What measuring and rendering write themselves changes nothing that is measured.
    written = (f":(top,exclude){path}" for path in _WRITTEN_BY_US)
    changed = _first_line(["git", "status", "--porcelain", "--untracked-files=no", "--", ":(top)", *written])
    return f"{head}+uncommitted" if changed else head


def _first_line(command: list[str]) -> str:
    """Of a command's output; empty when it cannot be run or fails."""
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SMI_SECONDS, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip().partition("\n")[0] if run.returncode == 0 else ""
