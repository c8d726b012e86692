"""Outlier channels of the size that trained models have: plain max loses the picture, the remedies regain it.

`scripts/measure_outliers.py` writes the full table.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sana_calibration.aggregate import component_scales
from sana_calibration.layers import weight_of
from sana_calibration.observers import observing
from sana_calibration.recipe import LayerRule, PerChannel, PerTensor, load_recipe
from sana_calibration.sensitivity import Sensitivity, block_groups
from sana_calibration.testing import plant_outliers
from sana_export.calibration_run import rules_of
from sana_export.sensitivity_run import velocity_of

CHANNELS = (7, 30, 51)
FACTOR = 1024.0


@pytest.fixture(scope="module")
def planted(denoising: Any) -> nn.Module:
    module = denoising.module()
    plant_outliers(module.transformer, CHANNELS, FACTOR)
    return module


def sensitivity(denoising: Any, module: nn.Module, dtype: str, **changes: object) -> tuple[Sensitivity, list[str]]:
    resolved = rules_of(load_recipe("int8"), denoising.run.plans["transformer"])
    defaults = {"granularity": PerTensor(), "smoothing_alpha": None, **changes}
    fields: dict = {"weight_dtype": dtype, "activation_dtype": dtype, **defaults}
    rules: dict[str, LayerRule] = {
        name: replace(rule, **fields) for name, rule in resolved.items() if rule.activation_dtype is not None
    }
    with torch.inference_mode(), observing(module, denoising.prefix, rules, len(denoising.feeds)) as observers:
        for step, feed in enumerate(denoising.feeds):
            observers.at(step, "test")
            module(**feed)
        seen = observers.take()
    scales = component_scales(rules, seen, lambda name: weight_of(module, denoising.prefix + name))
    return Sensitivity(module, denoising.prefix, rules, scales, denoising.feeds, velocity_of), [*rules]


def sqnr(denoising: Any, module: nn.Module, dtype: str, **changes: object) -> float:
    judge, layers = sensitivity(denoising, module, dtype, **changes)
    return judge.sqnr_db(layers)


def test_planting_does_not_change_the_velocity(denoising: Any, planted: nn.Module) -> None:
    with torch.inference_mode():
        for feed, velocity in zip(denoising.feeds, denoising.velocities, strict=True):
            found = velocity_of(planted(**feed))
            # Products with powers of two are exact; matrix products may add up in another order.
            torch.testing.assert_close(found, velocity, rtol=0, atol=float(velocity.abs().max()) * 2**-18)


def test_planted_inputs_reach_the_size_that_was_reported(denoising: Any) -> None:
    module = denoising.module()
    plant_outliers(module.transformer, CHANNELS, 2.0**18)
    rules = {"blocks.0.linear_attention.to_out": LayerRule("transformer", "*", "int8", "int8", PerTensor())}
    with torch.inference_mode(), observing(module, denoising.prefix, rules, 1) as observers:
        module(**denoising.feeds[0])
        assert 1e5 < observers.take()["blocks.0.linear_attention.to_out"].amax < 2e6


def test_int8_plain_max_loses_and_the_remedies_regain(denoising: Any, planted: nn.Module) -> None:
    ordinary = sqnr(denoising, denoising.module(), "int8", granularity=PerChannel())
    assert ordinary > 25
    # One step of 1024 x sigma x 3 / 127 is 24 sigma of an ordinary channel: nothing of it is left.
    assert sqnr(denoising, planted, "int8") < 6
    assert sqnr(denoising, planted, "int8", granularity=PerChannel()) < 6
    for alpha in (0.5, 0.8):
        smoothed = sqnr(denoising, planted, "int8", granularity=PerChannel(), smoothing_alpha=alpha)
        assert smoothed > ordinary - 2, alpha


def test_a_searched_alpha_beats_the_fixed_ones(denoising: Any, planted: nn.Module) -> None:
    """INT8, where smoothing matters: with outliers and without, per layer at least as good as one alpha for all."""
    for module in (planted, denoising.module()):
        found = {
            alpha: sqnr(denoising, module, "int8", granularity=PerChannel(), smoothing_alpha=alpha)
            for alpha in (None, 0.5, 0.8, "search")
        }
        assert found["search"] >= max(found[0.5], found[0.8], found[None]), found


def test_exclusions_regain(denoising: Any, planted: nn.Module) -> None:
    judge, layers = sensitivity(denoising, planted, "int8", granularity=PerChannel())
    proposal = judge.propose("transformer", judge.ranking(block_groups(layers)), wanted_db=15.0)
    assert judge.sqnr_db(layers) < 6
    assert proposal.sqnr_db >= 15.0
    assert 0 < len(proposal.exclusions) < len(layers)


def test_per_channel_weights_regain_what_rows_lose(denoising: Any, planted: nn.Module) -> None:
    """Weight-only: the planted rows of qkv take a shared scale from all others. What the small columns lose stays lost:
    only smoothing, which makes them large again, would help.
    """
    weight_only = {"activation_dtype": None}
    resolved = rules_of(load_recipe("int8-weight-only"), denoising.run.plans["transformer"])
    found = {}
    for granularity in (PerTensor(), PerChannel()):
        rules = {name: replace(rule, granularity=granularity, **weight_only) for name, rule in resolved.items()}  # type: ignore[arg-type]
        judge = Sensitivity(planted, denoising.prefix, rules, {}, denoising.feeds, velocity_of)
        found[granularity] = judge.sqnr_db(rules)
    assert found[PerTensor()] < 6
    assert found[PerChannel()] > found[PerTensor()] + 6


def test_fp8_range_bears_a_thousandfold_outlier_but_not_the_reported_size(denoising: Any, planted: nn.Module) -> None:
    """E4M3 spans 448 / 2^-6 = 28672 in normal numbers, so three decades of outlier cost little, five and a half all."""
    ordinary = sqnr(denoising, denoising.module(), "float8e4m3fn")
    assert sqnr(denoising, planted, "float8e4m3fn") > ordinary - 6
    extreme = denoising.module()
    plant_outliers(extreme.transformer, CHANNELS, 2.0**18)
    assert sqnr(denoising, extreme, "float8e4m3fn") < 6
    assert sqnr(denoising, extreme, "float8e4m3fn", granularity=PerChannel(), smoothing_alpha=0.5) > ordinary - 2
