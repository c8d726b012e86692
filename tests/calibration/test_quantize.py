"""Our arithmetic is ONNX Runtime's bit for bit, and modelopt's up to its reciprocal."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from sana_calibration.quantize import (
    BOUNDS,
    QuantizedWeight,
    activation_scale,
    fake_quantize,
    quantize_weight,
)
from sana_calibration.recipe import Granularity, LayerRule, PerChannel, PerGroup, PerTensor
from sana_runtime.errors import InputError

ONNX_DTYPES = {"int8": TensorProto.INT8, "float8e4m3fn": TensorProto.FLOAT8E4M3FN}
SCALES = [0.037, 1.0, 3.0e-5, 17.3]


def ugly(scale: float, seed: int = 0) -> torch.Tensor:
    """Normal numbers, ties, both saturations, subnormals of E4M3, zeros of both signs: [4096 + ...] fp32."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4096, generator=generator) * 60 * scale
    steps = torch.arange(-140, 140) * scale
    tiny = torch.linspace(-(2.0**-6), 2.0**-6, 129) * scale
    edges = torch.tensor([0.0, -0.0, 448.0, 463.9, 464.1, 480.0, 1e9, -1e9, 127.5, -128.5]) * scale
    return torch.cat([normal, steps, steps + scale / 2, tiny, edges])


