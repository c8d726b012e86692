"""`sana-export bench`."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sana_export.commands.options import Base, Bundle, JsonFile, Variant, check_files

if TYPE_CHECKING:
    from sana_export.bench.rows import Row


class Peer(str, Enum):
    """What the engines are compared with."""

    eager = "eager"
    graph = "graph"
    compile = "compile"
    channels_last = "channels-last"
    max_autotune = "max-autotune"
    recipe = "recipe"
    recipe_whole = "recipe-whole"
    torch_tensorrt = "torch-tensorrt"
    all = "all"
    none = "none"


def run(
    bundle: Bundle,
    num_steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Default: the model's.")] = None,
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="Measured pictures, and calls of each stage.")] = 5,
    warmup: Annotated[int, typer.Option(metavar="N", min=0, help="Unmeasured ones before them.")] = 1,
    target: Annotated[
        str | None, typer.Option(metavar="T", help="Default: the bundle's first target that runs here.")
    ] = None,
    peer: Annotated[
        list[Peer] | None,
        typer.Option(
            help="diffusers eager; eager replayed as a CUDA graph; torch.compile, also with channels last; "
            "max-autotune; the recipe of its guide (max-autotune with flags and fused QKV), by transformer block or "
            "whole; torch-tensorrt. max-autotune compiles for many minutes. "
            "May be repeated. Default: eager on a CPU, all but recipe-whole on a GPU.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Default: the checkpoint the bundle was built from.")
    ] = None,
    variant: Variant = None,
    base: Base = None,
    json_file: JsonFile = None,
) -> None:
    """Time a bundle's engines beside diffusers on the same device, after checking that both compute the same.

    Engines and every peer run one after the other, each in a process of its own. Peers are in bf16 on a GPU and in
    fp32 on a CPU. The floor of each stage is its arithmetic and bytes over rates measured in the same run.
    """
    from sana_export.bench.rows import Case
    from sana_export.bench.run import (
        OUR_STAGES,
        Bench,
        check_parity,
        measure_ours,
        measure_peer,
        precision_of,
        replace_fields,
    )
    from sana_export.bench.subjects import Subject
    from sana_export.weights.checkpoint import open_checkpoint
    from sana_runtime.manifest import read_manifest

    console = Console(highlight=False)
    check_files({"--json": json_file})
    manifest = read_manifest(bundle)
    model = manifest.model
    source = open_checkpoint(checkpoint or model.source, variant=variant or model.variant, base=base)
    steps = num_steps or manifest.scheduler.default_num_steps
    case = Case(model.source, precision_of(manifest), manifest.height, manifest.width, steps)
    subject = Subject(
        kind="parity",
        source=checkpoint or model.source,
        variant=variant or model.variant,
        base=base,
        bundle=str(bundle),
        target=target,
        height=manifest.height,
        width=manifest.width,
        caption_tokens=manifest.tokenizer.padded_length,
        num_steps=steps,
        runs=runs,
        warmup=warmup,
        stages=OUR_STAGES,
    )
    with console.status("measuring"):
        bench = Bench(lambda line: console.print(line, markup=False, soft_wrap=True), runs, warmup)
        judged = check_parity(bench, subject)
        console.print(f"on {judged.description}; parity {judged.verdict}", markup=False, soft_wrap=True)
        rows = measure_ours(bench, subject, manifest, source, case, judged)
        on_device = replace_fields(subject, device=judged.device)
        for name in _chosen(peer, judged.device):
            rows += measure_peer(bench, on_device, source, case, name)
    console.print(_table(rows))
    _print_the_rest(console, rows)
    if json_file:
        _write_json(json_file, rows)


def _chosen(peers: list[Peer] | None, device: str) -> list[str]:
    every = [peer.value for peer in Peer if peer not in (Peer.all, Peer.none, Peer.recipe_whole)]
    if peers is None:
        return every if device == "cuda" else [Peer.eager.value]
    if Peer.all in peers:
        return every
    return [peer.value for peer in dict.fromkeys(peers) if peer is not Peer.none]


def _table(rows: "list[Row]") -> Table:
    """One line per stage and subject, the engines first."""
    first = rows[0]
    title = f"{first.model} {first.precision}, {first.width} x {first.height}, {first.num_steps} steps, {first.device}"
    table = Table("stage", "subject", "median ms", "p20-p80", "of ours", "floor", "gap", title=title)
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for stage in ("text_encoder", "step", "vae_decoder", "total", "total_one_at_a_time", "cold_start"):
        timed = [row for row in rows if row.stage == stage and row.p50_ms is not None]
        ours = next((row.p50_ms for row in timed if row.subject == first.subject), None)
        for row in timed:
            table.add_row(
                stage,
                f"{row.subject} {row.precision}",
                _figure(row.p50_ms),
                f"{_figure(row.p20_ms)}-{_figure(row.p80_ms)}",
                "" if not ours or row.p50_ms is None else f"{row.p50_ms / ours:.2f}x",
                _figure(row.floor_ms),
                _figure(row.gap),
                end_section=row is timed[-1],
            )
    return table


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _print_the_rest(console: Console, rows: "list[Row]") -> None:
    for row in rows:
        label = f"{row.subject} {row.stage}"
        if row.error:
            console.print(f"{label}: no figure: {row.error}", markup=False, soft_wrap=True)
        if row.stage == "build" and row.p50_ms is not None:
            console.print(f"build: {row.p50_ms / 1e3:.0f} s", soft_wrap=True)
        if row.device_mib is not None:
            console.print(
                f"{row.subject}, {row.stage}: {row.device_mib:.0f} MiB of the GPU at most while painting",
                soft_wrap=True,
            )


def _write_json(path: Path, rows: "list[Row]") -> None:
    from dataclasses import asdict

    import msgspec

    from sana_runtime.files import whole_file

    content = msgspec.json.encode({"rows": [asdict(row) for row in rows]})
    with whole_file(path) as temporary:
        temporary.write_bytes(msgspec.json.format(content, indent=2) + b"\n")
