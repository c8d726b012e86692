"""`sana-export inspect`."""

from rich.console import Console
from rich.table import Table

from sana_export.commands.options import Bundle


def run(bundle: Bundle) -> None:
    """Show how a bundle was built: stages, their inputs, time, memory, and what each graph pass did."""
    from sana_export.bundle import read_build_record
    from sana_runtime.manifest import read_manifest

    manifest = read_manifest(bundle)
    console = Console(highlight=False)
    console.print(f"{manifest.model.source} ({manifest.model.architecture}), {manifest.width} x {manifest.height} px")
    console.print("made with " + ", ".join(f"{name} {v}" for name, v in manifest.created_with.items()))
    table = Table("stage", "seconds", "peak MiB", "MiB", "details")
    for name, record in read_build_record(bundle).stages.items():
        measured = dict(record.measured)
        seconds, peak = str(measured.pop("seconds", "")), str(measured.pop("peak_memory_mib", ""))
        size = sum(entry.size for entry in record.files) / 2**20
        table.add_row(name, seconds, peak, f"{size:.1f}", "\n".join(f"{k}: {v}" for k, v in measured.items()))
    console.print(table)
    for note in manifest.notes:
        console.print(f"note: {note}")
