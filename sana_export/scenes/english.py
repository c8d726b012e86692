"""English sentences, with words or emoji for the objects."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Final

from sana_export.scenes.content import Content, Named
from sana_export.scenes.vocabulary import EMOJI, EMOJI_OBJECTS, NUMBERS, OPPOSITE

Phrase = Callable[[Named, Random | None], str]

_RELATIONS: Final = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher up than"),
    "below": ("below", "under", "beneath"),
}
_POSITIONS: Final = {
    "top left": ("in the top left corner", "in the upper left corner", "at the top left"),
    "top": ("at the top", "near the top edge", "in the upper part"),
    "top right": ("in the top right corner", "in the upper right corner", "at the top right"),
    "left": ("on the left", "on the left side", "near the left edge"),
    "centre": ("in the centre", "in the center", "in the middle"),
    "right": ("on the right", "on the right side", "near the right edge"),
    "bottom left": ("in the bottom left corner", "in the lower left corner", "at the bottom left"),
    "bottom": ("at the bottom", "near the bottom edge", "in the lower part"),
    "bottom right": ("in the bottom right corner", "in the lower right corner", "at the bottom right"),
}
_SYNONYMS: Final = {
    "small": ("small", "small", "little"),
    "medium": ("medium-sized",),
    "large": ("large", "large", "big"),
    "plain": ("plain", "solid"),
    "checkered": ("checkered", "checkered", "checked"),
    "gray": ("gray", "gray", "grey"),
    "diamond": ("diamond", "diamond", "rhombus"),
    "cross": ("cross", "cross", "plus sign"),
    "crescent": ("crescent", "crescent", "crescent moon"),
}
_PLURALS: Final = {"cross": "crosses", "rhombus": "rhombuses"}
_OPENINGS: Final = ("a picture of ", "an image of ", "a drawing of ", "a simple picture of ")


def choose(draw: Random | None, options: Sequence[str]) -> str:
    """One of the options; the first where nothing is drawn."""
    return options[0] if draw is None else options[int(draw.random() * len(options))]


def sentence(content: Content, phrase: Phrase, draw: Random | None = None) -> str:
    """The content in one sentence. `draw` chooses the wording; without it the plainest one is taken."""
    body = _body(content, phrase, draw)
    if content.background is None:
        return _opening(draw) + body
    colour = _word(content.background, draw)
    ground = _ground(colour, content.gradient, draw)
    form = 0.0 if draw is None else draw.random()
    if form < 0.75:
        return f"{_opening(draw)}{body} {ground}"
    if form < 0.88:
        return f"{body}, {colour} background"
    return f"{ground}, {body}"


def _opening(draw: Random | None) -> str:
    return "" if draw is None or draw.random() < 0.7 else choose(draw, _OPENINGS)


def _ground(colour: str, gradient: str | None, draw: Random | None) -> str:
    article = _article(colour)
    if gradient is None:
        plain = f"on {article} {colour} background"
        return choose(draw, (plain, plain, plain, f"against {article} {colour} background", f"on {colour}"))
    edge = "bottom" if gradient == "vertical" else "right"
    return choose(
        draw,
        (
            f"on {article} {colour} gradient background",
            f"on {article} {colour} background that darkens to the {edge}",
        ),
    )


def _body(content: Content, phrase: Phrase, draw: Random | None) -> str:
    phrases = [phrase(named, draw) for named in content.named]
    place = content.arrangement
    if place is None:
        *others, last = phrases
        return f"{', '.join(others)} and {last}" if others else last
    if place in _POSITIONS:
        return f"{phrases[0]} {choose(draw, _POSITIONS[place])}"
    if draw is not None and draw.random() < 0.5:
        return f"{phrases[1]} {choose(draw, _RELATIONS[OPPOSITE[place]])} {phrases[0]}"
    return f"{phrases[0]} {choose(draw, _RELATIONS[place])} {phrases[1]}"


def words(named: Named, draw: Random | None) -> str:
    """ "two large striped red circles"."""
    said = [_word(word, draw) for word in (named.size, named.texture, named.colour) if word]
    noun = _word(named.shape, draw) if named.shape else choose(draw, ("shape", "object"))
    if named.number == 1:
        said.append(noun)
        return f"{_article(said[0])} {' '.join(said)}"
    said.append(_PLURALS.get(noun, noun + "s"))
    return f"{_number(named.number, draw)} {' '.join(said)}"


def emoji(named: Named, draw: Random | None) -> str:
    """ "🔴🔴", "2️⃣ striped 🔴" or, where no emoji has the colour, "two cyan ⭐"."""
    # Emoji have colours of their own: without a colour word beside it, a star would be a yellow one.
    if named.shape is None or named.colour is None:
        return words(named, draw)
    said = [_word(word, draw) for word in (named.size, named.texture) if word]
    drawn = EMOJI_OBJECTS.get((named.shape, named.colour))
    if drawn is None:
        return " ".join([*_emoji_number(named.number, draw), *said, _word(named.colour, draw), EMOJI[named.shape]])
    if not said and named.number > 1 and (draw is None or draw.random() < 0.6):
        return drawn * named.number
    return " ".join([*_emoji_number(named.number, draw), *said, drawn])


def _emoji_number(count: int, draw: Random | None) -> list[str]:
    if count == 1:
        return []
    return [choose(draw, (EMOJI[NUMBERS[count]], _number(count, draw)))]


def _number(count: int, draw: Random | None) -> str:
    return choose(draw, (NUMBERS[count], NUMBERS[count], NUMBERS[count], str(count)))


def _word(word: str, draw: Random | None) -> str:
    return choose(draw, _SYNONYMS[word]) if word in _SYNONYMS else word


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
