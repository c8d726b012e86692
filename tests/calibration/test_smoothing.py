"""SmoothQuant: modelopt's factors, rounded so that nothing is lost by applying them."""

import numpy as np
import pytest
import torch

from sana_calibration.fake_quant import fake_quantized_product
from sana_calibration.quantize import activation_scale
from sana_calibration.recipe import LayerRule, PerChannel
from sana_calibration.scales import LayerScales
from sana_calibration.smoothing import exact_smooth_factor, layer_scales_of_channels, search_alpha, smooth_factor
from sana_runtime.errors import InputError

RULE = LayerRule("transformer", "*", "int8", "int8", PerChannel())


def layer(outlier: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [24, 16] and inputs [200, 16] whose channel 3 is `outlier` times larger and read that much less."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator)
    inputs = torch.randn(200, 16, generator=generator)
    weight[:, 3] /= outlier
    inputs[:, 3] *= outlier
    return weight, inputs


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_factor_is_the_inverse_of_modelopts(alpha: float) -> None:
    mtq = pytest.importorskip("modelopt.torch.quantization")
    weight, inputs = layer(outlier=50.0)
    linear = torch.nn.Linear(16, 24, bias=False)
    linear.weight.data = weight.clone()
    config = {**mtq.INT8_SMOOTHQUANT_CFG, "algorithm": {"method": "smoothquant", "alpha": alpha}}
    quantised = mtq.quantize(torch.nn.Sequential(linear), config, lambda model: model(inputs))
    theirs = quantised[0].input_quantizer.pre_quant_scale.flatten().numpy()
    ours = exact_smooth_factor(inputs.abs().amax(dim=0).numpy(), weight, alpha)
    np.testing.assert_allclose(ours, 1 / theirs, rtol=1e-5)


@pytest.mark.parametrize("base_dtype", ["bfloat16", "float16"])
def test_factor_is_the_same_in_every_dtype(base_dtype: str) -> None:
    weight, inputs = layer(outlier=3e6)
    factor = smooth_factor(inputs.abs().amax(dim=0).numpy(), weight, 0.8, base_dtype)  # type: ignore[arg-type]
    mantissa, _ = np.frexp(factor)
    assert set(mantissa * 8) <= {4, 5, 6, 7}
    assert len(set(mantissa)) > 1
    exact = exact_smooth_factor(inputs.abs().amax(dim=0).numpy(), weight, 0.8)
    ordinary = np.arange(16) != 3
    # Half a step of 1 / 8 is at most an eighth of the smallest mantissa, a half.
    assert (np.abs(factor / exact - 1)[ordinary] <= 1 / 8).all()
    tensor, kind = torch.from_numpy(factor), getattr(torch, base_dtype)
    assert torch.equal(tensor.to(kind).float(), tensor)
    assert (1 / tensor).to(kind).min() >= torch.finfo(kind).tiny
    # The weight of a 16-bit checkpoint times the factor: 8 or 11 bits times 3.
    narrow = weight.to(kind)
    assert torch.equal((narrow.float() * tensor).double(), narrow.double() * tensor.double())


def test_dead_channels_are_left_alone() -> None:
    weight, inputs = layer()
    inputs[:, 2], weight[:, 5] = 0, 0
    factor = smooth_factor(inputs.abs().amax(dim=0).numpy(), weight, 0.8)
    assert factor[2] == factor[5] == 1
    assert np.isfinite(factor).all()


def test_amax_is_that_of_the_divided_activation() -> None:
    weight, inputs = layer(outlier=100.0)
    scales = layer_scales_of_channels(inputs.abs().amax(dim=0).numpy(), weight, 0.8)
    assert scales.smooth_factor is not None
    assert scales.activation_amax == float((inputs / torch.from_numpy(scales.smooth_factor)).abs().max())


def test_product_is_integer_arithmetic() -> None:
    """The fake-quantised layer equals the integer product times both scales, computed another way (float64)."""
    weight, inputs = layer(outlier=30.0)
    scales = layer_scales_of_channels(inputs.abs().amax(dim=0).numpy(), weight, 0.5)
    assert scales.smooth_factor is not None
    assert scales.activation_amax is not None
    step = activation_scale(scales.activation_amax, "int8")
    smoothed = (weight.numpy() * scales.smooth_factor).astype(np.float64)
    rows = np.abs(smoothed).max(axis=1, keepdims=True) / 127
    integers = np.round(inputs.numpy() / scales.smooth_factor / np.float32(step)) @ np.round(smoothed / rows).T
    expected = integers * step * rows[:, 0]
    found = fake_quantized_product(inputs, weight, RULE, scales)
    # fp32 rounding of 16 products; no value sits on a tie, so all integers agree.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=float(np.abs(expected).max()) * 16 * 2**-24)


def test_search_prefers_smoothing_where_there_are_outliers() -> None:
    found = search_alpha(*layer(outlier=100.0), RULE)
    assert found.alpha is not None
    assert found.errors[found.alpha] == min(found.errors.values())
    # A step of 100 x 3 sigma / 127 swallows ordinary channels; smoothed, every channel has about 7 bits: 0.01.
    assert found.errors[None] > 0.3
    assert found.errors[found.alpha] < 0.03


def test_search_tries_no_smoothing_and_the_given_grid() -> None:
    found = search_alpha(*layer(), RULE, alphas=(0.25, 0.75))
    assert set(found.errors) == {None, 0.25, 0.75}


def test_search_heeds_channels_that_reach_further_elsewhere() -> None:
    """A channel that is an outlier only in inputs that were not kept: without smoothing it takes everybody's range."""
    weight, inputs = layer()
    seen = inputs.abs().amax(dim=0).numpy()
    seen[3] *= 100
    assert search_alpha(weight, inputs, RULE).errors[None] < 0.03
    assert search_alpha(weight, inputs, RULE, channel_amax=seen).errors[None] > 0.3


@pytest.mark.parametrize(("dtype", "outlier"), [("int8", 1.0), ("int8", 100.0), ("float8e4m3fn", 100.0)])
def test_rounding_the_factor_costs_little(dtype: str, outlier: float) -> None:
    """20 layers against the exact factor. Off by a factor in [7/8, 9/8] at most, a channel gains or loses that much
    range; the amax follows the one that gained most, 9/8, and with it the error of all. Powers of two: half an octave.
    """
    rule = LayerRule("transformer", "*", dtype, dtype, PerChannel())  # type: ignore[arg-type]
    ratios: dict[str, list[float]] = {"three bits": [], "powers of two": []}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        weight, inputs = (torch.randn(rows, 64, generator=generator) for rows in (256, 512))
        sizes = torch.exp2(4 * torch.rand(64, generator=generator))
        sizes[3] *= outlier
        weight, inputs = weight / sizes, inputs * sizes
        amax = inputs.abs().amax(dim=0).numpy()
        factor = exact_smooth_factor(amax, weight, 0.5)
        exact = product_error(weight, inputs, rule, factor)
        ratios["three bits"].append(product_error(weight, inputs, rule, smooth_factor(amax, weight, 0.5)) / exact)
        twos = np.exp2(np.rint(np.log2(factor)))
        ratios["powers of two"].append(product_error(weight, inputs, rule, twos) / exact)
    assert np.mean(ratios["three bits"]) < 9 / 8
    if dtype == "int8":
        assert np.mean(ratios["powers of two"]) > 9 / 8, "then powers of two would do"


def product_error(weight: torch.Tensor, inputs: torch.Tensor, rule: LayerRule, factor: np.ndarray) -> float:
    exact = inputs @ weight.T
    scales = LayerScales(float((inputs / torch.from_numpy(factor)).abs().max()), factor)
    return float((fake_quantized_product(inputs, weight, rule, scales) - exact).norm() / exact.norm())


def test_search_needs_a_quantised_activation() -> None:
    with pytest.raises(InputError, match="nothing to smooth"):
        search_alpha(*layer(), LayerRule("transformer", "*", "int8", None, PerChannel()))
