"""Recipes name every layer of every model, and say so when they cannot."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from sana_calibration.recipe import (
    Exclusion,
    Gate,
    LayerRule,
    PerChannel,
    PerGroup,
    PerTensor,
    Recipe,
    exclusions_of,
    layers_of,
    load_recipe,
    recipe_names,
    recipe_yaml,
    resolve,
)
from sana_calibration.rules import rules_digest
from sana_export.components import ComponentPlan, parameters_on_meta, plan_components
from sana_export.weights.checkpoint import open_checkpoint
from sana_runtime.errors import InputError

MODELS = ("random:tiny", "random:tiny-sprint", "random:0.6b", "random:1.6b-4k", "random:1.5-1.6b", "random:sprint-0.6b")
GEMMS = {
    "linear_attention.qkv",
    "linear_attention.to_out",
    "cross_attention.to_q",
    "cross_attention.to_out",
    "mix_ffn.conv_inverted",
    "mix_ffn.conv_point",
}
SMALL = """
name: mine
base_dtype: float32
gate: {min_x0_sqnr_db: 20, min_psnr_db: 30, min_ssim: 0.9}
rules:
  - component: transformer
    layers: [a]
    weight_dtype: int8
    granularity: per_channel
"""


def plans(model: str) -> tuple[ComponentPlan, ...]:
    return plan_components(open_checkpoint(model), "fp32", 128, 128, 300)


def layers(plan: ComponentPlan) -> dict[str, nn.Module]:
    with parameters_on_meta():
        return layers_of(plan.make(), plan.prefix)


def small(*rules: LayerRule, exclusions: tuple[Exclusion, ...] = ()) -> Recipe:
    return Recipe("mine", "float32", rules, exclusions, Gate(20, 30, 0.9))


def rule(pattern: str, granularity: object = None, **changes: object) -> LayerRule:
    fields: dict = {"weight_dtype": "int8", "activation_dtype": None, **changes}
    return LayerRule("transformer", pattern, granularity=granularity or PerChannel(), **fields)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_decides_every_layer(name: str, model: str) -> None:
    recipe = load_recipe(name)
    for plan in plans(model):
        found = layers(plan)
        resolved, excluded = resolve(recipe, plan.name, found), exclusions_of(recipe, plan.name, found)
        assert resolved
        assert {*resolved} | {*excluded} == {*found}
        assert not {*resolved} & {*excluded}
        assert all(excluded.values())


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_safe_defaults(name: str) -> None:
    """Activations: the six GEMMs of every block and the decoder's convolutions, nothing else."""
    recipe = load_recipe(name)
    active: dict[str, set[str]] = {}
    for plan in plans("random:tiny"):
        resolved = resolve(recipe, plan.name, layers(plan))
        active[plan.name] = {layer for layer, rule in resolved.items() if rule.activation_dtype is not None}
    assert active["text_encoder"] == set()
    assert active["transformer"] == {f"blocks.{block}.{gemm}" for block in range(2) for gemm in GEMMS}
    assert active["vae_decoder"] == {
        f"stages.{s}.blocks.{b}.conv{c}" for s in range(3) for b in range(3) for c in (1, 2)
    }


@pytest.mark.parametrize("model", ["random:0.6b", "random:1.6b"])
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_quantised_transformer_is_little_more_than_half(name: str, model: str) -> None:
    """Weight bytes against bf16; the plan may be 0.55 of the bf16 plan."""
    plan = next(plan for plan in plans(model) if plan.name == "transformer")
    with parameters_on_meta():
        module = plan.make()
    found = layers_of(module, plan.prefix)
    quantised = sum(found[layer].weight.numel() for layer in resolve(load_recipe(name), plan.name, found))
    total = sum(parameter.numel() for parameter in module.parameters())
    assert (quantised + 2 * (total - quantised)) / (2 * total) < 0.54


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_survives_its_own_file(name: str, recipe_file: Callable[[str], Path]) -> None:
    recipe = load_recipe(name).excluding((Exclusion("transformer", "proj_*", "Grund: ä"),))
    assert load_recipe(recipe_file(recipe_yaml(recipe))) == recipe


