"""`sana-export estimate`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def run(
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GPU", help="h100, h200, rtx-4090-laptop, rtx-5090, orin or thor; may be repeated. Default: all."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Any checkpoint; only its shapes are read.")
    ] = "random:0.6b",
    resolution: Annotated[int, typer.Option(metavar="N", min=32, help="Side of the picture in pixels.")] = 1024,
    precision: Annotated[
        list[str] | None,
        typer.Option(metavar="P", help="fp32, bf16, fp16 or a recipe; may be repeated. Default: bf16, fp8 and int8."),
    ] = None,
    num_steps: Annotated[int, typer.Option(metavar="N", min=1, help="Solver steps.")] = 20,
    target: Annotated[str, typer.Option(metavar="T", help="Engines whose measured efficiency is used.")] = "inductor",
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measured rows. Default: the repository's, where there is one.")
    ] = None,
) -> None:
    """Estimate each stage's time on GPUs that are not here, from their published rates and measured rows.

    A roofline over every operation, with efficiencies fitted to measured stages. These are estimates: nothing was run
    on the GPUs named.
    """
    from sana_export.bench import estimate as estimation
    from sana_export.bench.rows import Case, read_rows
    from sana_runtime.errors import InputError

    console = Console(highlight=False)
    known = estimation.published_gpus()
    measured = read_rows(rows or estimation.ROWS)
    fitted = estimation.fit(estimation.samples_of(measured, target))
    table = Table("GPU", "precision", "text encoder", "step", "decoder", f"picture, {num_steps} steps")
    shown = "ESTIMATED" if fitted.samples else "LOWER BOUNDS"
    table.title = f"{model}, {resolution} x {resolution}: milliseconds, {shown}"
    for column in table.columns[2:]:
        column.justify = "right"
    refusals = []
    for name in gpu or known:
        chosen = estimation.gpu_named(name)
        for level in precision or ["bf16", "fp8", "int8"]:
            work = estimation.work_of(Case(model, level, resolution, resolution, num_steps))
            try:
                times = estimation.estimate(work, num_steps, chosen, fitted)
            except InputError as refusal:
                refusals.append(f"{level}: {refusal.failed}")
                continue
            table.add_row(
                chosen.name, level, *(f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in times.values())
            )
    console.print(table)
    for line in (*refusals, fitted.description):
        console.print(line, soft_wrap=True)
    for class_name, factor in zip(estimation.CLASSES, fitted.factors, strict=True):
        console.print(f"  {class_name}: {factor:.2f} times its bound")
    for sample, error in zip(fitted.samples, fitted.errors, strict=True):
        console.print(f"  {sample.label}: {sample.p50_ms:.3g} ms, predicted without it {error:+.0%}")
    for name in gpu or known:
        console.print(f"rates of {known[name].name}: {known[name].source}", soft_wrap=True)
