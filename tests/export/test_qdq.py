"""Quantised graphs: what the pass writes and refuses, and the same numbers as the fake-quantised PyTorch module."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from sana_calibration.fake_quant import fake_quantized
from sana_calibration.quantize import activation_scale, fake_quantize, quantize_weight
from sana_calibration.recipe import Granularity, LayerRule, PerChannel, PerGroup, PerTensor, StoredDtype
from sana_calibration.scales import LayerScales
from sana_export.components import ComponentPlan, empty_module, loaded_module, plan_components
from sana_export.graph import quantized_weights
from sana_export.graph.export import ExportReport, export_component
from sana_export.graph.passes import insert_qdq
from sana_export.graph.passes.insert_qdq import Quantization
from sana_export.parity.metrics import measure
from sana_export.weights.checkpoint import Checkpoint, open_checkpoint
from sana_export.weights.lazy import LazyTensor
from sana_runtime.contract import ComponentName, PrecisionName
from sana_runtime.errors import BuildError
from sana_runtime.plan_builder import build_plan

HEIGHT, WIDTH, TOKENS = 96, 64, 320
FP8: StoredDtype = "float8e4m3fn"
# What ONNX Runtime 1.31 must not do to these graphs. The selector turns FP8 products into nodes that fail to load, and
# weight-only ones into products with 8-bit activations; the propagation writes INT8 pairs that fail to load.
DISABLED = ["QDQSelectorActionTransformer", "QDQPropagationTransformer"]


@dataclass(frozen=True)
class Case:
    """One component quantised one way. `smooth` gives every layer with activations a smooth factor."""

    model: str
    component: ComponentName
    weight_dtype: StoredDtype
    activation_dtype: StoredDtype | None
    granularity: Granularity
    smooth: bool = False


CASES = {
    "transformer-fp8": Case("random:tiny", "transformer", FP8, FP8, PerTensor()),
    "transformer-fp8-channels": Case("random:tiny", "transformer", FP8, FP8, PerChannel()),
    "transformer-int8-smooth": Case("random:tiny", "transformer", "int8", "int8", PerChannel(), smooth=True),
    "transformer-int8-weights": Case("random:tiny", "transformer", "int8", None, PerChannel()),
    "transformer-int4": Case("random:tiny", "transformer", "int4", None, PerGroup(32)),
    "sprint-fp8": Case("random:tiny-sprint", "transformer", FP8, FP8, PerTensor()),
    "text_encoder-fp8": Case("random:tiny", "text_encoder", FP8, FP8, PerTensor()),
    "text_encoder-int8-smooth": Case("random:tiny", "text_encoder", "int8", "int8", PerChannel(), smooth=True),
    "text_encoder-int8-weights": Case("random:tiny", "text_encoder", "int8", None, PerChannel()),
    "text_encoder-fp8-weights": Case("random:tiny", "text_encoder", FP8, None, PerTensor()),
    "text_encoder-int4": Case("random:tiny", "text_encoder", "int4", None, PerGroup(32)),
    "vae_decoder-fp8": Case("random:tiny", "vae_decoder", FP8, FP8, PerTensor()),
    "vae_decoder-int8": Case("random:tiny", "vae_decoder", "int8", "int8", PerChannel()),
    "vae_decoder-int8-weights": Case("random:tiny", "vae_decoder", "int8", None, PerChannel()),
}


@dataclass(frozen=True)
class Exported:
    """A quantised component on disk, and all that went into it."""

    path: Path
    report: ExportReport
    plan: ComponentPlan
    checkpoint: Checkpoint
    quantization: Quantization


def is_quantized(case: Case, layer: str, module: nn.Module) -> bool:
    """The layers of the shipped recipes, and Gemm nodes (timestep_modulation), so that every operator occurs."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim < 2:
        return False
    if case.component == "vae_decoder":
        return layer.startswith("stages.") and layer.endswith(("conv1", "conv2", "upsample"))
    if isinstance(module, nn.Embedding):
        return case.activation_dtype is None and case.weight_dtype != "int4"
    return not layer.endswith(("conv_depth", "patch_embed", "proj_out"))


def rules_for(case: Case, plan: ComponentPlan) -> dict[str, LayerRule]:
    rule = LayerRule(case.component, "*", case.weight_dtype, case.activation_dtype, case.granularity)
    modules = {
        name.removeprefix(plan.prefix): module
        for name, module in empty_module(plan).named_modules()
        if name.startswith(plan.prefix)
    }
    return {layer: rule for layer, module in modules.items() if is_quantized(case, layer, module)}


def observed_scales(
    case: Case, module: nn.Module, prefix: str, rules: Mapping[str, LayerRule], values: dict[str, torch.Tensor]
) -> dict[str, LayerScales]:
    """The amax of every ruled layer's input in one run, after smoothing by a factor of the input's channel amax."""
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        module.get_submodule(prefix + layer).register_forward_pre_hook(
            lambda _, given, layer=layer: inputs.update({layer: given[0].detach().clone()})
        )
        for layer, rule in rules.items()
        if rule.activation_dtype
    ]
    with torch.inference_mode():
        module(**values)
    for handle in handles:
        handle.remove()
    scales = {}
    for layer, x in inputs.items():
        factor = x.flatten(0, -2).abs().amax(0).clamp(min=1e-3).sqrt() if case.smooth else None
        amax = float((x if factor is None else x / factor).abs().amax())
        scales[layer] = LayerScales(amax, None if factor is None else factor.numpy())
    return scales