def test_layers_have_matrices_and_no_norms() -> None:
    with parameters_on_meta():
        found = {plan.name: layers_of(plan.make(), plan.prefix) for plan in plans("random:tiny-qknorm")}
    assert isinstance(found["text_encoder"]["embed_tokens"], nn.Embedding)
    assert "blocks.0.mix_ffn.conv_depth" in found["transformer"]
    assert "stages.5.blocks.0.linear_attention.multiscale.conv_group" in found["vae_decoder"]
    assert not [name for names in found.values() for name in names if "norm" in name]


def test_first_matching_rule_and_any_exclusion_count() -> None:
    linears = {name: nn.Linear(32, 32) for name in ("a", "b", "c")}
    recipe = small(rule("a"), rule("*", PerTensor()), exclusions=(Exclusion("transformer", "[bc]", "x"),))
    assert resolve(recipe, "transformer", linears) == {"a": rule("a")}
    assert exclusions_of(recipe, "transformer", linears) == {"b": "x", "c": "x"}


def test_wide_group_becomes_one_group_of_all_inputs() -> None:
    found = resolve(small(rule("a", PerGroup(128), weight_dtype="int4")), "transformer", {"a": nn.Linear(64, 8)})
    assert found["a"].granularity == PerGroup(64)


@pytest.mark.parametrize(
    ("layer", "ruled", "says"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), rule("a"), "depthwise"),
        (nn.Conv2d(8, 8, 1, groups=2), rule("a"), "grouped"),
        (nn.Linear(96, 8), rule("a", PerGroup(64), weight_dtype="int4"), "group of 64"),
        (nn.Conv2d(64, 8, 3), rule("a", PerGroup(64), weight_dtype="int4"), "linear layers only"),
        (nn.Embedding(9, 8), rule("a", activation_dtype="int8"), "weight only"),
        (nn.Conv2d(8, 8, 3), rule("a", activation_dtype="int8", smoothing_alpha=0.5), "smoothing"),
    ],
    ids=["depthwise", "grouped", "group does not divide", "grouped convolution", "embedding", "smoothed convolution"],
)
def test_layer_that_cannot_be_quantised_is_an_error(layer: nn.Module, ruled: LayerRule, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        resolve(small(ruled), "transformer", {"a": layer})
    assert "layer 'a'" in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (small(rule("a"), rule("blocks.9.*")), r"rule for transformer matches no layer\n  received: blocks\.9\.\*"),
        (small(rule("*"), exclusions=(Exclusion("transformer", "z", "x"),)), "exclusion for transformer matches no"),
        (small(rule("a")), "'b' is neither quantised nor excluded"),
    ],
    ids=["rule", "exclusion", "unnamed layer"],
)
def test_unknown_or_unnamed_layer_is_an_error(recipe: Recipe, says: str) -> None:
    with pytest.raises(InputError, match=says):
        resolve(recipe, "transformer", {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("weight_dtype: int8", "weight_dtype: int7"), "weight_dtype of 'a' has a wrong value\n  received: 'int7'"),
        (("weight_dtype", "wight_dtype"), "wight_dtype"),
        (("granularity: per_channel", "granularity: per_row"), "received: per_row"),
        (("granularity: per_channel", "granularity: per_group(64)"), "int4 only"),
        (("transformer", "transformator"), "transformator"),
        (("base_dtype: float32", "base_dtype: fp32"), "float32 or bfloat16 or float16"),
        (("min_ssim: 0.9", "min_ssim: 9"), "min_ssim"),
        (("name: mine\n", ""), "name"),
        (("layers: [a]", "layers: a"), "layers"),
        (("rules:", "rules: ["), "line"),
        (("weight_dtype: int8", "weight_dtype: int8\n    smoothing_alpha: 0.5"), "an activation_dtype to smooth"),
        (("weight_dtype: int8", "weight_dtype: int8\n    smoothing_alpha: search"), "an activation_dtype to smooth"),
        (("int8", "int8\n    activation_dtype: int8\n    smoothing_alpha: find"), "find"),
        (("int8", "int8\n    activation_dtype: int8\n    smoothing_candidates: [0.5]"), "smoothing_alpha: search"),
        (
            ("int8", "int8\n    activation_dtype: int8\n    smoothing_alpha: search\n    smoothing_candidates: [1.5]"),
            "smoothing_candidates of 'a' has a wrong value\n  received: (1.5,)",
        ),
        (("weight_dtype: int8", "weight_dtype: int8\n    activation_dtype: float8e4m3fn"), "int8 like the weight"),
        (("int8", "int8\n    activation_dtype: int8\n    amax: percentile\n    percentile: 0"), "percentile"),
        (
            ("int8", "int8\n    activation_dtype: int8\n    amax: entropy\n    smoothing_alpha: 0.5"),
            "exact after smoothing",
        ),
    ],
    ids=lambda value: value[1].split("\n")[-1].strip() if isinstance(value, tuple) else "",
)
def test_wrong_field_or_value_is_named(change: tuple[str, str], says: str, recipe_file: Callable[[str], Path]) -> None:
    assert change[0] in SMALL
    with pytest.raises(InputError) as error:
        load_recipe(recipe_file(SMALL.replace(*change, 1)))
    assert says in str(error.value)


