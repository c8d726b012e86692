"""Paint the README's pictures: docs/pictures/precisions.png and docs/pictures/prompts.png.

    python scripts/make_front_page.py                       # builds what is missing in demo/front-page, then paints
    python scripts/make_front_page.py --fp8 demo/bundle     # a bundle of nano that is there already

Nothing is chosen by hand. The first picture shows the demo's prompt and the first test prompts of several objects, by
each precision; the second one the first test prompts by fp8. Prompt i is painted from seed i, the demo's from seed 0,
by ONNX Runtime with the model's settings. Every picture is read: a green frame if it is what its prompt says, else a
red one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console

from sana_export.build import build
from sana_export.build_request import BuildRequest
from sana_export.commands.build import ProgressReport
from sana_export.scenes.prompts import DEMO_PROMPT, Prompt, test_prompts
from sana_export.scenes.reading import read_picture
from sana_export.scenes.scoring import score
from sana_export.scenes.sheet import SheetEntry, contact_sheet
from sana_export.weights.checkpoint import SHIPPED_MODEL, SHIPPED_SIDE
from sana_runtime import Pipeline
from sana_runtime.errors import InputError, SanaError
from sana_runtime.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
PRECISIONS = ("fp32", "fp8", "int8")
SHEET_PRECISION = "fp8"
SHEET_PROMPTS = 24
# Kinds with three or more objects: the first prompt of each stands beside the demo's.
MANY_OBJECTS = ("groups", "mixed")

Pixels = npt.NDArray[np.uint8]
Task = tuple[Prompt, int]


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 with the reason printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for precision in PRECISIONS:
        parser.add_argument(f"--{precision}", type=Path, metavar="BUNDLE", help=f"nano in {precision}, for onnxruntime")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "demo" / "front-page", metavar="DIR", help="where missing bundles are built"
    )
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    try:
        bundles = {name: getattr(options, name) or built(name, options.work, console) for name in PRECISIONS}
        pipelines = {name: opened(name, folder) for name, folder in bundles.items()}
        paint_precisions(pipelines, console)
        paint_prompts(pipelines[SHEET_PRECISION], console)
    except SanaError as error:
        console.print(str(error), markup=False)
        return 1
    return 0


def built(precision: str, work: Path, console: Console) -> Path:
    """The bundle of `nano`, built unless it is there. Without the gate, which changes nothing that paints."""
    output = work / precision
    request = BuildRequest(
        SHIPPED_MODEL,
        precision,
        ("onnxruntime",),
        SHIPPED_SIDE,
        SHIPPED_SIDE,
        output,
        base_precision=None if precision == "fp32" else "fp32",
        gate=False,
    )
    console.print(f"{SHIPPED_MODEL} in {precision}: {output}")
    with ProgressReport(console) as reporter:
        build(request, reporter)
    return output


def opened(precision: str, folder: Path) -> Pipeline:
    """Raises `InputError` for a bundle that would stand under a wrong name."""
    pipeline = Pipeline.load(folder, "onnxruntime", report=lambda line: None)
    manifest = pipeline.manifest
    quantization = manifest.quantization
    found = quantization.recipe if quantization else manifest.component("transformer").dtype
    wanted = "float32" if precision == "fp32" else precision
    if (manifest.model.source, found) != (SHIPPED_MODEL, wanted):
        raise InputError(
            f"{folder} cannot stand for {precision}",
            received=f"{manifest.model.source} in {found}",
            expected=f"{SHIPPED_MODEL} in {wanted}",
            action=f"leave out --{precision}, and it is built",
        )
    return pipeline


def paint_precisions(pipelines: dict[str, Pipeline], console: Console) -> None:
    """A row per prompt, a column per precision."""
    tests = [*enumerate(test_prompts(SHEET_PROMPTS))]
    firsts = [next((prompt, seed) for seed, prompt in tests if prompt.kind == kind) for kind in MANY_OBJECTS]
    entries = [
        painted(pipeline, task, f"{precision}: {task[0].text}")
        for task in [(DEMO_PROMPT, 0), *firsts]
        for precision, pipeline in pipelines.items()
    ]
    save("precisions.png", contact_sheet(entries, columns=len(pipelines), side=176), entries, console)


def paint_prompts(pipeline: Pipeline, console: Console) -> None:
    """The first test prompts."""
    tasks = [(prompt, seed) for seed, prompt in enumerate(test_prompts(SHEET_PROMPTS))]
    entries = [painted(pipeline, task, task[0].text) for task in tasks]
    save("prompts.png", contact_sheet(entries, columns=6, side=160), entries, console)


def painted(pipeline: Pipeline, task: Task, text: str) -> SheetEntry:
    """The picture of a prompt and a seed, read."""
    prompt, seed = task
    pixels = pipeline.generate(prompt.text, seed=seed).pixels
    return SheetEntry(pixels, text, score(prompt, read_picture(pixels)).overall)


def save(name: str, sheet: Pixels, entries: Sequence[SheetEntry], console: Console) -> None:
    """Write the sheet and say how many of its pictures are right."""
    path = PICTURES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG", optimize=True)
    right = sum(bool(entry.right) for entry in entries)
    console.print(f"{path.relative_to(ROOT)}: {right} of {len(entries)} right, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
