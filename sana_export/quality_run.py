"""`sana-export compare --quality`: a bundle's pictures of the test prompts, read and scored.

A run writes its rows as it goes and continues from them: its file says for which bundle and settings they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sana_export.scenes.prompts import Prompt, test_prompts
from sana_export.scenes.quality import EQUAL_PSNR_DB, Fidelity, QualityRow, fidelity, measure_quality
from sana_export.scenes.scoring import Rate, summarise
from sana_export.scenes.sheet import SheetEntry, contact_sheet
from sana_runtime.errors import InputError
from sana_runtime.files import whole_file
from sana_runtime.pipeline import Pipeline
from sana_runtime.request import checked_settings

Pixels = npt.NDArray[np.uint8]

SHEET_PICTURES = 40
# A row is a second or more of painting: little is lost between two writes.
_ROWS_PER_WRITE = 10


@dataclass(frozen=True)
class QualityRequest:
    """What to paint and where to keep it. None for a number is the model's default, for a path "not wanted".

    `rows_file`: JSON, continued if it exists. `pictures`: a directory for the PNGs 0000.png, 0001.png, ...
    `references`: such a directory, of another bundle. `sheet`: a PNG of the first pictures with their prompts.
    """

    num_prompts: int
    seed: int = 0
    num_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""
    rows_file: Path | None = None
    pictures: Path | None = None
    references: Path | None = None
    sheet: Path | None = None


@dataclass(frozen=True)
class QualityReport:
    """Every row, the rates of `summarise`, and the distance from the references if there are any."""

    rows: tuple[QualityRow, ...]
    rates: tuple[Rate, ...]
    fidelity: Fidelity | None


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    """The rows file. JSON has no infinity: the PSNR of equal pictures is stored as `EQUAL_PSNR_DB`."""

    measurement: dict[str, Any]
    rates: list[Rate]
    fidelity: Fidelity | None
    rows: list[QualityRow]


class _Run:
    """One measurement under way."""

    def __init__(self, pipeline: Pipeline, request: QualityRequest, on_progress: Callable[[int, int], None]) -> None:
        self.pipeline, self.request, self.on_progress = pipeline, request, on_progress
        self.prompts = test_prompts(request.num_prompts)
        self.measurement = _measurement(pipeline, request)
        self.rows = {
            index: row
            for index, row in _finished(request.rows_file, self.measurement).items()
            if index < len(self.prompts) and (not request.pictures or _numbered(request.pictures, index).is_file())
        }
        self.unwritten = 0

    def paint(self, prompt: str, seed: int) -> Pixels:
        """The bundle's picture."""
        request = self.request
        picture = self.pipeline.generate(
            prompt,
            negative_prompt=request.negative_prompt,
            seed=seed,
            num_steps=request.num_steps,
            guidance_scale=request.guidance_scale,
        )
        if request.pictures:
            picture.save(_numbered(request.pictures, seed - request.seed))
        return picture.pixels

    def keep(self, row: QualityRow, _: Pixels) -> None:
        """Remember a row, and now and then write all of them."""
        self.rows[row.index] = row
        self.unwritten += 1
        if self.unwritten == _ROWS_PER_WRITE:
            self.write()
        self.on_progress(len(self.rows), len(self.prompts))

    def write(self) -> None:
        """The rows so far, whole or not at all."""
        self.unwritten = 0
        if self.request.rows_file is None or not self.rows:
            return
        rows = [self.rows[index] for index in sorted(self.rows)]
        stored = _Stored(
            self.measurement, list(summarise([row.score for row in rows])), fidelity(rows), [_finite(r) for r in rows]
        )
        with whole_file(self.request.rows_file) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(stored), indent=2) + b"\n")


