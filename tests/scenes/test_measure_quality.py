"""Reference pictures are painted once, and kept."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sana_runtime.errors import InputError
from scripts.measure_quality import load_pictures, save_pictures

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
