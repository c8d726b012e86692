"""Captions: parsed back by an independent little grammar, every one must be true of its scene."""

import re
from collections import Counter
from dataclasses import dataclass

import pytest

from sana_export.scenes.captions import captions, full_caption
from sana_export.scenes.scene import Scene, SceneObject, arrangement_of, sample_scene
from sana_export.scenes.vocabulary import CHINESE, COLOURS, EMOJI, EMOJI_OBJECTS, OPPOSITE, SHAPES, SIZES, TEXTURES
from sana_runtime.errors import InputError

SAME = {
    **{"little": "small", "big": "large", "medium-sized": "medium", "solid": "plain", "checked": "checkered"},
    **{"grey": "gray", "rhombus": "diamond", "rhombuses": "diamonds", "crescent moon": "crescent"},
    **{"crescent moons": "crescents", "plus sign": "cross", "plus signs": "crosses", "center": "centre"},
    **{"to the left of": "left of", "on the left of": "left of", "to the right of": "right of"},
    **{"on the right of": "right of", "higher up than": "above", "over": "above", "under": "below"},
    **{"beneath": "below", "in the middle": "in the centre", "upper": "top", "lower": "bottom", "side": ""},
    **{"near the": "", "at the": "", "on the": "", "in the": "", "corner": "", "edge": "", "part": ""},
}
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "2": 2, "3": 3, "4": 4}
PLURALS = {**{shape + "s": shape for shape in SHAPES}, "crosses": "cross"}
NO_SHAPE = ("shape", "object", "shapes", "objects")


@dataclass(frozen=True)
class Parsed:
    """`named`: words of each noun phrase and its number. `place`: canonical, or None."""

    named: tuple[tuple[int, frozenset[str]], ...]
    place: str | None
    background: str | None
    gradient: str | None


def parse(caption: str) -> Parsed:
    """An English caption. Fails on any word it does not know."""
    text = caption.lower().removesuffix(".")
    text = re.sub(r"^(?:a (?:simple )?picture|an image|a drawing) of ", "", text)
    text, background, gradient = _without_background(text)
    for variant, word in sorted(SAME.items(), key=lambda item: -len(item[0])):
        text = re.sub(rf"\b{variant}\b", word, text)
    text = " ".join(text.split())
    for relation in OPPOSITE:
        if f" {relation} " in text:
            first, second = text.split(f" {relation} ")
            return Parsed((_phrase(first), _phrase(second)), relation, background, gradient)
    place = re.search(r" ((?:top|bottom) (?:left|right)|top|bottom|left|right|centre)$", text)
    text = text[: place.start()] if place else text
    named = tuple(_phrase(part) for part in re.split(r", | and ", text))
    return Parsed(named, place[1] if place else None, background, gradient)


def _without_background(text: str) -> tuple[str, str | None, str | None]:
    colours = "|".join([*COLOURS, "grey"])
    ground = rf"(?:on|against) an? ({colours})( gradient)? background(?: that darkens to the (bottom|right))?"
    patterns = (
        rf"^(?:{ground}|on ({colours})), ",
        rf" (?:{ground}|on ({colours}))$",
        rf", ({colours}) background$",
    )
    for pattern in patterns:
        if found := re.search(pattern, text):
            parts = found.groups() + (None,) * 4
            colour = parts[0] or parts[3]
            kind = {"bottom": "vertical", "right": "horizontal"}.get(parts[2] or "", "any" if parts[1] else None)
            assert colour
            return text.replace(found[0], "", 1), SAME.get(colour, colour), kind
    return text, None, None


def _phrase(text: str) -> tuple[int, frozenset[str]]:
    article, *words = text.split()
    number = NUMBERS[article]
    assert article not in ("a", "an") or (article == "an") == (words[0][0] in "aeiou"), text
    noun = words.pop()
    assert (noun in PLURALS or noun in ("shapes", "objects")) == (number > 1), text
    if noun not in NO_SHAPE:
        words.append(PLURALS.get(noun, noun))
    assert {*words} <= {*SHAPES, *COLOURS, *SIZES, *TEXTURES}, text
    return number, frozenset(words)


