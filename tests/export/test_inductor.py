"""The pieces of the target `inductor` compute what the reference modules compute, in every variant and precision.

They run eagerly here, with the kernels' references; `test_inductor_build.py` compiles them.
"""

import contextlib
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sana_calibration.fake_quant import fake_quantized
from sana_calibration.layers import weight_of
from sana_calibration.quantize import fake_quantize
from sana_calibration.recipe import load_recipe
from sana_calibration.rules import Exclusion, LayerRule, PerTensor, Recipe
from sana_calibration.scales import LayerScales
from sana_calibration.smoothing import layer_scales_of_channels
from sana_export.calibration_run import rules_of
from sana_export.components import ComponentPlan, loaded_module, plan_components
from sana_export.inductor import decoder, text_encoder
from sana_export.inductor.decoder import (
    DecoderLayout,
    decoder_calls,
    decoder_pieces,
    decoder_weights,
    phase_weight,
    stored_weight,
)
from sana_export.inductor.linear import FP8, INT8, LinearForm, linear
from sana_export.inductor.prepare import Prepared, convolution_forms, prepare, quantized_by
from sana_export.inductor.transformer import stored_taps, taps_view
from sana_export.parity.metrics import measure
from sana_export.parity.tolerance import check
from sana_export.reference.dc_ae import AutoencoderConfig
from sana_export.weights.checkpoint import Checkpoint, open_checkpoint
from sana_kernels.linear_attention import linear_attention
from sana_kernels.mix_ffn_depthwise import tap_major
from sana_kernels.modulated_norm import channel_rms_norm_codes
from sana_runtime.contract import COMPONENTS, ComponentName, PrecisionName, TensorSpec
from sana_runtime.errors import TargetError
from sana_runtime.inductor_program import Call, run_calls

VARIANTS = ["random:tiny", "random:tiny-qknorm", "random:tiny-sprint", "random:tiny-4k"]
# The variants have the same text encoder and decoder.
DIFFERENT = [("random:tiny", component) for component in COMPONENTS] + [(name, "transformer") for name in VARIANTS[1:]]
# Not square, so that height and width cannot be exchanged; the prompt is longer than what is valid of it.
HEIGHT, WIDTH, TOKENS, VALID = 128, 96, 60, 23
# Blocks of the tiny components, for the bound of parity/tolerance.py.
BLOCKS = {"text_encoder": 2, "transformer": 2, "vae_decoder": 18}
# What another order of sums changes of an activation, relative to the layer's RMS: against fp64 these layers' inputs
# have relative RMS errors of 1e-7 to 5e-7.
ORDER_OF_SUMS = 4e-7
# Guidance multiplies the independent errors of its halves.
GUIDANCE = 4.5


@cache
def checkpoint(model: str) -> Checkpoint:
    return open_checkpoint(model)


@cache
def plan_of(model: str, precision: PrecisionName, component: ComponentName) -> ComponentPlan:
    plans = plan_components(checkpoint(model), precision, HEIGHT, WIDTH, TOKENS)
    return next(plan for plan in plans if plan.name == component)


def feeds_of(plan: ComponentPlan, seed: int = 1) -> dict[str, torch.Tensor]:
    """Seeded inputs; one masked caption position lies between valid ones."""
    generator = torch.Generator().manual_seed(seed)
    scalars = {"timestep": 731.0, "sigma": 0.7, "guidance_scale": GUIDANCE, "guidance_embeds": GUIDANCE}
    feeds = {}
    names = {spec.name for spec in plan.inputs}
    for spec in plan.inputs:
        if spec.name == "caption_tokens":
            feeds[spec.name] = torch.randint(0, 768, spec.shape, generator=generator)
        elif spec.name == "caption_mask":
            mask = torch.zeros(spec.shape, dtype=torch.int64)
            mask[..., :VALID] = 1
            if plan.name == "transformer":
                mask[..., 5] = 0
            feeds[spec.name] = mask
        elif spec.name in scalars:
            sprint = spec.name == "timestep" and "guidance_embeds" in names
            feeds[spec.name] = torch.tensor(0.6 if sprint else scalars[spec.name])
        else:
            feeds[spec.name] = torch.randn(spec.shape, generator=generator).to(getattr(torch, spec.dtype))
    return feeds


