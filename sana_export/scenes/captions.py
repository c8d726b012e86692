"""True captions of a scene, of different detail, wording and language."""

from random import Random
from typing import Final

from sana_export.scenes import chinese, english
from sana_export.scenes.content import Facts, Mention, content_of, facts_of
from sana_export.scenes.scene import Scene
from sana_runtime.errors import InputError

_CHINESE_SHARE: Final = 0.12
_EMOJI_SHARE: Final = 0.08


def captions(scene: Scene, seed: int, count: int = 4) -> tuple[str, ...]:
    """`count` captions drawn from the seed. Each is true of the whole scene: none leaves out an object.

    Raises `InputError` for fewer than one.
    """
    if count < 1:
        raise InputError(
            "no captions asked for", received=f"count {count}", expected="count >= 1", action="ask for one or more"
        )
    # Not the stream of `sample_scene`: a scene's own seed may be passed.
    draw = Random(-1 - seed)
    facts = facts_of(scene)
    return tuple(_caption(facts, draw) for _ in range(count))


def full_caption(scene: Scene) -> str:
    """All that a reader can check, in plain English: "a large red circle left of a blue square on a green background".

    A plain texture, a medium size and a background's gradient are not said.
    """
    return english.sentence(content_of(facts_of(scene), Mention()), english.words)


def _caption(facts: Facts, draw: Random) -> str:
    content = content_of(facts, _mention(draw))
    language = draw.random()
    if language < _CHINESE_SHARE:
        return chinese.sentence(content, draw) + ("。" if draw.random() < 0.2 else "")
    phrase = english.emoji if language < _CHINESE_SHARE + _EMOJI_SHARE else english.words
    text = english.sentence(content, phrase, draw)
    if draw.random() < 0.25:
        text = text[0].upper() + text[1:]
    return text + "." if draw.random() < 0.2 else text


def _mention(draw: Random) -> Mention:
    """From "three shapes" to everything; most captions name colour and shape."""
    detail, trivial = draw.random(), draw.random() < 0.2
    if detail < 0.2:
        return Mention(gradient=draw.random() < 0.5, trivial=trivial)
    named = detail >= 0.36
    return Mention(
        size=draw.random() < 0.2,
        texture=draw.random() < 0.25,
        colour=named or 0.26 <= detail < 0.31,
        shape=named or detail >= 0.31,
        arrangement=draw.random() < (0.8 if named else 0.5),
        background=draw.random() < 0.6,
        gradient=draw.random() < 0.15,
        trivial=trivial,
    )
