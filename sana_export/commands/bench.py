"""`sana-export bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sana_export.commands.options import Base, Bundle, JsonFile, Variant

if TYPE_CHECKING:
    from sana_runtime.bench import BenchResult
    from sana_runtime.pipeline import Pipeline

_PARITY_STEPS = 2


def run(
    bundle: Bundle,
    num_steps: Annotated[int | None, typer.Option(metavar="N", help="Default: the model's.")] = None,
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="Measured pictures.")] = 5,
    warmup: Annotated[int, typer.Option(metavar="N", min=0, help="Pictures before the first measured one.")] = 1,
    target: Annotated[
        str | None, typer.Option(metavar="T", help="Default: the bundle's first target that runs here.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Default: the checkpoint the bundle was built from.")
    ] = None,
    variant: Variant = None,
    base: Base = None,
    json_file: JsonFile = None,
) -> None:
    """Time a bundle's engines beside diffusers on the same machine, after checking that both compute the same.

    The peer is diffusers eager in fp32 on the CPU, so this refuses a bundle that runs on a GPU here: compare it with a
    peer on that GPU. For the engines alone use `sana-runtime bench`.
    """
    from sana_export.parity.judge import judge, judged_gate
    from sana_export.parity.ladder import check_components
    from sana_export.peer import time_stages
    from sana_export.weights.checkpoint import open_checkpoint
    from sana_runtime.bench import check_json, measure
    from sana_runtime.pipeline import Pipeline

    console = Console(highlight=False)
    if json_file:
        check_json(json_file)
    pipeline = Pipeline.load(bundle, target, report=lambda line: console.print(line, markup=False, soft_wrap=True))
    _refuse_gpu(pipeline)
    model = pipeline.manifest.model
    source = open_checkpoint(checkpoint or model.source, variant=variant or model.variant, base=base)
    with console.status("parity first"):
        result = judge(pipeline, source, lambda _: None, prompt="a red circle", num_steps=_PARITY_STEPS)
    verdict = judged_gate(pipeline.manifest, result)
    if verdict is None:
        check_components((result,), pipeline.manifest, source)
    elif not verdict.passed:
        console.print(f"no time is printed: the quantised bundle misses its gate ({verdict})", soft_wrap=True)
        raise typer.Exit(1)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("engines", total=runs + warmup)
        ours = measure(
            pipeline, num_steps=num_steps, runs=runs, warmup=warmup, on_picture=lambda: progress.advance(task)
        )
        peer_task = progress.add_task("diffusers", total=3 * (runs + warmup))
        peer = time_stages(source, pipeline.manifest, runs, warmup, lambda: progress.advance(peer_task))
    console.print(_table(ours, peer))
    if json_file:
        _write_json(json_file, ours, peer)


def _refuse_gpu(pipeline: "Pipeline") -> None:
    from sana_runtime.engine import HostMemory
    from sana_runtime.errors import InputError

    if not isinstance(pipeline.backend.memory, HostMemory):
        raise InputError(
            "the peer of this command runs on the CPU",
            received=f"engines on {pipeline.backend.description}",
            expected="engines on the CPU",
            action="sana-runtime bench times the engines alone",
        )


def _table(ours: "BenchResult", peer: dict[str, float]) -> Table:
    title = f"{ours.target} on {ours.device}; {ours.width} x {ours.height}, {ours.num_steps} steps, {ours.runs} runs"
    table = Table("stage", "median ms", "p20", "p80", "diffusers eager fp32", "speedup", title=title)
    for row in ours.rows:
        other = peer.get(row.stage)
        table.add_row(
            row.stage,
            *(f"{value:.1f}" for value in (row.p50_ms, row.p20_ms, row.p80_ms)),
            f"{other:.1f}" if other else "",
            f"{other / row.p50_ms:.2f}x" if other else "",
        )
    return table


def _write_json(path: Path, ours: "BenchResult", peer: dict[str, float]) -> None:
    from dataclasses import asdict

    import msgspec
    import torch

    from sana_runtime.files import whole_file

    content: dict[str, Any] = {
        **asdict(ours),
        "peer": {"name": f"diffusers eager fp32, torch {torch.__version__}", "p50_ms": peer},
    }
    with whole_file(path) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