@torch.no_grad()
def run_prepared(
    prepared: Prepared, plan: ComponentPlan, feeds: dict[str, torch.Tensor], step: tuple[Call, ...] | None = None
) -> dict[str, torch.Tensor]:
    values = {name: tensor.load() for name, tensor in prepared.weights.items()}
    for name, tensor in prepared.weights.items():
        assert (tuple(values[name].shape), values[name].dtype) == (tensor.shape, tensor.dtype), name
    values.update(feeds)
    for lookup in prepared.lookups:
        values[lookup.output] = prepared.tables[lookup.table].load()[feeds[lookup.index][:, lookup.first : lookup.end]]
    made = frozenset(name for call in prepared.prepare for name in call.outputs)
    run_calls(prepared.prepare, prepared.pieces, values, made)
    outputs = frozenset(spec.name for spec in plan.outputs)
    run_calls(prepared.step if step is None else step, prepared.pieces, values, outputs)
    return {name: values[name] for name in outputs}


def prepared_for(model: str, plan: ComponentPlan, rules: dict, scales: dict) -> Prepared:
    return prepare(checkpoint(model), plan, HEIGHT // 32, WIDTH // 32, TOKENS, rules, scales, "reference")


@torch.no_grad()
def reference_outputs(module: torch.nn.Module, plan: ComponentPlan, feeds: dict) -> dict[str, torch.Tensor]:
    outputs = module(*[feeds[spec.name] for spec in plan.inputs])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {spec.name: output for spec, output in zip(plan.outputs, outputs, strict=True)}


def compare(
    plan: ComponentPlan, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], dtype: str
) -> dict[str, float]:
    """Hold every output to the bound of its dtype; rows of padding mean nothing."""
    errors = {}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        left, right = found[name], value
        assert left.shape == right.shape, name
        if plan.name == "text_encoder":
            left, right = left[:, :VALID], right[:, :VALID]
        row = measure(plan.name, name, _numpy(left), _numpy(right))
        blocks = BLOCKS[plan.name]
        if plan.name == "transformer" and dtype != "float32":
            # An error of each half counts GUIDANCE and GUIDANCE - 1 times: as of that many more squared roundings.
            blocks = int(blocks * (GUIDANCE**2 + (GUIDANCE - 1) ** 2))
        check(row, dtype, blocks)
        errors[name] = row.relative_rms
    return errors


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


@pytest.mark.parametrize(("model", "component"), DIFFERENT)
def test_pieces_equal_the_reference_in_fp32(model: str, component: ComponentName) -> None:
    plan = plan_of(model, "fp32", component)
    feeds = feeds_of(plan)
    found = run_prepared(prepared_for(model, plan, {}, {}), plan, feeds)
    wanted = reference_outputs(loaded_module(plan, checkpoint(model)), plan, feeds)
    compare(plan, found, wanted, "float32")
    assert all(value.float().std() > 0 for value in wanted.values())


@pytest.mark.parametrize(("model", "component"), DIFFERENT)
def test_pieces_in_bf16_are_within_their_roundings(model: str, component: ComponentName) -> None:
    plan, exact = plan_of(model, "bf16", component), plan_of(model, "fp32", component)
    feeds = feeds_of(plan)
    found = run_prepared(prepared_for(model, plan, {}, {}), plan, feeds)
    wide = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in feeds.items()}
    wanted = reference_outputs(loaded_module(exact, checkpoint(model)), exact, wide)
    compare(plan, found, wanted, "bfloat16")


