"""The PNG file: pixels, settings, and that it is whole or absent."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_runtime import image as image_module
from sana_runtime.errors import InputError
from sana_runtime.image import Picture, Settings


def picture(prompt: str = "a fox") -> Picture:
    pixels = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    settings = Settings(prompt, "blurry", 3, 20, 4.5, 64, 96, None, "toy/sana", "d" * 64, "onnxruntime", "0.1.0")
    return Picture(pixels, settings, {"total": 1.0})


@pytest.mark.parametrize("prompt", ["a fox", "été 雪 🦊", "line\nbreak", "[bold]", "x" * 5000], ids=ascii)
def test_pixels_and_settings_survive(tmp_path: Path, prompt: str) -> None:
    original = picture(prompt)
    original.save(tmp_path / "fox.png")
    with Image.open(tmp_path / "fox.png") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), original.pixels)
        text = image.text  # type: ignore[attr-defined]
    stored = json.loads(text["sana"])
    assert stored["prompt"] == prompt
    assert stored["seed"] == 3
    assert stored["bundle_digest"] == "d" * 64
    assert text["parameters"].startswith(prompt + "\nNegative prompt: blurry\nSteps: 20, CFG scale: 4.5, Seed: 3")
    assert "Size: 96x64" in text["parameters"]


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "fox.png"
    path.write_bytes(b"old")
    picture().save(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fox.png"
    path.write_bytes(b"old")

    def fail(self: Image.Image, target: Path, **options: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(image_module.Image.Image, "save", fail)
    with pytest.raises(InputError, match="Input/output error"):
        picture().save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_outputs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.png"):
        picture().save(tmp_path / "fox")
    with pytest.raises(InputError, match="there is no directory"):
        picture().save(tmp_path / "missing" / "fox.png")
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(InputError, match="it is a directory"):
        picture().save(tmp_path / "dir.png")
