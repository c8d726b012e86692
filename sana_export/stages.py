"""The stages of a build: what each depends on, what it writes, and when it is reused."""

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

import sana_calibration
import sana_calibration.quantize as quantize_arithmetic
import sana_plugins
from sana_calibration.prompts import prompts_digest
from sana_calibration.recipe import recipe_yaml
from sana_calibration.scales import Scales
from sana_export.build_request import BuildRequest
from sana_export.bundle import StageRecord, Staging
from sana_export.calibration_run import sampling_of
from sana_export.components import ComponentPlan, empty_module
from sana_export.graph.export import WEIGHTS_FILE, ExportReport, export_component
from sana_export.graph.fusion import check_fusion, parse_capability
from sana_export.graph.opset import OPSET
from sana_export.graph.passes import quick_plugins
from sana_export.graph.variants import ONNXRUNTIME_GRAPH, write_onnxruntime_graph, write_variant
from sana_export.inductor.compile import Begun
from sana_export.inductor.stage import InductorStage
from sana_export.inductor.workers import Workers
from sana_export.peak_memory import PeakMemory
from sana_export.prompting import tokenizer_entry
from sana_export.quantize import (
    QuantizedBuild,
    alpha_summary,
    calibration_device,
    calibration_size,
    component_report,
    gate_file,
    run_calibration,
    run_gate,
)
from sana_export.weights.checkpoint import Checkpoint
from sana_kernels.linear_attention import reference as linear_attention_reference
from sana_plugins.aot import compile_kernels, kernel_files
from sana_runtime.contract import COMPONENTS, TargetName
from sana_runtime.errors import BuildError
from sana_runtime.files import sha256_file, whole_file
from sana_runtime.inductor_engine import machine_device
from sana_runtime.manifest import ComponentEntry, EngineEntry, FileEntry, GateEntry, QuantizationEntry, TokenizerEntry
from sana_runtime.plan_builder import PlanProgress, build_plan
from sana_runtime.plugins import PluginForm
from sana_runtime.tensorrt_library import TensorrtLibrary

Measured = dict[str, float | int | str]
Made = tuple[list[Path], Measured]

# The packages whose code decides what an exported graph looks like.
EXPORTER_PACKAGES = ("torch", "onnxscript", "onnx-ir", "transformers")
# The compute capabilities a target's fusion summary is printed for.
_TYPICAL_CAPABILITIES: dict[TargetName, tuple[str, ...]] = {
    "tensorrt-rtx": ("sm_89", "sm_120"),
    "tensorrt": ("sm_87", "sm_90"),
}
# The GPUs whose cubins travel with a target's plans.
_PLUGIN_CAPABILITIES: dict[TargetName, tuple[int, ...]] = {
    "tensorrt-rtx": (80, 86, 89, 120),
    "tensorrt": (80, 86, 87, 89, 90, 110, 120),
}
TENSORRT_TARGETS: tuple[TargetName, ...] = tuple(_PLUGIN_CAPABILITIES)
PLUGIN_FOLDER = "plugins"
_OWN = Path(__file__).parent


