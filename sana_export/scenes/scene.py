"""Scenes: one to four objects on a background, drawn from a seed, in three splits that share no combination."""

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Final, TypeVar

from sana_export.scenes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    OBJECT_COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    Size,
    Split,
)
from sana_runtime.errors import InputError

_Choice = TypeVar("_Choice")
Pair = tuple[str, str]
"""(shape, colour)."""
Combination = tuple[tuple[Pair, ...], str | None]
"""Different pairs in order of the alphabet, and a background colour."""
Draw = Random
"""Only `random()` of it is used: its numbers are promised to stay the same in every version of Python."""

# No shape reaches further from its centre than this many radii.
EXTENT: Final = 1.14
MARGIN: Final = 0.015
GAP: Final = 0.03
MAX_ANGLE: Final = 8.0
# Centres nearer to the middle than this count as centred, on each axis.
CENTRED: Final = 0.1
_CENTRE_JITTER: Final = 0.045

# Per mille of all combinations; what is left trains.
_VALIDATION_SHARE: Final = 60
_TEST_SHARE: Final = 110
_HELD_OUT_SHARE: Final = 0.3


@dataclass(frozen=True, slots=True)
class SceneObject:
    """`x`, `y` (down) and `radius` are fractions of the picture's side, `angle` is in degrees, clockwise."""

    shape: str
    colour: str
    size: Size
    texture: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def pair(self) -> Pair:
        """(shape, colour)."""
        return self.shape, self.colour


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture in words. Equal (shape, colour) pairs agree in size and texture as well."""

    objects: tuple[SceneObject, ...]
    background_colour: str
    background_kind: str


@dataclass(frozen=True, slots=True)
class Group:
    """Equal objects of a scene."""

    shape: str
    colour: str
    size: Size
    texture: str
    count: int


@dataclass(frozen=True)
class Layout:
    """Places for the objects of a group picture, all as fractions of the side.

    `spacing`: the least distance of two spots. `border`: the least distance of a spot to the picture's edge. `drift`:
    how far the whole layout may move along x and along y.
    """

    spots: tuple[tuple[float, float], ...]
    drift: tuple[float, float] = (0.0, 0.0)

    @property
    def spacing(self) -> float:
        return min(_distance(a, b) for i, a in enumerate(self.spots) for b in self.spots[:i])

    @property
    def border(self) -> float:
        dx, dy = self.drift
        return min(min(min(x, 1 - x) - dx, min(y, 1 - y) - dy) for x, y in self.spots)


def _distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    return ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5


_LAYOUTS: Final[dict[int, tuple[Layout, ...]]] = {
    2: (
        Layout(((0.28, 0.5), (0.72, 0.5)), (0.0, 0.22)),
        Layout(((0.5, 0.28), (0.5, 0.72)), (0.22, 0.0)),
        Layout(((0.31, 0.31), (0.69, 0.69)), (0.06, 0.06)),
        Layout(((0.31, 0.69), (0.69, 0.31)), (0.06, 0.06)),
    ),
    3: (
        Layout(((0.5, 0.28), (0.27, 0.7), (0.73, 0.7)), (0.03, 0.03)),
        Layout(((0.5, 0.72), (0.27, 0.3), (0.73, 0.3)), (0.03, 0.03)),
        Layout(((0.165, 0.5), (0.5, 0.5), (0.835, 0.5)), (0.0, 0.3)),
        Layout(((0.5, 0.165), (0.5, 0.5), (0.5, 0.835)), (0.3, 0.0)),
        Layout(((0.205, 0.205), (0.5, 0.5), (0.795, 0.795))),
        Layout(((0.205, 0.795), (0.5, 0.5), (0.795, 0.205))),
    ),
    4: (
        Layout(((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)), (0.03, 0.03)),
        Layout(((0.5, 0.2), (0.2, 0.5), (0.8, 0.5), (0.5, 0.8))),
    ),
}


def sample_scene(seed: int, split: Split) -> Scene:
    """The scene of a seed. Each split has its own sequence of scenes; about 30 % of the test split holds a pair that
    training never sees, the rest only combinations (`combination`) that training never sees.

    Raises `InputError` for an unknown split or a negative seed.
    """
    if split not in SPLITS or seed < 0:
        raise InputError(
            "no such scene",
            received=f"split {split!r}, seed {seed}",
            expected=f"a split of {', '.join(SPLITS)} and a seed >= 0",
            action="correct the argument",
        )
    draw = Random(seed * len(SPLITS) + SPLITS.index(split))
    unseen_pair = split == "test" and draw.random() < _HELD_OUT_SHARE
    while True:
        background, counts, pairs = _content(draw, unseen_pair)
        if unseen_pair or _bucket(_combination(pairs, background)) == split:
            return _laid_out(draw, background, counts, pairs)


def split_of(scene: Scene) -> Split:
    """The only split whose sampling can give a scene of this combination."""
    if any(item.pair in HELD_OUT for item in scene.objects):
        return "test"
    return _bucket(combination(scene))


def combination(scene: Scene) -> Combination:
    """What decides the split: the different (shape, colour) pairs and, where there is only one, the background.

    Coarser than what a picture shows, so that neither another relation, nor another number, nor another place of
    objects that were trained together can pass for an unseen picture.
    """
    return _combination({item.pair for item in scene.objects}, scene.background_colour)


def _combination(pairs: Collection[Pair], background: str) -> Combination:
    return tuple(sorted(pairs)), background if len(pairs) == 1 else None


@cache
def _bucket(key: Combination) -> Split:
    place = zlib.crc32(repr(key).encode()) % 1000
    if place < _VALIDATION_SHARE:
        return "validation"
    return "test" if place < _VALIDATION_SHARE + _TEST_SHARE else "train"


def groups_of(scene: Scene) -> tuple[Group, ...]:
    """The scene's objects, equal ones counted, in the order in which they come."""
    counts: dict[Pair, int] = {}
    first: dict[Pair, SceneObject] = {}
    for item in scene.objects:
        pair = (item.shape, item.colour)
        counts[pair] = counts.get(pair, 0) + 1
        first.setdefault(pair, item)
    return tuple(Group(item.shape, item.colour, item.size, item.texture, counts[pair]) for pair, item in first.items())


