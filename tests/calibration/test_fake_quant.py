"""A fake-quantised module computes what its parts say, equals modelopt's, and comes back unchanged."""

import numpy as np
import pytest
import torch
from torch import nn

from sana_calibration import fake_quant
from sana_calibration.fake_quant import fake_quantize_in_place, fake_quantized
from sana_calibration.quantize import activation_scale, fake_quantize, quantize_weight
from sana_calibration.recipe import Granularity, LayerRule, PerChannel, PerGroup, PerTensor
from sana_calibration.scales import LayerScales
from sana_export.peak_memory import PeakMemory
from sana_runtime.errors import InputError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).eval().requires_grad_(False)


def rule(dtype: str = "int8", granularity: Granularity | None = None, active: bool = True) -> LayerRule:
    activation = dtype if active else None
    return LayerRule("transformer", "*", dtype, activation, granularity or PerChannel())  # type: ignore[arg-type]


X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


def test_forward_is_what_the_parts_say_and_the_module_comes_back() -> None:
    module = network()
    plain, weights = module(X), {name: value.clone() for name, value in module.state_dict().items()}
    rules = {"0": rule(), "2": rule("float8e4m3fn", PerTensor(), active=False)}
    with fake_quantized(module, "", rules, {"0": LayerScales(2.5)}):
        found = module(X)
    first = quantize_weight(weights["0.weight"], rules["0"]).dequantized()
    last = quantize_weight(weights["2.weight"], rules["2"]).dequantized()
    x = fake_quantize(X, activation_scale(2.5, "int8"), "int8")
    hidden = nn.functional.gelu(nn.functional.linear(x, first, weights["0.bias"]))
    expected = nn.functional.linear(hidden, last, weights["2.bias"])
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert torch.equal(module(X), plain)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


def test_module_comes_back_after_an_exception() -> None:
    module = network()
    plain = module(X)
    with pytest.raises(RuntimeError), fake_quantized(module, "", {"0": rule()}, {"0": LayerScales(2.5)}):
        module(torch.ones(1, 3))
    assert torch.equal(module(X), plain)


def test_in_place_is_the_same_and_stays() -> None:
    rules, scales = {"0": rule(), "2": rule()}, {"0": LayerScales(2.5), "2": LayerScales(1.5)}
    module = network()
    with fake_quantized(module, "", rules, scales):
        expected = module(X)
    fake_quantize_in_place(module, "", rules, scales)
    assert torch.equal(module(X), expected)


def test_a_16_bit_weight_is_multiplied_by_the_factor_the_activation_is_divided_by() -> None:
    """A factor that fp16 does not know, as a cache from elsewhere may hold."""
    module, factor = network().half(), np.linspace(0.7, 3.1, 16).astype(np.float32)
    weight = module[0].weight.clone()
    rounded = torch.from_numpy(factor).half()
    assert not torch.equal(rounded.float(), torch.from_numpy(factor))
    fake_quantize_in_place(module, "", {"0": rule()}, {"0": LayerScales(2.5, factor)})
    expected = quantize_weight(weight, rule(), rounded.float().numpy(), torch.float16).dequantized().half()
    assert torch.equal(module[0].weight, expected)
    assert not torch.equal(quantize_weight(weight, rule(), factor, torch.float16).dequantized().half(), expected)


def test_parts_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"0": rule(), "2": rule("float8e4m3fn", PerTensor(), active=False)}
    whole, in_parts = network(), network()
    factor = LayerScales(2.5, np.exp2(np.arange(16) % 3).astype(np.float32))
    fake_quantize_in_place(whole, "", rules, {"0": factor})
    monkeypatch.setattr(fake_quant, "_CHUNK", 3 * 16)
    fake_quantize_in_place(in_parts, "", rules, {"0": factor})
    assert torch.equal(in_parts(X), whole(X))
    assert not torch.equal(whole(X), network()(X))


