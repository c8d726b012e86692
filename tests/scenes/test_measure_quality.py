"""Reference pictures are painted once, and kept; which rows are measured again."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sana_runtime.errors import InputError
from scripts.measure_quality import (
    Row,
    Way,
    _measure,
    load_pictures,
    read_rows,
    save_pictures,
    scheduler_of,
    write_rows,
)

PICTURES = [np.random.default_rng(i).integers(0, 256, (8, 12, 3), np.uint8) for i in range(3)]


def test_reference_pictures_come_back_as_they_were(tmp_path: Path) -> None:
    folder = tmp_path / "references" / "some"
    save_pictures(folder, iter(PICTURES))
    np.testing.assert_array_equal(load_pictures(folder, 3), PICTURES)
    assert [entry.name for entry in folder.parent.iterdir()] == ["some"]


def test_an_interrupted_painting_leaves_no_folder(tmp_path: Path) -> None:
    def interrupted() -> Iterator[np.ndarray]:
        yield PICTURES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_pictures(tmp_path / "some", interrupted())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"\x89PNG")])
def test_a_damaged_reference_is_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    folder = tmp_path / "some"
    save_pictures(folder, PICTURES)
    damage(folder / "0001.png")
    with pytest.raises(InputError, match="reference pictures cannot be read"):
        load_pictures(folder, 3)


def made_row(way: Way, weights: str, compared: int) -> Row:
    figures: dict[str, Any] = {field.name: 0.5 for field in fields(Row)}
    figures |= {"prompts": 3, "compared": compared, "recipe": "", "weights": weights}
    scheduler = scheduler_of(way.solver)
    figures |= {"flow_shift": scheduler.flow_shift, "guidance_scale": scheduler.default_guidance_scale}
    return Row(**(figures | asdict(way)))


@pytest.mark.parametrize("compared", [1, 3])
def test_rows_of_other_weights_go_and_fewer_comparisons_do_not_pass_for_more(tmp_path: Path, compared: int) -> None:
    dpm, euler = (Way("fp32", "onnxruntime", solver, 28) for solver in ("flow_dpm_solver", "flow_euler"))
    path = tmp_path / "rows.csv"
    write_rows(path, [asdict(made_row(dpm, "old", 3)), asdict(made_row(euler, "new", 2))])
    asked: list[Way] = []

    def row(way: Way) -> Row:
        asked.append(way)
        return made_row(way, "new", compared)

    measurement: Any = SimpleNamespace(weights="new", texts=("a", "b", "c"), compared=compared, row=row)
    arguments = Namespace(rows=path, minutes=None, precision=["fp32"], steps=[28], target=["onnxruntime"])
    _measure(arguments, measurement)
    assert asked == ([] if compared == 1 else [euler])
    found = {(row["weights"], row["compared"]) for row in read_rows(path)}
    assert found == ({("old", "3"), ("new", "2")} if compared == 1 else {("new", "3")})


@pytest.mark.parametrize("setting", ["flow_shift", "guidance_scale"])
def test_rows_of_other_sampling_settings_stay_behind_those_of_the_shipped_ones(tmp_path: Path, setting: str) -> None:
    way = Way("fp32", "onnxruntime", "flow_euler", 28)
    path = tmp_path / "rows.csv"
    write_rows(path, [{**asdict(made_row(way, "same", 3)), setting: 2.5}])
    measurement: Any = SimpleNamespace(
        weights="same", texts=("a", "b", "c"), compared=3, row=lambda way: made_row(way, "same", 3)
    )
    arguments = Namespace(rows=path, minutes=None, precision=["fp32"], steps=[28], target=["onnxruntime"])
    _measure(arguments, measurement)
    shipped = asdict(made_row(way, "same", 3))[setting]
    assert [row[setting] for row in read_rows(path)] == [str(shipped), "2.5"]
