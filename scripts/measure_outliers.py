"""Show what outlier channels do to quantised velocities, and what gives the fidelity back.

Trained Sana transformers have self-attention outputs of 5e5 to 1.3e6 in a few channels; random weights have none. This
plants such channels into a tiny transformer, calibrates it on real denoising steps, and writes the lowest velocity SQNR
over all steps for plain max calibration and for each remedy to benchmarks/results/outliers.csv.

    python scripts/measure_outliers.py
"""

import argparse
import csv
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from sana_calibration import smoothing
from sana_calibration.aggregate import component_scales
from sana_calibration.layers import weight_of
from sana_calibration.observers import observing
from sana_calibration.recipe import LayerRule, PerChannel, PerTensor, load_recipe
from sana_calibration.scales import LayerScales
from sana_calibration.sensitivity import Sensitivity, block_groups
from sana_calibration.smoothing import exact_smooth_factor, smooth_factor
from sana_calibration.testing import plant_outliers
from sana_export.calibration_run import DenoisingRun, Feed, rules_of
from sana_export.sensitivity_run import denoising_steps, velocity_of
from sana_export.weights.checkpoint import open_checkpoint
from sana_runtime.files import whole_file

MODEL = "random:tiny"
PROMPTS = ("a red circle left of a blue square", "ein Leuchtturm im Sturm")
CHANNELS = (7, 30, 51)
# Powers of two leave the velocity as it is. The last one brings the channels to what was seen in fp16-era weights.
FACTORS = (1, 128, 1024, 8192, 262144)
WANTED_DB = 15.0
FactorRule = Callable[..., np.ndarray]
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "outliers.csv"


@dataclass(frozen=True)
class Row:
    """`largest_activation`: the amax over all quantised layers and steps. `quantised_layers`: of those named."""

    model: str
    outlier_factor: int
    largest_activation: float
    weight_dtype: str
    calibration: str
    quantised_layers: str
    velocity_sqnr_db: float


class Bench:
    """A model with planted outliers on its own denoising steps."""

    def __init__(self, run: DenoisingRun, factor: int, feeds: list[Feed], module: nn.Module) -> None:
        self.factor, self.feeds, self.module = factor, feeds, module
        self.prefix = run.plans["transformer"].prefix
        if factor != 1:
            plant_outliers(module.get_submodule(self.prefix[:-1]), CHANNELS, factor)

    def scales(self, rules: dict[str, LayerRule]) -> dict[str, LayerScales]:
        """What the rules choose from one pass over all steps."""
        with observing(self.module, self.prefix, rules, len(self.feeds)) as observers:
            for step, feed in enumerate(self.feeds):
                observers.at(step, "the measurement")
                self.module(**feed)
        return component_scales(rules, observers.take(), lambda name: weight_of(self.module, self.prefix + name))

    def judge(self, rules: dict[str, LayerRule], factors: FactorRule = smooth_factor) -> Sensitivity:
        """The measurement of a set of rules; `factors` replaces the smooth factors."""
        with patch.object(smoothing, "smooth_factor", factors):
            scales = self.scales(rules)
        return Sensitivity(self.module, self.prefix, rules, scales, self.feeds, velocity_of)


def powers_of_two(channel_amax: np.ndarray, weight: torch.Tensor, alpha: float, _: str) -> np.ndarray:
    """Smooth factors [I] that a graph could fold into its neighbours without changing a bit."""
    return np.exp2(np.rint(np.log2(exact_smooth_factor(channel_amax, weight, alpha)))).astype(np.float32)


def measure(bench: Bench, resolved: dict[str, LayerRule]) -> Iterator[Row]:
    """One row per format and calibration."""
    quantised = {name: rule for name, rule in resolved.items() if rule.activation_dtype is not None}
    for dtype in ("int8", "float8e4m3fn"):
        yield from _measure_format(bench, dtype, {name: _rule(rule, dtype) for name, rule in quantised.items()})


def _measure_format(bench: Bench, dtype: str, plain: dict[str, LayerRule]) -> Iterator[Row]:
    amax = max(found.activation_amax or 0.0 for found in bench.scales(plain).values())

    def row(calibration: str, layers: int, sqnr: float) -> Row:
        return Row(MODEL, bench.factor, round(amax, 1), dtype, calibration, f"{layers}/{len(plain)}", round(sqnr, 2))

    for calibration, changes in _calibrations(dtype).items():
        rules = {name: replace(rule, **changes) for name, rule in plain.items()}
        yield row(calibration, len(rules), bench.judge(rules).sqnr_db(rules))
    for alpha in (0.5, 0.8):
        changes = {"granularity": PerChannel(), "smoothing_alpha": alpha}
        rules = {name: replace(rule, **changes) for name, rule in plain.items()}
        judge = bench.judge(rules, powers_of_two)
        yield row(f"per-channel weights + SmoothQuant alpha {alpha}, powers of two", len(rules), judge.sqnr_db(rules))
    rules = {name: replace(rule, granularity=PerChannel()) for name, rule in plain.items()}
    judge = bench.judge(rules)
    proposal = judge.propose("transformer", judge.ranking(block_groups(rules)), wanted_db=WANTED_DB)
    left = len(rules) - len(proposal.exclusions)
    yield row(f"per-channel weights + exclusions proposed for {WANTED_DB:g} dB", left, proposal.sqnr_db)


def _rule(rule: LayerRule, dtype: str) -> LayerRule:
    return replace(
        rule, weight_dtype=dtype, activation_dtype=dtype, granularity=PerTensor(), amax="max", smoothing_alpha=None
    )


def _calibrations(dtype: str) -> dict[str, dict]:
    per_channel = {"granularity": PerChannel()}
    found: dict[str, dict] = {
        "plain max per tensor": {},
        "per-channel weights": per_channel,
        "per-channel weights + percentile 99.9": {**per_channel, "amax": "percentile", "percentile": 99.9},
        "per-channel weights + SmoothQuant alpha 0.5": {**per_channel, "smoothing_alpha": 0.5},
        "per-channel weights + SmoothQuant alpha 0.8": {**per_channel, "smoothing_alpha": 0.8},
        "per-channel weights + SmoothQuant alpha searched": {**per_channel, "smoothing_alpha": "search"},
    }
    if dtype == "int8":
        found["per-channel weights + entropy"] = {**per_channel, "amax": "entropy"}
    return found


def rows(num_steps: int, side: int) -> Iterator[Row]:
    """Every row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        run = DenoisingRun(open_checkpoint(MODEL), PROMPTS, 0, num_steps, side, side, Path(folder))
        resolved = rules_of(load_recipe("int8"), run.plans["transformer"])
        feeds, _ = denoising_steps(run)
        for factor in FACTORS:
            with run.module("transformer") as module:
                yield from measure(Bench(run, factor, feeds, module), resolved)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=10, help="denoising steps (default 10)")
    parser.add_argument("--side", type=int, default=256, help="picture side in pixels (default 256)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV to write (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = []
    for found in rows(arguments.num_steps, arguments.side):
        print(*asdict(found).values(), sep="  ", flush=True)
        table.append(asdict(found))
    with whole_file(arguments.output) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
