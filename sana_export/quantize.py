"""What a quantised build adds: the recipe's verdict on every layer, the calibration, the report and the gate."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec
import torch

from sana_calibration.layers import exclusions_of, layers_of
from sana_calibration.prompts import load_prompts
from sana_calibration.recipe import load_recipe
from sana_calibration.rules import ALPHAS, Gate, LayerRule, Recipe
from sana_calibration.scales import LayerScales, Scales
from sana_calibration.sensitivity import block_groups
from sana_export.build_request import BuildRequest
from sana_export.calibration_run import DenoisingRun, calibrate, rules_of
from sana_export.components import ComponentPlan, parameters_on_meta
from sana_export.graph.passes.insert_qdq import Quantization, QuantizationReport
from sana_export.parity.ladder import FakeQuantizedCandidate, LadderResult, climb
from sana_export.weights.checkpoint import Checkpoint
from sana_runtime.contract import DTYPE_OF_PRECISION, ComponentName, PrecisionName, TargetName
from sana_runtime.errors import TargetError
from sana_runtime.manifest import GateEntry

# A channel that no prompt excites is clipped.
_PROMPTS = 8
# Weights that are rounded for the inputs of few pictures suit others less: nano with 8 paints one of the gate's two
# pictures as another one, with 24 both are right.
_PROMPTS_TO_ROUND = 24
# The gate paints this many of the calibration's prompts twice.
GATE_PROMPTS = 2
# Room for activations and for the GPU library's own: those of a decoder at the default calibration side, twice.
_ACTIVATION_BYTES = 4 << 30
_PRECISION_OF_DTYPE: dict[str, PrecisionName] = {dtype: name for name, dtype in DTYPE_OF_PRECISION.items()}  # type: ignore[misc]


@dataclass(frozen=True)
class QuantizedBuild:
    """A request's recipe, with what it says of every layer of every component.

    `largest_component`: how many parameters that has.
    """

    recipe: Recipe
    prompts: tuple[str, ...]
    rules: Mapping[ComponentName, Mapping[str, LayerRule]]
    exclusions: Mapping[ComponentName, Mapping[str, str]]
    largest_component: int

    @property
    def needs_calibration(self) -> bool:
        """Whether any layer's inputs must be seen."""
        return any(rule.calibrated for rules in self.rules.values() for rule in rules.values())

    def quantization(self, component: ComponentName, scales: Scales | None) -> Quantization:
        """What the graph pass needs for one component."""
        return Quantization(self.rules[component], scales.component(component) if scales else {})


def recipe_of(request: BuildRequest) -> Recipe | None:
    """The recipe of a quantised request, with the base precision asked for; None for fp32, bf16 and fp16.

    Raises `TargetError` where a target cannot compute what the recipe asks for.
    """
    name = request.recipe_name
    if name is None:
        return None
    recipe = load_recipe(name)
    if request.base_precision is not None:
        recipe = replace(recipe, base_dtype=DTYPE_OF_PRECISION[request.base_precision])  # type: ignore[arg-type]
    for target in request.targets:
        _check_target(recipe, target)
    return recipe


def base_precision(recipe: Recipe) -> PrecisionName:
    """The precision of what a recipe does not quantise."""
    return _PRECISION_OF_DTYPE[recipe.base_dtype]


def calibration_prompts(checkpoint: Checkpoint, wanted: Path | None, on_note: Callable[[str], None]) -> tuple[str, ...]:
    """The prompts of the file `wanted`; without one those that come with the model, which is said, or the shipped list.

    A model that knows few words shows the activations of its own pictures on prompts it understands only. Raises
    `InputError` for a file without prompts.
    """
    own = checkpoint.calibration_prompts() if wanted is None else None
    if own is not None:
        on_note(f"calibration prompts: the model's own, {own.name}")
    return load_prompts(wanted or own)


