"""`sana-export build`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from sana_export.commands.options import Base, Variant, picture_size

if TYPE_CHECKING:
    from sana_export.bundle import StageRecord
    from sana_runtime.manifest import Manifest

_DEFAULT_SIDE = 1024


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A diffusers directory, an official .pth file, a Hugging Face id, nano (the small model that "
            "scripts/train_nano trains), or random weights: random:tiny, random:0.6b, random:1.6b, ...",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The bundle to write.")],
    precision: Annotated[
        str, typer.Option(metavar="P", help="fp32, bf16, fp16, fp8, int8, int8-weight-only or int4-weight-only.")
    ] = "bf16",
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T",
            help="tensorrt-rtx (compiles without a GPU), tensorrt (compiles on the device), onnxruntime, or inductor "
            "(PyTorch packages for the very GPU that builds them, or for the CPU where there is none). "
            "Repeat it to put several into the bundle; the runtime takes the first that its machine can run. "
            "Default: tensorrt-rtx.",
        ),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(metavar="N", help="Side of a square picture in pixels. Default: 1024, for nano 512.")
    ] = None,
    height: Annotated[int | None, typer.Option(metavar="H", help="Picture height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(metavar="W", help="Picture width in pixels.")] = None,
    variant: Variant = None,
    base: Base = None,
    components: Annotated[
        str, typer.Option(metavar="LIST", help="Comma-separated: text_encoder, transformer, vae_decoder.")
    ] = "text_encoder,transformer,vae_decoder",
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A quantisation recipe of your own (YAML); replaces --precision."),
    ] = None,
    base_precision: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="Precision of what a recipe does not quantise: fp32, bf16 or fp16. "
            "Default: the recipe's; fp32 lets ONNX Runtime run the bundle on a CPU.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to calibrate with, one per line. Default: calibration_prompts.txt of the model's directory, "
            "else shipped ones.",
        ),
    ] = None,
    calibration_prompts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How many of the prompts are painted. Default: 8, or 24 where the recipe's rounding is calibrated.",
        ),
    ] = None,
    calibration_steps: Annotated[int, typer.Option(metavar="N", help="Solver steps per prompt.")] = 8,
    calibration_side: Annotated[
        int, typer.Option(metavar="PX", help="Longest side of the pictures painted for calibration and gate.")
    ] = 512,
    calibration_seed: Annotated[int, typer.Option(metavar="S", help="Seed of their noise.")] = 0,
    calibration_cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A finished calibration of the same weights and recipe, used instead."),
    ] = None,
    plugin: Annotated[
        bool,
        typer.Option(
            "--plugin/--no-plugin",
            help="Compile linear attention as our TensorRT plugin instead of plain layers. Needs triton here, and "
            "cuda-core on the device; not run on a TensorRT device yet.",
        ),
    ] = False,
    plugin_form: Annotated[
        str,
        typer.Option(
            metavar="FORM",
            help="class, or quick: for target tensorrt, kernels inside the plan, which then needs nothing else.",
        ),
    ] = "class",
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Judge a quantised model against the unquantised one.")
    ] = True,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="For target inductor: compile so many pieces at once; without it, as many as CPUs and memory allow.",
        ),
    ] = None,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="A finished bundle, of another size or precision for example: a stage that has the same inputs there "
            "is taken from it instead of being built again. The bundle is not changed. Repeat it to name several.",
        ),
    ] = None,
) -> None:
    """Compile a checkpoint into a bundle, component by component.

    A finished stage is recorded with the digests of its inputs: an interrupted build resumes, an identical build
    reuses everything, and a changed input rebuilds what depends on it and names the input. The bundle appears at
    --output only when it is whole.
    """
    from sana_export.build_request import BuildRequest, CalibrationSettings
    from sana_export.weights.checkpoint import SHIPPED_MODEL, SHIPPED_SIDE

    side = SHIPPED_SIDE if model == SHIPPED_MODEL else _DEFAULT_SIDE
    high, wide = picture_size(resolution, height, width, side)
    request = BuildRequest(
        model=model,
        precision=precision,
        targets=tuple(dict.fromkeys(target or ["tensorrt-rtx"])),  # type: ignore[arg-type]  # __post_init__ checks the choices
        height=high,
        width=wide,
        output=output,
        variant=variant,
        base=base,
        components=tuple(dict.fromkeys(components.split(","))),  # type: ignore[arg-type]
        recipe=recipe,
        base_precision=base_precision,  # type: ignore[arg-type]
        calibration=CalibrationSettings(
            calibration,
            calibration_prompts,
            calibration_steps,
            calibration_seed,
            calibration_side,
            calibration_cache,
        ),
        gate=gate,
        plugin=plugin,
        plugin_form=plugin_form,  # type: ignore[arg-type]
        jobs=jobs,
        reuse=tuple(dict.fromkeys(reuse or [])),
    )
    from sana_export.build import build

    console = Console(highlight=False)
    with ProgressReport(console) as reporter:
        manifest = build(request, reporter)
    console.print(_summary(manifest))
    console.print(f"bundle: {output}  (digest {manifest.digest[:12]})")
    _report_gate(console, manifest)
    if "onnxruntime" in manifest.targets and any(entry.dtype == "bfloat16" for entry in manifest.components):
        if manifest.quantization is None:
            console.print("note: ONNX Runtime runs bf16 graphs on CUDA only; for its CPU provider build fp32.")
        else:  # beside fp16, which leaves the text encoder in bf16
            console.print("note: ONNX Runtime has no QuantizeLinear of bf16: it runs bundles of --base-precision fp32.")


def _report_gate(console: Console, manifest: "Manifest") -> None:
    gate = manifest.quantization.gate if manifest.quantization else None
    if gate is not None:
        console.print(
            f"gate {'passed' if gate.passed else 'MISSED'}: x0 SQNR {gate.x0_sqnr_db:.1f} dB (at least "
            f"{gate.min_x0_sqnr_db:g}), PSNR {gate.psnr_db:.1f} dB (at least {gate.min_psnr_db:g}), "
            f"SSIM {gate.ssim:.3f} (at least {gate.min_ssim:g}) over {gate.prompts} prompts, {gate.num_steps} steps",
            soft_wrap=True,
        )
        if not gate.passed:
            raise typer.Exit(1)


class ProgressReport:
    """A rich progress bar per running stage and one line per finished or reused stage."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<26}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=console,
            transient=True,
        )
        self._console = console
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "ProgressReport":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage_started(self, stage: str, reason: str) -> None:
        self.stage_progress(stage, 0.0, "")
        if reason != "not built yet":
            self._console.print(f"  rebuild  {stage:<26} {reason}", soft_wrap=True)

    def stage_progress(self, stage: str, fraction: float, detail: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=1.0, detail=detail)
        self._progress.update(self._tasks[stage], completed=fraction, detail=detail[:60])

    def stage_finished(self, stage: str, record: "StageRecord") -> None:
        self._drop(stage)
        size = sum(entry.size for entry in record.files) / 2**20
        figures = f"{record.measured['seconds']:>8} s {record.measured['peak_memory_mib']:>7} MiB peak"
        self._console.print(f"  built    {stage:<26} {figures} {size:>10.1f} MiB", soft_wrap=True)

    def stage_reused(self, stage: str, record: "StageRecord", reason: str) -> None:
        self._drop(stage)
        self._console.print(f"  reused   {stage:<26} {reason}", soft_wrap=True)

    def note(self, text: str) -> None:
        first, *rest = text.splitlines()
        self._console.print(f"  note     {first}", soft_wrap=True)
        for line in rest:
            self._console.print(f"           {line}", soft_wrap=True)

    def _drop(self, stage: str) -> None:
        if stage in self._tasks:
            self._progress.remove_task(self._tasks.pop(stage))


def _summary(manifest: "Manifest") -> Table:
    table = Table("component", "dtype", "engine", "builder", "MiB", title=f"{manifest.model.source}")
    sizes = {entry.path: entry.size for entry in manifest.files}
    for component in manifest.components:
        for engine in component.engines:
            size = sum(sizes[path] for path in engine.files) / 2**20
            builder = f"{engine.builder} {engine.builder_version}"
            table.add_row(component.name, component.dtype, engine.target, builder, f"{size:.1f}")
    return table
