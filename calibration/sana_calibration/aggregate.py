"""From what was observed to the scales of a layer, as the recipe chooses."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from sana_calibration.histogram import entropy_amax, percentile_amax
from sana_calibration.observers import Observation
from sana_calibration.rules import ALPHAS, BaseDtype, LayerRule
from sana_calibration.scales import LayerScales
from sana_calibration.smoothing import layer_scales_of_channels, search_alpha


def component_scales(
    rules: Mapping[str, LayerRule],
    observations: Mapping[str, Observation],
    weight: Callable[[str], torch.Tensor],
    base_dtype: BaseDtype = "bfloat16",
) -> dict[str, LayerScales]:
    """The scales of every ruled layer; a weight-only layer has empty ones. `weight` gives a layer's weight. Rounding is
    not chosen here.
    """
    return {
        name: LayerScales(None)
        if rule.activation_dtype is None
        else layer_scales(rule, observations[name], partial(weight, name), base_dtype)
        for name, rule in rules.items()
    }


def layer_scales(
    rule: LayerRule, observation: Observation, weight: Callable[[], torch.Tensor], base_dtype: BaseDtype
) -> LayerScales:
    """The scales of one layer whose activations the rule quantises. `weight` is called only to smooth."""
    if rule.smoothing_alpha == "search":
        return _searched(rule, observation, weight(), base_dtype)
    if rule.smoothing_alpha is not None:
        assert observation.channel_amax is not None
        smoothed = layer_scales_of_channels(observation.channel_amax, weight(), rule.smoothing_alpha, base_dtype)
        return replace(smoothed, step_amax=observation.step_amax)
    return LayerScales(_chosen_amax(rule, observation), None, observation.step_amax)


def _searched(rule: LayerRule, observation: Observation, weight: torch.Tensor, base_dtype: BaseDtype) -> LayerScales:
    """The scales with the alpha that costs the layer least on the inputs kept of every step."""
    assert observation.channel_amax is not None
    assert observation.rows is not None
    alphas = rule.smoothing_candidates or ALPHAS
    inputs, seen = torch.from_numpy(observation.rows), observation.channel_amax
    found = search_alpha(weight.cpu(), inputs, rule, alphas, seen, base_dtype)
    scales = layer_scales_of_channels(seen, weight, found.alpha, base_dtype)
    errors = np.array([found.errors[alpha] for alpha in (None, *alphas)], np.float32)
    return replace(scales, step_amax=observation.step_amax, smoothing_alpha=found.alpha, alpha_errors=errors)


def _chosen_amax(rule: LayerRule, observation: Observation) -> float:
    if rule.amax == "max":
        return observation.amax
    assert observation.histogram is not None
    if rule.amax == "percentile":
        found = percentile_amax(observation.histogram, rule.percentile)
    else:
        found = entropy_amax(observation.histogram)
    # A bin's upper edge may lie above everything that was seen.
    return float(np.float32(min(found, observation.amax)))
