"""`make demo` says whether its picture is what the prompt says: of one drawn to be right, and of its mirror image."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sana_export.scenes.prompts import DEMO_PROMPT, expectation_of
from sana_export.scenes.rendering import render_uint8
from sana_export.scenes.scene import Scene, SceneObject
from scripts import demo

CIRCLE = SceneObject("circle", "red", "medium", "plain", 0.25, 0.5, 0.14, 0.0)
SQUARE = SceneObject("square", "blue", "medium", "plain", 0.7, 0.5, 0.14, 0.0)
SCENE = Scene((CIRCLE, SQUARE), "green", "plain")


def judged(picture: np.ndarray, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, str]:
    Image.fromarray(picture).save(folder / "picture.png")
    monkeypatch.setattr(demo, "PICTURE", folder / "picture.png")
    output = io.StringIO()
    right = demo.judge(Console(file=output, width=200))
    return right, output.getvalue()


def test_prompt_claims_what_it_says() -> None:
    assert DEMO_PROMPT.text == "a red circle left of a blue square on a green background"
    assert DEMO_PROMPT.expected == expectation_of(SCENE)


def test_right_picture_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, output = judged(render_uint8(SCENE, 256), tmp_path, monkeypatch)
    assert right, output
    assert "WRONG" not in output
    assert "red circle at (0.25, 0.50), blue square at (0.70, 0.50) on green" in output


def test_mirror_image_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, output = judged(np.ascontiguousarray(render_uint8(SCENE, 256)[:, ::-1]), tmp_path, monkeypatch)
    assert not right
    assert {line.split()[0] for line in output.splitlines() if line.endswith("WRONG")} == {"position", "binding"}


def test_flat_picture_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, output = judged(np.full((256, 256, 3), 120, np.uint8), tmp_path, monkeypatch)
    assert not right
    assert "seen:   nothing" in output