def test_unknown_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(InputError, match="fp8, int4-weight-only, int8, int8-weight-only"):
        load_recipe("fp9")


def test_a_search_survives_the_file_and_decides_the_digest(recipe_file: Callable[[str], Path]) -> None:
    searched = "int8\n    activation_dtype: int8\n    smoothing_alpha: search\n    smoothing_candidates: [0.4, 0.6]"
    recipe = load_recipe(recipe_file(SMALL.replace("int8", searched, 1)))
    (one,) = {(rule.smoothing_alpha, rule.smoothing_candidates) for rule in recipe.rules if rule.smoothing_alpha}
    assert one == ("search", (0.4, 0.6))
    assert load_recipe(recipe_file(recipe_yaml(recipe))) == recipe
    every = tuple(replace(rule, smoothing_candidates=()) for rule in recipe.rules)
    assert replace(recipe, rules=every).digest != recipe.digest


def test_a_digest_of_rules_follows_them_and_not_the_patterns_they_were_found_by() -> None:
    rule = LayerRule("transformer", "a.*", "int8", "int8", PerChannel(), smoothing_alpha=0.5)
    found = rules_digest({"a.b": rule, "a.c": rule})
    assert rules_digest({"a.c": rule, "a.b": replace(rule, pattern="*")}) == found
    changed = [
        {"a.b": rule},
        {"a.b": rule, "a.d": rule},
        *(
            {"a.b": rule, "a.c": replace(rule, **change)}
            for change in (
                {"activation_dtype": None, "smoothing_alpha": None},
                {"granularity": PerTensor()},
                {"smoothing_alpha": 0.6},
            )
        ),
    ]
    assert len({found, *(rules_digest(rules) for rules in changed)}) == 6
    assert rules_digest({}) == "none"


def test_digest_follows_what_decides_a_calibration() -> None:
    recipe = load_recipe("int8")
    same = replace(recipe, name="x", gate=Gate(1, 1, 0.5), base_dtype="float32")
    assert same.digest == recipe.digest
    first = replace(recipe.rules[0], smoothing_alpha=0.7)
    changed = [
        replace(recipe, rules=(first, *recipe.rules[1:])),
        replace(recipe, base_dtype="float16"),
        recipe.excluding((Exclusion("transformer", "blocks.0.*", "x"),)),
    ]
    assert len({recipe.digest, *(one.digest for one in changed)}) == 4
