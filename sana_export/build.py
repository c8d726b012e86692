"""From a checkpoint to a bundle."""

import importlib.metadata
import shutil

from sana_export import __version__
from sana_export.build_request import BuildRequest
from sana_export.bundle import open_source, open_staging
from sana_export.components import ComponentPlan, plan_components
from sana_export.inductor.workers import Workers
from sana_export.prompting import scheduler_entry
from sana_export.quantize import base_precision, calibration_prompts, prepare, recipe_of
from sana_export.stages import EXPORTER_PACKAGES, TENSORRT_TARGETS, Reporter, Stages
from sana_export.weights.checkpoint import open_checkpoint
from sana_runtime.contract import DTYPE_OF_PRECISION, PrecisionName, TargetName
from sana_runtime.errors import BuildError
from sana_runtime.files import full_disk_is_an_error
from sana_runtime.manifest import (
    SCHEMA_VERSION,
    ComponentEntry,
    Manifest,
    ModelEntry,
    QuantizationEntry,
    TokenizerEntry,
)
from sana_runtime.tensorrt_library import TensorrtLibrary, find_tensorrt


def build(request: BuildRequest, reporter: Reporter) -> Manifest:
    """Build, or rebuild what changed, and put the bundle at `request.output`.

    Raises `SanaError` for every mistake and failure; then the output is as it was before, and finished stages are kept
    for the next run. Returns the manifest of the bundle.
    """
    sources = tuple(open_source(bundle) for bundle in request.reuse)
    recipe = recipe_of(request)
    precision: PrecisionName = base_precision(recipe) if recipe else request.precision  # type: ignore[assignment]
    libraries: dict[TargetName, TensorrtLibrary] = {
        target: find_tensorrt(target) for target in request.targets if target in TENSORRT_TARGETS
    }
    checkpoint = open_checkpoint(request.model, variant=request.variant, base=request.base)
    with (
        full_disk_is_an_error(request.output),
        open_staging(request.output, sources) as staging,
        Workers(request.jobs, staging.folder / "inductor.work") as workers,
    ):
        stages = Stages(request, reporter, checkpoint, libraries, staging, workers)
        tokenizer = stages.tokenizer()
        plans = plan_components(checkpoint, precision, request.height, request.width, tokenizer.padded_length)
        stages.plans = plans = tuple(plan for plan in plans if plan.name in request.components)
        _check_space(stages, plans)
        if recipe:
            prompts = calibration_prompts(checkpoint, request.calibration.prompts, reporter.note)
            stages.quantized = prepare(recipe, request, plans, prompts)
            stages.calibration()
        if request.plugin and libraries:
            stages.plugins(plans)
        entries = tuple(stages.component(plan) for plan in plans)
        quantization = stages.quantization_entry(stages.gate()) if recipe else None
        staging.keep_only(set(stages.done))
        manifest = _manifest(stages, tokenizer, entries, quantization)
        staging.commit(manifest)
    return manifest.sealed()


def _manifest(
    stages: Stages,
    tokenizer: TokenizerEntry,
    entries: tuple[ComponentEntry, ...],
    quantization: QuantizationEntry | None,
) -> Manifest:
    checkpoint, request = stages.checkpoint, stages.request
    packages = (*EXPORTER_PACKAGES, "diffusers", "onnx")
    return Manifest(
        schema_version=SCHEMA_VERSION,
        digest="",
        model=ModelEntry(
            checkpoint.source,
            checkpoint.architecture,
            checkpoint.variant,
            checkpoint.guidance,
            checkpoint.attention_clip,
        ),
        height=request.height,
        width=request.width,
        targets=request.targets,
        components=entries,
        scheduler=scheduler_entry(checkpoint),
        tokenizer=tokenizer,
        files=stages.staging.files(),
        created_with={"sana-export": __version__, **{name: importlib.metadata.version(name) for name in packages}},
        notes=(*(f"{entry.name}: {entry.dtype_reason}" for entry in entries if entry.dtype_reason), *stages.notes),
        quantization=quantization,
    )


def _check_space(stages: Stages, plans: tuple[ComponentPlan, ...]) -> None:
    """Refuse before hours of work: each component is written once as ONNX, if that is needed, and once per compiled
    target.
    """
    targets = stages.request.targets
    copies = len(stages.libraries) + ("inductor" in targets) + any(target != "inductor" for target in targets)
    needed = 0
    for plan in plans:
        width = 4 if plan.dtype == DTYPE_OF_PRECISION["fp32"] else 2
        parameters = sum(tensor.count for tensor in stages.checkpoint.weights(plan.name).values())
        present = sum(path.stat().st_size for path in (stages.staging.folder / plan.name).glob("*") if path.is_file())
        needed += max(0, parameters * width * copies - present)
    free = shutil.disk_usage(stages.staging.folder).free
    if needed > free:
        raise BuildError(
            f"not enough space for the bundle in {stages.request.output.parent}",
            received=f"{free >> 20} MiB free",
            expected=f"about {needed >> 20} MiB",
            action="free space or choose another --output",
        )