def feeds(plan: ComponentPlan) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = {
        spec.name: torch.randn(spec.shape, generator=generator).to(getattr(torch, spec.dtype)) for spec in plan.inputs
    }
    if "caption_mask" in values:
        shape = values["caption_mask"].shape
        values["caption_mask"] = (torch.arange(shape[1]) < 250).long().expand(shape).contiguous()
    if "caption_tokens" in values:
        values["caption_tokens"] = torch.randint(4, 200, values["caption_tokens"].shape, generator=generator)
    if "timestep" in values:
        values["timestep"] = torch.tensor(0.7 if "guidance_embeds" in values else 850.0)
    if "sigma" in values:
        values["sigma"] = torch.tensor(0.85)
    return values


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    """export(case name, precision) -> Exported, once per module; scales observed on the fp32 module."""

    @cache
    def export(name: str, precision: PrecisionName = "fp32") -> Exported:
        case = CASES[name]
        checkpoint = open_checkpoint(case.model)
        plans = {
            dtype: next(
                plan
                for plan in plan_components(checkpoint, dtype, HEIGHT, WIDTH, TOKENS)
                if plan.name == case.component
            )
            for dtype in ("fp32", precision)
        }
        wide, plan = plans["fp32"], plans[precision]
        rules = rules_for(case, wide)
        scales = observed_scales(case, loaded_module(wide, checkpoint), wide.prefix, rules, feeds(wide))
        quantization = Quantization(rules, scales)
        path = tmp_path_factory.mktemp("qdq") / "model.onnx"
        weights = checkpoint.weights(case.component)
        report = export_component(
            empty_module(plan), weights, plan.prefix, plan.inputs, plan.outputs, path, quantization=quantization
        )
        return Exported(path, report, plan, checkpoint, quantization)

    return export


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED)


def graph_of(path: Path) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


# ------------------------------------------------------------------------------------- numbers in ONNX Runtime


@pytest.mark.parametrize("name", CASES)
def test_every_quantised_layer_equals_fake_quantised_torch(quantized, name: str) -> None:
    """Layer by layer on the graph's own activations: Q/DQ to the bit, the product within fp32 rounding.

    A product sums at most 640 terms here; its error relative to the RMS of the result is below
    sqrt(640) * 2^-24 on either side, 3e-6 together; 1e-5 leaves room for cancelling sums.
    """
    exported = quantized(name)
    graph = graph_of(exported.path)
    nodes = {node.name: node for node in graph.node}
    producers = {output: node for node in graph.node for output in node.output}
    module = loaded_module(exported.plan, exported.checkpoint)
    rows = exported.report.quantization.layers
    assert len(rows) == len(exported.quantization.rules)
    probes: dict[str, tuple[str, str, str]] = {}
    for row in rows:
        node = nodes[row.node]
        read = source = node.input[0]
        if row.activation_dtype is not None:
            source = producers[producers[read].input[0]].input[0]
            source = producers[source].input[0] if row.smoothed else source
        probes[row.layer] = (source, read, node.output[0])
    values = run_with_outputs(exported, sorted({name for names in probes.values() for name in names[:]}))
    for row in rows:
        check_layer(exported, module.get_submodule(exported.plan.prefix + row.layer), row, probes[row.layer], values)


def run_with_outputs(exported: Exported, names: list[str]) -> dict[str, torch.Tensor]:
    """The named inner values, inputs and initializers of the graph."""
    model = onnx.load(exported.path, load_external_data=False)
    outside = {value.name for value in model.graph.input} | {tensor.name for tensor in model.graph.initializer}
    present = {value.name for value in model.graph.output}
    inner = [name for name in names if name not in outside]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner if name not in present)
    probe = exported.path.with_name("probe.onnx")
    onnx.save(model, probe)
    given = {name: tensor.numpy() for name, tensor in feeds(exported.plan).items()}
    found = dict(zip(inner, session(probe).run(inner, given), strict=True)) | given
    return {name: torch.from_numpy(array) for name, array in found.items()}


def check_layer(
    exported: Exported,
    layer: nn.Module,
    row: insert_qdq.QuantizedLayer,
    probes: tuple[str, str, str],
    values: dict[str, torch.Tensor],
) -> None:
    rule, scales = exported.quantization.rules[row.layer], exported.quantization.scales.get(row.layer)
    factor = scales.smooth_factor if scales else None
    stored = quantize_weight(layer.weight, rule, factor).dequantized()
    if row.op == "Gather":
        return
    x, read, out = (values[name] for name in probes)
    if rule.activation_dtype is not None:
        x = x / torch.from_numpy(factor) if factor is not None else x
        x = fake_quantize(x, activation_scale(scales.activation_amax, rule.activation_dtype), rule.activation_dtype)
        assert torch.equal(read, x), f"{row.layer}: the activation's Q/DQ differs"
        assert torch.unique(x).numel() > 8, f"{row.layer}: a constant activation compares nothing"
    bias = layer.bias if row.op == "Gemm" or (row.op == "Conv" and layer.bias is not None) else None
    expected = (
        nn.functional.conv2d(x, stored, bias, padding=1) if row.op == "Conv" else nn.functional.linear(x, stored, bias)
    )
    assert measure(row.layer, row.op, out.numpy(), expected.numpy()).relative_rms < 1e-5, row.layer


