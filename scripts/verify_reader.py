"""Prove that the evaluator reads pictures right: on pictures whose content is known, clean and degraded.

Renders scenes of the test split, degrades them as a slightly imperfect painter would, reads them back, and writes one
row per condition and attribute to benchmarks/results/reader_accuracy.csv. Exit code 1 where fewer than 99 % of the
pictures of a condition are read right in all their claims.

    python scripts/verify_reader.py
"""

import argparse
import csv
import io
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

# A picture is small work: processes, not threads, share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
from PIL import Image
from skimage.filters import gaussian

from sana_export.scenes.prompts import Prompt, expectation_of
from sana_export.scenes.reading import read_picture
from sana_export.scenes.rendering import render_uint8
from sana_export.scenes.scene import sample_scene
from sana_export.scenes.scoring import Score, score, summarise
from sana_runtime.files import whole_file

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "reader_accuracy.csv"
WANTED = 0.99

Floats = npt.NDArray[np.float64]
Degradation = Callable[[Floats, np.random.Generator], Floats]


def blurred(pixels: Floats, _: np.random.Generator) -> Floats:
    """Gaussian, sigma 1 px."""
    return gaussian(pixels, 1, channel_axis=-1)


def noisy(pixels: Floats, draw: np.random.Generator) -> Floats:
    """Gaussian per value, sigma 4 of 255."""
    return pixels + draw.normal(0, 4, pixels.shape)


def shifted(pixels: Floats, draw: np.random.Generator) -> Floats:
    """Brightness by up to 12 of 255, each channel by up to 6 more."""
    return pixels + draw.uniform(-12, 12) + draw.uniform(-6, 6, 3)


def compressed(pixels: Floats, _: np.random.Generator) -> Floats:
    """JPEG of quality 40 with halved chroma."""
    file = io.BytesIO()
    Image.fromarray(rounded(pixels)).save(file, format="JPEG", quality=40, subsampling=2)
    return np.asarray(Image.open(file), dtype=np.float64)


def rounded(pixels: Floats) -> npt.NDArray[np.uint8]:
    """The picture that a file would hold."""
    return pixels.round().clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Condition:
    """`pictures`: how many test scenes are rendered at `side` pixels and degraded."""

    name: str
    degradations: tuple[Degradation, ...]
    side: int
    pictures: int


ALL = (blurred, shifted, noisy, compressed)
CONDITIONS = (
    Condition("clean", (), 512, 2000),
    Condition("blur + shift + noise + JPEG", ALL, 512, 2000),
    Condition("clean", (), 256, 1000),
    Condition("blur + shift + noise + JPEG", ALL, 256, 1000),
    Condition("blur", (blurred,), 512, 250),
    Condition("shift", (shifted,), 512, 250),
    Condition("noise", (noisy,), 512, 250),
    Condition("JPEG", (compressed,), 512, 250),
    Condition("clean", (), 1024, 200),
)


@dataclass(frozen=True)
class Row:
    """`right` of `pictures` that make the claim; the interval is Wilson's, 95 %, in percent."""

    condition: str
    side_px: int
    attribute: str
    pictures: int
    right: int
    right_percent: float
    low_percent: float
    high_percent: float


def judged(condition: Condition, seed: int) -> Score:
    """The score of one scene's picture against everything that its scene claims."""
    scene = sample_scene(seed, "test")
    draw = np.random.default_rng(seed)
    pixels = render_uint8(scene, condition.side).astype(np.float64)
    for degrade in condition.degradations:
        pixels = degrade(pixels, draw)
    found = score(Prompt("", "single", expectation_of(scene)), read_picture(rounded(pixels)))
    if not found.overall:
        print(f"misread: {condition.name}, {condition.side} px, test scene {seed}: {found}", file=sys.stderr)
    return found


def rows(condition: Condition, pool: ProcessPoolExecutor, limit: int | None) -> Iterator[Row]:
    """One row for all claims together, one per attribute."""
    seeds = range(min(condition.pictures, limit or condition.pictures))
    scores = list(pool.map(partial(judged, condition), seeds, chunksize=20))
    for found in summarise(scores):
        if found.scope == "kind":
            continue
        percents = (round(100 * value, 2) for value in (found.rate, found.low, found.high))
        yield Row(condition.name, condition.side, found.name, found.total, found.passed, *percents)


def main() -> int:
    """Measure, write the table, and judge it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--pictures", type=int, help="at most this many per condition, for a quick look")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write (default: %(default)s)")
    arguments = parser.parse_args()
    table = []
    with ProcessPoolExecutor(arguments.processes) as pool:
        for condition in CONDITIONS:
            found = list(rows(condition, pool, arguments.pictures))
            print(*asdict(found[0]).values(), sep="  ", flush=True)
            table += found
    with whole_file(arguments.output) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, asdict(table[0]).keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in table)
    missed = [row for row in table if row.attribute == "overall" and row.right < WANTED * row.pictures]
    for row in missed:
        print(f"below {WANTED:.0%}: {row}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