@pytest.fixture
def prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer positions than usual are computed per prompt: of the prompt's 23 tokens, 20 are the prefix's."""
    monkeypatch.setattr(text_encoder, "_PER_PROMPT", TOKENS - 20)
    monkeypatch.setattr(text_encoder, "_SHORTEST_PREFIX", 16)


@pytest.mark.usefixtures("prefix")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_prefix_of_its_own_changes_nothing(precision: PrecisionName) -> None:
    plan, exact = (plan_of("random:tiny", name, "text_encoder") for name in (precision, "fp32"))
    feeds = feeds_of(plan)
    prepared = prepared_for("random:tiny", plan, {}, {})
    assert {*prepared.pieces} == {"embed", "layer", "final", "prefix_embed", "prefix_layer"}
    found = run_prepared(prepared, plan, feeds)
    wanted = reference_outputs(loaded_module(exact, checkpoint("random:tiny")), exact, feeds)
    compare(plan, found, wanted, plan.dtype)


@pytest.mark.parametrize("per_prompt", [TOKENS, TOKENS - 20], ids=["all", "behind a prefix"])
def test_a_short_caption_is_computed_by_fewer_positions(per_prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its valid rows are the reference's, and zeros stand behind those that are computed."""
    monkeypatch.setattr(text_encoder, "_PER_PROMPT", per_prompt)
    monkeypatch.setattr(text_encoder, "_SHORTEST_PREFIX", 16)
    monkeypatch.setattr(text_encoder, "_SHORT", 9)
    plan = plan_of("random:tiny", "fp32", "text_encoder")
    prepared = prepared_for("random:tiny", plan, {}, {})
    assert {"short_embed", "short_layer", "short_final"} <= {*prepared.pieces}
    short, prefix = prepared.short_step, TOKENS - per_prompt
    assert short is not None
    assert short.end == prefix + 9
    (rows,) = [lookup for lookup in prepared.lookups if lookup.output == "short_rows"]
    assert (rows.first, rows.end) == (prefix, short.end)
    feeds = feeds_of(plan)
    feeds["caption_mask"][:, short.end :] = 0
    found = run_prepared(prepared, plan, feeds, short.calls)["caption_embeds"]
    wanted = reference_outputs(loaded_module(plan, checkpoint("random:tiny")), plan, feeds)["caption_embeds"]
    valid = feeds["caption_mask"][0].bool()
    assert valid[prefix : short.end].any()
    row = measure("text_encoder", "caption_embeds", _numpy(found[:, valid]), _numpy(wanted[:, valid]))
    check(row, "float32", BLOCKS["text_encoder"])
    assert found.shape == wanted.shape
    assert not found[:, short.end :].any()
    # The whole caption's step is another one and still there.
    whole = run_prepared(prepared, plan, feeds)["caption_embeds"]
    assert whole[:, short.end :].any()


def test_captions_are_told_apart_where_it_saves_half() -> None:
    assert text_encoder.short_end(300) == 128
    assert text_encoder.prefix_length(512) == 208
    assert text_encoder.short_end(512) == 336
    assert text_encoder.short_end(256) == 0


def observed_scales(
    module: torch.nn.Module, plan: ComponentPlan, rules: dict[str, LayerRule], feeds: dict
) -> dict[str, LayerScales]:
    """Plain max calibration on the very inputs of the test."""
    found: dict[str, np.ndarray] = {}
    handles = []
    for name, rule in rules.items():
        if rule.activation_dtype is not None:

            def hook(_: object, inputs: tuple, name: str = name) -> None:
                x = inputs[0].detach().float().abs()
                found[name] = x.flatten(0, -2).amax(0).numpy() if x.ndim == 3 else x.amax().reshape(1).numpy()

            handles.append(module.get_submodule(plan.prefix + name).register_forward_pre_hook(hook))
    reference_outputs(module, plan, feeds)
    for handle in handles:
        handle.remove()
    # Pieces must compute with any alpha: where calibration would search for it, one is taken.
    alphas = {name: 0.8 if rule.smoothing_alpha == "search" else rule.smoothing_alpha for name, rule in rules.items()}
    return {
        name: layer_scales_of_channels(channels, weight_of(module, plan.prefix + name), alphas[name], "float32")
        for name, channels in found.items()
    }