def words_of(item: SceneObject) -> set[str]:
    return {item.shape, item.colour, item.size, item.texture}


def check_true(parsed: Parsed, scene: Scene) -> None:
    """Each phrase fits exactly as many objects as it says, each object fits a phrase, and the rest holds."""
    assert sum(number for number, _ in parsed.named) == len(scene.objects)
    for number, words in parsed.named:
        assert sum(words <= words_of(item) for item in scene.objects) >= number
    for item in scene.objects:
        assert any(words <= words_of(item) for _, words in parsed.named)
    assert parsed.background in (None, scene.background_colour)
    assert parsed.gradient in (None, scene.background_kind) or (
        parsed.gradient == "any" and scene.background_kind != "plain"
    )
    if parsed.place in OPPOSITE:
        assert_related(parsed, scene)
    elif parsed.place:
        assert parsed.place == arrangement_of(scene)


def assert_related(parsed: Parsed, scene: Scene) -> None:
    first, second = scene.objects
    (_, words), (_, other) = parsed.named
    as_listed = words <= words_of(first) and other <= words_of(second) and parsed.place == arrangement_of(scene)
    swapped = arrangement_of(Scene((second, first), scene.background_colour, scene.background_kind))
    assert as_listed or (words <= words_of(second) and other <= words_of(first) and parsed.place == swapped)


def is_english(caption: str) -> bool:
    return caption.isascii()


def is_chinese(caption: str) -> bool:
    return bool(re.search(r"[\u4e00-\u9fff]", caption))


@pytest.fixture(scope="module")
def captioned() -> list[tuple[Scene, str]]:
    scenes = [sample_scene(seed, "train") for seed in range(3000)]
    return [(scene, caption) for seed, scene in enumerate(scenes) for caption in captions(scene, seed)]


def test_english_captions_are_true(captioned: list[tuple[Scene, str]]) -> None:
    english = [(scene, caption) for scene, caption in captioned if is_english(caption)]
    assert len(english) > 9000
    for scene, caption in english:
        try:
            check_true(parse(caption), scene)
        except (AssertionError, KeyError, ValueError) as error:
            raise AssertionError(f"{caption!r} of {full_caption(scene)!r}: {error}") from error


def test_the_parser_finds_false_captions() -> None:
    """The test above could not fail if the parser believed everything."""
    first = SceneObject("circle", "red", "small", "plain", 0.25, 0.5, 0.12, 0.0)
    second = SceneObject("square", "blue", "large", "plain", 0.7, 0.5, 0.2, 0.0)
    scene = Scene((first, second), "green", "plain")
    check_true(parse("a red circle left of a blue square on a green background"), scene)
    for caption in (
        "a red circle right of a blue square",
        "a blue circle left of a red square",
        "a red circle",
        "a red circle and a blue square on red",
        "two red circles",
        "a large red circle and a blue square",
        "a blue square left of a red circle",
    ):
        with pytest.raises(AssertionError):
            check_true(parse(caption), scene)


def test_full_caption_says_everything() -> None:
    for seed in range(3000):
        scene = sample_scene(seed, "test")
        parsed = parse(full_caption(scene))
        check_true(parsed, scene)
        assert parsed.background == scene.background_colour
        assert parsed.place == arrangement_of(scene)
        trivial = {"plain", "medium"}
        said = Counter({(words): number for number, words in parsed.named})
        assert said == Counter(frozenset(words_of(item) - trivial) for item in scene.objects)


