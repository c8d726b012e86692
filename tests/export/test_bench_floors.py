"""The counted arithmetic is what PyTorch counts on the reference modules at real size, and floors follow from it."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sana_calibration.recipe import load_recipe
from sana_export.bench.ceilings import Ceilings, measure_ceilings
from sana_export.bench.floors import Stage, Work, caption_stage, decoder_stage, step_stage, text_encoder_stage
from sana_export.bench.rows import Case
from sana_export.bench.run import picture_work
from sana_export.calibration_run import rules_of
from sana_export.components import ComponentPlan, plan_components
from sana_export.reference.dc_ae import AutoencoderConfig, ImageDecoder
from sana_export.reference.transformer import TransformerConfig
from sana_export.weights.checkpoint import Checkpoint, open_checkpoint
from sana_kernels.linear_attention.reference import linear_attention_reference

TOKENS = 331


@pytest.fixture(autouse=True)
def decomposed_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter sees products only, and linear attention is one op to it: let it see the reference's products."""

    def decomposed(
        qkv: torch.Tensor, norm_q: torch.Tensor | None = None, norm_k: torch.Tensor | None = None, *, head_dim: int
    ) -> torch.Tensor:
        return linear_attention_reference(qkv, norm_q, norm_k, head_dim, 1e-15, 1e-5)

    for module in ("transformer", "dc_ae"):
        monkeypatch.setattr(f"sana_export.reference.{module}.linear_attention", decomposed)


def on_meta(plan: ComponentPlan) -> nn.Module:
    with torch.device("meta"):
        return plan.make().to("meta")


def counted(plan: ComponentPlan) -> int:
    module = on_meta(plan)
    if isinstance(module, ImageDecoder):
        # What overlapping windows compute twice is not part of the floor.
        module.decoder.most_elements = None
    feeds = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in plan.inputs]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*feeds)
    return counter.get_total_flops()


def plans_of(checkpoint: Checkpoint, height: int, width: int) -> dict[str, ComponentPlan]:
    return {plan.name: plan for plan in plan_components(checkpoint, "bf16", height, width, TOKENS)}