def prepare(
    recipe: Recipe, request: BuildRequest, plans: tuple[ComponentPlan, ...], prompts: tuple[str, ...]
) -> QuantizedBuild:
    """Resolve the recipe on the components to build, to be calibrated with the first of `prompts`.

    Raises `InputError` for a recipe that does not fit the components.
    """
    exclusions: dict[ComponentName, Mapping[str, str]] = {}
    largest = 0
    for plan in plans:
        with parameters_on_meta():
            module = plan.make()
        exclusions[plan.name] = exclusions_of(recipe, plan.name, layers_of(module, plan.prefix))
        largest = max(largest, sum(parameter.numel() for parameter in module.parameters()))
    rules = {plan.name: rules_of(recipe, plan) for plan in plans}
    rounded = any(rule.rounding != "nearest" for found in rules.values() for rule in found.values())
    wanted = request.calibration.num_prompts or (_PROMPTS_TO_ROUND if rounded else _PROMPTS)
    return QuantizedBuild(recipe, prompts[:wanted], rules, exclusions, largest)


def calibration_device(build: QuantizedBuild) -> str:
    """The GPU, "cuda", if it has room for the largest component in fp32 and its activations, or "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    free_bytes, _ = torch.cuda.mem_get_info()
    return "cuda" if free_bytes >= 4 * build.largest_component + _ACTIVATION_BYTES else "cpu"


def run_calibration(
    checkpoint: Checkpoint,
    build: QuantizedBuild,
    request: BuildRequest,
    work_folder: Path,
    on_progress: Callable[[float, str], None],
    device: str,
) -> Scales:
    """Calibrate at the request's size, reduced to its calibration side, or read the cache it names."""
    height, width = calibration_size(request)
    return calibrate(
        checkpoint,
        build.recipe,
        build.prompts,
        seed=request.calibration.seed,
        num_steps=request.calibration.num_steps,
        height=height,
        width=width,
        work_folder=work_folder,
        on_progress=on_progress,
        device=device,
    )


def calibration_size(request: BuildRequest) -> tuple[int, int]:
    """The picture's size in pixels, scaled down until no side is longer than the calibration side; multiples of 32."""
    longest = max(request.height, request.width)
    factor = min(1.0, request.calibration.side / longest)
    return tuple(max(32, round(side * factor / 32) * 32) for side in (request.height, request.width))  # type: ignore[return-value]


def run_gate(
    checkpoint: Checkpoint,
    build: QuantizedBuild,
    scales: Scales | None,
    request: BuildRequest,
    work_folder: Path,
    on_progress: Callable[[str], None],
) -> tuple[GateEntry, tuple[LadderResult, ...]]:
    """Paint a few prompts with the fake-quantised modules and with the unquantised ones, from the same noise."""
    height, width = calibration_size(request)
    settings = request.calibration
    prompts = build.prompts[:GATE_PROMPTS]
    run = DenoisingRun(checkpoint, prompts, settings.seed, settings.num_steps, height, width, work_folder)
    candidate = FakeQuantizedCandidate(run, {name: build.quantization(name, scales) for name in build.rules})
    results = climb(run, candidate, on_progress)
    return gate_entry(build.recipe.gate, results, settings.num_steps), results


def gate_entry(gate: Gate, results: tuple[LadderResult, ...], num_steps: int) -> GateEntry:
    """The worst figures over all prompts, and whether they pass. Infinite figures (equal pictures) become 999 dB."""
    sqnr = min(result.min_x0_sqnr_db for result in results)
    psnr = min(result.picture.psnr_db for result in results)
    similarity = min(result.ssim for result in results)
    passed = sqnr >= gate.min_x0_sqnr_db and psnr >= gate.min_psnr_db and similarity >= gate.min_ssim
    return GateEntry(
        passed=passed,
        x0_sqnr_db=round(_finite(sqnr), 2),
        psnr_db=round(_finite(psnr), 2),
        ssim=round(similarity, 4),
        **asdict(gate),
        prompts=len(results),
        num_steps=num_steps,
    )