def test_full_caption_reads_well() -> None:
    circle = SceneObject("circle", "red", "medium", "plain", 0.3, 0.5, 0.15, 0.0)
    square = SceneObject("square", "blue", "medium", "plain", 0.7, 0.5, 0.15, 0.0)
    assert full_caption(Scene((circle, square), "green", "plain")) == (
        "a red circle left of a blue square on a green background"
    )


def test_chinese_captions_are_true(captioned: list[tuple[Scene, str]]) -> None:
    chinese = [(scene, caption) for scene, caption in captioned if is_chinese(caption)]
    assert len(chinese) == pytest.approx(0.12 * len(captioned), rel=0.15)
    for scene, caption in chinese:
        said = {word for word in (*SHAPES, *COLOURS) if CHINESE[word] in caption}
        assert said <= {word for item in scene.objects for word in words_of(item)} | {scene.background_colour}, caption
        numbers = [1 + "一两三四".index(digit) for digit in re.findall("([一两三四])个", caption)]
        numbers += [int(digit) for digit in re.findall(r"(\d)个", caption)]
        assert sum(numbers) == len(scene.objects), caption
        assert_chinese_place(scene, caption)


def assert_chinese_place(scene: Scene, caption: str) -> None:
    if found := re.search(r"个(\w+)在\w*个(\w+)的(左边|右边|上面|下面)", caption):
        relation = {chinese: word for word, chinese in CHINESE.items()}[found[3]]
        named = ((1, _chinese_words(found[1])), (1, _chinese_words(found[2])))
        assert_related(Parsed(named, relation, None, None), scene)
    places = {word for word in ("左上角", "右上角", "左下角", "右下角", "中央", "左侧", "右侧") if word in caption}
    assert places <= {CHINESE.get(arrangement_of(scene) or "", "")}, caption


def _chinese_words(phrase: str) -> frozenset[str]:
    medium = CHINESE["medium"]
    rest = phrase.replace(medium, "")
    words = {word for word in (*SHAPES, *COLOURS, *SIZES, *TEXTURES) if word != "medium" and CHINESE[word] in rest}
    return frozenset(words | ({"medium"} if medium in phrase else set()))


def test_emoji_captions_are_true(captioned: list[tuple[Scene, str]]) -> None:
    coloured = {emoji: pair for pair, emoji in EMOJI_OBJECTS.items()}
    plain = {EMOJI[shape]: shape for shape in SHAPES if shape in EMOJI}
    drawn = re.compile(f"(\\w*) ?({'|'.join(sorted([*coloured, *plain], key=len, reverse=True))})")
    count = 0
    for scene, caption in captioned:
        pairs = {item.pair for item in scene.objects}
        for word, emoji in drawn.findall(caption):
            count += 1
            colour = SAME.get(word.lower(), word.lower())
            assert (coloured[emoji] if emoji in coloured else (plain[emoji], colour)) in pairs, caption
    assert count > 500


def test_captions_differ_in_detail_and_form(captioned: list[tuple[Scene, str]]) -> None:
    english = [caption for _, caption in captioned if is_english(caption)]
    shares = {
        "capital": sum(caption[0].isupper() for caption in english),
        "period": sum(caption.endswith(".") for caption in english),
        "no background": sum(parse(caption).background is None for caption in english),
        "no colour": sum(not any(words & {*COLOURS} for _, words in parse(caption).named) for caption in english),
        "texture": sum(any(texture in caption for texture in TEXTURES[1:]) for caption in english),
    }
    assert all(0.05 < share / len(english) < 0.6 for share in shares.values()), shares


def test_captions_are_those_of_their_seed() -> None:
    scene = sample_scene(5, "train")
    assert captions(scene, 5, 8) == captions(scene, 5, 8)
    assert captions(scene, 5, 8) != captions(scene, 6, 8)
    assert captions(scene, 5, 2) == captions(scene, 5, 8)[:2]


def test_no_captions_are_refused() -> None:
    with pytest.raises(InputError, match="no captions"):
        captions(sample_scene(0, "train"), 0, 0)
