"""Chinese sentences."""

from random import Random
from typing import Final

from sana_export.scenes.content import Content, Named
from sana_export.scenes.english import choose
from sana_export.scenes.vocabulary import CHINESE, NUMBERS, OPPOSITE


def sentence(content: Content, draw: Random | None = None) -> str:
    """The content in one sentence. `draw` chooses the wording; without it the plainest one is taken."""
    body = _body(content, draw)
    if content.background is None:
        return choose(draw, ("", "", "一张图片,", "画面中有")) + body
    colour = CHINESE[content.background]
    ground = f"{colour}{_GRADIENTS[content.gradient]}背景"
    return choose(draw, (f"{ground}上有{body}", f"{body},{ground}", f"在{ground}上,{body}"))


_GRADIENTS: Final = {None: "", "vertical": "渐变", "horizontal": "渐变"}


def _body(content: Content, draw: Random | None) -> str:
    phrases = [_phrase(named, draw) for named in content.named]
    place = content.arrangement
    if place is None:
        *others, last = phrases
        return f"{'、'.join(others)}和{last}" if others else last
    if place not in OPPOSITE:
        return choose(draw, (f"{CHINESE[place]}的{phrases[0]}", f"{phrases[0]}位于{CHINESE[place]}"))
    if draw is not None and draw.random() < 0.5:
        phrases, place = phrases[::-1], OPPOSITE[place]
    first, second = phrases
    return f"{first}在{second}的{CHINESE[place]}"


def _phrase(named: Named, draw: Random | None) -> str:
    number = choose(draw, (CHINESE[NUMBERS[named.number]], str(named.number)))
    said = "".join(CHINESE[word] for word in (named.size, named.texture, named.colour, named.shape) if word)
    return f"{number}个{said}" if named.shape else f"{number}个{said}{choose(draw, ('图形', '物体'))}"