def test_in_place_needs_no_copy_of_a_table() -> None:
    """256 MiB of weights. A part's working copies are 16 MiB each, a few at a time; whole ones would be 256 MiB."""
    table = nn.Embedding(1 << 16, 1 << 10).requires_grad_(False)
    before = PeakMemory().mib()
    peak = PeakMemory()
    fake_quantize_in_place(nn.ModuleDict({"table": table}), "", {"table": rule(active=False)}, {})
    assert peak.mib() - before < 256 / 2
    assert table.weight[0].unique().numel() < 255 < table.weight[0].numel()


def test_names_are_below_the_prefix() -> None:
    wrapper = nn.ModuleDict({"net": network()})
    with fake_quantized(wrapper, "net.", {"0": rule()}, {"0": LayerScales(0.1)}):
        assert wrapper["net"][0]._forward_pre_hooks
        assert not wrapper["net"][2]._forward_pre_hooks


@pytest.mark.parametrize("scales", [{}, {"0": LayerScales(None)}], ids=["no layer", "no amax"])
def test_missing_scale_is_an_error_and_changes_nothing(scales: dict[str, LayerScales]) -> None:
    module = network()
    plain = module(X)
    with (
        pytest.raises(InputError, match="layer '0' has no activation scale"),
        fake_quantized(module, "", {"2": rule(active=False), "0": rule()}, scales),
    ):
        pass
    assert torch.equal(module(X), plain)


ROUNDED = LayerRule("transformer", "*", "int4", None, PerGroup(16), rounding="gptq")


def test_a_weight_that_calibration_rounded_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where other weights are quantised a few rows at a time."""
    monkeypatch.setattr(fake_quant, "_CHUNK", 100)
    generator = np.random.default_rng(0)
    codes = generator.integers(-8, 8, (24, 16), np.int8)
    scale = generator.uniform(0.1, 1, (24, 1)).astype(np.float32)
    module = network()
    with fake_quantized(module, "", {"0": ROUNDED}, {"0": LayerScales(None, weight_codes=codes, weight_scale=scale)}):
        np.testing.assert_array_equal(module[0].weight.numpy(), codes * scale)


@pytest.mark.parametrize("scales", [{}, {"0": LayerScales(None)}], ids=["no layer", "no codes"])
def test_missing_codes_are_an_error_and_change_nothing(scales: dict[str, LayerScales]) -> None:
    module = network()
    plain = module(X)
    with (
        pytest.raises(InputError, match="layer '0' has no rounded weight"),
        fake_quantized(module, "", {"0": ROUNDED}, scales),
    ):
        pass
    assert torch.equal(module(X), plain)


def test_16_bit_module_stays_16_bit() -> None:
    module = network().bfloat16()
    with fake_quantized(module, "", {"0": rule()}, {"0": LayerScales(2.5)}):
        assert module(X.bfloat16()).dtype == torch.bfloat16
        weight = module[0].weight
        assert weight.dtype == torch.bfloat16
        scale = weight.float().abs().amax(dim=1) / 127
        # bf16 x integer rounds once more: up to 2^-9 of 127 steps.
        steps = weight.float() / scale[:, None]
        assert (steps - steps.round()).abs().max() < 127 * 2**-8


@pytest.mark.parametrize("config", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"])
def test_whole_module_is_modelopts(config: str) -> None:
    """modelopt's own observers, weight and activation quantisers, on the same inputs."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    module = network()
    int8 = config.startswith("INT8")
    rules = {name: rule() if int8 else rule("float8e4m3fn", PerTensor()) for name in ("0", "2")}
    hidden = nn.functional.gelu(module[0](X))
    scales = {"0": LayerScales(float(X.abs().max())), "2": LayerScales(float(hidden.abs().max()))}
    with fake_quantized(module, "", rules, scales):
        ours = module(X)
    theirs = mtq.quantize(network(), getattr(mtq, config), lambda model: model(X))(X)
    # Multiplying by a reciprocal where we divide moves a quotient across a tie now and then: one step of one of the
    # 24 products, and all else equal to fp32 rounding.
    step = scales["2"].activation_amax * (1 / 127 if int8 else 2**-3) * float(module[2].weight.abs().max())  # type: ignore[operator]
    assert (ours - theirs).abs().max() < step
    assert ((ours - theirs).abs() < 1e-5).float().mean() > 0.95
