"""From a checkpoint to a bundle: the stages, what each depends on, and what is reused."""

import hashlib
import importlib.metadata
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
import onnx

import sana_kernels
from sana_export import __version__
from sana_export.build_request import BuildRequest
from sana_export.bundle import StageRecord, Staging, open_staging
from sana_export.components import ComponentPlan, empty_module, plan_components
from sana_export.graph.export import WEIGHTS_FILE, export_component
from sana_export.graph.opset import OPSET
from sana_export.peak_memory import PeakMemory
from sana_export.prompting import scheduler_entry, tokenizer_entry
from sana_export.weights.checkpoint import Checkpoint, open_checkpoint
from sana_runtime.contract import TargetName
from sana_runtime.errors import BuildError
from sana_runtime.files import no_space_or, whole_file
from sana_runtime.manifest import (
    SCHEMA_VERSION,
    ComponentEntry,
    EngineEntry,
    Manifest,
    ModelEntry,
    TokenizerEntry,
)
from sana_runtime.plan_builder import PlanProgress, build_plan
from sana_runtime.tensorrt_library import TensorrtLibrary, find_tensorrt

_TOKENIZER_STAGE = "tokenizer"
# The packages whose code decides what an exported graph looks like.
_EXPORTER_PACKAGES = ("torch", "onnxscript", "onnx-ir", "transformers")


class Reporter(Protocol):
    """Who hears of a build's progress."""

    def stage_started(self, stage: str, reason: str) -> None: ...
    def stage_progress(self, stage: str, fraction: float, detail: str) -> None: ...
    def stage_finished(self, stage: str, record: StageRecord) -> None: ...
    def stage_reused(self, stage: str, record: StageRecord, reason: str) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class _Build:
    """One run: the request, what it opened, and what it has done."""

    request: BuildRequest
    reporter: Reporter
    checkpoint: Checkpoint
    libraries: Mapping[TargetName, TensorrtLibrary]
    staging: Staging
    stages: dict[str, StageRecord] = field(default_factory=dict)

    def stage(
        self,
        name: str,
        inputs: Mapping[str, str],
        make: Callable[[], tuple[list[Path], dict[str, float | int | str]]],
    ) -> StageRecord:
        """Reuse the stage or run `make`, which returns the files it wrote and what it measured."""
        reuse = self.staging.reusable(name, inputs)
        if reuse.record is not None:
            self.reporter.stage_reused(name, reuse.record, reuse.reason)
            self.stages[name] = reuse.record
            return reuse.record
        self.reporter.stage_started(name, reuse.reason)
        started, memory = time.monotonic(), PeakMemory()
        files, measured = make()
        measured = {
            "seconds": round(time.monotonic() - started, 2),
            "peak_memory_mib": memory.mib(),
            **measured,
        }
        record = self.staging.finish(name, inputs, files, measured)
        self.stages[name] = record
        self.reporter.stage_finished(name, record)
        return record


def build(request: BuildRequest, reporter: Reporter) -> Manifest:
    """Build, or rebuild what changed, and put the bundle at `request.output`.

    Raises `SanaError` for every mistake and failure; then the output is as it was before, and finished stages are
    kept for the next run. Returns the manifest of the bundle.
    """
    libraries: dict[TargetName, TensorrtLibrary] = {
        target: find_tensorrt(target) for target in request.targets if target != "onnxruntime"
    }
    checkpoint = open_checkpoint(request.model, variant=request.variant, base=request.base)
    with _full_disk_is_an_error(request.output), open_staging(request.output) as staging:
        run = _Build(request, reporter, checkpoint, libraries, staging)
        tokenizer = _tokenizer_stage(run)
        plans = plan_components(checkpoint, request.precision, request.height, request.width, tokenizer.padded_length)
        plans = tuple(plan for plan in plans if plan.name in request.components)
        _check_space(run, plans)
        entries = tuple(_component_stages(run, plan) for plan in plans)
        staging.keep_only(set(run.stages))
        manifest = _manifest(run, tokenizer, entries)
        staging.commit(manifest)
    return manifest.sealed()


def _tokenizer_stage(run: _Build) -> TokenizerEntry:
    content = run.checkpoint.tokenizer_json()
    path = run.staging.folder / "tokenizer" / "tokenizer.json"

    def make() -> tuple[list[Path], dict[str, float | int | str]]:
        with whole_file(path) as temporary:
            temporary.write_bytes(content)
        return [path], {}

    run.stage(_TOKENIZER_STAGE, {"tokenizer": hashlib.sha256(content).hexdigest()}, make)
    return tokenizer_entry(content, "tokenizer/tokenizer.json", run.checkpoint.pipeline_class)


def _component_stages(run: _Build, plan: ComponentPlan) -> ComponentEntry:
    if plan.dtype_reason:
        run.reporter.note(f"{plan.name}: {plan.dtype_reason}")
    stage = f"{plan.name}/onnx"
    digest = run.checkpoint.digest(plan.name, lambda count: run.reporter.stage_progress(stage, 0.0, "hashing weights"))
    graph = run.stage(stage, _graph_inputs(run, plan, digest), lambda: _export(run, plan))
    engines = tuple(_engine(run, plan, graph, target) for target in run.request.targets)
    return ComponentEntry(plan.name, plan.dtype, plan.dtype_reason, digest, plan.inputs, plan.outputs, engines)


