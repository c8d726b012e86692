"""Parity before any time: the bundle against the PyTorch reference in fp32, both on the device that is measured."""

import functools
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from sana_export.bench.child import Emit, describe
from sana_export.bench.subjects import Failed, Judged, Subject
from sana_export.calibration_run import Array, Arrays, DenoisingRun
from sana_export.components import loaded_module
from sana_export.parity import tolerance
from sana_export.parity.judge import judged_gate
from sana_export.parity.ladder import EngineCandidate, LadderResult, check_components, check_same_weights, climb
from sana_export.parity.metrics import measure
from sana_export.reference import dc_ae, transformer
from sana_export.weights.checkpoint import Checkpoint, open_checkpoint
from sana_kernels.linear_attention import linear_attention
from sana_runtime.contract import DTYPE_OF_PRECISION, ComponentName
from sana_runtime.engine import Backend, HostMemory
from sana_runtime.errors import SanaError
from sana_runtime.manifest import Manifest, read_manifest
from sana_runtime.pipeline import Pipeline
from sana_runtime.targets import choose_target, open_backend

_PROMPT = "a red circle"
_STEPS = 2
_DTYPES = {*DTYPE_OF_PRECISION.values()}


def judge_bundle(subject: Subject, emit: Emit) -> None:
    """Report `Judged`, or a red `Failed` when the engines do not compute what the reference computes."""
    manifest = read_manifest(Path(subject.bundle))
    target = choose_target(manifest, subject.target)[-1].target
    backend = open_backend(target, manifest)
    device = _device(backend)
    description = backend.description
    del backend
    checkpoint = open_checkpoint(subject.source, variant=subject.variant, base=subject.base)
    try:
        result = _climbed(subject, manifest, checkpoint, target, device)
        verdict = _verdict(manifest, result, checkpoint)
    except SanaError as error:
        emit(Failed("parity", describe(error), red=True))
        return
    if verdict.startswith("missed"):
        emit(Failed("parity", f"the quantised bundle misses its gate: {verdict}", red=True))
    else:
        emit(Judged(device, description, target, verdict))


def _climbed(subject: Subject, manifest: Manifest, checkpoint: Checkpoint, target: str, device: str) -> LadderResult:
    check_same_weights(manifest, checkpoint)
    # TF32 would make the reference less exact than what it judges.
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with TemporaryDirectory() as folder, exact, _specified_attention():
        run = _RunOn(
            checkpoint,
            (_PROMPT,),
            0,
            _STEPS,
            manifest.height,
            manifest.width,
            Path(folder),
            modules_device=device,
        )
        candidate = _LateEngines(subject.bundle, target, run)
        (result,) = climb(run, candidate, lambda _: None)
        if target == "inductor":
            _check_loop(candidate.pipeline, run, checkpoint)
    return result


def _device(backend: Backend) -> str:
    """Where a backend computes: "cpu" or "cuda"."""
    if isinstance(backend.memory, HostMemory):
        return "cpu"
    # Memory of PyTorch names its device; the other kinds are of CUDA alone.
    return str(getattr(getattr(backend.memory, "device", None), "type", "cuda"))


def _check_loop(pipeline: Pipeline, run: DenoisingRun, checkpoint: Checkpoint) -> None:
    """The ladder watches every step, so an engine that runs the loop as a whole was judged step by step: what is timed
    must paint the same. Raises `ParityError`.
    """
    watched, whole = (
        pipeline.generate(_PROMPT, seed=run.seed, num_steps=_STEPS, on_step=on_step).pixels
        for on_step in (lambda _: None, None)
    )
    row = measure("whole loop", "image", whole, watched)
    dtype = pipeline.manifest.component("transformer").dtype
    # Other kernels may be chosen, so roundings may differ: those of all blocks of all steps.
    tolerance.check(
        row, dtype if dtype in _DTYPES else "bfloat16", _STEPS * checkpoint.transformer_config["num_layers"]
    )


@contextmanager
def _specified_attention() -> Iterator[None]:
    """Let the reference run the specification of linear attention, not the kernels that engines share with its op."""
    specified: Any = functools.partial(linear_attention, impl="reference")
    modules: tuple[Any, ...] = (dc_ae, transformer)
    before = [module.linear_attention for module in modules]
    for module in modules:
        module.linear_attention = specified
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.linear_attention = function


def _verdict(manifest: Manifest, result: LadderResult, checkpoint: Checkpoint) -> str:
    gate = judged_gate(manifest, result)
    rows = ", ".join(f"{row.stage} {row.relative_rms:.1e}" for row in result.components)
    if gate is None:
        check_components((result,), manifest, checkpoint)
        return f"relative RMS within the rounding of the dtype: {rows}"
    missed = "" if gate.passed else f"; relative RMS of single calls: {rows}"
    return (
        f"{'passed' if gate.passed else 'missed'}: x0 SQNR {gate.x0_sqnr_db:.1f} dB (at least "
        f"{gate.min_x0_sqnr_db:g}), PSNR {gate.psnr_db:.1f} dB (at least {gate.min_psnr_db:g}), SSIM "
        f"{gate.ssim:.3f} (at least {gate.min_ssim:g}), {_STEPS} steps{missed}"
    )


@dataclass(frozen=True)
class _RunOn(DenoisingRun):
    """A run whose modules lie on `modules_device` while everything around them stays on the host."""

    modules_device: str = "cpu"

    @contextmanager
    def module(self, name: ComponentName) -> Iterator[nn.Module]:
        """A component with its weights on the device, freed afterwards."""
        module = loaded_module(self.plans[name], self.checkpoint, self.modules_device)
        with torch.inference_mode():
            yield _HostInputs(module, self.modules_device)
        del module
        _free()


class _HostInputs(nn.Module):
    """Calls a module on its device with tensors of the host, and brings the results back."""

    def __init__(self, module: nn.Module, device: str) -> None:
        super().__init__()
        self.module, self.device = module, device

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        outputs = self.module(
            *(tensor.to(self.device) for tensor in args),
            **{name: tensor.to(self.device) for name, tensor in kwargs.items()},
        )
        return tuple(tensor.cpu() for tensor in outputs) if isinstance(outputs, tuple) else outputs.cpu()


class _LateEngines:
    """A bundle that is loaded when the reference is done: at 4096 pixels both do not fit one GPU."""

    def __init__(self, bundle: str, target: str, run: DenoisingRun) -> None:
        self._bundle, self._target, self._run = bundle, target, run

    @cached_property
    def pipeline(self) -> Pipeline:
        """The loaded bundle."""
        _free()
        return Pipeline.load(self._bundle, self._target, report=lambda _: None)

    @cached_property
    def _engines(self) -> EngineCandidate:
        return EngineCandidate(self.pipeline, self._run)

    def component(self, name: ComponentName) -> AbstractContextManager[None]:
        """All engines are loaded at the first call."""
        return self._engines.component(name)

    def captions(self) -> list[Arrays]:
        """See `Candidate`."""
        return self._engines.captions()

    def step(self, **feed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Candidate`."""
        return self._engines.step(**feed)

    def decode(self, latent: torch.Tensor) -> Array:
        """See `Candidate`."""
        return self._engines.decode(latent)

    def paint(self, index: int, captions: Arrays) -> list[Array]:
        """See `Candidate`."""
        return self._engines.paint(index, captions)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