@pytest.mark.parametrize("name", CASES)
def test_component_equals_fake_quantised_torch(quantized, name: str) -> None:
    """End to end. A difference of one fp32 rounding can move a value over a rounding boundary of the 8-bit type, and
    that step grows through the layers after it. How far, PyTorch itself shows: the same module, its weights moved by
    one fp32 rounding. The graph may differ from PyTorch by four times that, plus the fp32 tolerance of plain graphs.
    """
    exported = quantized(name)
    plan, values = exported.plan, feeds(exported.plan)
    outputs = session(exported.path).run(None, {key: tensor.numpy() for key, tensor in values.items()})
    module = loaded_module(plan, exported.checkpoint)
    plain = run_module(module, values)
    rules, scales = exported.quantization.rules, exported.quantization.scales
    with fake_quantized(module, plan.prefix, rules, scales):
        expected = run_module(module, values)
        generator = torch.Generator().manual_seed(7)
        for parameter in module.parameters():
            parameter.data = parameter.data * (1 + 2**-23 * torch.randn(parameter.shape, generator=generator))
        moved = run_module(module, values)
    for spec, candidate, reference, shifted, unquantized in zip(
        plan.outputs, outputs, expected, moved, plain, strict=True
    ):
        row = measure(name, spec.name, candidate, reference)
        floor = measure(name, spec.name, shifted, reference)
        noise = measure(name, spec.name, reference, unquantized)
        if spec.dtype == "uint8":
            assert row.max_abs <= 1 + 4 * floor.max_abs, row
        else:
            assert row.relative_rms <= 3e-5 + 4 * floor.relative_rms, (row, floor)
            assert row.relative_rms < noise.relative_rms, "the comparison is blinder than the quantisation itself"


FP16_CASES = (
    "transformer-fp8",
    "transformer-int8-smooth",
    "transformer-int8-weights",
    "sprint-fp8",
    "vae_decoder-int8",
)


@pytest.mark.parametrize("name", FP16_CASES)
def test_every_quantised_layer_equals_fake_quantised_torch_in_fp16(quantized, name: str) -> None:
    """As in fp32, on the graph's own fp16 activations: scales and Q/DQ to the bit. The division by a smooth factor is
    held to three roundings of 2^-11: of either result, and of its input, which ONNX Runtime may keep in fp32.

    A product is judged against fp64: both sides add in fp32 and round once to fp16, 2^-12 of each element in RMS, which
    2^-11 covers together with the sums. ONNX Runtime has no bf16 kernels on the CPU; the rounding there is one formula
    with this (`fake_quantize`), and its scales are checked above.
    """
    exported = quantized(name, "fp16")
    graph = graph_of(exported.path)
    nodes = {node.name: node for node in graph.node}
    producers = {output: node for node in graph.node for output in node.output}
    module = loaded_module(exported.plan, exported.checkpoint)
    sites: dict[str, tuple[str, str, str, str]] = {}
    for row in exported.report.quantization.layers:
        read = rounded = nodes[row.node].input[0]
        if row.activation_dtype is not None:
            rounded = producers[producers[read].input[0]].input[0]
        whole = producers[rounded].input[0] if row.smoothed else rounded
        sites[row.layer] = (whole, rounded, read, nodes[row.node].output[0])
    values = run_in_fp16(exported, sorted({name for found in sites.values() for name in found}))
    compared = 0
    for row in exported.report.quantization.layers:
        layer = module.get_submodule(exported.plan.prefix + row.layer)
        rule, scales = exported.quantization.rules[row.layer], exported.quantization.scales.get(row.layer)
        whole, x, read, out = (values[value] for value in sites[row.layer])
        if x.dtype != torch.float16:
            continue  # what an fp16 graph keeps in fp32 is compared above
        factor = None
        if scales is not None and scales.smooth_factor is not None:
            factor = scales.smooth_factor.astype(np.float16)  # this test's own factors are of any size
        if rule.activation_dtype is not None:
            if factor is not None:
                step = 2**-24 * (1 + 1 / float(factor.min()))  # of subnormal numbers, before and after
                torch.testing.assert_close(x, whole / torch.from_numpy(factor), rtol=3 * 2**-11, atol=step)
            x = fake_quantize(x, activation_scale(scales.activation_amax, rule.activation_dtype), rule.activation_dtype)
            assert torch.equal(read, x), f"{row.layer}: the activation's Q/DQ differs"
            assert torch.unique(x).numel() > 8, f"{row.layer}: a constant activation compares nothing"
        stored = quantize_weight(layer.weight, rule, factor, torch.float16).dequantized().half().double()
        bias = layer.bias.double() if row.op != "MatMul" and layer.bias is not None else None
        exact = (
            nn.functional.conv2d(x.double(), stored, bias, padding=1)
            if row.op == "Conv"
            else nn.functional.linear(x.double(), stored, bias)
        )
        assert float((out.double() - exact).norm() / exact.norm()) < 2**-11, row.layer
        compared += 1
    assert compared >= 5


