"""`sana-export compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sana_export.commands.options import Base, Bundle, JsonFile, Variant, check_files

if TYPE_CHECKING:
    from sana_export.parity.ladder import LadderResult
    from sana_export.parity.metrics import Parity
    from sana_export.quality_run import QualityReport
    from sana_runtime.manifest import GateEntry
    from sana_runtime.pipeline import Pipeline


def run(
    bundle: Bundle,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What both sides paint.")
    ] = "a red circle left of a blue square",
    negative_prompt: Annotated[str, typer.Option(metavar="TEXT", help="What both sides avoid.")] = "",
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of the noise both sides start from.")] = 0,
    num_steps: Annotated[int | None, typer.Option(metavar="N", help="Default: the model's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(metavar="G", help="Default: the model's.")] = None,
    target: Annotated[
        str | None, typer.Option(metavar="T", help="Default: the bundle's first target that runs here.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Default: the checkpoint the bundle was built from.")
    ] = None,
    variant: Variant = None,
    base: Base = None,
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Fail where a bound or a threshold of the recipe is missed.")
    ] = True,
    json_file: JsonFile = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write the result as a page: verdict, pictures, curves over the steps, all figures.",
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Save candidate and reference side by side; with --quality, the first pictures with their prompts.",
        ),
    ] = None,
    quality: Annotated[
        bool, typer.Option("--quality", help="Read pictures of test prompts instead, and score their claims.")
    ] = False,
    quality_prompts: Annotated[
        int, typer.Option(metavar="N", min=1, max=5000, help="How many test prompts --quality paints.")
    ] = 500,
    save_pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where --quality keeps its pictures: 0000.png, 0001.png, ...")
    ] = None,
    reference_pictures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Such pictures of another bundle: --quality adds PSNR and SSIM to them."),
    ] = None,
) -> None:
    """Compare a bundle's engines with the PyTorch reference in fp32, component by component and end to end.

    Both sides start from the same noise. Every component is compared on equal inputs, the transformer at every step,
    the latent as it drifts, and the finished picture. The weights must be those the bundle was built from. Exit
    code 1 if a component is further from the reference than the rounding of its dtype explains or, for a quantised
    bundle, if a threshold of its recipe is missed. --report, --json and --pictures are written in either case.

    --quality needs no checkpoint: it paints prompts of procedural scenes that no training has seen, for models such as
    sana-nano, reads count, colour, shape, position, binding and background off each picture, and gives their rates.
    Prompt i is painted from seed S + i. With --json, an interrupted run goes on where it stopped.
    """
    check_files({"--json": json_file, "--report": report, "--pictures": pictures})
    if quality:
        _refuse(
            "--report", report, "a comparison with PyTorch", "leave --quality away, or use --json FILE for its rates"
        )
        _quality(
            bundle,
            target,
            num_prompts=quality_prompts,
            seed=seed,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            rows_file=json_file,
            pictures=save_pictures,
            references=reference_pictures,
            sheet=pictures,
        )
        return
    for flag, value in (("--save-pictures", save_pictures), ("--reference-pictures", reference_pictures)):
        advice = "add --quality, or use --pictures FILE.png for the one picture that is compared"
        _refuse(flag, value, "--quality", advice)
    import numpy as np
    from PIL import Image

    from sana_export.parity.judge import judge, judged_gate
    from sana_export.parity.ladder import check_components, component_bounds
    from sana_export.weights.checkpoint import open_checkpoint
    from sana_runtime.files import whole_file
    from sana_runtime.pipeline import Pipeline

    console = Console(highlight=False)
    pipeline = Pipeline.load(bundle, target, report=lambda line: console.print(line, markup=False, soft_wrap=True))
    manifest = pipeline.manifest
    source = open_checkpoint(checkpoint or manifest.model.source, variant=variant or manifest.model.variant, base=base)
    with console.status("comparing") as status:
        result = judge(
            pipeline,
            source,
            status.update,
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
        )
    console.print(_table(result, f"{bundle} on {pipeline.target} against PyTorch fp32"))
    verdict = judged_gate(manifest, result)
    if json_file:
        with whole_file(json_file) as temporary:
            temporary.write_bytes(_json(result, pipeline, verdict))
    if pictures:
        with whole_file(pictures) as temporary:
            Image.fromarray(np.concatenate(result.images, axis=1)).save(temporary, format="PNG")
    if report:
        from sana_export.parity.report import write_report

        facts = _facts(bundle, pipeline, source.source, result, seed=seed, negative_prompt=negative_prompt)
        write_report(report, facts, result, verdict, component_bounds(result, manifest, source))
        console.print(f"report: {report}", markup=False, soft_wrap=True)
    if verdict is not None:
        _report_gate(console, verdict, gate)
    elif gate:
        check_components((result,), manifest, source)
        console.print("every component is within the rounding of its dtype")


def _refuse(flag: str, value: Path | None, owner: str, action: str) -> None:
    from sana_runtime.errors import InputError

    if value is not None:
        raise InputError(
            f"{flag} belongs to {owner}",
            received=f"{flag} {value}",
            expected=f"{owner} with {flag}, or neither",
            action=action,
        )


def _facts(
    bundle: Path, pipeline: "Pipeline", source: str, result: "LadderResult", *, seed: int, negative_prompt: str
) -> dict[str, str]:
    """What was compared, by name."""
    import torch

    manifest = pipeline.manifest
    found = {
        "bundle": bundle,
        "digest": manifest.digest,
        "checkpoint": source,
        "recipe": manifest.quantization.recipe if manifest.quantization else "",
        "dtypes": ", ".join(f"{entry.name} {entry.dtype}" for entry in manifest.components),
        "target": pipeline.target,
        "device": pipeline.backend.description,
        "reference": f"PyTorch {torch.__version__}, fp32",
        "prompt": result.prompt,
        "negative prompt": negative_prompt,
        "seed": seed,
        "steps": len(result.x0),
        "guidance scale": f"{result.guidance_scale:g}",
    }
    return {name: str(value) for name, value in found.items() if value != ""}


def _quality(bundle: Path, target: str | None, **request: Any) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sana_export.quality_run import QualityRequest, run_quality
    from sana_runtime.pipeline import Pipeline

    console = Console(highlight=False)
    pipeline = Pipeline.load(bundle, target, report=lambda line: console.print(line, markup=False, soft_wrap=True))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("painting and reading", total=request["num_prompts"])
        report = run_quality(
            pipeline,
            QualityRequest(**request),
            lambda done, of: progress.update(task, completed=done, total=of),
        )
    console.print(_quality_table(report, f"{bundle} on {pipeline.target}: claims that hold"))


def _quality_table(report: "QualityReport", title: str) -> Table:
    names = {"overall": "all claims", "claim": "{}", "kind": "all claims, kind “{}”"}
    table = Table("right in", "pictures", "of", "%", "95 % interval", title=title)
    for row, following in zip(report.rates, (*report.rates[1:], None), strict=True):
        table.add_row(
            names[row.scope].format(row.name),
            str(row.passed),
            str(row.total),
            f"{100 * row.rate:.1f}",
            f"{100 * row.low:.1f} to {100 * row.high:.1f}",
            end_section=following is not None and following.scope != row.scope,
        )
    if distance := report.fidelity:
        table.caption = (
            f"{distance.pictures} pictures against the references: PSNR {distance.mean_psnr_db:.1f} dB on average, "
            f"{distance.worst_psnr_db:.1f} dB at worst, SSIM {distance.mean_ssim:.4f}"
        )
    return table


def _report_gate(console: Console, verdict: "GateEntry", gate: bool) -> None:
    console.print(
        f"gate {'passed' if verdict.passed else 'MISSED'}: x0 SQNR {verdict.x0_sqnr_db:.1f} dB at the "
        f"worst step (at least {verdict.min_x0_sqnr_db:g}), picture PSNR {verdict.psnr_db:.1f} dB (at least "
        f"{verdict.min_psnr_db:g}), SSIM {verdict.ssim:.3f} (at least {verdict.min_ssim:g})",
        soft_wrap=True,
    )
    if gate and not verdict.passed:
        raise typer.Exit(1)


def _table(result: "LadderResult", title: str) -> Table:
    table = Table("stage", "max abs", "rel. RMS", "SQNR dB", "cosine", "PSNR dB", title=title)
    groups = (result.components, result.x0, result.velocity, result.drift, (result.picture,))
    for rows in groups:
        for row in rows:
            table.add_row(
                row.stage,
                f"{row.max_abs:.3g}",
                f"{row.relative_rms:.2e}",
                f"{row.sqnr_db:.1f}",
                f"{row.cosine:.7f}",
                f"{row.psnr_db:.1f}",
                end_section=row is rows[-1],
            )
    table.caption = f"SSIM of the picture: {result.ssim:.4f}"
    return table


def _json(result: "LadderResult", pipeline: "Pipeline", verdict: "GateEntry | None") -> bytes:
    import msgspec

    content = {
        "bundle_digest": pipeline.manifest.digest,
        "target": pipeline.target,
        "device": pipeline.backend.description,
        "prompt": result.prompt,
        "components": [_finite(row) for row in result.components],
        "x0": [_finite(row) for row in result.x0],
        "velocity": [_finite(row) for row in result.velocity],
        "drift": [_finite(row) for row in result.drift],
        "picture": {**_finite(result.picture), "ssim": result.ssim},
        "gate": verdict,
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def _finite(row: "Parity") -> dict[str, Any]:
    """JSON has no infinity: an infinite ratio (equal tensors) is null."""
    from dataclasses import asdict
    from math import isfinite

    values = {**asdict(row), "sqnr_db": row.sqnr_db}
    return {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in values.items()}