class Reporter(Protocol):
    """Who hears of a build's progress."""

    def stage_started(self, stage: str, reason: str) -> None: ...
    def stage_progress(self, stage: str, fraction: float, detail: str) -> None: ...
    def stage_finished(self, stage: str, record: StageRecord) -> None: ...
    def stage_reused(self, stage: str, record: StageRecord, reason: str) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class Stages:
    """One build's stages: the request, what it opened, and what is done."""

    request: BuildRequest
    reporter: Reporter
    checkpoint: Checkpoint
    libraries: Mapping[TargetName, TensorrtLibrary]
    staging: Staging
    workers: Workers
    plans: tuple[ComponentPlan, ...] = ()
    quantized: QuantizedBuild | None = None
    scales: Scales | None = None
    plugin_files: tuple[FileEntry, ...] = ()
    done: dict[str, StageRecord] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _begun: dict[str, Begun] = field(default_factory=dict)

    def run(self, name: str, inputs: Mapping[str, str], make: Callable[[], Made]) -> StageRecord:
        """Reuse the stage or run `make`, which returns the files it wrote and what it measured."""
        reuse = self.staging.reuse(name, inputs)
        if reuse.record is not None:
            self.reporter.stage_reused(name, reuse.record, reuse.reason)
            self.done[name] = reuse.record
            return reuse.record
        self.reporter.stage_started(name, reuse.reason)
        started, memory = time.monotonic(), PeakMemory()
        files, measured = make()
        seconds = round(time.monotonic() - started, 2)
        measured = {"seconds": seconds, "peak_memory_mib": memory.mib(), **measured}
        record = self.staging.finish(name, inputs, files, measured)
        self.done[name] = record
        self.reporter.stage_finished(name, record)
        return record

    def tokenizer(self) -> TokenizerEntry:
        """The tokenizer, as a file and as settings."""
        content = self.checkpoint.tokenizer_json()
        path = self.staging.folder / "tokenizer" / "tokenizer.json"
        digest = hashlib.sha256(content).hexdigest()
        self.run("tokenizer", {"tokenizer": digest}, lambda: ([_written(path, content)], {}))
        return tokenizer_entry(content, "tokenizer/tokenizer.json", self.checkpoint.pipeline_class)

    def component(self, plan: ComponentPlan) -> ComponentEntry:
        """One component's graph and the engines made from it."""
        if plan.dtype_reason:
            self.reporter.note(f"{plan.name}: {plan.dtype_reason}")
        stage = f"{plan.name}/{'inductor' if self.request.targets == ('inductor',) else 'onnx'}"
        digest = self.checkpoint.digest(
            plan.name, lambda _: self.reporter.stage_progress(stage, 0.0, "hashing weights")
        )
        engines: dict[TargetName, EngineEntry] = {}
        if from_graph := [target for target in self.request.targets if target != "inductor"]:
            graph = self.run(stage, self._graph_inputs(plan, digest), lambda: self._export(plan))
            self._report_quantization(plan, graph)
            engines = {target: self._engine(plan, graph, target) for target in from_graph}
        if "inductor" in self.request.targets:
            engines["inductor"] = self._inductor(plan, digest)
        listed = tuple(engines[target] for target in self.request.targets)
        return ComponentEntry(plan.name, plan.dtype, plan.dtype_reason, digest, plan.inputs, plan.outputs, listed)

    def plugins(self, plans: tuple[ComponentPlan, ...]) -> None:
        """Compile the linear-attention plugin's kernels for every GPU the plans may run on."""
        folder = self.staging.folder / PLUGIN_FOLDER
        capabilities = tuple(sorted({sm for target in self.libraries for sm in _PLUGIN_CAPABILITIES[target]}))
        dtypes = tuple(sorted({attention_dtype(plan) for plan in plans if plan.name != "text_encoder"}))
        forms = tuple(sorted({False, self.checkpoint.transformer_config["qk_norm"] is not None}))

        def make() -> Made:
            def show(done: int, total: int) -> None:
                self.reporter.stage_progress("plugins", done / total, f"kernel {done}/{total}")

            shutil.rmtree(folder, ignore_errors=True)
            index = compile_kernels(
                folder,
                capabilities=capabilities,
                dtypes=dtypes,
                forms=forms,
                plugin_form=self.request.plugin_form,
                on_kernel=show,
            )
            return [folder / name for name in kernel_files(index)], {"kernels": len(index.kernels)}

        kernels = sorted((Path(linear_attention_reference.__file__).parent).glob("*.py"))
        inputs = {
            "capabilities": ", ".join(f"sm_{sm}" for sm in capabilities),
            "dtypes": ", ".join(dtypes),
            "forms": ", ".join("qk-norm" if form else "plain" for form in forms),
            "plugin form": self.request.plugin_form,
            "kernel code": _digest_of([*kernels, *sorted(Path(sana_plugins.__file__).parent.glob("*.py"))]),
            "triton": _version_or_none("triton"),
        }
        self.plugin_files = self.run("plugins", inputs, make).files

    def calibration(self) -> None:
        """Observe activations, if the recipe quantises any, and keep the scales."""
        assert self.quantized is not None
        if not self.quantized.needs_calibration:
            return
        path = self.staging.folder / "quantization" / "calibration.safetensors"
        stage = "calibration"
        cache = self.request.calibration.cache

        def make() -> Made:
            assert self.quantized is not None
            scales = self._cached_scales(cache) if cache else None
            if scales is None:
                work, report = self.staging.folder / "calibration.work", self.reporter
                device = calibration_device(self.quantized)
                scales = run_calibration(
                    self.checkpoint,
                    self.quantized,
                    self.request,
                    work,
                    lambda fraction, text: report.stage_progress(stage, fraction, f"{text} ({device})"),
                    device,
                )
                shutil.rmtree(work)
            scales.save(path)
            return [path], {"digest": scales.digest}

        inputs = {"cache": sha256_file(cache)} if cache else self._calibration_inputs()
        self.run(stage, inputs, make)
        self.scales = self._cached_scales(path)

    def gate(self) -> GateEntry | None:
        """Judge the quantised model on a few prompts; None where that was not asked for or a component is missing."""
        assert self.quantized is not None
        if not self.request.gate or set(self.request.components) != set(COMPONENTS):
            return None
        quantized, stage = self.quantized, "gate"
        path = self.staging.folder / "quantization" / "gate.json"

        def make() -> Made:
            work = self.staging.folder / "gate.work"
            entry, results = run_gate(
                self.checkpoint,
                quantized,
                self.scales,
                self.request,
                work,
                lambda text: self.reporter.stage_progress(stage, 0.0, text),
            )
            shutil.rmtree(work)
            _written(path, gate_file(entry, results))
            return [path], {"passed": str(entry.passed)}

        scales = self.scales.digest if self.scales else "none"
        inputs = {
            **self._calibration_inputs(),
            "scales": scales,
            "thresholds": str(quantized.recipe.gate),
            "reference code": _code_digest("reference", "parity"),
        }
        self.run(stage, inputs, make)
        return msgspec.json.decode(path.read_bytes(), type=_GateFile).gate

    def quantization_entry(self, gate: GateEntry | None) -> QuantizationEntry:
        """What the manifest says of the quantisation; writes the recipe into the bundle."""
        assert self.quantized is not None
        recipe = self.quantized.recipe
        path = self.staging.folder / "quantization" / "recipe.yaml"
        content = recipe_yaml(recipe).encode()
        self.run("recipe", {"recipe": hashlib.sha256(content).hexdigest()}, lambda: ([_written(path, content)], {}))
        return QuantizationEntry(
            recipe=recipe.name,
            recipe_file="quantization/recipe.yaml",
            recipe_digest=recipe.digest,
            calibration_file="quantization/calibration.safetensors" if self.scales else None,
            calibration_digest=self.scales.digest if self.scales else None,
            min_x0_sqnr_db=recipe.gate.min_x0_sqnr_db,
            min_psnr_db=recipe.gate.min_psnr_db,
            min_ssim=recipe.gate.min_ssim,
            gate=gate,
        )

    def _weights(self) -> dict[str, str]:
        return {name: self.checkpoint.digest(name) for name in COMPONENTS}

    def _cached_scales(self, path: Path) -> Scales:
        assert self.quantized is not None
        return Scales.load(
            path,
            weights=self._weights(),
            recipe=self.quantized.recipe.digest,
            sampling=sampling_of(self.checkpoint),
        )

    def _calibration_inputs(self) -> dict[str, str]:
        assert self.quantized is not None
        settings = self.request.calibration
        height, width = calibration_size(self.request)
        return {
            **{f"{name} weights": digest for name, digest in self._weights().items()},
            "recipe": self.quantized.recipe.digest,
            "sampling": sampling_of(self.checkpoint),
            "prompts": prompts_digest(self.quantized.prompts),
            "steps": str(settings.num_steps),
            "seed": str(settings.seed),
            "size": f"{height} x {width}",
            "calibration code": _calibration_code_digest(),
            "torch": importlib.metadata.version("torch"),
        }

    def _graph_inputs(self, plan: ComponentPlan, digest: str) -> dict[str, str]:
        request = self.request
        configuration = msgspec.json.encode(
            self.checkpoint.config("vae" if plan.name == "vae_decoder" else plan.name), order="sorted"
        )
        inputs = {
            "weights": digest,
            "configuration": hashlib.sha256(configuration).hexdigest(),
            "dtype": plan.dtype,
            "I/O": hashlib.sha256(msgspec.json.encode((plan.inputs, plan.outputs))).hexdigest(),
            "attention_clip": str(self.checkpoint.attention_clip),
            "opset": str(OPSET),
            "exporter code": _code_digest("reference", "graph"),
            **{package: importlib.metadata.version(package) for package in EXPORTER_PACKAGES},
        }
        if plan.name != "text_encoder":
            inputs["height x width"] = f"{request.height} x {request.width}"
        if self.quantized:
            # All of it: quantization.json names the recipe.
            inputs["recipe"] = self.quantized.recipe.digest
            inputs["calibration"] = self.scales.component_digest(plan.name) if self.scales else "none"
        return inputs

    def _export(self, plan: ComponentPlan) -> Made:
        folder = self.staging.folder / plan.name
        partial = folder / "export.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        stage = f"{plan.name}/onnx"
        self.reporter.stage_progress(stage, 0.0, "tracing")
        report = export_component(
            empty_module(plan),
            self.checkpoint.weights(plan.name),
            plan.prefix,
            plan.inputs,
            plan.outputs,
            partial / "model.onnx",
            lambda done, total: self.reporter.stage_progress(stage, done / total, f"weights {done}/{total}"),
            quantization=self.quantized.quantization(plan.name, self.scales) if self.quantized else None,
        )
        onnx.checker.check_model(str(partial / "model.onnx"))
        files = [folder / name for name in ("model.onnx", WEIGHTS_FILE)]
        for file in files:
            with whole_file(file) as temporary:
                (partial / file.name).rename(temporary)
        partial.rmdir()
        variant, rewritten = write_onnxruntime_graph(files[0])
        files += variant
        passes = ", ".join(f"{name} {count}" for name, count in report.passes.items())
        measured: Measured = {"nodes": report.nodes, "weight_bytes": report.weight_bytes, "passes": passes}
        measured["linear_attention"] = report.passes["linear_attention_function"]
        measured |= rewritten
        return files + self._quantization_report(plan, report, measured), measured

    def _quantization_report(self, plan: ComponentPlan, report: ExportReport, measured: Measured) -> list[Path]:
        """Write what was quantised, what was not and why; add the summary to `measured`."""
        if report.quantization is None or self.quantized is None:
            return []
        found = report.quantization
        measured["quantized_layers"] = len(found.layers)
        measured["quantized_flops_fraction"] = round(found.quantized_fraction, 4)
        content = component_report(self.quantized, plan.name, found, self.scales)
        return [_written(self.staging.folder / plan.name / "quantization.json", content)]

    def _report_quantization(self, plan: ComponentPlan, graph: StageRecord) -> None:
        """Say what was quantised and what of it the targets will compute in low precision."""
        if self.quantized is None:
            return
        excluded = len(self.quantized.exclusions[plan.name])
        self.reporter.note(
            f"{plan.name}: {graph.measured['quantized_layers']} layers quantised, {excluded} excluded, "
            f"{float(graph.measured['quantized_flops_fraction']):.1%} of the products' FLOPs in 8 bits"
        )
        alphas = alpha_summary(self.scales.component(plan.name)) if self.scales else []
        if alphas:
            self.reporter.note("\n".join((f"{plan.name}: SmoothQuant alpha, searched per layer", *alphas)))
        path = self.staging.folder / graph.files[0].path
        for target in self.request.targets:
            for capability in _TYPICAL_CAPABILITIES.get(target, ()):
                report = check_fusion(path, target, parse_capability(capability))
                self.reporter.note(f"{plan.name}: {report.summary}")

    def _engine(self, plan: ComponentPlan, graph: StageRecord, target: TargetName) -> EngineEntry:
        graph_files = graph.files[:2]
        if target == "onnxruntime":
            version = importlib.metadata.version("onnxruntime")
            paths = [entry.path for entry in graph_files]
            own = f"{plan.name}/{ONNXRUNTIME_GRAPH}"
            if own in {entry.path for entry in graph.files}:
                paths[0] = own
            return EngineEntry(target, tuple(paths), "ONNX Runtime", version)
        library = self.libraries[target]
        path = self.staging.folder / plan.name / f"{target}.plan"
        stage = f"{plan.name}/{target}"
        # Gemma-2 has softmax attention only.
        plugins = () if plan.name == "text_encoder" else self.plugin_files
        form = self.request.plugin_form

        def make() -> Made:
            def show(progress: PlanProgress) -> None:
                self.reporter.stage_progress(stage, progress.fraction, progress.phase)

            folder = self.staging.folder / PLUGIN_FOLDER if plugins else None
            onnx_path = self.staging.folder / graph_files[0].path
            layers = int(graph.measured["linear_attention"]) if plugins else 0
            with _plugin_graph(onnx_path, form, layers) as (source, expected):
                result = build_plan(source, path, target, on_progress=show, plugins=folder, plugin_form=form)
            _check_plugin_layers(stage, result.plugin_layers, expected)
            measured: Measured = {"peak_memory_mib": result.peak_memory_mib, "layers": result.layers}
            if result.activation_bytes is not None:
                measured["gpu_activation_mib"] = result.activation_bytes >> 20
            return [path], {**measured, "plugin_layers": result.plugin_layers, "plan_bytes": result.size}

        inputs = {entry.path: entry.sha256 for entry in (*graph_files, *plugins)}
        inputs |= {"builder": library.builder_name, "builder version": library.version}
        if target == "tensorrt":
            # It compiles for the GPU that it runs on.
            inputs["device"] = machine_device()
        record = self.run(stage, inputs, make)
        if "gpu_activation_mib" in record.measured:
            self.reporter.note(
                f"{stage}: takes {record.measured['gpu_activation_mib']} MiB of the GPU's memory beside its weights, "
                "by the compiler's log"
            )
        # The quick form's kernels are inside the plan.
        travelling = plugins if form == "class" else ()
        files = (f"{plan.name}/{target}.plan", *(entry.path for entry in travelling))
        return EngineEntry(target, files, library.builder_name, library.version, form if plugins else "none")

    def _inductor(self, plan: ComponentPlan, digest: str) -> EngineEntry:
        """The component's pieces, compiled for this machine."""
        name, compiler = f"{plan.name}/inductor", self._compiler()
        # What is said of the recipe, and refused of it, is this request's, also where the files come from another one.
        notes = compiler.prepare(plan).notes

        def make() -> Made:
            if self.workers.jobs > 1:
                # The next components are compiled meanwhile, the decoder, whose pieces take longest, first.
                for other in reversed(self.plans[self.plans.index(plan) + 1 :]):
                    inputs = compiler.inputs(other, self.checkpoint.digest(other.name))
                    if self.staging.reuse(f"{other.name}/inductor", inputs).record is None:
                        self._begin(other)
            self._begin(plan)

            def show(done: int, total: int, piece: str) -> None:
                self.reporter.stage_progress(name, done / total, f"compiling {piece}")

            files = compiler.finish(self._begun.pop(plan.name), self._inductor_folder(plan), show)
            return files, {"pieces": sum(path.suffix == ".pt2" for path in files)}

        record = self.run(name, compiler.inputs(plan, digest), make)
        if notes:
            self.notes += notes
            self.reporter.note("; ".join(notes))
        files = tuple(entry.path for entry in record.files)
        return EngineEntry("inductor", files, "AOTInductor", compiler.torch_version, device=compiler.device)

    def _compiler(self) -> InductorStage:
        return InductorStage(self.checkpoint, self.request, self.quantized, self.scales)

    def _inductor_folder(self, plan: ComponentPlan) -> Path:
        return self.staging.folder / plan.name / "inductor"

    def _begin(self, plan: ComponentPlan) -> None:
        """Begin to compile a component, if that has not begun."""
        if plan.name not in self._begun:
            folder = self._inductor_folder(plan)
            shutil.rmtree(folder, ignore_errors=True)
            self._begun[plan.name] = self._compiler().begin(plan, folder, self.workers)


