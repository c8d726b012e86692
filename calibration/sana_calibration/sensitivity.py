"""Which layers cost most fidelity, and which to exclude to keep a budget."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sana_calibration.fake_quant import fake_quantized
from sana_calibration.rules import Exclusion, LayerRule
from sana_calibration.scales import LayerScales
from sana_runtime.contract import ComponentName
from sana_runtime.errors import InputError

Feed = Mapping[str, torch.Tensor]
# From a module's outputs to the tensor that is judged: the velocity of a solver step, the picture of a decoder.
Select = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class GroupSensitivity:
    """`sqnr_db` of the judged tensor with only this group quantised; infinite if nothing changed."""

    group: str
    layers: tuple[str, ...]
    sqnr_db: float


@dataclass(frozen=True)
class Proposal:
    """Exclusions that keep `sqnr_db` (measured with all of them in place) at `wanted_db` or above."""

    exclusions: tuple[Exclusion, ...]
    sqnr_db: float
    wanted_db: float


class Sensitivity:
    """Measures a module on a list of feeds (keyword arguments) against its own unquantised outputs.

    The feeds must come from the unquantised model, so that each measures one step on equal inputs.
    """

    def __init__(
        self,
        module: nn.Module,
        prefix: str,
        rules: Mapping[str, LayerRule],
        scales: Mapping[str, LayerScales],
        feeds: Iterable[Feed],
        select: Select,
    ) -> None:
        self._module, self._prefix, self._rules, self._scales = module, prefix, rules, scales
        self._feeds, self._select = list(feeds), select
        self._exact = self._outputs()

    def sqnr_db(self, layers: Iterable[str]) -> float:
        """The lowest SQNR over the feeds with these layers quantised, in dB."""
        return min(self.sqnr_db_per_feed(layers))

    def sqnr_db_per_feed(self, layers: Iterable[str]) -> list[float]:
        """The SQNR of every feed with these layers quantised, in dB."""
        rules = {name: self._rules[name] for name in layers}
        with fake_quantized(self._module, self._prefix, rules, self._scales):
            candidates = self._outputs()
        return [sqnr_db(mine, exact) for mine, exact in zip(candidates, self._exact, strict=True)]

    def ranking(self, groups: Mapping[str, Sequence[str]]) -> tuple[GroupSensitivity, ...]:
        """Every group quantised alone, the most sensitive first."""
        found = [GroupSensitivity(name, tuple(names), self.sqnr_db(names)) for name, names in groups.items()]
        return tuple(sorted(found, key=lambda row: (row.sqnr_db, row.group)))

    def propose(self, component: ComponentName, ranking: Sequence[GroupSensitivity], wanted_db: float) -> Proposal:
        """Exclude the most sensitive groups, one after the other, until the rest keeps `wanted_db`.

        Every candidate set is measured, none predicted. Raises `InputError` if even the last group alone is too much.
        """
        remaining = list(ranking)
        exclusions: list[Exclusion] = []
        while remaining:
            measured = self.sqnr_db(name for row in remaining for name in row.layers)
            if measured >= wanted_db:
                return Proposal(tuple(exclusions), measured, wanted_db)
            worst = remaining.pop(0)
            reason = f"sensitive: alone it leaves {worst.sqnr_db:.1f} dB, the budget is {wanted_db:.1f} dB"
            exclusions += [Exclusion(component, name, reason) for name in worst.layers]
        raise InputError(
            f"no part of {component} can be quantised within the fidelity budget",
            received=f"{wanted_db:.1f} dB wanted; the least sensitive group alone leaves {ranking[-1].sqnr_db:.1f} dB",
            expected="a budget that at least one group keeps",
            action="allow a larger drop, or choose a recipe with a wider format",
        )

    def _outputs(self) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [self._select(self._module(**feed)).float() for feed in self._feeds]


def block_groups(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Layers grouped by what they do, over all blocks: "blocks.*.mix_ffn.conv_point" -> its layer in every block."""
    groups: dict[str, list[str]] = {}
    for name in layers:
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        groups.setdefault(pattern, []).append(name)
    return {pattern: tuple(names) for pattern, names in groups.items()}


def layer_groups(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Every layer a group of its own."""
    return {name: (name,) for name in layers}


def sqnr_db(candidate: torch.Tensor, exact: torch.Tensor) -> float:
    """10 log10 of the exact tensor's power over the error's; infinite where both are equal, -inf if not finite."""
    error = float((candidate.double() - exact.double()).square().sum())
    power = float(exact.double().square().sum())
    if not math.isfinite(error):
        return -math.inf
    return 10 * math.log10(power / error) if error and power else (math.inf if not error else -math.inf)
