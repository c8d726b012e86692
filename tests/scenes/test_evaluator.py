"""The evaluator: every word is read right, wrong pictures fail for the right reason, prompts are fair."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from sana_export.scenes import prompts as scene_prompts
from sana_export.scenes.prompts import KINDS, Expectation, Prompt, expectation_of, prompts
from sana_export.scenes.quality import EQUAL_PSNR_DB, fidelity, measure_quality
from sana_export.scenes.reading import UNCLEAR, PictureReading, SeenObject, read_picture
from sana_export.scenes.rendering import render_uint8
from sana_export.scenes.scene import Scene, SceneObject, combination, sample_scene
from sana_export.scenes.scoring import score, summarise, wilson_interval
from sana_export.scenes.vocabulary import COLOURS, HELD_OUT, OBJECT_COLOURS, SHAPES, TEXTURES
from sana_runtime.errors import BuildError, InputError

CIRCLE = SeenObject("circle", "red", 0.25, 0.5, 0.15)
SQUARE = SeenObject("square", "blue", 0.75, 0.5, 0.15)
EXPECTED = Expectation((("circle", "red"), ("square", "blue")), relation="left of", background="green")
PROMPT = Prompt("a red circle left of a blue square on a green background", "relation", EXPECTED)


PLACES = ((0.25, 0.25), (0.75, 0.3), (0.3, 0.75), (0.7, 0.7))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_colour_and_texture_is_read(shape: str) -> None:
    """The smallest radius at 256 px: a colour in all textures and over all angles, on one of its backgrounds."""
    for number, colour in enumerate(COLOURS):
        grounds = [ground for ground, allowed in OBJECT_COLOURS.items() if colour in allowed]
        ground = grounds[(number * 5 + SHAPES.index(shape)) % len(grounds)]
        objects = tuple(
            SceneObject(shape, colour, "small", texture, x, y, 0.11, angle)
            for texture, (x, y), angle in zip(TEXTURES, PLACES, (-8.0, -3.0, 3.0, 8.0), strict=True)
        )
        reading = read_picture(render_uint8(Scene(objects, ground, "vertical"), 256))
        assert reading.background_colour == ground, colour
        assert len(reading.objects) == 4
        for item in objects:
            seen = min(reading.objects, key=lambda seen: abs(seen.x - item.x) + abs(seen.y - item.y))
            assert (seen.shape, seen.colour) == (shape, colour), (item, ground, seen)
            # A hundredth of the side: two and a half pixels.
            assert (seen.x, seen.y, seen.radius) == pytest.approx((item.x, item.y, 0.11), abs=0.01)


@pytest.mark.parametrize("side", [256, 384, 512, 1024])
def test_scenes_are_read_at_every_size(side: int) -> None:
    for seed in range(12):
        scene = sample_scene(seed, "test")
        reading = read_picture(render_uint8(scene, side))
        assert score(Prompt("", "mixed", expectation_of(scene)), reading).overall, (seed, reading)


def test_wide_pictures_are_read_in_fractions() -> None:
    item = SceneObject("star", "yellow", "large", "plain", 0.5, 0.5, 0.3, 0.0)
    square = render_uint8(Scene((item,), "blue", "plain"), 256)
    wide = np.concatenate([square, np.full_like(square, COLOURS["blue"])], axis=1)
    (seen,) = read_picture(wide).objects
    assert (seen.shape, seen.x, seen.y) == ("star", pytest.approx(0.25, abs=0.01), pytest.approx(0.5, abs=0.01))


def test_degraded_pictures_are_read() -> None:
    draw = np.random.default_rng(0)
    for seed in range(100, 130):
        scene = sample_scene(seed, "test")
        noisy = render_uint8(scene, 512) + draw.normal(draw.uniform(-12, 12), 4, (512, 512, 3))
        reading = read_picture(noisy.round().clip(0, 255).astype(np.uint8))
        assert score(Prompt("", "mixed", expectation_of(scene)), reading).overall, (seed, reading)


def test_what_is_no_shape_is_unclear() -> None:
    """A thin bar overlaps no template by three quarters: it is an object, and no shape."""
    picture = np.full((256, 256, 3), COLOURS["white"], np.uint8)
    picture[120:136, 40:216] = COLOURS["red"]
    (seen,) = read_picture(picture).objects
    assert (seen.shape, seen.colour) == (UNCLEAR, "red")


def test_noise_and_emptiness_are_no_scene() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert not score(PROMPT, read_picture(noise)).overall
    empty = read_picture(np.full((256, 256, 3), COLOURS["green"], np.uint8))
    assert empty == PictureReading("green", ())
    found = score(PROMPT, empty)
    assert (found.count, found.colour, found.shape, found.position, found.binding) == (False,) * 5
    assert found.background is True


@pytest.mark.parametrize(
    "picture",
    [np.zeros((256, 256), np.uint8), np.zeros((256, 256, 3), np.float32), np.zeros((32, 256, 3), np.uint8)],
    ids=["grey", "float", "tiny"],
)
def test_other_arrays_are_refused(picture: np.ndarray) -> None:
    with pytest.raises(InputError, match="not a picture"):
        read_picture(picture)


def test_the_right_picture_passes() -> None:
    found = score(PROMPT, PictureReading("green", (SQUARE, CIRCLE)))
    assert found.overall
    assert None not in dataclasses.astuple(found)


def change(item: SeenObject, **changes: object) -> SeenObject:
    return dataclasses.replace(item, **changes)


@pytest.mark.parametrize(
    ("objects", "background", "wrong"),
    [
        ((CIRCLE,), "green", {"count", "colour", "shape", "position", "binding"}),
        ((CIRCLE, SQUARE, SQUARE), "green", {"count", "colour", "shape", "binding"}),
        ((change(CIRCLE, colour="orange"), SQUARE), "green", {"colour", "binding"}),
        ((change(CIRCLE, shape="ring"), SQUARE), "green", {"shape", "binding"}),
        ((change(CIRCLE, x=0.75), change(SQUARE, x=0.25)), "green", {"position", "binding"}),
        ((change(CIRCLE, x=0.5, y=0.2), change(SQUARE, x=0.6, y=0.8)), "green", {"position", "binding"}),
        ((change(CIRCLE, colour="blue"), change(SQUARE, colour="red")), "green", {"binding"}),
        ((CIRCLE, SQUARE), "cyan", {"background"}),
    ],
    ids=["missing", "one too many", "colour", "shape", "swapped", "above", "colours exchanged", "background"],
)
def test_wrong_pictures_fail_for_the_right_reason(
    objects: tuple[SeenObject, ...], background: str, wrong: set[str]
) -> None:
    found = score(PROMPT, PictureReading(background, objects))
    assert not found.overall
    values = {name: value for name, value in dataclasses.asdict(found).items() if name != "kind"}
    assert {name for name, value in values.items() if value is False} == wrong


def test_a_wrong_position_fails() -> None:
    prompt = Prompt("", "position", Expectation((("circle", "red"),), position="left"))
    assert score(prompt, PictureReading("white", (CIRCLE,))).overall
    wrong = score(prompt, PictureReading("white", (change(CIRCLE, x=0.5),)))
    assert (wrong.position, wrong.binding, wrong.count) == (False, False, True)
    assert wrong.background is None


def test_drawn_mistakes_are_seen() -> None:
    """End to end: a picture of one scene, scored against the claims of the same scene with one thing changed."""
    for seed in range(20):
        scene = sample_scene(seed, "test")
        reading = read_picture(render_uint8(scene, 256))
        (shape, colour), *others = expectation_of(scene).objects
        other = next(name for name in COLOURS if name not in (colour, *(pair[1] for pair in others)))
        claimed = dataclasses.replace(expectation_of(scene), objects=((shape, other), *others))
        assert score(Prompt("", "mixed", claimed), reading).colour is False
        fewer = Scene(scene.objects[:-1], scene.background_colour, scene.background_kind)
        if fewer.objects:
            assert score(Prompt("", "mixed", expectation_of(fewer)), reading).count is False


def test_prompts_are_balanced_different_and_those_of_their_seed() -> None:
    found = scene_prompts.test_prompts(200)
    assert found[:40] == scene_prompts.test_prompts(40)
    assert len({prompt.text for prompt in found}) == 200
    assert Counter(prompt.kind for prompt in found) == dict.fromkeys(KINDS, 25)
    assert {p.text for p in found} != {p.text for p in scene_prompts.test_prompts(200, seed=1)}


def test_prompts_ask_for_what_was_never_trained() -> None:
    """No training scene can satisfy a test prompt: neither its pairs nor, with one pair, pair and background."""
    trained = {combination(sample_scene(seed, "train")) for seed in range(20_000)}
    for prompt in scene_prompts.test_prompts(160):
        pairs = tuple(sorted({*prompt.expected.objects}))
        if HELD_OUT.isdisjoint(pairs):
            assert len(pairs) > 1 or prompt.expected.background, prompt
            assert (pairs, prompt.expected.background if len(pairs) == 1 else None) not in trained, prompt


def test_validation_prompts_have_no_held_out_pair() -> None:
    assert all(HELD_OUT.isdisjoint(prompt.expected.objects) for prompt in prompts("validation", 80))


def test_every_claim_is_in_the_text() -> None:
    for prompt in scene_prompts.test_prompts(160):
        expected = prompt.expected
        assert all(colour in prompt.text and shape in prompt.text for shape, colour in expected.objects)
        if expected.background:
            assert prompt.text.endswith(f"{expected.background} background")
        assert (expected.relation or "") in prompt.text
        assert (expected.position or "").split(" ")[0] in prompt.text
        assert (expected.relation is not None) == (prompt.kind == "relation")
        assert (expected.position is not None) == (prompt.kind == "position")


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (5001, 0), (10, -1)])
def test_impossible_prompts_are_refused(count: int, seed: int) -> None:
    with pytest.raises(InputError, match="no such prompts"):
        scene_prompts.test_prompts(count, seed)


def test_more_prompts_than_a_split_has_are_refused() -> None:
    with pytest.raises(InputError, match=r"at most \d+: there are no more of kind 'single'"):
        prompts("validation", 500)


def test_summary() -> None:
    right = score(PROMPT, PictureReading("green", (CIRCLE, SQUARE)))
    wrong = score(PROMPT, PictureReading("cyan", (CIRCLE, SQUARE)))
    rates = {(rate.scope, rate.name): (rate.passed, rate.total) for rate in summarise([right, right, wrong])}
    assert rates["overall", "overall"] == rates["claim", "background"] == rates["kind", "relation"] == (2, 3)
    assert rates["claim", "count"] == (3, 3)
    assert ("kind", "single") not in rates


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"),
    # Published examples: 0 of 10 and 450 of 500; the last from the formula in fractions.
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (450, 500, 0.8706, 0.9234), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(passed: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(passed, total) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def painter(painted: list[str]) -> dict[str, np.ndarray]:
    """Ground-truth pictures of the first test prompts, by text: a painter that is always right."""
    del painted[:]
    pictures = {}
    for prompt in scene_prompts.test_prompts(8):
        scene = next(
            scene
            for seed in range(10**7)
            if (scene := _arranged(prompt, seed)) and score(prompt, read_picture(render_uint8(scene, 128))).overall
        )
        pictures[prompt.text] = render_uint8(scene, 128)
    return pictures


def _arranged(prompt: Prompt, seed: int) -> Scene | None:
    """Some scene with the prompt's objects on a background they may lie on, in the places of a sampled scene."""
    sampled = sample_scene(seed, "train")
    if len(sampled.objects) != len(prompt.expected.objects):
        return None
    ground = prompt.expected.background or next(
        ground
        for ground, allowed in OBJECT_COLOURS.items()
        if all(colour in allowed for _, colour in prompt.expected.objects)
    )
    objects = tuple(
        dataclasses.replace(item, shape=shape, colour=colour, texture="plain")
        for item, (shape, colour) in zip(sampled.objects, prompt.expected.objects, strict=True)
    )
    return Scene(objects, ground, "plain")


