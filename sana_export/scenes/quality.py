"""Paint prompts, read the pictures, and say how many claims hold and how far the pictures are from given ones."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sana_export.parity.metrics import measure, ssim
from sana_export.scenes.prompts import Prompt
from sana_export.scenes.reading import PictureReading, read_picture
from sana_export.scenes.scoring import Score, score
from sana_runtime.errors import InputError

Pixels = npt.NDArray[np.uint8]
Paint = Callable[[str, int], Pixels]
"""(prompt, seed) -> picture [H, W, 3]."""

# Equal pictures have no finite ratio: in averages they count as this many dB.
EQUAL_PSNR_DB = 100.0


@dataclass(frozen=True)
class QualityRow:
    """One picture. `psnr_db`, `ssim`: against the reference picture of this index, None without one."""

    index: int
    seed: int
    prompt: str
    score: Score
    reading: PictureReading
    psnr_db: float | None = None
    ssim: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """How far pictures are from their references; equal pictures count as `EQUAL_PSNR_DB`."""

    pictures: int
    mean_psnr_db: float
    worst_psnr_db: float
    mean_ssim: float


def measure_quality(
    paint: Paint,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    finished: Mapping[int, QualityRow] | None = None,
    reference: Callable[[int], Pixels] | None = None,
    on_row: Callable[[QualityRow, Pixels], None] | None = None,
) -> tuple[QualityRow, ...]:
    """Judge every prompt's picture; prompt i is painted from the seed `seed` + i.

    `finished`: rows of an earlier run by index, which are not painted again. `reference`: gives the picture that
    prompt i is compared with. `on_row` is told each new row and its picture.
    Raises `InputError` where a finished row is of another prompt or seed, `BuildError` where a reference differs in
    size.
    """
    known = finished or {}
    found = []
    for index, prompt in enumerate(prompts):
        row = known.get(index)
        if row is None:
            picture = paint(prompt.text, seed + index)
            row = _row(index, seed + index, prompt, picture, reference(index) if reference else None)
            if on_row:
                on_row(row, picture)
        elif (row.prompt, row.seed) != (prompt.text, seed + index):
            raise InputError(
                "finished rows belong to another measurement",
                received=f"row {index}: {row.prompt!r}, seed {row.seed}",
                expected=f"{prompt.text!r}, seed {seed + index}",
                action="write to a new file",
            )
        found.append(row)
    return tuple(found)


def fidelity(rows: Sequence[QualityRow]) -> Fidelity | None:
    """Over the rows that have a reference; None if none has."""
    psnrs = [min(row.psnr_db, EQUAL_PSNR_DB) for row in rows if row.psnr_db is not None]
    ssims = [row.ssim for row in rows if row.ssim is not None]
    if not psnrs:
        return None
    return Fidelity(len(psnrs), math.fsum(psnrs) / len(psnrs), min(psnrs), math.fsum(ssims) / len(ssims))


def _row(index: int, seed: int, prompt: Prompt, picture: Pixels, reference: Pixels | None) -> QualityRow:
    reading = read_picture(picture)
    row = QualityRow(index, seed, prompt.text, score(prompt, reading), reading)
    if reference is None:
        return row
    distance = measure(f"picture {index}", "image", picture, reference)
    return QualityRow(
        row.index, row.seed, row.prompt, row.score, row.reading, distance.psnr_db, ssim(picture, reference)
    )