def arrangement_of(scene: Scene) -> str | None:
    """The position of a single object, or the relation of the first of two different ones to the second."""
    first, *others = scene.objects
    if not others:
        return position_of(first.x, first.y)
    if len(others) == 1 and first.pair != others[0].pair:
        return relation_between((first.x, first.y), (others[0].x, others[0].y))
    return None


def position_of(x: float, y: float) -> str:
    """The ninth of the picture in which a centre (fractions of the side, y down) lies: one of `POSITIONS`."""
    column, row = (1 + (v > 0.5 + CENTRED) - (v < 0.5 - CENTRED) for v in (x, y))
    return POSITIONS[3 * row + column]


def relation_between(a: tuple[float, float], b: tuple[float, float]) -> str:
    """How centre `a` lies to centre `b`, along the axis on which they are further apart: one of `RELATIONS`."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def _pairs(background: str, held_out: bool) -> tuple[Pair, ...]:
    return tuple(
        (shape, colour)
        for shape in SHAPES
        for colour in OBJECT_COLOURS[background]
        if ((shape, colour) in HELD_OUT) == held_out
    )


_SEEN_PAIRS: Final = {background: _pairs(background, False) for background in COLOURS}
_UNSEEN_PAIRS: Final = {background: _pairs(background, True) for background in COLOURS}
_BACKGROUND_COLOURS: Final = tuple(COLOURS)
_ALL_SIZES: Final[tuple[Size, ...]] = ("small", "medium", "large")


def _pick(draw: Draw, choices: Sequence[_Choice]) -> _Choice:
    return choices[int(draw.random() * len(choices))]


def _between(draw: Draw, low: float, high: float) -> float:
    return low + (high - low) * draw.random()


def _content(draw: Draw, unseen_pair: bool) -> tuple[str, tuple[int, ...], list[Pair]]:
    """A background colour, and how many objects of which pairs."""
    background = _pick(draw, _BACKGROUND_COLOURS)
    counts = _group_counts(draw)
    pairs: list[Pair] = [_pick(draw, _UNSEEN_PAIRS[background])] if unseen_pair else []
    while len(pairs) < len(counts):
        pair = _pick(draw, _SEEN_PAIRS[background])
        if pair not in pairs:
            pairs.append(pair)
    return background, counts, pairs


def _laid_out(draw: Draw, background: str, counts: tuple[int, ...], pairs: list[Pair]) -> Scene:
    if counts == (1,):
        objects = _single(draw, pairs[0])
    elif counts == (1, 1):
        objects = _related(draw, pairs)
    else:
        objects = _arranged(draw, pairs, counts)
    kind = BACKGROUNDS[0] if draw.random() < 0.6 else _pick(draw, BACKGROUNDS[1:])
    return Scene(objects, background, kind)


def _group_counts(draw: Draw) -> tuple[int, ...]:
    """How many objects of how many kinds."""
    kind = draw.random()
    if kind < 0.25:
        return (1,)
    if kind < 0.55:
        return (1, 1)
    if kind < 0.75:
        return _pick(draw, ((2,), (3,), (4,)))
    return _pick(draw, ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1, 1)))


def _place(draw: Draw, pair: Pair, size: Size, texture: str, radius: float, x: float, y: float) -> SceneObject:
    return SceneObject(pair[0], pair[1], size, texture, x, y, radius, _between(draw, -MAX_ANGLE, MAX_ANGLE))


def _texture(draw: Draw) -> str:
    return TEXTURES[0] if draw.random() < 0.55 else _pick(draw, TEXTURES[1:])


def _radius(draw: Draw, size: Size) -> float:
    low, high = SIZES[size]
    return low + (high - low) * draw.random()


def _single(draw: Draw, pair: Pair) -> tuple[SceneObject, ...]:
    size = _pick(draw, _ALL_SIZES)
    radius = _radius(draw, size)
    reach = EXTENT * radius + MARGIN
    # A third of the pictures is centred; the other places of the 3 x 3 grid share the rest.
    column, row = (1, 1) if draw.random() < 0.25 else (int(draw.random() * 3), int(draw.random() * 3))
    x, y = _coordinate(draw, column, reach), _coordinate(draw, row, reach)
    return (_place(draw, pair, size, _texture(draw), radius, x, y),)


def _coordinate(draw: Draw, third: int, reach: float) -> float:
    if third == 1:
        return 0.5 + _CENTRE_JITTER * (2 * draw.random() - 1)
    # Clear of the boundary between "left" and "centre" by the jitter that the centre has.
    inwards = _between(draw, max(reach, 0.16), 0.5 - CENTRED - _CENTRE_JITTER)
    return inwards if third == 0 else 1 - inwards


def _related(draw: Draw, pairs: Sequence[Pair]) -> tuple[SceneObject, ...]:
    """Two objects, one clearly beside or above the other."""
    sizes = [_pick(draw, _ALL_SIZES), _pick(draw, _ALL_SIZES)]
    if sizes[0] == sizes[1] == "large":
        sizes[1] = "medium"
    radii = [_radius(draw, size) for size in sizes]
    along, distance = _along(draw, radii)
    reach = EXTENT * max(radii) + MARGIN
    middle = 0.5 + 0.8 * (0.5 - reach) * (2 * draw.random() - 1)
    shift = 0.2 * distance * (2 * draw.random() - 1)
    across = [min(max(middle + sign * shift, reach), 1 - reach) for sign in (0.5, -0.5)]
    beside, swapped = draw.random() < 0.5, draw.random() < 0.5
    objects = [
        _place(draw, pair, size, _texture(draw), radius, *((a, c) if beside else (c, a)))
        for pair, size, radius, a, c in zip(pairs, sizes, radii, along, across, strict=True)
    ]
    return tuple(reversed(objects)) if swapped else tuple(objects)


def _along(draw: Draw, radii: Sequence[float]) -> tuple[tuple[float, float], float]:
    """Two centres on the axis of the relation, the first one nearer to 0, and their distance."""
    low, high = (EXTENT * radius for radius in radii)
    slack = 1 - 2 * MARGIN - 2 * (low + high) - GAP
    u, v = sorted((draw.random(), draw.random()))
    first, second = MARGIN + low + slack * u, 1 - MARGIN - high - slack * (1 - v)
    return (first, second), second - first


def _arranged(draw: Draw, pairs: Sequence[Pair], counts: Sequence[int]) -> tuple[SceneObject, ...]:
    """Groups of equal objects, mixed over the spots of a layout."""
    members = [index for index, count in enumerate(counts) for _ in range(count)]
    _shuffle(draw, members)
    sizes: list[Size] = [_pick(draw, _ALL_SIZES[:2]) for _ in pairs]
    radii = [_radius(draw, size) for size in sizes]
    textures = [_texture(draw) for _ in pairs]
    spots = _spots(draw, len(members), max(radii))
    return tuple(
        _place(draw, pairs[index], sizes[index], textures[index], radii[index], x, y)
        for index, (x, y) in zip(members, spots, strict=True)
    )


def _spots(draw: Draw, count: int, radius: float) -> list[tuple[float, float]]:
    """Centres of `count` objects of at most this radius: a layout with room for them, drifted and jittered."""
    fitting = _fitting_layouts(count, radius <= SIZES["small"][1])
    layout, spacing, border = _pick(draw, fitting)
    # Two jitters of `room` along both axes bring two spots at most 2 sqrt(2) `room` nearer.
    room = min((spacing - 2 * EXTENT * radius - GAP) / 2.83, border - EXTENT * radius - MARGIN, 0.05)
    dx, dy = ((2 * draw.random() - 1) * drift for drift in layout.drift)
    return [(x + dx + room * (2 * draw.random() - 1), y + dy + room * (2 * draw.random() - 1)) for x, y in layout.spots]


@cache
def _fitting_layouts(count: int, small: bool) -> tuple[tuple[Layout, float, float], ...]:
    reach = EXTENT * SIZES["small" if small else "medium"][1]
    found = ((layout, layout.spacing, layout.border) for layout in _LAYOUTS[count])
    return tuple(
        (layout, spacing, border)
        for layout, spacing, border in found
        if spacing >= 2 * reach + GAP and border >= reach + MARGIN
    )


def _shuffle(draw: Draw, items: list[int]) -> None:
    """Fisher and Yates, from `random()` alone."""
    for last in range(len(items) - 1, 0, -1):
        other = int(draw.random() * (last + 1))
        items[last], items[other] = items[other], items[last]
