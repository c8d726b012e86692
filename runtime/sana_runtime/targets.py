"""Which of a bundle's targets this machine can run, and why not the others."""

import importlib
import importlib.util
from dataclasses import dataclass

from sana_runtime.bundle import engine_entry, missing_engines
from sana_runtime.contract import COMPONENTS, DTYPE_OF_PRECISION, TargetName
from sana_runtime.engine import Backend
from sana_runtime.errors import TargetError
from sana_runtime.manifest import ComponentEntry, Manifest

TENSORRT_MODULES: dict[TargetName, str] = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_RTX_CAPABILITIES = ((8, 0), (8, 6), (8, 9))
_RTX_FIRST_BLACKWELL = (12, 0)
_CUDA_PROVIDER = "CUDAExecutionProvider"


@dataclass(frozen=True)
class TargetVerdict:
    """Whether this machine can run one target of a bundle, and the one-line reason."""

    target: TargetName
    usable: bool
    reason: str


def examine_targets(manifest: Manifest) -> tuple[TargetVerdict, ...]:
    """A verdict for every target of the bundle, in its order of preference. Loads no engine."""
    return tuple(_examine(target, manifest) for target in manifest.targets)


def choose_target(manifest: Manifest, requested: str | None = None) -> tuple[TargetVerdict, ...]:
    """Verdicts up to and including the chosen target, which is the last.

    Without `requested` the first usable target is chosen. Raises `TargetError` if there is none, or if the
    requested one is not in the bundle or cannot run here.
    """
    if requested is not None:
        return (_requested(manifest, requested),)
    verdicts = examine_targets(manifest)
    for position, verdict in enumerate(verdicts):
        if verdict.usable:
            return verdicts[: position + 1]
    raise TargetError(
        "this machine can run none of the bundle's targets",
        received="; ".join(f"{verdict.target}: {verdict.reason}" for verdict in verdicts) or "no target",
        expected="a machine that can run one of them",
        action="for any CPU: sana-export build MODEL --output DIR --target onnxruntime --precision fp32",
    )


def open_backend(target: TargetName, manifest: Manifest | None = None, *, threads: int = 0) -> Backend:
    """Open a usable target. `threads` applies to ONNX Runtime on the CPU; 0 lets it choose. `manifest` says for which
    device an `inductor` bundle was compiled; without it, for this machine's GPU if it has one.
    """
    if target == "inductor":
        from sana_runtime.inductor_engine import InductorBackend, machine_device

        device = engine_entry(manifest, "transformer", target).device if manifest else machine_device()
        return InductorBackend(device.partition(" ")[0])
    if target != "onnxruntime":
        from sana_runtime.tensorrt_engine import TensorRTBackend

        return TensorRTBackend(target)
    from sana_runtime.onnxruntime_engine import CPU_PROVIDER, CUDA_PROVIDER, OnnxRuntimeBackend

    return OnnxRuntimeBackend(CPU_PROVIDER if _onnxruntime_cuda_problem() else CUDA_PROVIDER, threads=threads)


def _requested(manifest: Manifest, requested: str) -> TargetVerdict:
    if requested not in manifest.targets:
        raise TargetError(
            f"the bundle has no target '{requested}'",
            received=requested,
            expected="one of " + ", ".join(manifest.targets),
            action=f"build one that has: sana-export build MODEL --output DIR --target {requested}",
        )
    verdict = _examine(next(target for target in manifest.targets if target == requested), manifest)
    if not verdict.usable:
        raise TargetError(
            f"target '{requested}' cannot run on this machine",
            received=verdict.reason,
            expected="a machine that can run it",
            action="remove the reason above, or leave --target away to use another target of the bundle",
        )
    return verdict


def _examine(target: TargetName, manifest: Manifest) -> TargetVerdict:
    if missing := missing_engines(manifest, target):
        return TargetVerdict(target, False, f"the bundle has no {target} engine of {', '.join(missing)}")
    if target == "inductor":
        return _examine_inductor(manifest)
    return _examine_onnxruntime(manifest) if target == "onnxruntime" else _examine_tensorrt(target)


def _examine_inductor(manifest: Manifest) -> TargetVerdict:
    from sana_runtime.inductor_engine import inductor_problem

    entries = [engine_entry(manifest, name, "inductor") for name in COMPONENTS]
    for entry in entries:
        if problem := inductor_problem(entry.device, entry.builder_version):
            return TargetVerdict("inductor", False, problem)
    return TargetVerdict("inductor", True, f"torch {entries[0].builder_version} on {entries[0].device}")


def _examine_tensorrt(target: TargetName) -> TargetVerdict:
    module = TENSORRT_MODULES[target]
    if importlib.util.find_spec(module) is None:
        reason = f"{module} is not installed: pip install 'sana-runtime[{target}]'"
        return TargetVerdict(target, False, reason)
    from sana_runtime.cuda import compute_capability, cuda_problem

    if problem := cuda_problem():
        return TargetVerdict(target, False, problem)
    capability = compute_capability()
    device = f"sm_{capability[0]}{capability[1]}"
    if target == "tensorrt-rtx" and not rtx_supports(capability):
        return TargetVerdict(target, False, f"TensorRT-RTX does not support this GPU ({device})")
    try:
        version = importlib.import_module(module).__version__
    except Exception as error:  # placeholders and missing libraries raise whatever they like
        return TargetVerdict(target, False, f"{module} cannot be imported: {error}")
    return TargetVerdict(target, True, f"{module} {version} on {device}")


def rtx_supports(capability: tuple[int, int]) -> bool:
    """TensorRT-RTX runs on compute capability 8.0, 8.6, 8.9 and from 12.0 on."""
    return capability in _RTX_CAPABILITIES or capability >= _RTX_FIRST_BLACKWELL


def _examine_onnxruntime(manifest: Manifest) -> TargetVerdict:
    if importlib.util.find_spec("onnxruntime") is None:
        reason = "onnxruntime is not installed: pip install 'sana-runtime[onnxruntime]'"
        return TargetVerdict("onnxruntime", False, reason)
    problem = _onnxruntime_cuda_problem()
    low = [entry.name for entry in manifest.components if _dtype(entry) == "bfloat16"]
    if low and manifest.quantization is not None:
        return TargetVerdict(
            "onnxruntime",
            False,
            f"{', '.join(low)}: bfloat16 beside quantised layers, for which ONNX Runtime has no QuantizeLinear; "
            "a bundle built with --base-precision fp32 runs",
        )
    if problem is None:
        return TargetVerdict("onnxruntime", True, "ONNX Runtime runs it through CUDA")
    if low:
        return TargetVerdict(
            "onnxruntime",
            False,
            f"{', '.join(low)} compute in bfloat16, which ONNX Runtime implements on CUDA only ({problem}); "
            "an fp32 bundle runs on the CPU",
        )
    return TargetVerdict("onnxruntime", True, f"ONNX Runtime runs it on the CPU ({problem})")


def _dtype(component: ComponentEntry) -> str:
    return DTYPE_OF_PRECISION.get(component.dtype, component.dtype)


def _onnxruntime_cuda_problem() -> str | None:
    """Why ONNX Runtime cannot use CUDA here, or None if it can."""
    import onnxruntime

    if _CUDA_PROVIDER not in onnxruntime.get_available_providers():
        return "this onnxruntime has no CUDA provider"
    from sana_runtime.cuda import cuda_problem

    return cuda_problem()
