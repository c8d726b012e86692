"""A component of the target `inductor`: compiled pieces, and in which order they are called with which tensors.

One compiled block serves every layer: its weights are arguments. Needs nothing but Python.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMAT_VERSION = 1
# A piece takes tensors by position and returns a sequence of them.
RunPiece = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Call:
    """One call of a piece. An input is the name of a value, or "name[3]" for a row of one."""

    piece: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """`pieces`: name -> file, and the `weights` file, both beside the program. `prepare` depends only on inputs that
    stay the same over a denoising loop; `step` is the rest. `device` and `torch` are those it was compiled for.
    """

    version: int
    device: str
    torch: str
    pieces: dict[str, str]
    weights: str
    prepare: tuple[Call, ...]
    step: tuple[Call, ...]


def run_calls(
    calls: Sequence[Call],
    pieces: Mapping[str, RunPiece],
    values: MutableMapping[str, Any],
    keep: frozenset[str] = frozenset(),
) -> None:
    """Run the calls in order. `values` holds their inputs and receives the outputs that are in `keep`; what the calls
    make for each other is dropped after its last use.
    """
    last_use = {_name_and_row(name)[0]: position for position, call in enumerate(calls) for name in call.inputs}
    made: dict[str, Any] = {}
    for position, call in enumerate(calls):
        arguments = [_value(name, made, values) for name in call.inputs]
        made.update(zip(call.outputs, pieces[call.piece](*arguments), strict=True))
        del arguments
        for name in [name for name in made if last_use.get(name, -1) <= position and name not in keep]:
            del made[name]
    values.update(made)


def _value(name: str, made: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    name, row = _name_and_row(name)
    value = made[name] if name in made else values[name]
    return value if row is None else value[row]


def _name_and_row(name: str) -> tuple[str, int | None]:
    if not name.endswith("]"):
        return name, None
    name, _, row = name[:-1].rpartition("[")
    return name, int(row)