def _graph_inputs(run: _Build, plan: ComponentPlan, digest: str) -> dict[str, str]:
    component = "vae" if plan.name == "vae_decoder" else plan.name
    configuration = msgspec.json.encode(run.checkpoint.config(component), order="sorted")
    size = {} if plan.name == "text_encoder" else {"height x width": f"{run.request.height} x {run.request.width}"}
    return {
        "weights": digest,
        "configuration": hashlib.sha256(configuration).hexdigest(),
        "dtype": plan.dtype,
        **size,
        "I/O": hashlib.sha256(msgspec.json.encode((plan.inputs, plan.outputs))).hexdigest(),
        "attention_clip": str(run.checkpoint.attention_clip),
        "opset": str(OPSET),
        "exporter code": _code_digest(),
        **{package: importlib.metadata.version(package) for package in _EXPORTER_PACKAGES},
    }


def _code_digest() -> str:
    """Digest of our modules that decide what a graph computes."""
    own = Path(__file__).parent
    folders = (own / "reference", own / "graph", Path(sana_kernels.__file__).parent)
    digest = hashlib.sha256((own / "components.py").read_bytes())
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _export(run: _Build, plan: ComponentPlan) -> tuple[list[Path], dict[str, float | int | str]]:
    folder = run.staging.folder / plan.name
    partial = folder / "export.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stage = f"{plan.name}/onnx"
    run.reporter.stage_progress(stage, 0.0, "tracing")
    report = export_component(
        empty_module(plan),
        run.checkpoint.weights(plan.name),
        plan.prefix,
        plan.inputs,
        plan.outputs,
        partial / "model.onnx",
        lambda done, total: run.reporter.stage_progress(stage, done / total, f"weights {done}/{total}"),
    )
    onnx.checker.check_model(str(partial / "model.onnx"))
    files = [folder / name for name in ("model.onnx", WEIGHTS_FILE)]
    for file in files:
        with whole_file(file) as temporary:
            (partial / file.name).rename(temporary)
    partial.rmdir()
    passes = ", ".join(f"{name} {count}" for name, count in report.passes.items())
    return files, {"nodes": report.nodes, "weight_bytes": report.weight_bytes, "passes": passes}


def _engine(run: _Build, plan: ComponentPlan, graph: StageRecord, target: TargetName) -> EngineEntry:
    if target == "onnxruntime":
        version = importlib.metadata.version("onnxruntime")
        return EngineEntry(target, tuple(entry.path for entry in graph.files), "ONNX Runtime", version)
    library = run.libraries[target]
    path = run.staging.folder / plan.name / f"{target}.plan"
    stage = f"{plan.name}/{target}"

    def make() -> tuple[list[Path], dict[str, float | int | str]]:
        def show(progress: PlanProgress) -> None:
            run.reporter.stage_progress(stage, progress.fraction, progress.phase)

        result = build_plan(run.staging.folder / graph.files[0].path, path, target, on_progress=show)
        return [path], {
            "peak_memory_mib": result.peak_memory_mib,
            "plan_bytes": result.size,
            "layers": result.layers,
        }

    run.stage(
        stage,
        {
            **{entry.path: entry.sha256 for entry in graph.files},
            "builder": library.builder_name,
            "builder version": library.library_version,
        },
        make,
    )
    return EngineEntry(target, (f"{plan.name}/{target}.plan",), library.builder_name, library.library_version)


def _manifest(run: _Build, tokenizer: TokenizerEntry, entries: tuple[ComponentEntry, ...]) -> Manifest:
    checkpoint, request = run.checkpoint, run.request
    versions = {"sana-export": __version__}
    versions |= {name: importlib.metadata.version(name) for name in (*_EXPORTER_PACKAGES, "diffusers", "onnx")}
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
        files=run.staging.files(),
        created_with=versions,
        notes=tuple(f"{entry.name}: {entry.dtype_reason}" for entry in entries if entry.dtype_reason),
    )


def _check_space(run: _Build, plans: tuple[ComponentPlan, ...]) -> None:
    """Refuse before hours of work: each component is written once as ONNX and once per compiled target."""
    copies = 1 + len(run.libraries)
    needed = 0
    for plan in plans:
        width = {"float32": 4}.get(plan.dtype, 2)
        parameters = sum(tensor.count for tensor in run.checkpoint.weights(plan.name).values())
        present = sum(path.stat().st_size for path in (run.staging.folder / plan.name).glob("*") if path.is_file())
        needed += max(0, parameters * width * copies - present)
    free = shutil.disk_usage(run.staging.folder).free
    if needed > free:
        raise BuildError(
            f"not enough space for the bundle in {run.request.output.parent}",
            received=f"{free >> 20} MiB free",
            expected=f"about {needed >> 20} MiB",
            action="free space or choose another --output",
        )


@contextmanager
def _full_disk_is_an_error(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise no_space_or(error, output) from error
