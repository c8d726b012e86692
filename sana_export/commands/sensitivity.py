"""`sana-export sensitivity`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sana_export.commands.options import Base, Bundle, Variant, check_files

if TYPE_CHECKING:
    from sana_calibration.rules import Recipe
    from sana_calibration.scales import Scales
    from sana_export.sensitivity_run import SensitivityReport
    from sana_export.weights.checkpoint import Checkpoint
    from sana_runtime.manifest import QuantizationEntry


def run(
    bundle: Bundle,
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="DB", help="Propose exclusions until the velocity's SQNR is at most DB below the base dtype's."
        ),
    ] = None,
    write_recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the recipe with the proposed exclusions (YAML).")
    ] = None,
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Rank single layers, not a layer's place in the block over all blocks.")
    ] = False,
    prompts: Annotated[int, typer.Option(metavar="N", min=1, help="How many of the prompts are painted.")] = 1,
    num_steps: Annotated[int, typer.Option(metavar="N", min=1, help="Solver steps per prompt.")] = 4,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Default: the checkpoint the bundle was built from.")
    ] = None,
    variant: Variant = None,
    base: Base = None,
) -> None:
    """Rank which of the transformer's layers a quantised bundle's recipe hurts most, and propose exclusions.

    One group at a time is quantised with the bundle's calibration, in PyTorch, on real denoising steps at the bundle's
    size, with the model's calibration prompts or the shipped ones. Build again with the written recipe: --recipe FILE.
    """
    from tempfile import TemporaryDirectory

    from sana_calibration.recipe import load_recipe
    from sana_export.quantize import calibration_prompts
    from sana_export.sensitivity_run import measure_sensitivity
    from sana_export.weights.checkpoint import open_checkpoint
    from sana_runtime.errors import InputError
    from sana_runtime.manifest import read_manifest

    check_files({"--write-recipe": write_recipe})
    manifest = read_manifest(bundle)
    if manifest.quantization is None:
        raise InputError(
            f"{bundle} quantises nothing",
            received=f"a bundle in {manifest.components[0].dtype}",
            expected="a bundle built with a recipe",
            action="sana-export build MODEL --precision fp8 ...",
        )
    source = open_checkpoint(checkpoint or manifest.model.source, variant=variant or manifest.model.variant, base=base)
    recipe = load_recipe(bundle / manifest.quantization.recipe_file)
    scales = _scales(bundle, manifest.quantization, source, recipe)
    console = Console(highlight=False)
    painted = calibration_prompts(source, None, console.print)[:prompts]
    with console.status("measuring") as status, TemporaryDirectory() as folder:
        report = measure_sensitivity(
            source,
            recipe,
            scales,
            painted,
            seed=0,
            num_steps=num_steps,
            height=manifest.height,
            width=manifest.width,
            work_folder=Path(folder),
            on_progress=lambda fraction, text: status.update(f"{fraction:.0%} {text}"),
            max_drop_db=max_drop,
            by_layer=by_layer,
        )
    console.print(_table(recipe, report))
    _write_proposal(console, recipe, report, write_recipe)


def _scales(bundle: Path, entry: "QuantizationEntry", checkpoint: "Checkpoint", recipe: "Recipe") -> "Scales":
    """The bundle's calibration; empty where the recipe needs none."""
    from sana_calibration.scales import Provenance, Scales
    from sana_export.calibration_run import sampling_of
    from sana_runtime.contract import COMPONENTS

    weights: dict[str, str] = {name: checkpoint.digest(name) for name in COMPONENTS}
    if entry.calibration_file is None:
        return Scales({}, Provenance(weights, recipe.digest, "", 0, 0, 0, 0))
    sampling = sampling_of(checkpoint)
    return Scales.load(bundle / entry.calibration_file, weights=weights, recipe=recipe.digest, sampling=sampling)


def _table(recipe: "Recipe", report: "SensitivityReport") -> Table:
    title = f"velocity SQNR: {recipe.name} {report.whole_db:.1f} dB, base dtype alone {report.base_db:.1f} dB"
    table = Table("quantised alone", "layers", "SQNR dB", title=title)
    for group in report.ranking:
        table.add_row(group.group, str(len(group.layers)), f"{group.sqnr_db:.1f}")
    return table


def _write_proposal(console: Console, recipe: "Recipe", report: "SensitivityReport", path: Path | None) -> None:
    from sana_calibration.recipe import recipe_yaml
    from sana_runtime.files import whole_file

    if report.proposal is None:
        return
    exclusions = report.proposal.exclusions
    for exclusion in exclusions:
        console.print(f"exclude {exclusion.pattern}: {exclusion.reason}", soft_wrap=True)
    console.print(f"{len(exclusions)} exclusions leave {report.proposal.sqnr_db:.1f} dB")
    if path is not None:
        with whole_file(path) as temporary:
            temporary.write_bytes(recipe_yaml(recipe.excluding(tuple(exclusions))).encode())
        console.print(f"wrote {path}: build with --recipe {path}")
