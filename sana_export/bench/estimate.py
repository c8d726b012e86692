"""Times on GPUs that are not at hand: a roofline over every operation, with efficiencies fitted to measured rows.

An operation needs at least max(FLOP / rate, bytes / bandwidth) at a GPU's published peak rates. A kernel class c takes
s_c >= 1 times that (1 / s_c is its efficiency), and every operation a fixed gap: a stage takes
sum_c s_c x_c + g n, where x_c is the sum of its operations' bounds and n their number. The s_c and g are fitted to the
measured stages, each with the bounds of its GPU, minimising relative errors, and used unchanged for another GPU. That
they carry over is the assumption: what comes out is an estimate, and is called one everywhere it is shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations
from pathlib import Path

import msgspec
import numpy as np

from sana_export.bench.floors import PictureWork, Stage, Work
from sana_export.bench.rows import OURS, Case, Row, newest_rows
from sana_export.bench.run import picture_work
from sana_export.prompting import tokenizer_entry
from sana_export.weights.checkpoint import open_checkpoint
from sana_runtime.contract import PRECISIONS
from sana_runtime.errors import InputError

CLASSES = ("products, 16 bits and more", "products, 8 bits", "attention", "passes over activations", "gaps")
FITTED_STAGES = ("text_encoder", "step", "vae_decoder")
ROWS = Path(__file__).parents[2] / "benchmarks" / "results" / "end_to_end.csv"
_EIGHT_BITS = ("float8e4m3fn", "int8")
# The gap behind a kernel in a CUDA graph is about this long; its factor is fitted from 0 on.
_GAP_MS = 1e-3
Factors = tuple[float, ...]


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Published peak rates of one GPU, and where they are published. `device`: in the name its driver gives it; only
    where rows are measured on one.
    """

    name: str
    tflop_per_s: dict[str, float]
    gb_per_s: float
    source: str
    device: str | None = None


def published_gpus() -> dict[str, Gpu]:
    """The GPUs of gpus.yaml."""
    content = (files("sana_export.bench") / "gpus.yaml").read_bytes()
    return msgspec.yaml.decode(content, type=dict[str, Gpu])


def gpu_named(name: str) -> Gpu:
    """A GPU of gpus.yaml. Raises `InputError` for another name."""
    known = published_gpus()
    if name not in known:
        raise InputError(
            "no published rates of this GPU",
            received=name,
            expected=", ".join(known),
            action="choose one of these, or add its rates and their source to sana_export/bench/gpus.yaml",
        )
    return known[name]


def bounds(stage: Stage, gpu: Gpu) -> Factors:
    """Milliseconds that each class of a stage needs at least, and its gaps. Raises `InputError` for a missing dtype."""
    found = dict.fromkeys(CLASSES, 0.0)
    for work in stage.works:
        found[_class(work)] += _bound_ms(work, gpu)
        found["gaps"] += _GAP_MS
    return tuple(found.values())


def _class(work: Work) -> str:
    if work.kind in ("gemm", "convolution"):
        return CLASSES[1] if work.dtype in _EIGHT_BITS else CLASSES[0]
    return CLASSES[2] if work.kind == "attention" else CLASSES[3]


def _bound_ms(work: Work, gpu: Gpu) -> float:
    if work.dtype not in gpu.tflop_per_s:
        raise InputError(
            f"{gpu.name} has no products in {work.dtype}",
            received=work.name,
            expected=", ".join(gpu.tflop_per_s),
            action="choose another --precision for this GPU",
        )
    # What is not a product on tensor cores is bound by its bytes alone.
    rate = gpu.tflop_per_s[work.dtype] * 1e12
    arithmetic = work.flop / rate if work.kind in ("gemm", "convolution", "attention") else 0.0
    return max(arithmetic, work.bytes / (gpu.gb_per_s * 1e9)) * 1e3


@dataclass(frozen=True)
class Sample:
    """One measured stage: its bounds on the GPU it was measured on, and its time."""

    label: str
    bounds: Factors
    p50_ms: float