def run_in_fp16(exported: Exported, names: list[str]) -> dict[str, torch.Tensor]:
    """`run_with_outputs` for a graph with bf16 inputs, which NumPy does not know."""
    model = onnx.load(exported.path, load_external_data=False)
    given = feeds(exported.plan)
    inner = [name for name in names if name not in given]
    present = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner if name not in present)
    probe = exported.path.with_name("probe.onnx")
    onnx.save(model, probe)
    values = {name: ort_value(tensor) for name, tensor in given.items()}
    found = session(probe).run_with_ort_values(inner, values)
    return {name: torch.from_numpy(value.numpy()) for name, value in zip(inner, found, strict=True)} | given


def ort_value(tensor: torch.Tensor) -> onnxruntime.OrtValue:
    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.int16).numpy().view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


@pytest.mark.parametrize("name", ["transformer-fp8", "transformer-int8-smooth", "vae_decoder-int8"])
def test_component_equals_fake_quantised_torch_in_fp16(quantized, name: str) -> None:
    """End to end: a rounding of fp16 instead of fp32 may move a value over a boundary of the 8-bit type. How far that
    carries, PyTorch shows with weights moved by one fp16 rounding; four times that, and one rounding of the result.
    """
    exported = quantized(name, "fp16")
    plan, values = exported.plan, feeds(exported.plan)
    ready = {key: ort_value(tensor) for key, tensor in values.items()}
    outputs = [value.numpy() for value in session(exported.path).run_with_ort_values(None, ready)]
    module = loaded_module(plan, exported.checkpoint)
    plain = run_module(module, values)
    with fake_quantized(module, plan.prefix, exported.quantization.rules, exported.quantization.scales):
        expected = run_module(module, values)
        generator = torch.Generator().manual_seed(7)
        for parameter in module.parameters():
            noise = 1 + 2**-11 * torch.randn(parameter.shape, generator=generator)
            parameter.data = (parameter.data.float() * noise).to(parameter.dtype)
        moved = run_module(module, values)
    for spec, candidate, reference, shifted, unquantized in zip(
        plan.outputs, outputs, expected, moved, plain, strict=True
    ):
        row = measure(name, spec.name, candidate, reference)
        floor = measure(name, spec.name, shifted, reference)
        noise = measure(name, spec.name, reference, unquantized)
        if spec.dtype == "uint8":
            assert row.max_abs <= 1 + 4 * floor.max_abs, row
        else:
            assert row.relative_rms <= 2**-11 + 4 * floor.relative_rms, (row, floor)
            assert row.relative_rms < noise.relative_rms, "the comparison is blinder than the quantisation itself"


def run_module(module: nn.Module, values: dict[str, torch.Tensor]) -> tuple[np.ndarray, ...]:
    with torch.inference_mode():
        outputs = module(**values)
    return tuple(tensor.numpy() for tensor in (outputs if isinstance(outputs, tuple) else (outputs,)))


# --------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_scales_have_the_dtype_of_what_they_scale(quantized, precision: PrecisionName) -> None:
    exported = quantized("transformer-fp8", precision)
    onnx.checker.check_model(str(exported.path), full_check=True)
    graph = graph_of(exported.path)
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    base = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}[precision]
    counts: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert types[node.input[1]] == base, node.name
            counts[node.op_type] += 1
    report = exported.report.quantization
    # 2 caption linears, 2 of the timestep, 1 modulation, and per block: qkv, to_out, q, kv, to_out, inverted, point.
    assert len(report.layers) == exported.report.passes["insert_qdq"] == 5 + 2 * 7
    # The K/V linears of both blocks read one caption.
    assert report.activation_pairs == counts["QuantizeLinear"] == len(report.layers) - 1
    assert counts["DequantizeLinear"] == report.activation_pairs + len(report.layers)