def feeds_between_ties(
    module: torch.nn.Module, plan: ComponentPlan, rules: dict[str, LayerRule]
) -> tuple[dict, dict[str, LayerScales]]:
    """Feeds, and the scales observed on them, whose codes stay the same in any order of sums.

    An activation between two codes is one or the other by its last bits, which CPUs sum differently, and a code that
    moves takes those of its position in all later layers along.
    """
    for seed in range(1, 400):
        feeds = feeds_of(plan, seed)
        scales = observed_scales(module, plan, rules, feeds)

        def look(x: torch.Tensor, scale: float, dtype: str) -> torch.Tensor:
            codes = fake_quantize(x, scale, dtype)
            margin = ORDER_OF_SUMS * (x.abs() + x.square().mean().sqrt())
            if any(not torch.equal(fake_quantize(x + d, scale, dtype), codes) for d in (margin, -margin)):
                raise NearTie
            return codes

        with pytest.MonkeyPatch.context() as patch, fake_quantized(module, plan.prefix, rules, scales):
            patch.setattr("sana_calibration.fake_quant.fake_quantize", look)
            with contextlib.suppress(NearTie):
                reference_outputs(module, plan, feeds)
                return feeds, scales
    raise AssertionError("no feeds without activations near a tie")


class NearTie(Exception):
    """Another order of sums could move a code."""


def per_tensor(recipe: Recipe) -> Recipe:
    """With one scale per tensor nothing can be folded into a weight: factors are applied on the way."""
    return replace(recipe, rules=tuple(replace(rule, granularity=PerTensor()) for rule in recipe.rules))


def per_channel_fp8(recipe: Recipe) -> Recipe:
    fp8 = load_recipe("fp8")
    rules = tuple(
        replace(rule, granularity=load_recipe("int8").rules[0].granularity) if rule.activation_dtype else rule
        for rule in fp8.rules
    )
    return replace(fp8, rules=rules)


RECIPES = {
    "fp8": lambda: load_recipe("fp8"),
    "int8": lambda: load_recipe("int8"),
    "int8-weight-only": lambda: load_recipe("int8-weight-only"),
    "int8-per-tensor": lambda: per_tensor(load_recipe("int8")),
    "fp8-per-channel": lambda: per_channel_fp8(load_recipe("fp8")),
}


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize(
    ("model", "component"),
    [*((model, "transformer") for model in VARIANTS[:3]), ("random:tiny", "text_encoder")],
)
def test_quantised_pieces_equal_the_fake_quantised_reference(model: str, name: str, component: ComponentName) -> None:
    """In an fp32 base every code is the same, so only the order of sums differs."""
    recipe = replace(RECIPES[name](), base_dtype="float32")
    plan = plan_of(model, "fp32", component)
    module, rules = loaded_module(plan, checkpoint(model)), rules_of(recipe, plan)
    feeds, scales = feeds_between_ties(module, plan, rules)
    if component == "transformer" and "weight-only" not in name:
        assert (scales["blocks.0.linear_attention.qkv"].smooth_factor is not None) == (name.startswith("int8"))
    found = run_prepared(prepared_for(model, plan, rules, scales), plan, feeds)
    plain = reference_outputs(module, plan, feeds)
    with fake_quantized(module, plan.prefix, rules, scales):
        wanted = reference_outputs(module, plan, feeds)
    errors = compare(plan, found, wanted, "float32")
    output = plan.outputs[-1].name
    effect = measure(component, output, _numpy(wanted[output]), _numpy(plain[output])).relative_rms
    assert effect > 20 * errors[output], "the recipe changes nothing: the comparison shows nothing"


CONVOLUTION_RECIPES = ["fp8", "int8", "int8-per-tensor", "fp8-per-channel"]