@pytest.mark.parametrize(
    ("model", "height", "width"),
    [
        pytest.param("random:0.6b", 1024, 1024, id="0.6b"),
        pytest.param("random:1.6b", 4096, 4096, id="1.6b-4096"),
        pytest.param("random:1.5-1.6b", 768, 1344, id="qk-norm-not-square"),
        pytest.param("random:sprint-0.6b", 512, 512, id="sprint-batch-1"),
        pytest.param("random:tiny", 96, 160, id="tiny-odd"),
    ],
)
def test_flop_equal_pytorchs_counter(model: str, height: int, width: int) -> None:
    checkpoint = open_checkpoint(model)
    plans = plans_of(checkpoint, height, width)
    latent = (height // 32, width // 32)
    transformer = TransformerConfig.from_upstream(checkpoint.transformer_config)
    batch = 1 if checkpoint.guidance == "embedded" else 2
    step = step_stage(transformer, latent, batch, {}).flop + caption_stage(transformer, batch, {}).flop
    assert step == counted(plans["transformer"])
    decoder = decoder_stage(AutoencoderConfig.from_upstream(checkpoint.vae_config), latent, {})
    assert decoder.flop == counted(plans["vae_decoder"])
    square = text_encoder_stage(checkpoint.text_encoder_config, TOKENS, {}, causal=False)
    assert square.flop == counted(plans["text_encoder"])


def test_a_causal_floor_leaves_out_exactly_the_future() -> None:
    config = open_checkpoint("random:0.6b").text_encoder_config
    square = text_encoder_stage(config, TOKENS, {}, causal=False).flop
    causal = text_encoder_stage(config, TOKENS, {}).flop
    width = config["num_attention_heads"] * config["head_dim"]
    assert square - causal == config["num_hidden_layers"] * 4 * width * TOKENS * (TOKENS - 1) // 2


def test_positions_that_are_kept_cost_nothing() -> None:
    config = open_checkpoint("random:0.6b").text_encoder_config
    whole, first = (text_encoder_stage(config, tokens, {}).flop for tokens in (TOKENS, TOKENS // 3))
    assert text_encoder_stage(config, TOKENS, {}, kept=TOKENS // 3).flop == whole - first


def test_a_picture_whose_engines_know_short_captions_counts_one() -> None:
    checkpoint = open_checkpoint("random:tiny")
    case = Case("random:tiny", "bf16", 64, 64, 20)
    plain = picture_work(checkpoint, case, caption_tokens=TOKENS, recipe=None, kept=TOKENS // 3)
    work = picture_work(checkpoint, case, caption_tokens=TOKENS, recipe=None, kept=TOKENS // 3, short=TOKENS // 2)
    config = checkpoint.text_encoder_config
    short = text_encoder_stage(config, TOKENS // 2, {}, kept=TOKENS // 3)
    assert plain.stage("text_encoder_short") is None
    assert work.stage("text_encoder_short") == short
    assert work.stage("text_encoder") == plain.stage("text_encoder") != short
    assert next(plain.calls(20)) == plain.text_encoder
    assert next(work.calls(20)) == short


@pytest.mark.parametrize("model", ["random:0.6b", "random:tiny"])
def test_weight_bytes_are_those_of_the_modules_matrices(model: str) -> None:
    checkpoint = open_checkpoint(model)
    plans = plans_of(checkpoint, 256, 256)
    work = picture_work(checkpoint, Case(model, "bf16", 256, 256, 20), caption_tokens=TOKENS, recipe=None)
    expected = {name: matrices(on_meta(plan)) for name, plan in plans.items()}
    stages = {"transformer": (work.step, work.caption), "vae_decoder": (work.vae_decoder,)}
    for name, parts in stages.items():
        assert sum(item.weight_bytes for part in parts for item in part.works) == 2 * expected[name]
    hidden, vocabulary = (checkpoint.text_encoder_config[key] for key in ("hidden_size", "vocab_size"))
    read_rows = expected["text_encoder"] - (vocabulary - TOKENS) * hidden
    assert sum(item.weight_bytes for item in work.text_encoder.works) == 2 * read_rows


def matrices(module: nn.Module) -> int:
    """Elements of every weight with two or more axes, modulation tables apart: they are added, not multiplied."""
    return sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if parameter.ndim > 1 and not name.endswith("modulation")
    )


def test_a_recipe_changes_dtypes_and_bytes_of_what_it_quantises() -> None:
    checkpoint = open_checkpoint("random:0.6b")
    recipe = load_recipe("fp8")
    rules = rules_of(recipe, plans_of(checkpoint, 1024, 1024)["transformer"])
    config = TransformerConfig.from_upstream(checkpoint.transformer_config)
    plain, quantised = (step_stage(config, (32, 32), 2, chosen) for chosen in ({}, rules))
    assert quantised.flop == plain.flop
    by_name = {work.name: work for work in quantised.works}
    for before in plain.works:
        after = by_name[before.name]
        eight_bits = before.name in rules
        assert after.dtype == ("float8e4m3fn" if eight_bits else "bfloat16"), before.name
        assert after.weight_bytes * (2 if eight_bits else 1) == before.weight_bytes, before.name
    assert {work.dtype for work in quantised.works} == {"float8e4m3fn", "bfloat16"}
    to_kv = next(work for work in caption_stage(config, 2, rules).works if work.name.endswith("to_kv"))
    assert to_kv.dtype == "bfloat16", "8-bit weights alone do not make an 8-bit product"
    assert to_kv.weight_bytes == 2 * config.channels**2


def test_the_floor_is_the_slower_of_arithmetic_and_bytes() -> None:
    ceilings = Ceilings({"bfloat16": 100.0, "float8e4m3fn": 200.0}, 1000.0)
    works = (
        Work("a", "gemm", "bfloat16", 10**12, 10**6, 10**12),
        Work("b", "gemm", "float8e4m3fn", 10**12, 10**6, 0),
    )
    # 1 TFLOP at 100 TFLOP/s and at 200: 10 + 5 ms. Activations inside a stage count nothing.
    assert Stage(works, 0).floor_ms(ceilings) == pytest.approx(15.0)
    assert Stage(works, 10**11).floor_ms(ceilings) == pytest.approx((2e6 + 1e11) / 1e12 * 1e3)
    # A type without a product of its own is no faster than 16 bits.
    int8 = (Work("c", "gemm", "int8", 10**12, 0, 0),)
    assert Stage(int8, 0).floor_ms(ceilings) == pytest.approx(10.0)


def test_ceilings_of_a_cpu() -> None:
    found = measure_ceilings("cpu")
    assert set(found.tflop_per_s) == {"float32"}
    assert all(math.isfinite(rate) and rate > 0 for rate in (found.tflop_per_s["float32"], found.copy_gb_per_s))