def test_without_quantisation_the_pass_fires_zero_times(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("random:tiny")
    plan = plan_components(checkpoint, "fp32", 64, 64, TOKENS)[1]
    path = tmp_path / "model.onnx"
    report = export_component(
        empty_module(plan), checkpoint.weights("transformer"), plan.prefix, plan.inputs, plan.outputs, path
    )
    assert report.passes["insert_qdq"] == 0
    assert report.quantization is None
    assert not {node.op_type for node in graph_of(path).node} & {"QuantizeLinear", "DequantizeLinear"}


def test_flops_and_bytes_are_counted_from_the_shapes(quantized) -> None:
    report = quantized("transformer-fp8", "bf16").report.quantization
    tokens, captions, channels, hidden, batch = 6, 300, 64, 160, 2  # latent 3 x 2; hidden = 2.5 x 64
    matrix = channels * channels
    image_rows, caption_rows = batch * tokens, batch * captions
    block = image_rows * (3 * matrix + 3 * matrix + 3 * channels * hidden) + caption_rows * 2 * matrix
    once = caption_rows * 2 * matrix + batch * (256 * channels + matrix + 6 * matrix)
    assert report.quantized_flops == 2 * (2 * block + once)
    assert report.weight_only_flops == 0
    kept = Counter(product.op for product in report.kept)
    # patch_embed, proj_out, and per block the scores and their product with V; the depthwise convolutions.
    assert kept == {"MatMul": 2 + 2 * 2, "Conv": 2}
    attention = image_rows * captions * channels * 2
    depthwise = image_rows * 2 * hidden * 9
    ends = image_rows * 2 * 32 * channels
    assert sum(product.flops for product in report.kept) == 2 * (2 * (attention + depthwise) + ends)
    assert report.quantized_fraction == report.quantized_flops / report.total_flops
    weights = 2 * (8 * matrix + 3 * channels * hidden) + 2 * matrix + 256 * channels + 7 * matrix
    assert report.weight_bytes == 2 * weights
    assert report.stored_bytes == weights + 2 * len(report.layers)


def test_an_embedding_table_is_dequantised_by_row_before_the_gather(quantized) -> None:
    graph = graph_of(quantized("text_encoder-int8-weights").path)
    gather = next(node for node in graph.node if node.op_type == "Gather")
    dequantize = next(node for node in graph.node if gather.input[0] in node.output)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    assert dequantize.op_type == "DequantizeLinear"
    assert helper.get_attribute_value(dequantize.attribute[0]) == 0
    assert tensors[dequantize.input[0]].data_type == TensorProto.INT8
    assert list(tensors[dequantize.input[1]].dims) == [768]


def test_each_weight_is_read_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("random:tiny")
    plan = plan_components(checkpoint, "bf16", 64, 64, TOKENS)[1]
    loads: Counter[str] = Counter()

    def counted(name: str, tensor: LazyTensor) -> LazyTensor:
        def load() -> torch.Tensor:
            loads[name] += 1
            return tensor.load()

        return replace(tensor, load=load)

    weights = {name: counted(name, tensor) for name, tensor in checkpoint.weights("transformer").items()}
    case = Case("random:tiny", "transformer", "int8", None, PerChannel())
    quantization = Quantization(rules_for(case, plan), {})
    path = tmp_path / "model.onnx"
    export_component(
        empty_module(plan), weights, plan.prefix, plan.inputs, plan.outputs, path, quantization=quantization
    )
    assert {loads[f"{layer}.weight"] for layer in quantization.rules} == {1}


def test_a_decoder_in_windows_is_quantised_in_every_window(
    quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stored weight and one scale per layer, a pair per window, and the picture of the decoder in one pass."""
    whole = quantized("vae_decoder-fp8")
    monkeypatch.setattr("sana_export.components._WINDOW_BYTES", 48 * WIDTH * 8 * 4)
    plans = plan_components(whole.checkpoint, "fp32", HEIGHT, WIDTH, TOKENS)
    plan = next(plan for plan in plans if plan.name == "vae_decoder")
    reports, pictures = [], []
    latent = feeds(plan)["latent"].numpy()
    for quantization in (whole.quantization, None):
        path = tmp_path / f"{quantization is None}.onnx"
        weights = whole.checkpoint.weights("vae_decoder")
        reports.append(
            export_component(
                empty_module(plan), weights, plan.prefix, plan.inputs, plan.outputs, path, quantization=quantization
            )
        )
        pictures.append(session(path).run(["image"], {"latent": latent})[0])
    found, expected = reports[0].quantization, whole.report.quantization
    assert [layer.layer for layer in found.layers] == [layer.layer for layer in expected.layers]
    assert found.stored_bytes == expected.stored_bytes
    assert found.activation_pairs > expected.activation_pairs
    # Windows overlap.
    assert expected.quantized_flops < found.quantized_flops < 2 * expected.quantized_flops
    picture = session(whole.path).run(["image"], {"latent": latent})[0]
    effect = measure("vae_decoder", "image", picture, pictures[1]).relative_rms
    # In exact arithmetic there is no difference; sums in another order may move a few codes.
    assert measure("vae_decoder", "image", pictures[0], picture).relative_rms <= 0.1 * effect


def test_quantising_twice_gives_the_same_files(quantized, tmp_path: Path) -> None:
    exported = quantized("transformer-int8-smooth")
    again, plan = tmp_path / "model.onnx", exported.plan
    weights = exported.checkpoint.weights("transformer")
    export_component(
        empty_module(plan),
        weights,
        plan.prefix,
        plan.inputs,
        plan.outputs,
        again,
        quantization=exported.quantization,
    )
    assert again.read_bytes() == exported.path.read_bytes()
    data = "model.onnx.data"
    assert again.with_name(data).read_bytes() == exported.path.with_name(data).read_bytes()


# -------------------------------------------------------------------------------------------- hand-made graphs


def toy(
    op: str = "MatMul",
    shape: tuple[int, ...] = (32, 48),
    x: tuple[int, ...] = (2, 5, 32),
    dtype: int = TensorProto.FLOAT,
    twice: bool = False,
    x_dtype: int | None = None,
    **attributes: int | list[int],
) -> ir.Model:
    """One or two products of input x with the weight net.layer.weight. x_dtype casts on the way out."""
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    tensor = helper.make_tensor("net.layer.weight", dtype, shape, weight.ravel())
    inputs = ["net.layer.weight", "x"] if op == "Gather" else ["x", "net.layer.weight"]
    nodes = [helper.make_node(op, inputs, ["y"], name="product", **attributes)]
    if twice:
        nodes.append(helper.make_node(op, inputs, ["z"], name="product_again", **attributes))
    x_type = x_dtype or (TensorProto.INT64 if op == "Gather" else dtype)
    outputs = [helper.make_tensor_value_info(name, dtype, None) for name in ("y", "z")[: 1 + twice]]
    graph = helper.make_graph(nodes, "toy", [helper.make_tensor_value_info("x", x_type, x)], outputs, [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def rule(
    weight: StoredDtype = FP8,
    activation: StoredDtype | None = FP8,
    granularity: Granularity | None = None,
    alpha: float | None = None,
) -> LayerRule:
    return LayerRule("transformer", "*", weight, activation, granularity or PerTensor(), smoothing_alpha=alpha)


def quantize_toy(model: ir.Model, by: LayerRule, scales: LayerScales | None = None) -> insert_qdq.QuantizationReport:
    return insert_qdq.run(model, "net.", Quantization({"layer": by}, {"layer": scales or LayerScales(4.0)}))


def groups_for(dtype: StoredDtype) -> LayerRule:
    """A rule that recipes refuse; the pass must as well."""
    made = rule("int4", None, PerGroup(16))
    object.__setattr__(made, "weight_dtype", dtype)
    return made


def int4_without_groups() -> LayerRule:
    made = rule("int4", None, PerGroup(16))
    object.__setattr__(made, "granularity", PerChannel())
    return made


def mixed_dtypes() -> LayerRule:
    made = rule()
    object.__setattr__(made, "activation_dtype", "int8")
    return made


BF16, FP16, INT64 = TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.INT64
REFUSALS: dict[str, tuple[Callable[[], ir.Model], Callable[[], LayerRule], LayerScales, str]] = {
    "two readers": (lambda: toy(twice=True), rule, LayerScales(4.0), "read by 2 nodes (product, product_again)"),
    "no product": (lambda: toy("Add", (32,), (5, 32)), rule, LayerScales(4.0), "not the weight of MatMul, Gemm"),
    "depthwise": (
        lambda: toy("Conv", (16, 1, 3, 3), (1, 16, 8, 8), group=16),
        rule,
        LayerScales(4.0),
        "grouped or depthwise convolution",
    ),
    "table with activation": (
        lambda: toy("Gather", (64, 32), (1, 7)),
        rule,
        LayerScales(4.0),
        "its input is token numbers",
    ),
    "table by column": (
        lambda: toy("Gather", (64, 32), (1, 7), axis=1),
        lambda: rule("int8", None, PerChannel()),
        LayerScales(None),
        "does not read rows",
    ),
    "transposed activation": (
        lambda: toy("Gemm", (48, 32), (32, 5), transA=1, transB=1),
        rule,
        LayerScales(4.0),
        "reads its activation transposed",
    ),
    "group does not divide": (
        toy,
        lambda: rule("int4", None, PerGroup(24)),
        LayerScales(None),
        "32 inputs are not a multiple of the group of 24",
    ),
    "group of a convolution": (
        lambda: toy("Conv", (16, 32, 1, 1), (1, 32, 8, 8)),
        lambda: rule("int4", None, PerGroup(16)),
        LayerScales(None),
        "is for MatMul and Gemm, not Conv",
    ),
    "fp8 groups": (toy, lambda: groups_for(FP8), LayerScales(None), "is for INT4, not float8e4m3fn"),
    "int4 per channel": (toy, int4_without_groups, LayerScales(None), "INT4 needs one scale per group"),
    "two types": (toy, mixed_dtypes, LayerScales(4.0), "activations in int8 and weights in float8e4m3fn"),
    "no amax": (toy, rule, LayerScales(None), "the calibration has no amax for it"),
    "fp16 underflow": (lambda: toy(dtype=FP16), rule, LayerScales(1e-6), "(amax 1e-06) is 0 in FLOAT16"),
    "other dtype": (lambda: toy(x_dtype=BF16), rule, LayerScales(4.0), "its input is BFLOAT16, its weight FLOAT"),
    "factor of another width": (
        toy,
        lambda: rule(alpha=0.5),
        LayerScales(4.0, np.ones(48, np.float32)),
        "has shape [48], its 32 inputs need [32]",
    ),
    "factor of zero": (
        toy,
        lambda: rule(alpha=0.5),
        LayerScales(4.0, np.zeros(32, np.float32)),
        "not positive and finite",
    ),
    "factor beyond fp16": (
        lambda: toy(dtype=FP16),
        lambda: rule(alpha=0.5),
        LayerScales(4.0, np.full(32, 1e6, np.float32)),
        "not positive and finite in FLOAT16",
    ),
    "factor of a convolution": (
        lambda: toy("Conv", (16, 32, 1, 1), (1, 32, 8, 8)),
        rule,
        LayerScales(4.0, np.ones(32, np.float32)),
        "smoothing is for linear layers",
    ),
    "symbolic shape": (lambda: toy(x=("batch", 5, 32)), rule, LayerScales(4.0), "shape of its input is not static"),
    "integer weight": (
        lambda: toy(dtype=INT64),
        rule,
        LayerScales(4.0),
        "net.layer.weight is stored as INT64 already",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_layer_and_the_reason_and_change_nothing(name: str) -> None:
    make, by, scales, reason = REFUSALS[name]
    model = make()
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(BuildError) as raised:
        quantize_toy(model, by(), scales)
    assert reason in str(raised.value)
    assert "layer 'layer'" in raised.value.failed
    if "node" in raised.value.failed:
        assert "'product'" in raised.value.failed
    assert "exclusion" in raised.value.action
    assert ir.to_proto(model).SerializeToString() == before


def test_an_unknown_layer_is_refused() -> None:
    with pytest.raises(BuildError, match=r"no initializer net\.absent\.weight"):
        insert_qdq.run(toy(), "net.", Quantization({"absent": rule()}, {}))


def test_a_second_run_is_refused_as_the_weight_is_stored_already() -> None:
    model = toy()
    assert len(quantize_toy(model, rule()).layers) == 1
    with pytest.raises(BuildError, match="input 0 of DequantizeLinear"):
        quantize_toy(model, rule())


@pytest.mark.parametrize(
    ("amax", "factors", "pairs"),
    [
        ((4.0, 4.0, 4.0), (None, None, None), 1),
        ((4.0, 4.0, 5.0), (None, None, None), 2),
        ((4.0, 4.0, 4.0), (2.0, 2.0, 3.0), 2),
        ((4.0, 4.0, 4.0), (None, 1.0, 1.0), 2),
    ],
    ids=["equal", "other scale", "other factor", "factor or none"],
)
def test_a_pair_is_shared_only_if_all_of_it_is_equal(
    amax: tuple[float, ...], factors: tuple[float | None, ...], pairs: int
) -> None:
    names = ("q", "k", "v")
    weight = np.ones((32, 16), np.float32).ravel()
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", f"{name}.weight"], [name], name=name) for name in names],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (5, 32))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        [helper.make_tensor(f"{name}.weight", TensorProto.FLOAT, (32, 16), weight) for name in names],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    scales = {
        name: LayerScales(bound, None if factor is None else np.full(32, factor, np.float32))
        for name, bound, factor in zip(names, amax, factors, strict=True)
    }
    report = insert_qdq.run(model, "", Quantization({name: rule() for name in names}, scales))
    assert report.activation_pairs == pairs
    counts = Counter(node.op_type for node in model.graph)
    assert counts["QuantizeLinear"] == pairs
    assert counts["DequantizeLinear"] == pairs + 3
    assert counts["Div"] == len({factor for factor in factors if factor is not None})
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize(
    ("model", "by", "scale_shape", "attributes"),
    [
        (toy(), rule(), (), {}),
        (toy(), rule(granularity=PerChannel()), (48,), {"axis": 1}),
        (toy("Gemm", (48, 32), (5, 32), transB=1), rule(granularity=PerChannel()), (48,), {"axis": 0}),
        (toy("Gemm", (32, 48), (5, 32)), rule(granularity=PerChannel()), (48,), {"axis": 1}),
        (toy("Conv", (16, 32, 3, 3), (1, 32, 8, 8)), rule(granularity=PerChannel()), (16,), {"axis": 0}),
        (toy(), rule("int4", None, PerGroup(16)), (2, 48), {"axis": 0, "block_size": 16}),
        (
            toy("Gemm", (48, 32), (5, 32), transB=1),
            rule("int4", None, PerGroup(16)),
            (48, 2),
            {"axis": 1, "block_size": 16},
        ),
        # An odd number of 4-bit values, so that the last byte is half empty, and one group.
        (toy(shape=(17, 3), x=(5, 17)), rule("int4", None, PerGroup(17)), (1, 3), {"axis": 0, "block_size": 17}),
        (toy(dtype=BF16), rule("int8", None, PerChannel()), (48,), {"axis": 1}),
    ],
    ids=["tensor", "channel", "gemm", "gemm-in-out", "conv", "group", "gemm-group", "odd-int4", "bf16"],
)
def test_stored_weight_and_scale_stand_for_the_weight(
    model: ir.Model, by: LayerRule, scale_shape: tuple[int, ...], attributes: dict[str, int]
) -> None:
    """What ONNX's own DequantizeLinear makes of the stored tensors is what `quantize_weight` promises."""
    original = model.graph.initializers["net.layer.weight"].const_value.numpy().astype(np.float32)
    node = next(iter(model.graph))
    transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and "transB" not in node.attributes)
    dtype = torch.bfloat16 if model.graph.inputs[0].dtype == ir.DataType.BFLOAT16 else torch.float32
    report = quantize_toy(model, by)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    dequantize = next(node for node in proto.graph.node if node.input[0] == "net.layer.weight")
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    assert tuple(tensors[dequantize.input[1]].dims) == scale_shape
    assert {item.name: item.i for item in dequantize.attribute} == attributes
    value = helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, None)
    value.type.tensor_type.elem_type = tensors[dequantize.input[1]].data_type
    inputs = [tensors[name] for name in dequantize.input]
    alone = helper.make_graph([onnx.NodeProto.FromString(dequantize.SerializeToString())], "w", [], [value], inputs)
    alone.node[0].output[0] = "w"
    stored = onnx.reference.ReferenceEvaluator(
        helper.make_model(alone, opset_imports=proto.opset_import, ir_version=10)
    ).run(None, {})[0]
    weight = torch.from_numpy(original.T.copy() if transposed else original)
    expected = quantize_weight(weight, by, scale_dtype=dtype).dequantized().numpy()
    expected = (expected.T if transposed else expected).astype(stored.dtype)
    np.testing.assert_array_equal(stored.astype(np.float32), expected.astype(np.float32))
    assert report.layers[0].stored_bytes == sum(ir.from_proto(tensors[name]).nbytes for name in dequantize.input)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize("dtype", [None, BF16], ids=["fp32", "bf16"])