@torch.no_grad()
@pytest.mark.parametrize("name", CONVOLUTION_RECIPES)
def test_a_quantised_residual_block_equals_the_fake_quantised_one(name: str) -> None:
    """In an fp32 base every code is the same, so only the order of sums differs."""
    plan = plan_of("random:tiny", "fp32", "vae_decoder")
    ck, block = checkpoint("random:tiny"), "stages.0.blocks.1"
    module = loaded_module(plan, ck)
    found_rules = rules_of(replace(RECIPES[name](), base_dtype="float32"), plan)
    rules = {layer.removeprefix(f"{block}."): rule for layer, rule in found_rules.items() if layer.startswith(block)}
    assert {*rules} == {"conv1", "conv2"}
    config = AutoencoderConfig.from_upstream(ck.vae_config)
    x = TensorSpec("x", "float32", (1, config.decoder_channels[0], 5, 4))
    one = replace(plan, prefix="", inputs=(x,), outputs=plan.outputs[:1])
    reference = module.get_submodule(f"{plan.prefix}{block}")
    feeds, scales = feeds_between_ties(reference, one, rules)
    with fake_quantized(reference, "", rules, scales):
        wanted = reference(feeds["x"])
    full = {f"{block}.{layer}": scales[layer] for layer in rules}
    prepared = prepared_for("random:tiny", plan, {f"{block}.{layer}": rule for layer, rule in rules.items()}, full)
    values = {layer: tensor.load() for layer, tensor in prepared.weights.items() if layer.startswith(block)}
    forms = convolution_forms(quantized_by({layer: found_rules[layer] for layer in full}, full, torch.float32))
    layout = DecoderLayout(config, torch.float32, 5, 4, "reference", forms=forms)
    pixels = decoder.Pair(feeds["x"].permute(0, 2, 3, 1))
    found = decoder._res_block(pixels, values, block, layout, feeds="").x.permute(0, 3, 1, 2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.std()))
    assert (reference(feeds["x"]) - wanted).std() > 1e-3 * wanted.std(), "the recipe changes nothing"


@pytest.mark.parametrize("name", CONVOLUTION_RECIPES)
def test_quantised_convolutions_are_those_of_the_fake_quantised_decoder(name: str) -> None:
    """A decoder has too many activations for none to be near a tie, and a code that another order of sums moves takes
    others along: what is left of the difference, a wrong scale or layer would be a multiple of.
    """
    recipe = replace(RECIPES[name](), base_dtype="float32")
    plan = plan_of("random:tiny", "fp32", "vae_decoder")
    module, rules, feeds = loaded_module(plan, checkpoint("random:tiny")), rules_of(recipe, plan), feeds_of(plan)
    observed = observed_scales(module, plan, rules, feeds)
    # Coarse steps, whose effect is larger than the rounding of the image to bytes. E4M3's are as coarse at any scale.
    coarse = 16 if name.startswith("int8") else 1
    scales = {layer: LayerScales(coarse * (found.activation_amax or 0)) for layer, found in observed.items()}
    prepared = prepared_for("random:tiny", plan, rules, scales)
    assert not prepared.notes
    assert sum(tensor.dtype in (FP8, INT8) for tensor in prepared.weights.values()) == 18
    image = run_prepared(prepared, plan, feeds)["image"]
    plain = reference_outputs(module, plan, feeds)["image"]
    with fake_quantized(module, plan.prefix, rules, scales):
        wanted = reference_outputs(module, plan, feeds)["image"]

    def error(found: torch.Tensor) -> float:
        return measure("vae_decoder", "image", _numpy(found), _numpy(wanted)).relative_rms

    assert error(image) < error(plain) / 4


