"""Key maps: which upstream tensors make one of our reference tensors, and how.

The maps are data (`key_maps/*.json`). An entry names its reference tensor, its upstream parts, the shape of
each part in symbols ("6*D"), and the transform. Entries stand in groups; an `architecture.Layout` says how
often each group repeats for one configuration, and the values of placeholders and symbols.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, reduce
from importlib.resources import files
from math import prod
from typing import Literal, TypeVar

import msgspec
import torch

from sana_export.weights.architecture import Layout, ReferenceComponent
from sana_export.weights.lazy import LazyTensor, rows

Shape = tuple[int, ...]
TransformName = Literal["identity", "squeeze", "concat_rows", "heads_to_qkv"]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a key map. `shape` is that of each upstream part."""

    reference: str
    upstream: tuple[str, ...]
    shape: tuple[str, ...]
    transform: TransformName


class KeyMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One component's map. `drop` lists upstream names (patterns) that our modules have no place for."""

    groups: dict[str, tuple[Entry, ...]]
    drop: tuple[str, ...]
    strip_prefix: str = ""


class OfficialEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An official tensor, and the diffusers tensors it holds stacked along rows."""

    official: str
    upstream: tuple[str, ...]


class OfficialKeyMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Official `.pth` names to diffusers names. The groups are those of the transformer's map."""

    groups: dict[str, tuple[OfficialEntry, ...]]
    drop: tuple[str, ...]


@dataclass(frozen=True)
class Assembly:
    """How one reference tensor is made: parts of one shape, joined along rows, then transformed."""

    reference: str
    upstream: tuple[str, ...]
    part_shape: Shape
    transform: TransformName
    head_dim: int

    @property
    def shape(self) -> Shape:
        """Shape of the reference tensor."""
        joined = (len(self.upstream) * self.part_shape[0], *self.part_shape[1:])
        return joined[:2] if self.transform == "squeeze" else joined

    def assemble(self, upstream: Mapping[str, LazyTensor]) -> LazyTensor:
        """The reference tensor, read when it is loaded."""
        parts = [upstream[name] for name in self.upstream]
        dtype = reduce(torch.promote_types, (part.dtype for part in parts))
        return LazyTensor(self.shape, dtype, lambda: self._join(parts).to(dtype))

    def _join(self, parts: list[LazyTensor]) -> torch.Tensor:
        tensors = [part.load() for part in parts]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return TRANSFORMS[self.transform](joined, self.head_dim)


def heads_to_qkv(stacked: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows [heads, (q, k, v), head_dim] -> rows [(q, k, v), heads, head_dim]; shape [R, ...] unchanged.

    DC-AE's to_q, to_k and to_v are thirds of a stack in which every head keeps its own q, k and v together.
    """
    return stacked.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)


TRANSFORMS: dict[TransformName, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "identity": lambda joined, _: joined,
    "concat_rows": lambda joined, _: joined,
    "squeeze": lambda joined, _: joined.flatten(1),
    "heads_to_qkv": heads_to_qkv,
}

_Map = TypeVar("_Map", KeyMap, OfficialKeyMap)


def _read(name: str, kind: type[_Map]) -> _Map:
    content = (files("sana_export.weights") / "key_maps" / f"{name}.json").read_bytes()
    return msgspec.json.decode(content, type=kind)


@cache
def key_map(component: ReferenceComponent) -> KeyMap:
    """The stored map of a component."""
    return _read(component, KeyMap)


@cache
def official_key_map() -> OfficialKeyMap:
    """The stored map of the official `.pth` transformer."""
    return _read("official_transformer", OfficialKeyMap)


def dropped(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether an upstream tensor is one that we knowingly leave out."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def assemblies(component: ReferenceComponent, layout: Layout) -> list[Assembly]:
    """Every reference tensor of a component in one configuration, in the order of the map."""
    found = []
    for group, entries in key_map(component).groups.items():
        for placement in layout.placements.get(group, ()):
            symbols = {**layout.symbols, **placement}
            found += [_assembly(entry, symbols) for entry in entries]
    return found


def _assembly(entry: Entry, symbols: Mapping[str, int]) -> Assembly:
    return Assembly(
        reference=entry.reference.format_map(symbols),
        upstream=tuple(name.format_map(symbols) for name in entry.upstream),
        part_shape=tuple(_extent(expression, symbols) for expression in entry.shape),
        transform=entry.transform,
        head_dim=symbols.get("head_dim", 0),
    )


def _extent(expression: str, symbols: Mapping[str, int]) -> int:
    """The value of a product such as "6*D"."""
    return prod(int(factor) if factor.isdigit() else symbols[factor] for factor in expression.split("*"))


def upstream_shapes(found: list[Assembly]) -> dict[str, Shape]:
    """Shape of every upstream tensor the assemblies read."""
    return {name: assembly.part_shape for assembly in found for name in assembly.upstream}


def official_parts(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Official name -> the diffusers names it holds, for one transformer configuration."""
    parts = {}
    for group, entries in official_key_map().groups.items():
        for placement in layout.placements.get(group, ()):
            for entry in entries:
                parts[entry.official.format_map(placement)] = tuple(
                    name.format_map(placement) for name in entry.upstream
                )
    return parts


def official_shapes(parts: Mapping[str, tuple[str, ...]], upstream: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shape of every official tensor: its parts stacked along rows."""
    return {
        official: (sum(upstream[name][0] for name in names), *upstream[names[0]][1:])
        for official, names in parts.items()
    }


def split_official(official: Mapping[str, LazyTensor], parts: Mapping[str, tuple[str, ...]]) -> dict[str, LazyTensor]:
    """The diffusers tensors inside official ones. Shapes must have been checked."""
    upstream = {}
    for name, names in parts.items():
        count = official[name].shape[0] // len(names)
        for index, part in enumerate(names):
            upstream[part] = rows(official[name], index * count, count)
    return upstream