def test_a_weight_that_calibration_rounded_is_stored_as_it_is(op: str, dtype: ir.DataType | None) -> None:
    shape = (32, 48) if op == "MatMul" else (48, 32)
    model = toy(op, shape, (5, 32), **({} if op == "MatMul" else {"transB": 1}), **({"dtype": dtype} if dtype else {}))
    generator = np.random.default_rng(0)
    codes = generator.integers(-8, 8, (48, 32), np.int8)
    scale = generator.uniform(0.1, 1, (48, 2)).astype(ml_dtypes.bfloat16).astype(np.float32)
    by = replace(rule("int4", None, PerGroup(16)), component="transformer", rounding="gptq")
    quantize_toy(model, by, LayerScales(None, weight_codes=codes, weight_scale=scale))
    stored = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    values, scales = stored["net.layer.weight"], stored["net.layer.weight_scale"]
    wanted = (codes.T, scale.T) if op == "MatMul" else (codes, scale)
    np.testing.assert_array_equal(values.astype(np.int8), wanted[0])
    np.testing.assert_array_equal(scales.astype(np.float32), wanted[1])


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(chunk: int, by: LayerRule, op: str, shape: tuple[int, int]) -> list[bytes]:
        monkeypatch.setattr(quantized_weights, "_CHUNK", chunk)
        model = toy(op, shape, (1, 7) if op == "Gather" else (5, shape[0]))
        quantize_toy(model, by)
        return [value.const_value.tobytes() for value in model.graph.initializers.values()]

    for by, op, shape in (
        (rule("int8", None, PerChannel()), "Gather", (61, 32)),
        (rule("int4", None, PerGroup(16)), "MatMul", (32, 61)),
        (rule(FP8, None, PerTensor()), "Gather", (61, 32)),
    ):
        assert stored(100, by, op, shape) == stored(1 << 24, by, op, shape)