def onnx_fake_quantize(x: np.ndarray, scale: float, dtype: str, element: int) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear in ONNX Runtime."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    kind = helper.tensor_dtype_to_np_dtype(element)
    graph = helper.make_graph(
        nodes,
        "qdq",
        [helper.make_tensor_value_info("x", element, ["n"])],
        [helper.make_tensor_value_info("y", element, ["n"])],
        [
            onnx.numpy_helper.from_array(np.array(scale, kind), "scale"),
            helper.make_tensor("zero", ONNX_DTYPES[dtype], [], [0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", ["int8", "float8e4m3fn"])
def test_fake_quantize_is_onnx_runtime_bit_for_bit(dtype: str, scale: float) -> None:
    x = ugly(scale)
    ours = fake_quantize(x, scale, dtype).numpy()
    theirs = onnx_fake_quantize(x.numpy(), scale, dtype, TensorProto.FLOAT)
    different = np.flatnonzero(ours != theirs)
    assert different.size == 0, (x[different[:5]], ours[different[:5]], theirs[different[:5]])


def test_fp16_scale_is_rounded_like_the_graph() -> None:
    x = ugly(0.037).clamp(-6e4, 6e4).half()
    ours = fake_quantize(x, 0.037, "int8")
    assert ours.dtype == torch.float16
    # The graph holds the scale in fp16. One rounding of the result to fp16 is all that may differ from exact.
    step = np.float64(np.float16(0.037))
    exact = np.clip(np.round(x.double().numpy() / step), -128, 127) * step
    np.testing.assert_array_equal(ours.numpy(), exact.astype(np.float16))


@pytest.mark.parametrize("amax", [0.7, 448.0, 5.5e5])
def test_fp8_is_modelopts(amax: float) -> None:
    fp8_eager = pytest.importorskip("modelopt.torch.quantization.tensor_quant").fp8_eager
    scale = activation_scale(amax, "float8e4m3fn")
    x = ugly(scale).clamp(-amax, amax)
    ours, theirs = fake_quantize(x, scale, "float8e4m3fn"), fp8_eager(x, torch.tensor(amax))
    # modelopt multiplies by 448 / amax where ONNX divides by amax / 448: a quotient within 2 rounding errors of a tie
    # goes the other way, one E4M3 step (2^-3 of the value, or a subnormal's 2^-9). Every tie of `steps` is such a case.
    assert (ours - theirs).abs().le(torch.maximum(ours.abs() / 8, torch.tensor(2.0**-9 * scale)) * 1.0001).all()
    random = slice(0, 4096)
    torch.testing.assert_close(ours[random], theirs[random], rtol=2**-22, atol=0)


@pytest.mark.parametrize("amax", [0.7, 127.0, 5.5e5])
def test_int8_is_modelopts(amax: float) -> None:
    their_quantise = pytest.importorskip("modelopt.torch.quantization.tensor_quant")._tensor_quant
    scale = activation_scale(amax, "int8")
    x = ugly(scale)
    ours, theirs = fake_quantize(x, scale, "int8"), their_quantise(x, torch.tensor(amax), narrow_range=False)
    assert (ours - theirs).abs().le(scale * 1.0001).all()
    random = slice(0, 4096)
    torch.testing.assert_close(ours[random], theirs[random], rtol=2**-22, atol=0)


def rule(dtype: str, granularity: Granularity) -> LayerRule:
    return LayerRule("transformer", "*", dtype, None, granularity)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "granularity", "shape", "scale_shape"),
    [
        ("int8", PerTensor(), (6, 64), ()),
        ("int8", PerChannel(), (6, 64), (6, 1)),
        ("int8", PerChannel(), (6, 5, 3, 3), (6, 1, 1, 1)),
        ("float8e4m3fn", PerTensor(), (6, 5, 3, 3), ()),
        ("float8e4m3fn", PerChannel(), (6, 63), (6, 1)),
    ],
    ids=str,
)
def test_weight_error_is_within_half_a_step(
    dtype: str, granularity: Granularity, shape: tuple[int, ...], scale_shape: tuple[int, ...]
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[0] *= 50
    quantised = quantize_weight(weight, rule(dtype, granularity))
    assert quantised.values.shape == weight.shape
    assert quantised.values.dtype == (torch.float8_e4m3fn if dtype == "float8e4m3fn" else torch.int8)
    assert tuple(quantised.scale.shape) == scale_shape
    assert quantised.scale.dtype == torch.float32
    bound, low, high = BOUNDS[dtype]
    wide = quantised.values.float()
    assert wide.min() >= low
    assert wide.max() <= high
    assert wide.abs().amax() == bound, "amax maps to the bound"
    error = (quantised.dequantized() - weight).abs()
    step = quantised.dequantized().abs() / wide.abs().clamp(min=1e-9)  # the scale of each element, 0 where value is 0
    if dtype == "float8e4m3fn":
        # Three mantissa bits: half a step is 2^-4 of the value, or half of the smallest subnormal, 2^-10 of the scale.
        scale = quantised.scale.expand(shape) if scale_shape else quantised.scale
        assert error.le(torch.maximum(weight.abs() * 2**-4, scale * 2**-10) * 1.00001).all()
    else:
        nonzero = wide != 0
        assert error[nonzero].le(step[nonzero] * 0.50001).all()


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int4_groups_lose_least_and_keep_their_size(size: int, scale_dtype: torch.dtype) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    weight[0] *= 50
    weight[1, :size] = 0
    quantised = quantize_weight(weight, rule("int4", PerGroup(size)), scale_dtype=scale_dtype)
    assert quantised.values.dtype == torch.int8
    assert quantised.values.min() >= -8
    assert quantised.values.max() <= 7
    assert quantised.scale.shape == (64, 128 // size)
    assert torch.equal(quantised.scale, quantised.scale.to(scale_dtype).float())
    groups = weight.double().unflatten(1, (-1, size))
    found = quantised.dequantized().double().unflatten(1, (-1, size))
    whole = groups.abs().amax(2, keepdim=True).clamp(min=1e-30) / 7
    tried = [
        ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(2)
        for scale in (whole * share for share in (1, 0.95, 0.9, 0.85, 0.8))
    ]
    error = (found - groups).square().sum(2)
    # The correction of the scale, and its rounding to bf16, cost a little of what the best share wins.
    assert error.sum() < 1.03 * torch.stack(tried).amin(0).sum()
    assert error.sum() < 0.87 * tried[0].sum(), "cutting off pays"
    gain = (found * groups).sum(2) / groups.square().sum(2)
    assert (gain - 1)[whole[..., 0] > 1e-20].abs().max() <= (2.0**-8 if scale_dtype == torch.bfloat16 else 1e-5)
    assert not found[1, 0].any()


def test_finer_granularity_keeps_small_rows() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    weight[0] *= 1000
    small = weight[1:]

    def relative_error(granularity: Granularity) -> float:
        restored = quantize_weight(weight, rule("int8", granularity)).dequantized()[1:]
        return float((restored - small).norm() / small.norm())

    # A row's own amax of about 3 sigma gives steps of 3 / 127: an error of 3 / 127 / sqrt(12) = 0.7 %.
    assert relative_error(PerChannel()) < 0.01
    assert relative_error(PerTensor()) > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scale_is_representable_where_the_graph_stores_it(dtype: torch.dtype) -> None:
    weight = torch.randn(16, 48, generator=torch.Generator().manual_seed(3)) * 1e-4
    quantised = quantize_weight(weight, rule("int8", PerChannel()), scale_dtype=dtype)
    assert torch.equal(quantised.scale, quantised.scale.to(dtype).float())
    # Rounding the scale down may push the largest value half a step beyond 127.
    assert (quantised.dequantized() - weight).abs().le(quantised.scale).all()


def test_zero_weights_keep_a_positive_scale() -> None:
    weight = torch.zeros(3, 32)
    weight[1] = 1e-30
    quantised = quantize_weight(weight, rule("int8", PerChannel()))
    assert (quantised.scale > 0).all()
    assert torch.equal(quantised.dequantized()[0], torch.zeros(32))
    assert activation_scale(0.0, "int8") > 0
    assert activation_scale(1e-44, "float8e4m3fn") > 0


def test_smooth_factor_multiplies_columns() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    factor = np.array([1, 2, 4, 8, 0.5, 0.25, 1, 1], np.float32)
    smoothed = quantize_weight(weight, rule("int8", PerChannel()), factor)
    expected = quantize_weight(weight * torch.from_numpy(factor), rule("int8", PerChannel()))
    assert torch.equal(smoothed.values, expected.values)
    kernel = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(5))
    smoothed = quantize_weight(kernel, rule("int8", PerTensor()), factor)
    expected = quantize_weight(kernel * torch.from_numpy(factor)[None, :, None, None], rule("int8", PerTensor()))
    assert torch.equal(smoothed.values, expected.values)


def test_group_scale_is_repeated_over_its_inputs() -> None:
    values = torch.ones(2, 6, dtype=torch.int8)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = torch.tensor([[1.0, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]])
    assert torch.equal(QuantizedWeight(values, scale).dequantized(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        quantize_weight(torch.tensor([[1.0, value]]), rule("int8", PerChannel()))
    with pytest.raises(InputError, match="amax is not usable"):
        activation_scale(value, "int8")
