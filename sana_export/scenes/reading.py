"""What a picture shows, by classic image analysis: no weights, so that it cannot have learnt a painter's habits.

Background: a plane in CIELAB through the picture's border, outliers left out. Foreground: what differs from it.
Colour: the vote of an object's pixels for the nearest tone. Shape: overlap with templates that the renderer painted.
"""

from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

from sana_export.scenes.rendering import render_uint8
from sana_export.scenes.scene import MAX_ANGLE, Scene, SceneObject
from sana_export.scenes.vocabulary import COLOURS, GRADIENT, SHADES, SHAPES
from sana_runtime.errors import InputError

Floats = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]

UNCLEAR: Final = "unclear"
"""The shape of an object that overlaps no template well enough."""

# Pictures are read at this size: the shorter side, in pixels.
_SIDE: Final = 256
_SMOOTHING: Final = 0.7
_BORDER: Final = 3
# CIELAB distances. An object's tone differs by more than twice this from the background it may lie on.
_FOREGROUND: Final = 12.0
_TRIMS: Final = (40.0, 20.0, 10.0, 6.0, 6.0)
# A fit to less than this share of the pixels would follow something else than the background.
_MIN_BACKGROUND: Final = 0.2
# A quarter of the smallest object's area, as a share of the picture.
_SPECK: Final = 0.0025
_VOTERS: Final = 1000
_GRID: Final = 48
# Half the width of the grid in units of the square root of the object's area.
_REACH: Final = 1.3
_MIN_OVERLAP: Final = 0.75


@dataclass(frozen=True)
class SeenObject:
    """`shape`: of `SHAPES`, or `UNCLEAR`. `x`, `y` (down): centre as fractions of width and height. `radius`: as a
    fraction of the shorter side. `overlap`: intersection over union with the shape's template, 0..1.
    """

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    overlap: float = 1.0


@dataclass(frozen=True)
class PictureReading:
    """Objects from the largest area to the smallest."""

    background_colour: str
    objects: tuple[SeenObject, ...]


def read_picture(picture: npt.NDArray[np.uint8]) -> PictureReading:
    """Read a picture [H, W, 3] uint8 sRGB of at least 64 px. Raises `InputError` for any other array."""
    lab = _lab(_checked(picture))
    background = _background(lab)
    distance = np.linalg.norm(lab - background, axis=-1)
    masks = _objects(distance)
    objects = tuple(_seen(mask, distance, lab) for mask in masks)
    return PictureReading(_background_colour(background), objects)


