"""Prompts whose every claim can be checked on a picture."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

from sana_export.scenes import english
from sana_export.scenes.content import Content, Facts, Mention, Named, content_of, facts_of
from sana_export.scenes.scene import Pair, Scene, sample_scene
from sana_export.scenes.vocabulary import HELD_OUT, OPPOSITE, Split
from sana_runtime.errors import InputError


@dataclass(frozen=True)
class Expectation:
    """What must be seen: exactly these objects, (shape, colour) as often as there are some, in the prompt's order.

    `position`: of the only object. `relation`: of the first object to the second. None is not claimed.
    """

    objects: tuple[Pair, ...]
    position: str | None = None
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Prompt:
    """`kind`: one of `KINDS`."""

    text: str
    kind: str
    expected: Expectation


KINDS: Final = ("single", "position", "count", "relation", "colours", "background", "groups", "mixed")
"""One object; one at a position; 2 to 4 equal ones; one beside, above or below another; two objects, said without
their relation; the same on a background; two groups, 3 or 4 objects in all; 3 or 4 different objects."""

# A seed's prompts of one kind are looked for among this many scenes.
_SCENES_PER_KIND: Final = 1_000_000
# So many scenes in a row (a second's work) without a new prompt: there is none.
_SCENES_WITHOUT_NEW: Final = 10_000


def test_prompts(count: int = 500, seed: int = 0) -> tuple[Prompt, ...]:  # noqa: PT028 (a split, no test)
    """Prompts of the test split: `prompts("test", count, seed)`."""
    return prompts("test", count, seed)


def prompts(split: Split, count: int, seed: int = 0) -> tuple[Prompt, ...]:
    """Different prompts, the kinds in turn: fewer prompts are the beginning of more.

    A prompt names either a pair that training never sees or the split's whole combination (`combination`): what it
    asks for was not trained. Raises `InputError` for a negative seed and a count below 1, above 5000 or above what the
    split has.
    """
    if not 1 <= count <= 5000 or seed < 0:
        raise InputError(
            "no such prompts",
            received=f"count {count}, seed {seed}",
            expected="a count in 1..5000 and a seed >= 0",
            action="correct the argument",
        )
    streams = [_prompts_of_kind(kind, split, seed) for kind in KINDS]
    found: list[Prompt] = []
    while len(found) < count:
        prompt = next(streams[len(found) % len(KINDS)], None)
        if prompt is None:
            raise InputError(
                f"the {split} split has no {count} different prompts",
                received=f"count {count}",
                expected=f"at most {len(found)}: there are no more of kind '{KINDS[len(found) % len(KINDS)]}'",
                action="ask for fewer",
            )
        found.append(prompt)
    return tuple(found)


def expectation_of(scene: Scene) -> Expectation:
    """Everything that can be checked of a scene's picture."""
    return _expectation(content_of(facts_of(scene), Mention(size=False, texture=False)))


def _prompts_of_kind(kind: str, split: Split, seed: int) -> Iterator[Prompt]:
    told: set[str] = set()
    first = (seed * len(KINDS) + KINDS.index(kind)) * _SCENES_PER_KIND
    fresh = first
    for scene_seed in range(first, first + _SCENES_PER_KIND):
        if scene_seed - fresh > _SCENES_WITHOUT_NEW:
            return
        facts = facts_of(sample_scene(scene_seed, split))
        if not _SUITS[kind](facts):
            continue
        content = content_of(facts, _mention(kind, facts, Random(scene_seed)))
        text = english.sentence(content, english.words)
        if text not in told:
            told.add(text)
            fresh = scene_seed
            yield Prompt(text, kind, _expectation(content))


def _mention(kind: str, facts: Facts, draw: Random) -> Mention:
    (only, *others) = facts.groups
    # With one pair the background belongs to what training did not see.
    needed = not others and (only.shape, only.colour) not in HELD_OUT
    wanted = kind == "background" or (kind != "colours" and draw.random() < 0.3)
    return Mention(size=False, texture=False, arrangement=kind in ("position", "relation"), background=needed or wanted)


def _expectation(content: Content) -> Expectation:
    place = content.arrangement
    return Expectation(
        tuple((named.shape or "", named.colour or "") for named in content.named for _ in range(named.number)),
        position=None if place in OPPOSITE else place,
        relation=place if place in OPPOSITE else None,
        background=content.background,
    )


def _total(facts: Facts) -> int:
    return sum(group.count for group in facts.groups)


def _is_pair(facts: Facts) -> bool:
    return len(facts.groups) == 2 == _total(facts)


def _is_single(facts: Facts) -> bool:
    return _total(facts) == 1


_SUITS: Final[dict[str, Callable[[Facts], bool]]] = {
    "single": _is_single,
    "position": _is_single,
    "count": lambda facts: len(facts.groups) == 1 and not _is_single(facts),
    "relation": _is_pair,
    "colours": _is_pair,
    "background": _is_pair,
    "groups": lambda facts: len(facts.groups) == 2 and not _is_pair(facts),
    "mixed": lambda facts: len(facts.groups) > 2,
}


_DEMO: Final = Content(
    (Named(1, None, None, "red", "circle"), Named(1, None, None, "blue", "square")), "left of", "green", None
)
DEMO_PROMPT: Final = Prompt(english.sentence(_DEMO, english.words), "relation", _expectation(_DEMO))
"""What `make demo` paints: "a red circle left of a blue square on a green background"."""