def gate_file(entry: GateEntry, results: tuple[LadderResult, ...]) -> bytes:
    """The JSON file of the verdict and what it comes from: SQNR in dB of x0 and velocity at every step."""
    steps = [
        {
            "prompt": result.prompt,
            "x0_sqnr_db": [round(_finite(row.sqnr_db), 2) for row in result.x0],
            "velocity_sqnr_db": [round(_finite(row.sqnr_db), 2) for row in result.velocity],
        }
        for result in results
    ]
    return msgspec.json.format(msgspec.json.encode({"gate": entry, "steps": steps}), indent=2) + b"\n"


def component_report(
    build: QuantizedBuild, component: ComponentName, report: QuantizationReport, scales: Scales | None
) -> bytes:
    """The JSON file that says of every layer what was quantised, what was not, and why."""
    found = scales.component(component) if scales else {}
    rules = build.rules[component]
    content: dict[str, Any] = {
        "recipe": build.recipe.name,
        "quantized_flops_fraction": report.quantized_fraction,
        "weight_bytes": {"before": report.weight_bytes, "after": report.stored_bytes},
        "layers": [
            {**asdict(layer), **_calibrated(rules[layer.layer], found.get(layer.layer))} for layer in report.layers
        ],
        "excluded": [{"layer": name, "reason": reason} for name, reason in build.exclusions[component].items()],
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def _calibrated(rule: LayerRule, scales: LayerScales | None) -> dict[str, Any]:
    """What calibration chose for a layer, and where it searched for alpha, what each candidate would have cost."""
    row: dict[str, Any] = {"activation_amax": scales.activation_amax if scales else None, "rounding": rule.rounding}
    if scales and scales.alpha_errors is not None:
        labels = ["none", *(f"{alpha:g}" for alpha in rule.smoothing_candidates or ALPHAS)]
        errors = dict(zip(labels, (float(f"{error:.4g}") for error in scales.alpha_errors), strict=True))
        row |= {"smoothing_alpha": scales.smoothing_alpha, "relative_rms_by_alpha": errors}
    return row


def alpha_summary(scales: Mapping[str, LayerScales]) -> list[str]:
    """One line per place in the block: which alphas its layers took. Empty where nothing was searched."""
    searched = [name for name, found in scales.items() if found.alpha_errors is not None]
    lines = []
    for place, names in block_groups(searched).items():
        taken = Counter(scales[name].smoothing_alpha for name in names)
        parts = (
            f"{'no smoothing' if alpha is None else f'{alpha:g}'} x {count}"
            for alpha, count in sorted(taken.items(), key=lambda item: -1 if item[0] is None else item[0])
        )
        lines.append(f"{place}: {', '.join(parts)}")
    return lines


def _check_target(recipe: Recipe, target: TargetName) -> None:
    if target == "tensorrt-rtx" and any(rule.activation_dtype == "int8" for rule in recipe.rules):
        raise TargetError(
            f"target 'tensorrt-rtx' has no kernels for INT8 activations, which recipe '{recipe.name}' asks for",
            received=f"--precision {recipe.name} --target tensorrt-rtx",
            expected="FP8 activations, or INT8 or INT4 weights only",
            action="--precision fp8 (RTX 40 and later), --precision int8-weight-only, or another --target",
        )
    if target == "onnxruntime" and recipe.base_dtype == "bfloat16":
        raise TargetError(
            f"target 'onnxruntime' has no QuantizeLinear of bf16, in which recipe '{recipe.name}' leaves the rest",
            received=f"--precision {recipe.name} --target onnxruntime",
            expected="fp32 beside what is quantised",
            action="add --base-precision fp32, and build other targets into a bundle of their own",
        )


def _finite(value: float) -> float:
    return value if isfinite(value) else 999.0
