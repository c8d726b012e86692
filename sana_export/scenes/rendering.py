"""Pictures of scenes: signed distances with analytic anti-aliasing, on the CPU or a GPU, plain or compiled.

Distances are in radii of the object (y down, the centre at 0) and negative inside. They are exact near the outline,
which is all that anti-aliasing reads; the formulas of heart and star are Inigo Quilez's (MIT licence).
"""

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sana_export.scenes.scene import Scene, SceneObject
from sana_export.scenes.vocabulary import COLOURS, GRADIENT, MAX_OBJECTS, SHADES, SHAPES, TEXTURE_PERIOD, TEXTURES
from sana_runtime.errors import InputError

Tensor = torch.Tensor
Distance = Callable[[Tensor, Tensor], Tensor]


class SceneBatch(NamedTuple):
    """Scenes as tensors, padded to `MAX_OBJECTS` = 4 objects.

    `shapes`, `textures` [B, 4] int64: index into `SHAPES` and `TEXTURES`. `tones` [B, 4, 2, 3] fp32 in 0..1: colour
    and its texture's second tone. `geometry` [B, 4, 4] fp32: x, y, radius as fractions of the side, angle in radians.
    `present` [B, 4] fp32: 1 or, for padding, 0. `background` [B, 3] fp32 in 0..1. `gradient` [B, 2] fp32: share of
    the brightness that is lost from left to right and from top to bottom.
    """

    shapes: Tensor
    textures: Tensor
    tones: Tensor
    geometry: Tensor
    present: Tensor
    background: Tensor
    gradient: Tensor

    def to(self, device: torch.device | str) -> "SceneBatch":
        """The same batch on a device."""
        return SceneBatch._make(tensor.to(device, non_blocking=True) for tensor in self)

    def rows(self, index: Tensor | slice) -> "SceneBatch":
        """The scenes of `index`."""
        return SceneBatch._make(tensor[index] for tensor in self)


def pack(scenes: Sequence[Scene]) -> SceneBatch:
    """Scenes as tensors on the CPU, owned by the caller. Raises `InputError` for an empty sequence."""
    if not scenes:
        raise InputError("no scenes to pack", received="0 scenes", expected="at least one", action="pass scenes")
    rows = [_padded(scene.objects) for scene in scenes]
    objects = torch.tensor(rows, dtype=torch.float32)
    palette = torch.tensor([*zip(COLOURS.values(), SHADES.values(), strict=True)], dtype=torch.float32) / 255
    colours = objects[..., 2].long()
    backgrounds = torch.tensor([_COLOUR_INDEX[scene.background_colour] for scene in scenes])
    return SceneBatch(
        objects[..., 0].long(),
        objects[..., 1].long(),
        palette[colours],
        objects[..., 3:7].contiguous(),
        objects[..., 7].contiguous(),
        palette[backgrounds, 0],
        torch.tensor([_GRADIENTS[scene.background_kind] for scene in scenes]),
    )


_SHAPE_INDEX: Final = {shape: index for index, shape in enumerate(SHAPES)}
_TEXTURE_INDEX: Final = {texture: index for index, texture in enumerate(TEXTURES)}
_COLOUR_INDEX: Final = {colour: index for index, colour in enumerate(COLOURS)}
_GRADIENTS: Final = {"plain": (0.0, 0.0), "horizontal": (GRADIENT, 0.0), "vertical": (0.0, GRADIENT)}
# A radius above 0 keeps the arithmetic of absent objects finite.
_ABSENT: Final = (0, 0, 0, 0.5, 0.5, 0.1, 0.0, 0.0)


def _padded(objects: tuple[SceneObject, ...]) -> list[tuple[float, ...]]:
    rows: list[tuple[float, ...]] = [
        (
            _SHAPE_INDEX[item.shape],
            _TEXTURE_INDEX[item.texture],
            _COLOUR_INDEX[item.colour],
            item.x,
            item.y,
            item.radius,
            math.radians(item.angle),
            1.0,
        )
        for item in objects
    ]
    return rows + [_ABSENT] * (MAX_OBJECTS - len(rows))


def render(batch: SceneBatch, side: int, device: torch.device | str) -> Tensor:
    """Pictures [B, 3, side, side] fp32 in 0..1 (sRGB) on `device`. The same at every side, apart from resolution."""
    return _paint(batch.to(device), side, range(len(SHAPES)), range(len(TEXTURES)))