def run_quality(
    pipeline: Pipeline, request: QualityRequest, on_progress: Callable[[int, int], None] = lambda done, of: None
) -> QualityReport:
    """Paint, read and score. `on_progress` is told how many of how many pictures are judged.

    Raises `InputError` for a rows file of another measurement and for missing reference pictures.
    """
    _check_folders(request)
    run = _Run(pipeline, request, on_progress)
    on_progress(len(run.rows), len(run.prompts))
    reference = None if request.references is None else _reader(request.references)
    try:
        rows = measure_quality(
            run.paint, run.prompts, seed=request.seed, finished=dict(run.rows), reference=reference, on_row=run.keep
        )
    finally:
        run.write()
    if request.sheet:
        _write_sheet(request.sheet, run.prompts, rows, run.paint, request)
    return QualityReport(rows, summarise([row.score for row in rows]), fidelity(rows))


def _measurement(pipeline: Pipeline, request: QualityRequest) -> dict[str, Any]:
    """All that decides the rows besides the number of prompts."""
    quantization = pipeline.manifest.quantization
    settings = checked_settings(
        pipeline.manifest,
        pipeline.target,
        prompt="any",
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        num_steps=request.num_steps,
        guidance_scale=request.guidance_scale,
    )
    return {
        **{key: value for key, value in asdict(settings).items() if key not in ("prompt", "latent_sha256")},
        "dtype": pipeline.manifest.component("transformer").dtype,
        "recipe": quantization.recipe if quantization else None,
        "solver": pipeline.manifest.scheduler.kind,
        "device": pipeline.backend.description,
        "references": None if request.references is None else str(request.references),
    }


def _finished(path: Path | None, measurement: dict[str, Any]) -> dict[int, QualityRow]:
    if path is None or not path.exists():
        return {}
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
    except msgspec.DecodeError as error:
        raise InputError(
            f"{path} is in the way",
            received=str(error),
            expected="rows of this command, or no such file",
            action="name another --json file",
        ) from error
    differing = [key for key, value in measurement.items() if stored.measurement.get(key) != value]
    if differing:
        key = differing[0]
        raise InputError(
            f"{path} holds the rows of another measurement",
            received=f"{key} {stored.measurement.get(key)!r}",
            expected=f"{key} {measurement[key]!r}",
            action="name another --json file, or delete this one",
        )
    return {row.index: row for row in stored.rows}


def _check_folders(request: QualityRequest) -> None:
    if request.pictures:
        _make_folder(request.pictures)
    if request.references is None:
        return
    last = _numbered(request.references, request.num_prompts - 1)
    missing = [index for index in range(request.num_prompts) if not _numbered(request.references, index).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} reference pictures are missing",
            received=f"no {_numbered(request.references, missing[0])}",
            expected=f"all up to {last.name}",
            action="paint them with: sana-export compare REFERENCE_BUNDLE --quality --quality-prompts "
            f"{request.num_prompts} --save-pictures {request.references}",
        )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot hold pictures",
            received=error.strerror or str(error),
            expected="a directory, or a path where one can be made",
            action="name another --save-pictures",
        ) from error


def _numbered(folder: Path, index: int) -> Path:
    return folder / f"{index:04d}.png"


def _reader(folder: Path) -> Callable[[int], Pixels]:
    def read(index: int) -> Pixels:
        return _picture(_numbered(folder, index))

    return read


def _picture(path: Path) -> Pixels:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read", received=str(error), expected="a PNG picture", action="paint it again"
        ) from error


def _finite(row: QualityRow) -> QualityRow:
    if row.psnr_db is None or isfinite(row.psnr_db):
        return row
    return replace(row, psnr_db=EQUAL_PSNR_DB)


def _write_sheet(
    path: Path,
    prompts: Sequence[Prompt],
    rows: Sequence[QualityRow],
    paint: Callable[[str, int], Pixels],
    request: QualityRequest,
) -> None:
    """The first pictures: from their folder if there is one, else painted once more."""
    from PIL import Image

    shown = rows[:SHEET_PICTURES]
    pictures = [
        _picture(_numbered(request.pictures, row.index)) if request.pictures else paint(row.prompt, row.seed)
        for row in shown
    ]
    entries = [SheetEntry(picture, row.prompt, row.score.overall) for picture, row in zip(pictures, shown, strict=True)]
    with whole_file(path) as temporary:
        Image.fromarray(contact_sheet(entries)).save(temporary, format="PNG")