def _checked(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    right = picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and min(picture.shape[:2]) >= 64
    if not right:
        raise InputError(
            "this array is not a picture that can be read",
            received=f"{picture.dtype} {picture.shape}",
            expected="uint8 [H, W, 3] with sides of 64 pixels or more",
            action="pass the pixels of a picture, as Pipeline.generate returns them",
        )
    return picture


def _lab(picture: npt.NDArray[np.uint8]) -> Floats:
    """CIELAB [h, w, 3] with the shorter side of `_SIDE` pixels, slightly smoothed."""
    from skimage.color import rgb2lab
    from skimage.filters import gaussian

    pixels = _resized(picture, min(picture.shape[:2]) / _SIDE) / 255
    return rgb2lab(gaussian(pixels, _SMOOTHING, channel_axis=-1))


def _resized(picture: npt.NDArray[np.uint8], factor: float) -> Floats:
    """Smaller by a factor: the mean of the area that each new pixel covers. fp32 in 0..255."""
    height, width = (round(length / factor) for length in picture.shape[:2])
    step = round(factor)
    if picture.shape[:2] == (height * step, width * step):
        total = np.zeros((height, width, 3), np.float32)
        for row in range(step):
            for column in range(step):
                total += picture[row::step, column::step]
        return total / step**2
    pixels = torch.tensor(picture, dtype=torch.float32).permute(2, 0, 1)[None].contiguous()
    return interpolate(pixels, size=(height, width), mode="area")[0].permute(1, 2, 0).numpy()


def _background(lab: Floats) -> Floats:
    """The background's colour at every pixel: a plane per channel, fitted to the border, then to all that agrees."""
    height, width = lab.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    terms = np.stack([np.ones_like(x), x / width - 0.5, y / height - 0.5], axis=-1)
    border = np.ones((height, width), bool)
    border[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    plane = np.zeros((3, 3), np.float32)
    plane[0] = np.median(lab[border], axis=0)
    plane = _trimmed_fit(plane, terms[border], lab[border], _TRIMS)
    return terms @ _trimmed_fit(plane, terms[::2, ::2].reshape(-1, 3), lab[::2, ::2].reshape(-1, 3), _TRIMS[-2:])


def _trimmed_fit(plane: Floats, terms: Floats, colours: Floats, limits: tuple[float, ...]) -> Floats:
    """Least squares through the pixels that are within a limit of the last fit, limit after limit."""
    for limit in limits:
        agreeing = np.linalg.norm(colours - terms @ plane, axis=-1) < limit
        if agreeing.mean() < _MIN_BACKGROUND:
            return plane
        used = terms[agreeing]
        plane = np.linalg.solve(used.T @ used, used.T @ colours[agreeing])
    return plane


def _objects(distance: Floats) -> list[Mask]:
    """A mask [h, w] per object, the largest first."""
    labels, areas = _components(distance > _FOREGROUND, diagonal=True)
    smallest = _SPECK * distance.size
    found = [labels == index for index in np.argsort(-areas, kind="stable") if areas[index] >= smallest]
    # A dot inside an object that happens to be of the background's colour is no hole of the shape.
    return [mask | _small_holes(mask, smallest / 8) for mask in found]


def _small_holes(mask: Mask, limit: float) -> Mask:
    labels, areas = _components(~mask, diagonal=False)
    small: Mask = areas < limit
    small[0] = False
    return small[labels]


def _components(mask: Mask, *, diagonal: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Connected components: their numbers [h, w], 0 outside the mask, and the area of each number (0 has none)."""
    from skimage.measure import label

    labels = label(mask, connectivity=2 if diagonal else 1)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return labels, areas


def _eroded(mask: Mask, times: int) -> Mask:
    """Without the pixels that are fewer than `times` steps from the outside."""
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _seen(mask: Mask, distance: Floats, lab: Floats) -> SeenObject:
    inside = _eroded(mask, 2)
    if inside.sum() < 0.2 * mask.sum():
        inside = mask
    # The outline is half way between the background and the object's tone: its faintest one where a texture has two,
    # its usual one where blur makes a faint rim.
    levels = (max(_FOREGROUND, 0.5 * float(np.percentile(distance[inside], share))) for share in (10, 60))
    outlines = (np.clip((distance / level - 1) * 2 + 0.5, 0, 1) * mask for level in levels)
    shape, overlap, (x, y), radius = max((_shape(outline) for outline in outlines), key=lambda found: found[1])
    height, width = mask.shape
    colour = _vote(lab[inside])
    return SeenObject(shape, colour, x / width, y / height, radius / min(height, width), overlap)


def _background_colour(background: Floats) -> str:
    tones = np.concatenate([_tones(1.0), _tones(1 - GRADIENT)])
    step = max(1, background.shape[0] // 32)
    return _nearest(background[::step, ::step].reshape(-1, 3), tones)


def _vote(pixels: Floats) -> str:
    """The colour to which most pixels [N, 3] are nearest, in its own tone or in its texture's."""
    step = max(1, len(pixels) // _VOTERS)
    return _nearest(pixels[::step], np.concatenate([_tones(1.0), _shade_tones()]))


def _nearest(pixels: Floats, tones: Floats) -> str:
    nearest = np.linalg.norm(pixels[:, None] - tones[None], axis=-1).argmin(axis=1) % len(COLOURS)
    return tuple(COLOURS)[int(np.bincount(nearest, minlength=len(COLOURS)).argmax())]


@cache
def _tones(brightness: float) -> Floats:
    from skimage.color import rgb2lab

    return rgb2lab(np.array([*COLOURS.values()]) * (brightness / 255))


@cache
def _shade_tones() -> Floats:
    from skimage.color import rgb2lab

    return rgb2lab(np.array([*SHADES.values()]) / 255)


@dataclass(frozen=True, eq=False)
class _Template:
    """`mask` [48, 48] in 0..1. `centre`, `radius`: the object's, relative to its centroid, over its root area."""

    shape: str
    mask: Floats
    centre: tuple[float, float]
    radius: float


def _shape(soft: Floats) -> tuple[str, float, tuple[float, float], float]:
    """(shape, overlap, (x, y) of the centre, radius), lengths in pixels."""
    normalised, (x, y), scale = _normalised(soft)
    masks = np.stack([template.mask for template in _templates()])
    shared = np.minimum(masks, normalised).sum(axis=(1, 2))
    overlaps = shared / np.maximum(masks, normalised).sum(axis=(1, 2))
    best = _templates()[int(overlaps.argmax())]
    overlap = float(overlaps.max())
    centre = (x + best.centre[0] * scale, y + best.centre[1] * scale)
    return best.shape if overlap >= _MIN_OVERLAP else UNCLEAR, overlap, centre, best.radius * scale


def _normalised(soft: Floats) -> tuple[Floats, tuple[float, float], float]:
    """A soft mask moved to its centroid and scaled to one area, [48, 48]; the centroid and the root of the area."""
    from skimage.transform import warp

    rows, columns = np.arange(soft.shape[0]) + 0.5, np.arange(soft.shape[1]) + 0.5
    area = float(soft.sum())
    x, y = float((soft.sum(axis=0) * columns).sum() / area), float((soft.sum(axis=1) * rows).sum() / area)
    scale = area**0.5
    grid = (np.arange(_GRID) + 0.5) / _GRID * 2 - 1
    grid = grid * _REACH * scale
    at = np.stack(np.meshgrid(grid + y - 0.5, grid + x - 0.5, indexing="ij"))
    return warp(soft, at, order=1, mode="constant"), (x, y), scale


@cache
def _templates() -> tuple[_Template, ...]:
    return tuple(_template(shape, angle) for shape in SHAPES for angle in np.linspace(-MAX_ANGLE, MAX_ANGLE, 5))


def _template(shape: str, angle: float) -> _Template:
    side, radius = 192, 0.4
    item = SceneObject(shape, "white", "large", "plain", 0.5, 0.5, radius, float(angle))
    soft = render_uint8(Scene((item,), "black", "plain"), side)[..., 0].astype(np.float64)
    soft = (soft - soft.min()) / np.ptp(soft)
    mask, (x, y), scale = _normalised(soft)
    return _Template(shape, mask, ((side / 2 - x) / scale, (side / 2 - y) / scale), radius * side / scale)