def render_uint8(scene: Scene, side: int) -> npt.NDArray[np.uint8]:
    """One picture [side, side, 3], on the CPU. Only what the scene shows is computed: the pixels are `render`'s."""
    batch = pack([scene])
    count = len(scene.objects)
    trimmed = SceneBatch._make((*(tensor[:, :count] for tensor in batch[:5]), *batch[5:]))
    shapes = sorted({_SHAPE_INDEX[item.shape] for item in scene.objects})
    textures = sorted({_TEXTURE_INDEX[item.texture] for item in scene.objects})
    with torch.inference_mode():
        picture = _paint(trimmed, side, shapes, textures)[0]
    return (picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _paint(batch: SceneBatch, side: int, shapes: Sequence[int], textures: Sequence[int]) -> Tensor:
    centres = (torch.arange(side, device=batch.geometry.device, dtype=torch.float32) + 0.5) / side
    x, y, radius, angle = (value[..., None, None] for value in batch.geometry.unbind(-1))  # [B, n, 1, 1]
    dx, dy = centres[None, None, None, :] - x, centres[None, None, :, None] - y
    u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()  # [B, n, side, side]
    distance = _chosen(_SHAPES, shapes, batch.shapes, u / radius, v / radius)
    coverage = _covered(distance * radius, side) * batch.present[..., None, None]
    shaded = _covered(_chosen(_TEXTURES, textures, batch.textures, u, v), side)
    canvas = _background(batch, centres)
    for index in range(coverage.shape[1]):
        plain, shade = batch.tones[:, index, :, :, None, None].unbind(1)  # [B, 3, 1, 1]
        colour = torch.lerp(plain, shade, shaded[:, index, None])
        canvas = torch.lerp(canvas, colour, coverage[:, index, None])
    return canvas


def _background(batch: SceneBatch, centres: Tensor) -> Tensor:
    lost_x, lost_y = batch.gradient[:, :, None, None].unbind(1)
    brightness = 1 - lost_x * centres[None, None, :] - lost_y * centres[None, :, None]
    return batch.background[:, :, None, None] * brightness[:, None]


def _covered(distance: Tensor, side: int) -> Tensor:
    """The share of a pixel that lies inside, from the distance of its centre in fractions of the side."""
    return (0.5 - distance * side).clamp(0, 1)


def _chosen(functions: Sequence[Distance], used: Sequence[int], index: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The distance of each object by its own function. All used ones are computed: nothing depends on the data."""
    distance = functions[used[0]](x, y)
    for number in used[1:]:
        distance = torch.where((index == number)[..., None, None], functions[number](x, y), distance)
    return distance


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return _length(x, y) - 0.95


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.8


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    # Equilateral, standing on its base, with its centroid at 0.
    return torch.maximum(y, x.abs() * math.sqrt(0.75) - y * 0.5) - 0.55


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    width, height = 0.78, 1.08
    return (x.abs() / width + y.abs() / height - 1) / math.hypot(1 / width, 1 / height)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    arm, length = 0.32, 0.98
    return torch.minimum(
        torch.maximum(x - arm, y - length),
        torch.maximum(x - length, y - arm),
    )


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (_length(x, y) - 0.74).abs() - 0.25


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_length(x - 0.16, y) - 1.0, 0.8 - _length(x - 0.56, y))


def _arrow(x: Tensor, y: Tensor) -> Tensor:
    # Points up: a head that is a triangle, and a shaft.
    x = x.abs()
    head = torch.maximum(y - 0.02, (x * 1.07 - (y + 1.07) * 0.85) / math.hypot(1.07, 0.85))
    return torch.minimum(head, torch.maximum(x - 0.33, (y - 0.42).abs() - 0.6))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    scale = 1.68
    x, y = x.abs() / scale, 0.56 - y / scale
    lobe = _length(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    along = (x + y).clamp(min=0) / 2
    tip = torch.minimum(_length(x, y - 1), _length(x - along, y - along)) * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, tip) * scale


def _star(x: Tensor, y: Tensor) -> Tensor:
    outer, inner = 1.1, 0.45
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x, y = x.abs(), -y
    for side in (1, -1):
        fold = 2 * (side * x * cos - y * sin).clamp(min=0)
        x, y = x - side * fold * cos, y + fold * sin
    x, y = x.abs(), y - outer
    edge_x, edge_y = inner * sin, inner * cos - 1
    share = ((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2)).clamp(0, outer)
    return _length(x - edge_x * share, y - edge_y * share) * torch.sign(y * edge_x - x * edge_y)


_SHAPES: Final[tuple[Distance, ...]] = (
    _circle,
    _square,
    _triangle,
    _star,
    _heart,
    _diamond,
    _cross,
    _ring,
    _crescent,
    _arrow,
)


def _plain(u: Tensor, v: Tensor) -> Tensor:
    return torch.ones_like(u + v)


def _wave(value: Tensor) -> Tensor:
    """Distance to the nearest edge of a band: bands half a period wide, one of them centred at 0."""
    cycles = value / TEXTURE_PERIOD
    return ((cycles - cycles.round()).abs() - 0.25) * TEXTURE_PERIOD


def _striped(u: Tensor, v: Tensor) -> Tensor:
    return _wave((u + v) * math.sqrt(0.5))


def _dotted(u: Tensor, v: Tensor) -> Tensor:
    u, v = (value - TEXTURE_PERIOD * (value / TEXTURE_PERIOD).round() for value in (u, v))
    return _length(u, v) - 0.3 * TEXTURE_PERIOD


def _checkered(u: Tensor, v: Tensor) -> Tensor:
    # Corners of four cells meet at 0: no cell is centred, and small objects show all four.
    a, b = _wave(u + TEXTURE_PERIOD / 4), _wave(v + TEXTURE_PERIOD / 4)
    return torch.minimum(a.abs(), b.abs()) * -torch.sign(a * b)


_TEXTURES: Final[tuple[Distance, ...]] = (_plain, _striped, _dotted, _checkered)
