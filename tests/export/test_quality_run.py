"""`sana-export compare --quality` on a real bundle: rows, resumption, pictures, references."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_export.commands.compare import run as compare
from sana_export.quality_run import QualityReport, QualityRequest, run_quality
from sana_export.scenes.prompts import test_prompts as prompts_of_the_test_split
from sana_export.scenes.quality import EQUAL_PSNR_DB
from sana_export.scenes.reading import read_picture
from sana_export.scenes.scoring import score
from sana_runtime.errors import InputError
from sana_runtime.pipeline import Pipeline

COUNT = 3


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Callable[..., Path]) -> Pipeline:
    return Pipeline.load(tiny_bundle(), report=lambda line: None)


@pytest.fixture
def paint(pipeline: Pipeline, tmp_path: Path) -> Callable[..., tuple[QualityReport, int]]:
    """Run with these settings; the report, and how many pictures were painted."""

    def run(num_prompts: int = COUNT, **settings: object) -> tuple[QualityReport, int]:
        told: list[tuple[int, int]] = []
        request = QualityRequest(num_prompts, seed=3, num_steps=1, rows_file=tmp_path / "rows.json")
        request = QualityRequest(**{**vars(request), **settings})
        report = run_quality(pipeline, request, lambda done, of: told.append((done, of)))
        assert told[-1] == (num_prompts, num_prompts)
        return report, len(told) - 1

    return run


def test_rows_are_those_of_the_saved_pictures(
    pipeline: Pipeline, paint: Callable[..., tuple[QualityReport, int]], tmp_path: Path
) -> None:
    report, painted = paint(pictures=tmp_path / "pictures")
    assert painted == COUNT
    for index, prompt in enumerate(prompts_of_the_test_split(COUNT)):
        pixels = np.asarray(Image.open(tmp_path / "pictures" / f"{index:04d}.png"))
        again = pipeline.generate(prompt.text, seed=3 + index, num_steps=1)
        np.testing.assert_array_equal(pixels, again.pixels)
        assert report.rows[index].score == score(prompt, read_picture(pixels))
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["measurement"]["bundle_digest"] == pipeline.manifest.digest
    assert written["measurement"]["num_steps"] == 1
    assert [row["prompt"] for row in written["rows"]] == [p.text for p in prompts_of_the_test_split(COUNT)]
    assert written["rates"][0]["total"] == COUNT


def test_a_run_goes_on_where_it_stopped(paint: Callable[..., tuple[QualityReport, int]], tmp_path: Path) -> None:
    first, painted = paint()
    assert painted == COUNT
    longer, painted = paint(COUNT + 2)
    assert painted == 2
    assert longer.rows[:COUNT] == first.rows
    shorter, painted = paint(1)
    assert (painted, len(shorter.rows)) == (0, 1)
    # Rows whose pictures are wanted and were not kept are painted again.
    _, painted = paint(pictures=tmp_path / "pictures")
    assert painted == COUNT


def test_an_interrupted_run_keeps_its_rows(
    pipeline: Pipeline, paint: Callable[..., tuple[QualityReport, int]], tmp_path: Path
) -> None:
    def interrupt(done: int, of: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_quality(pipeline, QualityRequest(COUNT, 3, 1, rows_file=tmp_path / "rows.json"), interrupt)
    _, painted = paint()
    assert painted == COUNT - 2


def test_references(paint: Callable[..., tuple[QualityReport, int]], tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    paint(pictures=pictures)
    same, _ = paint(references=pictures, rows_file=tmp_path / "same.json")
    assert same.fidelity is not None
    assert (same.fidelity.mean_psnr_db, same.fidelity.mean_ssim) == (EQUAL_PSNR_DB, 1.0)
    # JSON has no infinity: the file is read back.
    _, painted = paint(references=pictures, rows_file=tmp_path / "same.json")
    assert painted == 0
    other, _ = paint(references=pictures, rows_file=None, num_steps=2)
    assert other.fidelity is not None
    assert 5 < other.fidelity.worst_psnr_db <= other.fidelity.mean_psnr_db < 60
    with pytest.raises(InputError, match="1 reference pictures are missing"):
        paint(COUNT + 1, references=pictures, rows_file=None)


def test_rows_of_another_measurement_are_refused(
    paint: Callable[..., tuple[QualityReport, int]], tmp_path: Path
) -> None:
    paint(1)
    with pytest.raises(InputError, match="num_steps"):
        paint(1, num_steps=2)
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(InputError, match="cannot hold pictures"):
        paint(1, pictures=tmp_path / "rows.json")
    with pytest.raises(InputError, match="is in the way"):
        paint(1)


def test_the_sheet_shows_every_picture(paint: Callable[..., tuple[QualityReport, int]], tmp_path: Path) -> None:
    paint(sheet=tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        width, height = sheet.size
    assert width > 3 * 224
    assert height > 224


def test_flags_of_quality_are_refused_without_it(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--save-pictures belongs to --quality"):
        compare(tiny_bundle(), save_pictures=tmp_path)


def test_the_table_gives_every_rate(
    paint: Callable[..., tuple[QualityReport, int]],
    tiny_bundle: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paint(pictures=tmp_path / "pictures")
    compare(
        tiny_bundle(),
        seed=3,
        num_steps=1,
        quality=True,
        quality_prompts=COUNT,
        json_file=tmp_path / "rows.json",
        save_pictures=tmp_path / "pictures",
        pictures=tmp_path / "sheet.png",
    )
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("all claims", "binding", "background", "interval"))
    assert (tmp_path / "sheet.png").is_file()
