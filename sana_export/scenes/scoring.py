"""Does a picture show what its prompt claims? In the manner of GenEval, attribute by attribute."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final, Literal

from sana_export.scenes.prompts import KINDS, Expectation, Prompt
from sana_export.scenes.reading import PictureReading, SeenObject
from sana_export.scenes.scene import Pair, position_of, relation_between

Scope = Literal["overall", "claim", "kind"]

ATTRIBUTES: Final = ("count", "colour", "shape", "position", "binding", "background")


@dataclass(frozen=True)
class Score:
    """Right or wrong; None where the prompt claims nothing.

    `count`: as many objects as claimed. `colour`, `shape`: each as often as claimed, on whatever object. `position`:
    the position or the relation, of the objects that resemble the claimed ones most. `binding`: every object has the
    shape and the colour claimed for it together, where it is claimed to be. `background`: its colour.
    """

    kind: str
    count: bool
    colour: bool
    shape: bool
    position: bool | None
    binding: bool
    background: bool | None

    @property
    def overall(self) -> bool:
        """Every claim holds."""
        return all(getattr(self, attribute) is not False for attribute in ATTRIBUTES)


@dataclass(frozen=True)
class Rate:
    """How often something is right, among the prompts that claim it.

    `scope` "overall": everything that a prompt claims. "claim": one attribute, `name`. "kind": everything, in prompts
    of one kind, `name`. `low`, `high`: Wilson's 95 % interval of the true rate.
    """

    scope: Scope
    name: str
    passed: int
    total: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """0..1."""
        return self.passed / self.total


def score(prompt: Prompt, reading: PictureReading) -> Score:
    """Judge a picture that was read against the prompt it was painted for."""
    expected, seen = prompt.expected, reading.objects
    matched = _match(expected, seen)
    placed = _placed(expected, matched)
    pairs = [(item.shape, item.colour) for item in seen]
    bound = Counter(pairs) == Counter(expected.objects)
    return Score(
        prompt.kind,
        count=len(seen) == len(expected.objects),
        colour=_equal((colour for _, colour in expected.objects), (item.colour for item in seen)),
        shape=_equal((shape for shape, _ in expected.objects), (item.shape for item in seen)),
        position=placed,
        binding=bound and placed is not False,
        background=None if expected.background is None else reading.background_colour == expected.background,
    )


def summarise(scores: Sequence[Score]) -> tuple[Rate, ...]:
    """Rates: overall, each attribute that any prompt claims, then overall within each kind of prompt."""
    rates = [rate("overall", "overall", (item.overall for item in scores))]
    rates += [rate("claim", name, (getattr(item, name) for item in scores)) for name in ATTRIBUTES]
    rates += [rate("kind", kind, (item.overall for item in scores if item.kind == kind)) for kind in KINDS]
    return tuple(found for found in rates if found.total)


def rate(scope: Scope, name: str, results: Iterable[bool | None]) -> Rate:
    """The rate of True among what is not None."""
    claimed = [result for result in results if result is not None]
    low, high = wilson_interval(sum(claimed), len(claimed))
    return Rate(scope, name, sum(claimed), len(claimed), low, high)


def wilson_interval(passed: int, total: int) -> tuple[float, float]:
    """95 % interval of a binomial rate (E. B. Wilson 1927); (0, 1) for no trials."""
    if not total:
        return 0.0, 1.0
    z = 1.959964
    share, square = passed / total, z * z / total
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """How much larger the first rate is than the second, of the same trials, and half the 95 % interval of that
    (Wald's, of the trials in which the two differ).
    """
    total = len(first)
    gained = sum(a and not b for a, b in zip(first, second, strict=True))
    lost = sum(b and not a for a, b in zip(first, second, strict=True))
    variance = gained + lost - (gained - lost) ** 2 / total
    return (gained - lost) / total, 1.959964 * math.sqrt(variance) / total


def _equal(expected: Iterable[str], seen: Iterable[str]) -> bool:
    return Counter(expected) == Counter(seen)


def _match(expected: Expectation, seen: Sequence[SeenObject]) -> tuple[SeenObject, ...]:
    """The seen objects in the order of the claimed ones, as many attributes agreeing as can; () if one is missing."""
    wanted = expected.objects[: 2 if expected.relation else 1]
    if not (expected.relation or expected.position) or len(seen) < len(wanted):
        return ()

    def agreement(chosen: tuple[SeenObject, ...]) -> int:
        return sum(_agreeing(pair, item) for pair, item in zip(wanted, chosen, strict=True))

    # A picture of noise may hold dozens of components; the largest come first.
    return max(permutations(seen[:8], len(wanted)), key=agreement)


def _agreeing(pair: Pair, item: SeenObject) -> int:
    return (pair[0] == item.shape) + (pair[1] == item.colour)


def _placed(expected: Expectation, matched: tuple[SeenObject, ...]) -> bool | None:
    if expected.position is not None:
        return bool(matched) and position_of(matched[0].x, matched[0].y) == expected.position
    if expected.relation is not None:
        if not matched:
            return False
        first, second = matched
        return relation_between((first.x, first.y), (second.x, second.y)) == expected.relation
    return None