def test_quality_of_a_right_painter_resumes_and_compares() -> None:
    painted: list[str] = []
    pictures = painter(painted)
    asked = scene_prompts.test_prompts(8)

    def paint(text: str, seed: int) -> np.ndarray:
        painted.append(f"{seed} {text}")
        return pictures[text]

    kept: dict[int, object] = {}
    rows = measure_quality(
        paint,
        asked,
        seed=100,
        reference=lambda index: pictures[asked[index].text],
        on_row=lambda row, picture: kept.update({row.index: row}),
    )
    assert all(row.score.overall for row in rows)
    assert painted == [f"{100 + index} {prompt.text}" for index, prompt in enumerate(asked)]
    assert list(kept.values()) == list(rows)
    distance = fidelity(rows)
    assert distance is not None
    assert (distance.pictures, distance.mean_psnr_db, distance.mean_ssim) == (8, EQUAL_PSNR_DB, 1.0)

    again = measure_quality(paint, asked, seed=100, finished={row.index: row for row in rows[:5]})
    assert again[:5] == rows[:5]
    assert len(painted) == 8 + 3
    with pytest.raises(InputError, match="another measurement"):
        measure_quality(paint, asked, seed=101, finished={0: rows[0]})
    with pytest.raises(BuildError, match="cannot be compared"):
        measure_quality(paint, asked[:1], reference=lambda index: np.zeros((64, 64, 3), np.uint8))


def test_fidelity_needs_references() -> None:
    row = measure_quality(lambda text, seed: np.zeros((64, 64, 3), np.uint8), scene_prompts.test_prompts(1))
    assert fidelity(row) is None
    assert row[0].psnr_db is None