@pytest.mark.parametrize("name", ["fp8", "int8", "bf16", "smoothed"])
def test_codes_of_a_residual_block_are_written_by_what_stands_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the norm of the block before, unless they must be multiplied with factors first."""
    written: list[torch.dtype] = []

    def spy(*arguments: torch.Tensor, **options: Any) -> object:
        written.append(options["out_dtype"])
        return channel_rms_norm_codes(*arguments, **options)

    monkeypatch.setattr(decoder, "channel_rms_norm_codes", spy)
    plan = plan_of("random:tiny", "fp32", "vae_decoder")
    rules = {} if name == "bf16" else rules_of(RECIPES["int8" if name == "smoothed" else name](), plan)
    channels = AutoencoderConfig.from_upstream(checkpoint("random:tiny").vae_config).decoder_channels
    scales = {layer: LayerScales(3.0) for layer in rules}
    if name == "smoothed":
        factors = {layer: np.ones(channels[int(layer.split(".")[1])], np.float32) for layer in rules}
        scales = {layer: LayerScales(3.0, factors[layer]) for layer in rules}
    run_prepared(prepared_for("random:tiny", plan, rules, scales), plan, feeds_of(plan))
    dtype = {"fp8": FP8, "int8": INT8}.get(name)
    assert written == ([dtype] * 6 if dtype else [])


@pytest.mark.parametrize(("name", "written"), [("fp8", FP8), ("int8", None), ("int8-weight-only", None)])
def test_linear_attention_writes_the_codes_of_the_next_product(
    name: str, written: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless its result must be multiplied with smooth factors first."""
    found = []

    def spy(*arguments: torch.Tensor, **options: Any) -> torch.Tensor:
        found.append(options["out_dtype"])
        return linear_attention(*arguments, **options)

    monkeypatch.setattr("sana_export.inductor.transformer.linear_attention", spy)
    recipe = replace(RECIPES[name](), base_dtype="float32")
    plan = plan_of("random:tiny", "fp32", "transformer")
    feeds, module = feeds_of(plan), loaded_module(plan, checkpoint("random:tiny"))
    rules = rules_of(recipe, plan)
    scales = observed_scales(module, plan, rules, feeds)
    run_prepared(prepared_for("random:tiny", plan, rules, scales), plan, feeds)
    assert found == [written] * 2


def test_quantised_weights_are_stored_in_eight_bits() -> None:
    plan = plan_of("random:tiny", "bf16", "transformer")
    recipe = load_recipe("fp8")
    rules = rules_of(recipe, plan)
    scales = {name: LayerScales(2.0) for name, rule in rules.items() if rule.activation_dtype}
    weights = prepared_for("random:tiny", plan, rules, scales).weights
    assert weights["blocks.1.mix_ffn.conv_inverted.weight"].dtype == FP8
    assert weights["to_kv.weight"].dtype == INT8
    assert weights["to_kv.weight_scale"].shape == (2, 128)
    assert weights["blocks.0.mix_ffn.conv_depth.weight"].dtype == torch.bfloat16
    # 2 / 448, rounded to bf16 like the scale in the Q/DQ graph.
    scale = weights["blocks.0.linear_attention.qkv.activation_scale"].load()
    assert scale == torch.tensor(2 / 448).bfloat16().float()


def test_blocks_of_one_form_share_a_piece() -> None:
    plan = plan_of("random:tiny", "fp32", "transformer")
    shared = prepared_for("random:tiny", plan, {}, {})
    assert sorted(shared.pieces) == ["block", "caption", "embed", "head"]
    assert [call.piece for call in shared.step] == ["embed", "block", "block", "head"]


def test_a_block_with_an_exclusion_gets_a_piece_of_its_own() -> None:
    recipe = replace(load_recipe("int8"), base_dtype="float32")
    recipe = recipe.excluding((Exclusion("transformer", "blocks.1.mix_ffn.conv_point", "a test"),))
    plan = plan_of("random:tiny", "fp32", "transformer")
    module, rules = loaded_module(plan, checkpoint("random:tiny")), rules_of(recipe, plan)
    feeds, scales = feeds_between_ties(module, plan, rules)
    prepared = prepared_for("random:tiny", plan, rules, scales)
    assert [call.piece for call in prepared.step] == ["embed", "block", "block_2", "head"]
    found = run_prepared(prepared, plan, feeds)
    with fake_quantized(module, plan.prefix, rules, scales):
        compare(plan, found, reference_outputs(module, plan, feeds), "float32")


