"""`sana-export inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sana_export.commands.options import Bundle

if TYPE_CHECKING:
    from sana_runtime.manifest import Manifest


def run(
    bundle: Bundle,
    fusion: Annotated[
        str | None,
        typer.Option(
            metavar="SM",
            help="Predict for a compute capability (sm_87, sm_89, sm_120, ...) which quantised products become "
            "low-precision kernels, which do not, and why.",
        ),
    ] = None,
) -> None:
    """Show how a bundle was built: stages, their inputs, time, memory, and what each graph pass did."""
    from sana_runtime.manifest import read_manifest

    manifest = read_manifest(bundle)
    console = Console(highlight=False)
    if fusion is not None:
        _print_fusion(console, bundle, manifest, fusion)
        return
    console.print(f"{manifest.model.source} ({manifest.model.architecture}), {manifest.width} x {manifest.height} px")
    console.print("made with " + ", ".join(f"{name} {v}" for name, v in manifest.created_with.items()))
    console.print(_stages(bundle))
    if manifest.quantization:
        entry = manifest.quantization
        console.print(f"recipe {entry.recipe} ({entry.recipe_digest[:12]}), per layer: */quantization.json")
        gate = entry.gate
        console.print(f"gate: {'not run' if gate is None else 'passed' if gate.passed else 'MISSED'}")
    for note in manifest.notes:
        console.print(f"note: {note}")


def _stages(bundle: Path) -> Table:
    from sana_export.bundle import read_build_record

    table = Table("stage", "seconds", "peak MiB", "MiB", "details")
    for name, record in read_build_record(bundle).stages.items():
        measured = dict(record.measured)
        seconds, peak = str(measured.pop("seconds", "")), str(measured.pop("peak_memory_mib", ""))
        size = sum(entry.size for entry in record.files) / 2**20
        table.add_row(name, seconds, peak, f"{size:.1f}", "\n".join(f"{k}: {v}" for k, v in measured.items()))
    return table


def _print_fusion(console: Console, bundle: Path, manifest: "Manifest", capability_name: str) -> None:
    from sana_export.graph.fusion import check_fusion, parse_capability

    capability = parse_capability(capability_name)
    compiled = [target for target in manifest.targets if target.startswith("tensorrt")] or ["tensorrt"]
    for target in compiled:
        for component in manifest.components:
            report = check_fusion(bundle / component.name / "model.onnx", target, capability)
            table = Table("node", "op", "weight", "activation", "fuses", "why", title=f"{component.name}, {target}")
            for row in report.rows:
                kinds = (row.weight_dtype or "", row.activation_dtype or "")
                table.add_row(row.node, row.op, *kinds, "yes" if row.fused else "NO", row.reason)
            console.print(table)
            console.print(report.summary, soft_wrap=True)
