"""Pictures: one renderer for all sizes, batches and devices, and every shape is what its name says."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from sana_export.scenes.rendering import SceneBatch, pack, render, render_uint8
from sana_export.scenes.scene import EXTENT, Scene, SceneObject, sample_scene
from sana_export.scenes.vocabulary import COLOURS, GRADIENT, SHADES, SHAPES, TEXTURES
from sana_runtime.errors import InputError


def one(shape: str, texture: str = "plain", radius: float = 0.4, angle: float = 0.0, **changes: object) -> Scene:
    item = SceneObject(shape, "red", "large", texture, 0.5, 0.5, radius, angle)
    return Scene((dataclasses.replace(item, **changes),), "white", "plain")


def coverage(scene: Scene, side: int = 256) -> torch.Tensor:
    """[side, side] in 0..1: how much of each pixel a red object on white covers, from its green channel."""
    green = render(pack([scene]), side, "cpu")[0, 1]
    white, red = COLOURS["white"][1] / 255, COLOURS["red"][1] / 255
    return (white - green) / (white - red)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(seed, "train") for seed in range(12)]


def test_a_batch_is_its_scenes(scenes: list[Scene]) -> None:
    batch = render(pack(scenes), 96, "cpu")
    assert batch.shape == (len(scenes), 3, 96, 96)
    assert batch.dtype == torch.float32
    assert 0 <= batch.min() <= batch.max() <= 1
    pictures = (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for picture, scene in zip(pictures, scenes, strict=True):
        np.testing.assert_array_equal(render_uint8(scene, 96), picture)


def test_half_the_side_is_the_average_of_the_whole(scenes: list[Scene]) -> None:
    """Anti-aliasing is an area: only where an outline bends inside a pixel may the two differ."""
    small, large = render(pack(scenes), 128, "cpu"), avg_pool2d(render(pack(scenes), 256, "cpu"), 2)
    difference = (small - large).abs()
    assert difference.max() < 0.3
    assert difference.mean() < 1e-3


def test_compiled_without_a_break_it_is_the_same(scenes: list[Scene]) -> None:
    """fullgraph: no control flow depends on the data. The backend is the tracer's own: no C++ compiler is needed."""
    compiled = torch.compile(render, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pack(scenes), 64, "cpu"), render(pack(scenes), 64, "cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_paints_the_same(scenes: list[Scene]) -> None:
    # One level of 255 and a rounding: fast sines and square roots differ in the last bits of fp32.
    torch.testing.assert_close(
        render(pack(scenes), 256, "cuda").cpu(), render(pack(scenes), 256, "cpu"), atol=5e-3, rtol=0
    )


def areas() -> dict[str, float]:
    """Areas for radius 1, from geometry."""
    lens = _lens(1.0, 0.8, 0.4)
    arrow_head = 0.5 * (0.02 + 1.07) * 2 * (0.02 + 1.07) * 0.85 / 1.07
    return {
        "circle": np.pi * 0.95**2,
        "square": 1.6**2,
        "triangle": 3 * np.sqrt(3) * 0.55**2,
        "diamond": 2 * 0.78 * 1.08,
        "cross": 4 * 0.32 * 0.98 * 2 - 4 * 0.32**2,
        "ring": np.pi * (0.99**2 - 0.49**2),
        "crescent": np.pi - lens,
        "arrow": arrow_head + 0.66 * 1.0,
        # Ten triangles from the centre to a point and a notch.
        "star": 10 * 0.5 * 1.1 * _notch() * np.sin(np.pi / 5),
    }


def _lens(a: float, b: float, distance: float) -> float:
    """The area that two circles share."""
    left = a**2 * np.arccos((distance**2 + a**2 - b**2) / (2 * distance * a))
    right = b**2 * np.arccos((distance**2 + b**2 - a**2) / (2 * distance * b))
    root = np.sqrt((-distance + a + b) * (distance + a - b) * (distance - a + b) * (distance + a + b))
    return float(left + right - root / 2)


def _notch() -> float:
    """Distance of a star's inner corner: where the edge from the point meets the next fold."""
    edge_x, edge_y = 0.45 * np.sin(np.pi / 5), 0.45 * np.cos(np.pi / 5) - 1
    share = 1.1 * np.sin(np.pi / 5) / (edge_x * np.cos(np.pi / 5) - edge_y * np.sin(np.pi / 5))
    return float(share * edge_x / np.sin(np.pi / 5))


@pytest.mark.parametrize("shape", areas())
def test_area(shape: str) -> None:
    radius, side = 0.4, 256
    measured = float(coverage(one(shape, radius=radius), side).sum()) / (radius * side) ** 2
    # An outline of at most 16 radii, wrong by less than a hundredth of a pixel.
    assert measured == pytest.approx(areas()[shape], abs=16 * 0.01 / (radius * side) + 0.005)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_reaches_beyond_its_extent(shape: str) -> None:
    radius, side = 0.35, 256
    covered = coverage(one(shape, radius=radius, angle=8.0), side) > 0.01
    y, x = np.nonzero(covered.numpy())
    reach = np.hypot((x + 0.5) / side - 0.5, (y + 0.5) / side - 0.5).max()
    assert reach <= EXTENT * radius + 1 / side
    assert reach >= 0.9 * radius


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "crescent"])
def test_shapes_are_symmetric(shape: str) -> None:
    upright = coverage(one(shape))
    torch.testing.assert_close(upright, upright.flip(1), atol=1e-3, rtol=0)


def test_angles_turn_clockwise() -> None:
    turned = coverage(one("arrow", angle=8.0))
    top = turned[: turned.shape[0] // 4].nonzero()[:, 1].float().mean()
    assert top > turned.shape[1] / 2


@pytest.mark.parametrize("texture", TEXTURES[1:])
def test_textures_use_two_tones_and_keep_the_outline(texture: str) -> None:
    plain, textured = (render_uint8(one("square", name), 256) for name in ("plain", texture))
    inside = (plain == COLOURS["red"]).all(-1)
    tones, counts = np.unique(textured[inside], axis=0, return_counts=True)
    common = {tuple(int(value) for value in tone) for tone, count in zip(tones, counts, strict=True) if count > 999}
    assert common == {COLOURS["red"], SHADES["red"]}
    outside = (plain == COLOURS["white"]).all(-1)
    assert (textured[outside] == COLOURS["white"]).all()


@pytest.mark.parametrize(("kind", "axis"), [("vertical", 0), ("horizontal", 1)])
def test_gradients_darken(kind: str, axis: int) -> None:
    empty = Scene((SceneObject("circle", "red", "small", "plain", 0.5, 0.5, 0.001, 0.0),), "green", kind)
    profile = render_uint8(empty, 256)[..., 1].astype(float).mean(axis=1 - axis)
    assert profile[0] == pytest.approx(COLOURS["green"][1], abs=1)
    assert profile[-1] == pytest.approx(COLOURS["green"][1] * (1 - GRADIENT), abs=1)
    assert (np.diff(profile) <= 0.05).all()


def test_rows_and_devices_keep_the_scenes(scenes: list[Scene]) -> None:
    batch = pack(scenes)
    picked = batch.to("cpu").rows(torch.tensor([3, 1]))
    assert isinstance(picked, SceneBatch)
    torch.testing.assert_close(render(picked, 48, "cpu"), render(pack([scenes[3], scenes[1]]), 48, "cpu"))


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(InputError, match="no scenes"):
        pack([])
