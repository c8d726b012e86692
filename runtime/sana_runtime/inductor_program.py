"""A component of the target `inductor`: compiled pieces, and in which order they are called with which tensors.

One compiled block serves every layer: its weights are arguments. Needs nothing but Python.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMAT_VERSION = 3
# A piece takes tensors by position and returns a sequence of them.
RunPiece = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Call:
    """One call of a piece. An input names a value or a part of one: "name[3]" is a row, "name[4:9]" are five."""

    piece: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Lookup:
    """Rows that the host reads from a stored table: `output` [1, end - first, ...] is table[index[:, first:end]].

    `index` is an input [1, L] of whole numbers. The table, which may be large, takes no memory of the device.
    """

    table: str
    index: str
    first: int
    end: int
    output: str


@dataclass(frozen=True)
class ShortStep:
    """The step for prompts without a valid token from position `end` on: its `calls` compute nothing for those."""

    end: int
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Program:
    """`pieces`: name -> file, and the `weights` file, both beside the program. `prepare` depends only on inputs that
    stay the same over a denoising loop; `step` is the rest. `device` and `torch` are those it was compiled for.
    `lookups` come before the calls that read them, and `tables` is the file of their tables. A text encoder may have a
    `short_step`.
    """

    version: int
    device: str
    torch: str
    pieces: dict[str, str]
    weights: str
    prepare: tuple[Call, ...]
    step: tuple[Call, ...]
    tables: str = ""
    lookups: tuple[Lookup, ...] = ()
    short_step: ShortStep | None = None


def value_name(text: str) -> str:
    """The value that an input of a call names, whole or in part."""
    return _name_and_rows(text)[0]


def run_calls(
    calls: Sequence[Call],
    pieces: Mapping[str, RunPiece],
    values: MutableMapping[str, Any],
    keep: frozenset[str] = frozenset(),
) -> None:
    """Run the calls in order. `values` holds their inputs and receives the outputs that are in `keep`; what the calls
    make for each other is dropped after its last use.
    """
    last_use = {value_name(name): position for position, call in enumerate(calls) for name in call.inputs}
    made: dict[str, Any] = {}
    for position, call in enumerate(calls):
        arguments = [_value(name, made, values) for name in call.inputs]
        made.update(zip(call.outputs, pieces[call.piece](*arguments), strict=True))
        del arguments
        for name in [name for name in made if last_use.get(name, -1) <= position and name not in keep]:
            del made[name]
    values.update(made)


def _value(text: str, made: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    name, rows = _name_and_rows(text)
    value = made[name] if name in made else values[name]
    return value if rows is None else value[rows]


def _name_and_rows(text: str) -> tuple[str, int | slice | None]:
    if not text.endswith("]"):
        return text, None
    name, _, rows = text[:-1].rpartition("[")
    first, colon, end = rows.partition(":")
    return name, slice(int(first), int(end)) if colon else int(first)
