"""What observers keep: exact maxima, histograms that do not depend on order, and the amax they suggest."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from sana_calibration.aggregate import layer_scales
from sana_calibration.histogram import BINS, Histogram, entropy_amax, percentile_amax
from sana_calibration.observers import Observation, observing
from sana_calibration.recipe import LayerRule, PerChannel
from sana_runtime.errors import InputError


def rule(**changes: object) -> LayerRule:
    fields: dict = {"weight_dtype": "int8", "activation_dtype": "int8", "granularity": PerChannel(), **changes}
    return LayerRule("transformer", "*", **fields)


def histogram(x: torch.Tensor) -> Histogram:
    magnitude = x.abs().float()
    return Histogram.of(magnitude, float(magnitude.max()))


def normals(*scales: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5000, generator=generator) * scale for scale in scales]


def test_merged_histogram_is_that_of_all_values_in_any_order() -> None:
    tensors = normals(1e-3, 1.0, 700.0)
    whole = histogram(torch.cat(tensors))
    for order in itertools.permutations(tensors):
        merged = histogram(order[0]).merged(histogram(order[1])).merged(histogram(order[2]))
        assert merged.exponent == whole.exponent
        np.testing.assert_array_equal(merged.counts, whole.counts)


@pytest.mark.parametrize("amax", [0.0, 1e-42, 0.5, 1.0, 1023.9, 1e6, 3e38])
def test_histogram_holds_every_value(amax: float) -> None:
    """Also zeros, subnormals, powers of two (the edge of the range) and the largest numbers."""
    x = torch.tensor([0.0, amax, amax / 3, amax])
    found = histogram(x)
    assert found.counts.shape == (BINS,)
    assert found.counts.sum() == 4
    assert found.counts.min() == 0
    assert found.merged(histogram(torch.tensor([1.0]))).counts.sum() == 5


@pytest.mark.parametrize("percentile", [50.01, 99.03, 99.87, 100.0])
def test_percentile_is_numpys_within_a_bin(percentile: float) -> None:
    (x,) = normals(3.0)
    found = histogram(x)
    exact = np.percentile(x.abs().numpy(), percentile, method="inverted_cdf")
    assert exact <= percentile_amax(found, percentile) <= exact + found.width * 1.0001


@pytest.mark.parametrize("case", ["normal", "outliers", "half zeros"])
def test_entropy_is_modelopts(case: str) -> None:
    modelopt = pytest.importorskip("modelopt.torch.quantization.calib.histogram")
    (x,) = normals(1.0)
    if case == "outliers":
        x = torch.cat([x, torch.tensor([9.0, 9.5, 11.0])])
    if case == "half zeros":
        x = x.relu()
    # 4096 bins over a range of 16 leave modelopt's loop over bins some 1200 of them.
    found = histogram(x)
    used = int(np.flatnonzero(found.counts)[-1]) + 1
    edges = np.arange(used + 1) * found.width
    theirs = modelopt._compute_amax_entropy(found.counts[:used].copy(), edges, 8, False, stride=128)
    assert entropy_amax(found, stride=128) == pytest.approx(float(theirs), abs=found.width * 1e-3)


def test_amax_is_modelopts_over_batches() -> None:
    calib = pytest.importorskip("modelopt.torch.quantization.calib")
    layer = nn.Linear(8, 4)
    batches = [torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    total, channels = calib.MaxCalibrator(8, None, False), calib.MaxCalibrator(8, -1, False)
    with observing(nn.Sequential(layer), "", {"0": rule(smoothing_alpha=0.5)}, len(batches)) as observers:
        for step, batch in enumerate(batches):
            observers.at(step, "x")
            layer(batch)
            total.collect(batch)
            channels.collect(batch)
        seen = observers.take()["0"]
    assert seen.amax == float(total.compute_amax())
    np.testing.assert_array_equal(seen.channel_amax, channels.compute_amax().flatten().numpy())
    np.testing.assert_array_equal(seen.step_amax, [float(batch.abs().max()) for batch in batches])


def test_a_search_keeps_rows_of_every_pass_and_half() -> None:
    layer = nn.Linear(4, 2)
    batches = [torch.arange(240.0).view(2, 30, 4) + 1000 * step for step in range(3)]
    with observing(layer, "", {"": rule(smoothing_alpha="search")}, 3) as observers:
        for step, batch in enumerate(batches):
            observers.at(step, "x")
            layer(batch)
        seen = observers.take()[""]
    rows = [batch.flatten(0, 1)[index].tolist() for batch in batches for index in (0, 8, 17, 25, 34, 42, 51, 59)]
    np.testing.assert_array_equal(seen.rows, rows)
    again = Observation.from_arrays(seen.arrays())
    np.testing.assert_array_equal(again.merged(seen).rows, rows + rows)
    with observing(layer, "", {"": rule(smoothing_alpha="search")}, 1) as observers:
        layer(batches[0][:1, :3])
        assert len(observers.take()[""].rows) == 3, "fewer rows than are wanted: each once"


def test_convolution_channels_are_axis_one() -> None:
    layer = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    # Convolutions are not smoothed by a recipe; the observer itself knows where their channels are.
    with observing(layer, "", {"": rule(smoothing_alpha=0.5)}, 1) as observers:
        layer(x)
        seen = observers.take()[""]
    np.testing.assert_array_equal(seen.channel_amax, x.abs().amax(dim=(0, 2, 3)).numpy())


def test_weight_only_layers_are_not_watched_and_hooks_go_away() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    rules = {"0": rule(activation_dtype=None), "1": rule()}
    with observing(module, "", rules, 1) as observers:
        module(torch.ones(1, 4))
        assert [*observers.take()] == ["1"]
    assert not any(layer._forward_pre_hooks for layer in module)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_names_layer_prompt_and_step(value: float) -> None:
    module = nn.ModuleDict({"good": nn.Linear(2, 2), "bad": nn.Linear(2, 2)})
    with observing(module, "", {"good": rule(), "bad": rule()}, 20) as observers:
        observers.at(6, "prompt 3 of 8 ('a cat')")
        module["good"](torch.ones(1, 2))
        with pytest.raises(InputError) as error:
            module["bad"](torch.tensor([[1.0, value]]))
    for part in ("layer 'bad'", "1 of 2 values", "prompt 3 of 8 ('a cat')", "step 7 of 20"):
        assert part in str(error.value)


def test_layer_that_does_not_run_is_an_error() -> None:
    with observing(nn.Sequential(nn.Linear(2, 2)), "", {"0": rule()}, 1) as observers:
        observers.at(0, "prompt 1 of 1")
        with pytest.raises(InputError, match="layer '0' did not run"):
            observers.take()


def test_observation_survives_a_file_and_merges_by_maximum() -> None:
    a = Observation(np.array([1, 5], np.float32), np.array([1, 9], np.float32), histogram(torch.tensor([1.0, 5.0])))
    b = Observation(np.array([4, 2], np.float32), np.array([3, 2], np.float32), histogram(torch.tensor([4.0, 2.0])))
    for merged in (a.merged(b), b.merged(a), Observation.from_arrays(a.merged(b).arrays())):
        np.testing.assert_array_equal(merged.step_amax, [4, 5])
        np.testing.assert_array_equal(merged.channel_amax, [3, 9])
        assert merged.histogram is not None
        assert merged.histogram.counts.sum() == 4
        assert merged.amax == 5


def test_recipe_chooses_the_amax() -> None:
    (x,) = normals(1.0)
    x[0] = 40.0
    seen = Observation(np.array([40.0, 3.0], np.float32), None, histogram(x))

    def weight() -> torch.Tensor:
        raise AssertionError("only smoothing reads the weight")

    chosen = {amax: layer_scales(rule(amax=amax), seen, weight, "float32") for amax in ("max", "percentile", "entropy")}
    assert chosen["max"].activation_amax == 40.0
    # 99.99 % of 5000 values is all but half of one: 40 itself, and not the edge of its bin, which lies further out.
    assert chosen["percentile"].activation_amax == 40.0
    lower = layer_scales(rule(amax="percentile", percentile=99.9), seen, weight, "float32").activation_amax
    assert lower is not None
    assert 3.0 < lower < 4.5, "5 of 5000 normal numbers lie beyond 3.3"
    assert chosen["entropy"].activation_amax < 20
    for scales in chosen.values():
        np.testing.assert_array_equal(scales.step_amax, [40.0, 3.0])