def test_the_clip_of_fp16_era_weights_is_kept() -> None:
    """An attention output beyond fp16's range is clipped as in the reference."""
    ck = open_checkpoint("random:tiny")
    ck.attention_clip = True
    plan = next(p for p in plan_components(ck, "fp32", HEIGHT, WIDTH, TOKENS) if p.name == "transformer")
    weights = ck.weights("transformer")
    name = "blocks.0.linear_attention.to_out.bias"
    loud = replace(weights[name], load=lambda: torch.linspace(-1e6, 1e6, 64))
    ck.weights = lambda component: {**weights, name: loud}  # type: ignore[method-assign]
    feeds = feeds_of(plan)
    prepared = prepare(ck, plan, HEIGHT // 32, WIDTH // 32, TOKENS, {}, {}, "reference")
    wanted = reference_outputs(loaded_module(plan, ck), plan, feeds)["velocity"]
    ck.attention_clip = False
    unclipped = prepare(ck, plan, HEIGHT // 32, WIDTH // 32, TOKENS, {}, {}, "reference")

    def error(candidate: Prepared) -> float:
        found = run_prepared(candidate, plan, feeds)["velocity"]
        return measure("transformer", "velocity", _numpy(found), _numpy(wanted)).relative_rms

    # Beside 65504, fp32 keeps details of unit size to this many digits only.
    bound = 65504 * 2.0**-24
    assert error(prepared) <= bound
    assert error(unclipped) > 10 * bound


@pytest.mark.parametrize("upsampling", ["phases", "interpolate"])
@pytest.mark.parametrize("mixing", ["ours", "library"])
def test_every_way_to_decode_gives_the_same_picture(upsampling: str, mixing: str) -> None:
    plan = plan_of("random:tiny", "fp32", "vae_decoder")
    ck = checkpoint("random:tiny")
    config = AutoencoderConfig.from_upstream(ck.vae_config)
    ways = ("library", "library") if mixing == "library" else ("shifted", "batched")
    layout = DecoderLayout(config, torch.float32, HEIGHT // 32, WIDTH // 32, "reference", upsampling, *ways)  # type: ignore[arg-type]
    feeds = feeds_of(plan)
    found = {"image": decoded(layout, feeds["latent"])}
    compare(plan, found, reference_outputs(loaded_module(plan, ck), plan, feeds), "float32")


@torch.no_grad()
def decoded(layout: DecoderLayout, latent: torch.Tensor) -> torch.Tensor:
    """The picture that the pieces of a layout make of a latent with the weights of random:tiny."""
    weights = checkpoint("random:tiny").weights("vae_decoder")
    values = {n: stored_weight(n, weights[n].load(), layout.upsampling) for n in decoder_weights(layout)}
    values["latent"] = latent
    pieces = {piece.name: piece for piece in decoder_pieces(layout)}
    run_calls(decoder_calls(layout), pieces, values, frozenset({"image"}))
    return values["image"]


@pytest.mark.parametrize("rows", [17, 32, 64])
@pytest.mark.parametrize("upsampling", ["phases", "interpolate"])
def test_a_decoder_in_windows_gives_the_same_picture(
    rows: int, upsampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of about so many rows of the last stage, and so of twice as many of the stage before."""
    config = AutoencoderConfig.from_upstream(checkpoint("random:tiny").vae_config)
    layout = DecoderLayout(config, torch.float32, 5, 2, "reference", upsampling)  # type: ignore[arg-type]
    latent = torch.randn(1, 32, 5, 2, generator=torch.Generator().manual_seed(2))
    # Before it is rounded to bytes, which would hide most of a wrong row.
    monkeypatch.setattr(decoder, "_pixels", lambda x, t: decoder._convolution(F.relu(x), t, "conv_out"))
    whole = decoded(layout, latent)
    monkeypatch.setattr(decoder, "_WINDOW_BYTES", rows * 64 * config.decoder_channels[0] * 4)
    monkeypatch.setattr(decoder, "_MOST_WINDOWS", 160)
    windows = decoder._windows(layout, 0)
    good = [(w.good.stop - w.good.start) for w in windows]
    assert sum(good) == 160
    assert len({w.end - w.first for w in windows}) == 1
    assert len(windows) > 1
    assert max(good) <= rows
    assert [call.piece for call in decoder_calls(layout)].count("stages_0_to_0") == len(windows)
    torch.testing.assert_close(decoded(layout, latent), whole, rtol=0, atol=3e-5 * float(whole.std()))


def test_windows_start_where_a_picture_is_large() -> None:
    config = AutoencoderConfig.from_upstream(checkpoint("random:0.6b").vae_config)

    def counts(side: int) -> list[int]:
        layout = DecoderLayout(config, torch.bfloat16, side // 32, side // 32, "triton")
        return [len(decoder._windows(layout, stage)) for stage in range(6)]

    assert counts(512) == [0] * 6
    assert counts(1024) == [2, 0, 0, 0, 0, 0]
    assert counts(2048) == counts(4096) == [8, 4, 2, 0, 0, 0]


def test_the_four_phases_are_the_upsampled_convolution() -> None:
    x, weight = torch.randn(2, 5, 4, 7, dtype=torch.float64), torch.randn(3, 5, 3, 3, dtype=torch.float64)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    phases = F.conv2d(x.float(), phase_weight(weight.float()), padding=1).unflatten(1, (2, 2, 3))
    for a in (0, 1):
        for b in (0, 1):
            found = phases[:, a, b, :, a : a + 4, b : b + 7]
            torch.testing.assert_close(found, wanted[:, :, a::2, b::2].float(), rtol=1e-5, atol=1e-5)


def test_stored_taps_lie_as_the_kernel_reads_them_fastest() -> None:
    weight = torch.randn(10, 1, 3, 3)
    view = taps_view(stored_taps(weight))
    assert torch.equal(view, weight)
    assert view.stride() == tap_major(weight).stride()


@pytest.mark.parametrize("codes", [FP8, INT8], ids=str)
def test_a_linear_layer_takes_codes_or_makes_them(codes: torch.dtype) -> None:
    form = LinearForm(True, codes, codes)
    x, weight = torch.randn(3, 20, 32), torch.randn(16, 32)
    stored = (weight * 10).to(codes)
    scale = torch.tensor(0.02)
    tensors = {
        "l.weight": stored,
        "l.weight_scale": torch.tensor(0.1),
        "l.activation_scale": scale,
        "l.bias": torch.randn(16),
    }
    made = linear(x, tensors, "l", form, torch.float32)
    quantised = (x / scale).clamp(-448, 448) if codes == FP8 else (x / scale).round().clamp(-128, 127)
    given = linear(quantised.to(codes), tensors, "l", form, torch.float32)
    torch.testing.assert_close(made, given, rtol=0, atol=0)
    wanted = F.linear(quantised.to(codes).float() * scale, stored.float() * 0.1, tensors["l.bias"])
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-4)


def test_what_the_target_cannot_compute_is_refused() -> None:
    plan = plan_of("random:tiny", "bf16", "transformer")
    rules = rules_of(load_recipe("int4-weight-only"), plan)
    with pytest.raises(TargetError, match="no kernel for int4 weights"):
        prepared_for("random:tiny", plan, rules, {})
    with pytest.raises(TargetError, match="computes in bf16 or fp32"):
        prepared_for("random:tiny", plan_of("random:tiny", "fp16", "transformer"), {}, {})


def test_the_decoder_says_what_it_leaves_alone() -> None:
    plan = plan_of("random:tiny", "bf16", "vae_decoder")
    rules = rules_of(load_recipe("int8-weight-only"), plan)
    prepared = prepared_for("random:tiny", plan, rules, {})
    (note,) = prepared.notes
    assert note.startswith("vae_decoder: 18 quantised layers stay in the base dtype: this target has 8-bit kernels for")
    assert {tensor.dtype for tensor in prepared.weights.values()} == {torch.bfloat16}