def test_a_weight_of_zeros_is_stored_with_a_positive_scale() -> None:
    model = toy()
    zeros = np.zeros((32, 48), np.float32)
    model.graph.initializers["net.layer.weight"].const_value = ir.Tensor(zeros, name="net.layer.weight")
    quantize_toy(model, rule(granularity=PerChannel()))
    scale = model.graph.initializers["net.layer.weight_scale"].const_value.numpy()
    assert (scale > 0).all()
    assert not model.graph.initializers["net.layer.weight"].const_value.numpy().astype(np.float32).any()


def test_the_weight_is_multiplied_by_the_factor_the_activation_is_divided_by() -> None:
    """In bf16 the factor is rounded: both sides must use the rounded one."""
    factor = np.linspace(0.5, 3, 32, dtype=np.float32)
    model = toy(dtype=BF16)
    weight = model.graph.initializers["net.layer.weight"].const_value.numpy().astype(np.float32)
    quantize_toy(model, rule(alpha=0.5), LayerScales(4.0, factor))
    rounded = factor.astype(ml_dtypes.bfloat16)
    stored = model.graph.initializers["net.layer.smooth_factor"].const_value.numpy()
    np.testing.assert_array_equal(stored.astype(np.float32), rounded.astype(np.float32))
    expected = quantize_weight(
        torch.from_numpy(weight.T.copy()), rule(), rounded.astype(np.float32), torch.bfloat16
    ).values.float()
    found = model.graph.initializers["net.layer.weight"].const_value.numpy().astype(np.float32)
    np.testing.assert_array_equal(found.T, expected.numpy())


