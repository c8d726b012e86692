"""What a bundle holds, for a terminal."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sana_runtime.contract import TensorSpec
from sana_runtime.manifest import ComponentEntry, EngineEntry, Manifest, QuantizationEntry
from sana_runtime.targets import examine_targets

_MIB = 1 << 20


def describe(manifest: Manifest) -> Iterator[RenderableType]:
    """The bundle's model, components, io tensors and engines, and a verdict on every target."""
    yield Text(_model(manifest))
    yield _components(manifest)
    yield _io_tensors(manifest)
    yield _engines(manifest)
    yield _targets(manifest)
    if manifest.quantization:
        yield Text(_quantization(manifest.quantization))
    if manifest.notes:
        yield Text("\n".join(["notes", *(f"  {note}" for note in manifest.notes)]))


def _quantization(entry: QuantizationEntry) -> str:
    gate = entry.gate
    if gate is None:
        return f"quantised by recipe {entry.recipe}; its gate was not run"
    return (
        f"quantised by recipe {entry.recipe}; gate {'passed' if gate.passed else 'MISSED'}: x0 SQNR "
        f"{gate.x0_sqnr_db:.1f} dB, PSNR {gate.psnr_db:.1f} dB, SSIM {gate.ssim:.3f} over {gate.prompts} prompts"
    )


def _model(manifest: Manifest) -> str:
    model, scheduler, tokenizer = manifest.model, manifest.scheduler, manifest.tokenizer
    made_with = ", ".join(f"{name} {version}" for name, version in manifest.created_with.items())
    instruction = f"{tokenizer.instruction_tokens} tokens" if tokenizer.instruction else "none"
    lines = [
        f"model      {model.source} ({model.architecture}), guidance {model.guidance}",
        f"picture    {manifest.width} x {manifest.height} pixels",
        f"scheduler  {scheduler.kind}, flow_shift {scheduler.flow_shift:g}, default "
        f"{scheduler.default_num_steps} steps, guidance_scale {scheduler.default_guidance_scale:g}",
        f"caption    {tokenizer.padded_length} positions, instruction {instruction}",
        f"digest     {manifest.digest}",
        f"made with  {made_with or 'not recorded'}",
    ]
    return "\n".join(lines)


def _components(manifest: Manifest) -> Table:
    table = Table("component", "dtype", "why this dtype", "weights SHA-256")
    for entry in manifest.components:
        table.add_row(entry.name, entry.dtype, Text(entry.dtype_reason), entry.weights_sha256[:12])
    return table


def _io_tensors(manifest: Manifest) -> Table:
    table = Table("component", "io tensor", "direction", "dtype", "shape")
    for entry in manifest.components:
        for direction, specs in (("input", entry.inputs), ("output", entry.outputs)):
            for spec in specs:
                table.add_row(entry.name, spec.name, direction, spec.dtype, _shape(spec))
    return table


def _shape(spec: TensorSpec) -> Text:
    return Text(" x ".join(map(str, spec.shape)) or "scalar")


def _engines(manifest: Manifest) -> Table:
    table = Table("engine of", "target", "built by", "file", "MiB")
    table.columns[-2].overflow = "fold"
    table.columns[-1].justify = "right"
    for component in manifest.components:
        for engine in component.engines:
            table.add_row(*_engine_row(manifest, component, engine))
    return table


def _engine_row(manifest: Manifest, component: ComponentEntry, engine: EngineEntry) -> tuple[str | Text, ...]:
    size = sum(entry.size for entry in manifest.files if entry.path in engine.files)
    files = Text(engine.files[0] if engine.files else "none")
    builder = Text(f"{engine.builder} {engine.builder_version}")
    return component.name, engine.target, builder, files, f"{size / _MIB:.1f}"


def _targets(manifest: Manifest) -> Table:
    table = Table("target", "runs here", "why")
    for verdict in examine_targets(manifest):
        table.add_row(verdict.target, "yes" if verdict.usable else "no", Text(verdict.reason))
    return table