@contextmanager
def _plugin_graph(onnx_path: Path, form: PluginForm, layers: int) -> Iterator[tuple[Path, int]]:
    """The graph to compile and how many plugin layers it must give, from one with `layers` linear-attention nodes.

    The quick form has a graph of its own, which is removed afterwards.
    """
    if form == "class" or not layers:
        yield onnx_path, layers
        return
    path, expected = write_variant(onnx_path, f"{form}-plugins.onnx", quick_plugins.run)
    try:
        yield path, expected
    finally:
        path.unlink(missing_ok=True)


def attention_dtype(plan: ComponentPlan) -> str:
    """The dtype of a component's linear-attention nodes: an fp16 decoder keeps them in fp32."""
    return "float32" if (plan.name, plan.dtype) == ("vae_decoder", "float16") else plan.dtype


def _check_plugin_layers(stage: str, found: int, expected: int) -> None:
    if found != expected:
        raise BuildError(
            f"{stage}: the compiler did not take the plugin everywhere",
            received=f"{found} plugin layers",
            expected=f"{expected}, one for every linear-attention node",
            action="build without --plugin, and report this with the output of sana-export doctor",
        )


def _version_or_none(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


class _GateFile(msgspec.Struct, frozen=True):
    gate: GateEntry


def _written(path: Path, content: bytes) -> Path:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    return path


def _code_digest(*folders: str) -> str:
    """Digest of our modules that decide what a stage computes."""
    files = [_OWN / "components.py", Path(linear_attention_reference.__file__), Path(quantize_arithmetic.__file__)]
    files += [path for folder in folders for path in sorted((_OWN / folder).rglob("*.py"))]
    return _digest_of(files)


def _calibration_code_digest() -> str:
    package = Path(sana_calibration.__file__).parent
    return _digest_of([_OWN / "calibration_run.py", *sorted(package.rglob("*.py"))])


def _digest_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()