@pytest.mark.tensorrt
def test_fp8_plan_is_at_most_55_percent_of_bf16_at_real_width(tmp_path: Path) -> None:
    """Two blocks 1152 wide with every matrix quantised; the shipped recipe keeps 2 % of a whole model's."""
    checkpoint = open_checkpoint("random:0.6b")
    checkpoint.transformer_config["num_layers"] = 2
    plan = plan_components(checkpoint, "bf16", 256, 256, TOKENS)[1]
    rules = rules_for(Case("random:0.6b", "transformer", FP8, FP8, PerTensor()), plan)
    scales = {layer: LayerScales(4.0) for layer in rules}
    sizes = {}
    for quantization in (None, Quantization(rules, scales)):
        path = tmp_path / "model.onnx"
        export_component(
            empty_module(plan),
            checkpoint.weights("transformer"),
            plan.prefix,
            plan.inputs,
            plan.outputs,
            path,
            quantization=quantization,
        )
        sizes[quantization is None] = build_plan(path, tmp_path / "plan", "tensorrt-rtx").size
    assert sizes[False] <= 0.55 * sizes[True], sizes


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("transformer-fp8", "bf16"),
        ("transformer-fp8-channels", "fp16"),
        ("transformer-int8-weights", "bf16"),
        ("transformer-int4", "bf16"),
        ("sprint-fp8", "bf16"),
        ("text_encoder-fp8", "bf16"),
        ("text_encoder-int8-weights", "bf16"),
        ("text_encoder-int4", "bf16"),
        ("vae_decoder-fp8", "bf16"),
        ("vae_decoder-fp8", "fp16"),
        ("vae_decoder-int8-weights", "bf16"),
    ],
)
def test_tensorrt_rtx_builds(quantized, tmp_path: Path, name: str, precision: PrecisionName) -> None:
    exported = quantized(name, precision)
    result = build_plan(exported.path, tmp_path / "plan", "tensorrt-rtx")
    assert result.size > exported.path.with_name("model.onnx.data").stat().st_size
    assert result.layers > 0