@dataclass(frozen=True)
class Fit:
    """`factors` by class, and how well they predict stages they were not fitted to (each left out in turn):
    `errors` are (predicted - measured) / measured, in the order of `samples`.
    """

    factors: Factors
    samples: tuple[Sample, ...]
    errors: tuple[float, ...]

    @property
    def description(self) -> str:
        """What the estimates rest on, in words."""
        if not self.samples:
            return "no measured rows: lower bounds at published rates, not estimates"
        size = np.abs(self.errors)
        return (
            f"estimates, fitted to {len(self.samples)} measured stages; left out in turn, a stage is predicted within "
            f"{np.median(size):.0%} (median) and {size.max():.0%} (worst)"
        )

    def predict_ms(self, stage: Stage, gpu: Gpu) -> float:
        """A stage's time on a GPU."""
        return float(np.dot(self.factors, bounds(stage, gpu)))


_LOWER_BOUND: Factors = (1.0, 1.0, 1.0, 1.0, 0.0)


def fit(samples: Sequence[Sample]) -> Fit:
    """Fit the factors; without samples they are those of the lower bound."""
    if not samples:
        return Fit(_LOWER_BOUND, (), ())
    errors = []
    for index, sample in enumerate(samples):
        others = [*samples[:index], *samples[index + 1 :]]
        factors = _fitted(others) if others else _LOWER_BOUND
        errors.append(float(np.dot(factors, sample.bounds)) / sample.p50_ms - 1)
    return Fit(_fitted(samples), tuple(samples), tuple(errors))


def _fitted(samples: Sequence[Sample]) -> Factors:
    """Least squares of relative errors over factors that are at least those of the lower bound.

    With s = lower + u the condition is u >= 0, and the optimum is the best of the unconstrained optima over the sets
    of classes that may leave zero: few enough to try them all.
    """
    weights = np.array([1 / sample.p50_ms for sample in samples])
    matrix = np.array([sample.bounds for sample in samples]) * weights[:, None]
    lower = np.array(_LOWER_BOUND)
    target = 1 - matrix @ lower
    best, best_error = np.zeros(len(CLASSES)), float(np.square(target).sum())
    for size in range(1, len(CLASSES) + 1):
        for chosen in combinations(range(len(CLASSES)), size):
            columns = list(chosen)
            solution = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
            if (solution < 0).any():
                continue
            error = float(np.square(target - matrix[:, columns] @ solution).sum())
            if error < best_error:
                best, best_error = np.zeros(len(CLASSES)), error
                best[columns] = solution
    return tuple(float(value) for value in lower + best)


def samples_of(rows: Sequence[Row], target: str) -> list[Sample]:
    """The stages of our engines on GPUs whose rates are known, each as it was measured last."""
    found, works = [], {}
    gpus = {gpu.device: gpu for gpu in published_gpus().values() if gpu.device}
    for row in newest_rows(rows):
        if row.subject != f"{OURS} {target}" or row.stage not in FITTED_STAGES or row.p50_ms is None:
            continue
        gpu = next((gpu for device, gpu in gpus.items() if device in row.device), None)
        if gpu is None:
            continue
        case = Case(row.model, row.precision, row.height, row.width, row.num_steps)
        if case not in works:
            works[case] = work_of(case)
        stage = works[case].stage(row.stage)
        assert stage is not None
        label = f"{gpu.device} {row.model} {row.precision} {row.width} px {row.stage}"
        found.append(Sample(label, bounds(stage, gpu), row.p50_ms))
    return found


def work_of(case: Case) -> PictureWork:
    """The work of a case by its model's name, with a shipped recipe where its precision is one."""
    checkpoint = open_checkpoint(case.model)
    content = checkpoint.tokenizer_json()
    tokens = tokenizer_entry(content, "tokenizer.json", checkpoint.pipeline_class).padded_length
    recipe = None if case.precision in PRECISIONS else case.precision
    return picture_work(checkpoint, case, caption_tokens=tokens, recipe=recipe)


def estimate(work: PictureWork, num_steps: int, gpu: Gpu, fitted: Fit) -> Mapping[str, float]:
    """Milliseconds of each stage and of the whole picture."""
    stages = {name: stage for name in FITTED_STAGES if (stage := work.stage(name)) is not None}
    times = {name: fitted.predict_ms(stage, gpu) for name, stage in stages.items()}
    times["total"] = sum(fitted.predict_ms(call, gpu) for call in work.calls(num_steps))
    return times
