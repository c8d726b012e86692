"""Scenes: the same for the same seed, valid, and in splits that share nothing."""

import math
from collections import Counter

import pytest

from sana_export.scenes.scene import (
    EXTENT,
    GAP,
    MARGIN,
    MAX_ANGLE,
    Scene,
    SceneObject,
    arrangement_of,
    combination,
    position_of,
    relation_between,
    sample_scene,
    split_of,
)
from sana_export.scenes.vocabulary import (
    COLOURS,
    HELD_OUT,
    OBJECT_COLOURS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    Split,
)
from sana_runtime.errors import InputError

COUNT = 10_000


@pytest.fixture(scope="module")
def scenes() -> dict[Split, list[Scene]]:
    return {split: [sample_scene(seed, split) for seed in range(COUNT)] for split in SPLITS}


def test_a_seed_is_a_scene(scenes: dict[Split, list[Scene]]) -> None:
    assert [sample_scene(seed, "train") for seed in range(50)] == scenes["train"][:50]
    assert len(set(scenes["train"][:1000])) == 1000


def test_the_scene_of_a_seed_never_changes() -> None:
    """Trained weights and published scores stand for these scenes: a change of them must be meant."""
    scene = sample_scene(0, "test")
    found = (scene.background_colour, scene.background_kind, [(o.shape, o.colour, o.texture) for o in scene.objects])
    assert found == ("green", "horizontal", [("crescent", "black", "checkered"), ("diamond", "yellow", "checkered")])
    geometry = [round(value, 6) for item in scene.objects for value in (item.x, item.y, item.radius)]
    assert geometry == [0.22567, 0.773313, 0.142429, 0.680982, 0.741536, 0.114877]


def test_splits_share_no_combination(scenes: dict[Split, list[Scene]]) -> None:
    seen = {split: {combination(scene) for scene in scenes[split]} for split in SPLITS}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    assert all(split_of(scene) == split for split in SPLITS for scene in scenes[split])


def test_held_out_pairs_are_seen_in_the_test_split_only(scenes: dict[Split, list[Scene]]) -> None:
    assert len(HELD_OUT) / (len(SHAPES) * len(COLOURS)) == pytest.approx(0.08, abs=0.01)
    held_out = {
        split: sum(any(item.pair in HELD_OUT for item in scene.objects) for scene in scenes[split]) for split in SPLITS
    }
    assert held_out["train"] == held_out["validation"] == 0
    # Five standard deviations of a binomial of 10 000 trials at 30 %.
    assert held_out["test"] / COUNT == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / COUNT))


def test_every_word_is_trained_often(scenes: dict[Split, list[Scene]]) -> None:
    items = [item for scene in scenes["train"] for item in scene.objects]
    for words, attribute in ((SHAPES, "shape"), (COLOURS, "colour"), (SIZES, "size"), (TEXTURES, "texture")):
        counts = Counter(getattr(item, attribute) for item in items)
        assert min(counts[word] for word in words) > 0.3 * len(items) / len(words), counts
    places = Counter(arrangement_of(scene) for scene in scenes["train"])
    assert min(places[place] for place in (*POSITIONS, *RELATIONS)) > 100


def test_objects_keep_apart_and_inside(scenes: dict[Split, list[Scene]]) -> None:
    rounding = 1e-9
    for scene in (scene for split in SPLITS for scene in scenes[split]):
        for index, item in enumerate(scene.objects):
            reach = EXTENT * item.radius + MARGIN - rounding
            assert reach <= item.x <= 1 - reach, scene
            assert reach <= item.y <= 1 - reach, scene
            for other in scene.objects[:index]:
                distance = math.hypot(item.x - other.x, item.y - other.y)
                assert distance - EXTENT * (item.radius + other.radius) >= GAP - rounding, scene


def test_objects_are_of_the_vocabulary(scenes: dict[Split, list[Scene]]) -> None:
    for scene in scenes["train"]:
        assert 1 <= len(scene.objects) <= 4
        for item in scene.objects:
            low, high = SIZES[item.size]
            assert low <= item.radius <= high
            assert item.colour in OBJECT_COLOURS[scene.background_colour]
            assert abs(item.angle) <= MAX_ANGLE


def test_equal_pairs_look_the_same(scenes: dict[Split, list[Scene]]) -> None:
    for scene in scenes["train"]:
        looks = {(item.pair, item.size, item.texture) for item in scene.objects}
        assert len(looks) == len({item.pair for item in scene.objects})


def test_places_are_clear(scenes: dict[Split, list[Scene]]) -> None:
    """No centre lies near a boundary between two words: a reader's error of 2 % changes none."""
    for scene in scenes["train"]:
        first, *others = scene.objects
        if not others:
            moved = {position_of(first.x + dx, first.y + dy) for dx in (-0.02, 0.02) for dy in (-0.02, 0.02)}
            assert moved == {arrangement_of(scene)}
        elif arrangement_of(scene):
            dx, dy = abs(first.x - others[0].x), abs(first.y - others[0].y)
            assert min(dx, dy) <= 0.5 * max(dx, dy)


@pytest.mark.parametrize(
    ("a", "b", "relation"),
    [
        ((0.2, 0.5), (0.8, 0.6), "left of"),
        ((0.8, 0.5), (0.2, 0.6), "right of"),
        ((0.5, 0.2), (0.6, 0.8), "above"),
        ((0.5, 0.8), (0.4, 0.2), "below"),
    ],
)
def test_relation(a: tuple[float, float], b: tuple[float, float], relation: str) -> None:
    assert relation_between(a, b) == relation


def test_position() -> None:
    grid = [position_of(x, y) for y in (0.2, 0.5, 0.8) for x in (0.2, 0.5, 0.8)]
    assert grid == [*POSITIONS]


def test_equal_objects_have_no_arrangement() -> None:
    item = SceneObject("star", "red", "small", "plain", 0.3, 0.5, 0.12, 0.0)
    other = SceneObject("star", "red", "small", "plain", 0.7, 0.5, 0.12, 0.0)
    assert arrangement_of(Scene((item, other), "blue", "plain")) is None


@pytest.mark.parametrize(("seed", "split"), [(-1, "train"), (0, "holdout")])
def test_wrong_arguments_are_refused(seed: int, split: Split) -> None:
    with pytest.raises(InputError, match="no such scene"):
        sample_scene(seed, split)
