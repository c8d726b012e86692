"""`sana-export compare`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sana_export.commands.options import Base, Bundle, JsonFile, Variant

if TYPE_CHECKING:
    from sana_export.parity.ladder import LadderResult
    from sana_export.parity.metrics import Parity


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
    json_file: JsonFile = None,
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Save candidate and reference side by side."),
    ] = None,
) -> None:
    """Compare a bundle's engines with the PyTorch reference in fp32, component by component and end to end.

    Both sides start from the same noise. Every component is compared on equal inputs, the latent at every step,
    and the finished picture. The weights must be those the bundle was built from. Exit code 1 if a component is
    further from the reference than the rounding of its dtype explains.
    """
    import numpy as np
    from PIL import Image

    from sana_export.parity.ladder import Settings, check_components, climb
    from sana_export.weights.checkpoint import open_checkpoint
    from sana_runtime.files import whole_file
    from sana_runtime.pipeline import Pipeline

    console = Console(highlight=False)
    pipeline = Pipeline.load(bundle, target, report=partial(console.print, markup=False, soft_wrap=True))
    scheduler = pipeline.manifest.scheduler
    model = pipeline.manifest.model
    source = open_checkpoint(checkpoint or model.source, variant=variant or model.variant, base=base)
    settings = Settings(
        prompt,
        negative_prompt,
        seed,
        scheduler.default_num_steps if num_steps is None else num_steps,
        scheduler.default_guidance_scale if guidance_scale is None else guidance_scale,
    )
    with console.status("comparing") as status:
        result = climb(pipeline, source, settings, lambda text: status.update(text))
    console.print(_table(result, f"{bundle} on {pipeline.target} against PyTorch fp32"))
    if json_file:
        with whole_file(json_file) as temporary:
            temporary.write_bytes(_json(result, settings, pipeline))
    if pictures:
        with whole_file(pictures) as temporary:
            Image.fromarray(np.concatenate(result.images, axis=1)).save(temporary, format="PNG")
    check_components(result, pipeline, source)
    console.print("every component is within the rounding of its dtype")


def _table(result: "LadderResult", title: str) -> Table:
    table = Table("stage", "tensor", "max abs", "relative RMS", "cosine", "PSNR dB", title=title)
    for row in (*result.components, *result.drift, result.picture):
        table.add_row(
            row.stage,
            row.tensor,
            f"{row.max_abs:.3g}",
            f"{row.relative_rms:.2e}",
            f"{row.cosine:.7f}",
            f"{row.psnr_db:.1f}",
            end_section=row is result.components[-1] or row is result.drift[-1],
        )
    return table


def _json(result: "LadderResult", settings: Any, pipeline: Any) -> bytes:
    import msgspec

    content = {
        "bundle_digest": pipeline.manifest.digest,
        "target": pipeline.target,
        "device": pipeline.backend.description,
        "settings": settings,
        "components": [_finite(row) for row in result.components],
        "drift": [_finite(row) for row in result.drift],
        "picture": _finite(result.picture),
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def _finite(row: "Parity") -> dict[str, Any]:
    """JSON has no infinity: an infinite PSNR (equal tensors) is null."""
    from dataclasses import asdict
    from math import isfinite

    return {
        key: None if isinstance(value, float) and not isfinite(value) else value for key, value in asdict(row).items()
    }
