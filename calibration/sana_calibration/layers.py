"""Layers of a module, and the recipe's verdict on each of them."""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import nn

from sana_calibration.rules import LayerRule, PerGroup, Recipe
from sana_runtime.contract import ComponentName
from sana_runtime.errors import InputError


def layers_of(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Every layer with a weight matrix: linear, convolution (depthwise too), embedding; norms have vectors.

    Names are module paths below `prefix` (`ComponentPlan.prefix` for a component's module; "" for the network
    itself), in the order of definition.
    """
    return {
        name.removeprefix(prefix): layer
        for name, layer in module.named_modules()
        if name.startswith(prefix) and _has_matrix(layer)
    }


def resolve(recipe: Recipe, component: ComponentName, layers: Mapping[str, nn.Module]) -> dict[str, LayerRule]:
    """The rule of every layer that the recipe quantises.

    A group wider than the layer's inputs is returned as one group of all inputs. Raises `InputError` for a rule or
    an exclusion that matches no layer, a layer that nothing matches, and a layer that cannot be quantised as ruled.
    """
    excluded = exclusions_of(recipe, component, layers)
    rules = [rule for rule in recipe.rules if rule.component == component]
    for rule in rules:
        _check_matches(recipe, component, "rule", rule.pattern, layers)
    resolved: dict[str, LayerRule] = {}
    for name, layer in layers.items():
        if name in excluded:
            continue
        found = next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)
        if found is None:
            raise _unnamed(recipe, component, name)
        resolved[name] = _fitted(recipe, component, name, found, layer)
    return resolved


def exclusions_of(recipe: Recipe, component: ComponentName, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The reason of every excluded layer. Raises `InputError` for an exclusion that matches no layer."""
    excluded: dict[str, str] = {}
    for exclusion in recipe.exclusions:
        if exclusion.component == component:
            for name in _check_matches(recipe, component, "exclusion", exclusion.pattern, layers):
                excluded.setdefault(name, exclusion.reason)
    return {name: excluded[name] for name in layers if name in excluded}


def weight_of(module: nn.Module, name: str = "") -> torch.Tensor:
    """The weight of a layer, or of the submodule `name`."""
    weight = module.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def is_grouped(layer: nn.Module) -> bool:
    """A depthwise or grouped convolution: each output sees only some of the inputs."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups > 1
    weight = weight_of(layer)
    return not isinstance(layer, (nn.Linear, nn.Embedding)) and weight.ndim == 4 and weight.shape[1] == 1


def _has_matrix(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and weight.ndim >= 2


def _fitted(recipe: Recipe, component: ComponentName, name: str, rule: LayerRule, layer: nn.Module) -> LayerRule:
    """The rule with a group that fits the layer. Raises `InputError` where the layer cannot be quantised so."""
    shape = tuple(weight_of(layer).shape)
    inputs = prod(shape[1:])
    if isinstance(rule.granularity, PerGroup) and rule.granularity.size > inputs:
        rule = replace(rule, granularity=PerGroup(inputs))
    reason = _obstacle(rule, layer, shape)
    if reason:
        raise InputError(
            f"recipe {recipe.name}: {component} layer '{name}' cannot be quantised as the rule says",
            received=f"{type(layer).__name__} with weight {list(shape)}, rule '{rule.pattern}'",
            expected=reason,
            action="add an exclusion with a reason for this layer, or another rule before this one",
        )
    return rule


def _obstacle(rule: LayerRule, layer: nn.Module, shape: tuple[int, ...]) -> str:
    """What the rule needs and the layer is not; empty if it fits."""
    group = rule.granularity
    if is_grouped(layer):
        return "no depthwise or grouped convolution: no target has a fast 8-bit kernel for them"
    if isinstance(layer, nn.Embedding) and rule.activation_dtype is not None:
        return "weight only for an embedding table: its input is token numbers"
    if rule.smoothing_alpha is not None and not isinstance(layer, nn.Linear):
        return "smoothing for linear layers only"
    if isinstance(group, PerGroup):
        if not isinstance(layer, nn.Linear):
            return "groups for linear layers only"
        if shape[1] % group.size:
            return f"a number of inputs that the group of {group.size} divides"
    return ""


def _check_matches(
    recipe: Recipe, component: ComponentName, kind: str, pattern: str, layers: Mapping[str, nn.Module]
) -> list[str]:
    found = [name for name in layers if fnmatchcase(name, pattern)]
    if not found:
        raise InputError(
            f"recipe {recipe.name}: a {kind} for {component} matches no layer",
            received=pattern,
            expected=f"a layer of {component}, such as {', '.join(list(layers)[:3])}",
            action="correct the pattern, or remove it",
        )
    return found


def _unnamed(recipe: Recipe, component: ComponentName, name: str) -> InputError:
    return InputError(
        f"recipe {recipe.name}: {component} layer '{name}' is neither quantised nor excluded",
        expected="every layer under a rule or under an exclusion with a reason",
        action="add one of the two to the recipe",
    )
