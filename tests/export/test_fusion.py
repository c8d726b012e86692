"""The fusion checker: each rule has a graph that keeps it and one that breaks it, and the real compiler agrees."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sana_calibration.recipe import layers_of, load_recipe, resolve
from sana_calibration.scales import LayerScales
from sana_export.components import empty_module, plan_components
from sana_export.graph.export import export_component
from sana_export.graph.fusion import RULES, Capability, FusionRow, check_fusion, parse_capability
from sana_export.graph.passes.insert_qdq import Quantization
from sana_export.weights.checkpoint import open_checkpoint
from sana_runtime.contract import ComponentName, TargetName
from sana_runtime.environment import child_environment
from sana_runtime.errors import InputError
from sana_runtime.tensorrt_library import find_tensorrt

FP8, INT8, INT4 = TensorProto.FLOAT8E4M3FN, TensorProto.INT8, TensorProto.INT4
FLOAT, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
_NUMPY = {
    FLOAT: np.float32,
    FP16: np.float16,
    BF16: ml_dtypes.bfloat16,
    FP8: ml_dtypes.float8_e4m3fn,
    INT8: np.int8,
    INT4: ml_dtypes.int4,
}
ADA, HOPPER, BLACKWELL = (8, 9), (9, 0), (12, 0)


def tensor(name: str, value: Any, dtype: int) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(value).astype(_NUMPY[dtype]), name)


def quantized_product(
    op: str = "MatMul",
    weight: int | None = FP8,
    activation: int | None = FP8,
    shape: tuple[int, ...] = (64, 96),
    scale_shape: tuple[int, ...] = (),
    axis: int = 1,
    block: int = 0,
    base: int = BF16,
    before_weight: str = "",
    before_activation: str = "",
    activation_scales: int = 1,
    scale_dtype: int | None = None,
    zero: int = 0,
    computed_scale: bool = False,
    x_shape: tuple[int, ...] = (),
    opset: int = 22,
    **attributes: Any,
) -> onnx.ModelProto:
    """One product with, by default, FP8 on both sides and one scale each; every argument is one thing to break."""
    inputs = {"MatMul": (8, shape[0]), "Gemm": (8, shape[-1 if attributes.get("transB") else 0])}
    x_shape = x_shape or inputs.get(op) or (1, shape[1] * attributes.get("group", 1), 16, 16)
    rng = np.random.default_rng(0)
    tensors, nodes, x, w = [], [], "x", "w"
    if activation is not None:
        scales = np.full((activation_scales,) if activation_scales > 1 else (), 0.02)
        step = scale_dtype or base
        tensors += [tensor("xs", scales, step), tensor("xz", np.full(scales.shape, zero), activation)]
        if computed_scale:
            tensors.append(tensor("half", np.full(scales.shape, 0.01), step))
            nodes.append(helper.make_node("Add", ["half", "half"], ["xc"]))
        step_name = "xc" if computed_scale else "xs"
        along = {"axis": 1} if activation_scales > 1 else {}
        nodes.append(helper.make_node("QuantizeLinear", ["x", step_name, "xz"], ["xq"], name="q", **along))
        back = "xs" if step == base else "xb"
        if back == "xb":
            tensors.append(tensor("xb", scales, base))
        nodes.append(
            helper.make_node(
                "DequantizeLinear", ["xq", step_name if computed_scale else back, "xz"], ["xd"], name="dq", **along
            )
        )
        x = "xd"
    stored = rng.integers(-7, 8, size=shape)
    tensors.append(tensor("w", stored, weight if weight is not None else base))
    if weight is not None:
        tensors.append(tensor("ws", np.full(scale_shape, 0.5), base))
        along = ({"axis": axis} if scale_shape else {}) | ({"block_size": block} if block else {})
        nodes.append(helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], name="wdq", **along))
        w = "wd"
    for side, between in (("x", before_activation), ("w", before_weight)):
        if not between:
            continue
        read = x if side == "x" else w
        extra: dict[str, Any] = {"to": base} if between == "Cast" else {}
        others: list[str] = []
        if between == "Mul":
            tensors.append(tensor(f"two{side}", 2.0, base))
            others = [f"two{side}"]
        nodes.append(helper.make_node(between, [read, *others], [f"{side}between"], **extra))
        x, w = (f"{side}between", w) if side == "x" else (x, f"{side}between")
    if op == "Gather":
        nodes.append(helper.make_node(op, [w, "x"], ["y"], name="product"))
        x_shape, x_type = (1, 7), TensorProto.INT64
    else:
        nodes.append(helper.make_node(op, [x, w], ["y"], name="product", **attributes))
        x_type = base
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", x_type, x_shape)],
        [helper.make_tensor_value_info("y", base, None)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def conv(shape: tuple[int, ...] = (64, 32, 3, 3), **settings: Any) -> onnx.ModelProto:
    return quantized_product("Conv", shape=shape, pads=[shape[-1] // 2] * 4, **settings)


def embedding(**settings: Any) -> onnx.ModelProto:
    return quantized_product("Gather", activation=None, shape=(512, 64), scale_shape=(512,), axis=0, **settings)


def int4(op: str = "MatMul", **settings: Any) -> onnx.ModelProto:
    return quantized_product(
        op, **{"weight": INT4, "activation": None, "scale_shape": (4, 96), "axis": 0, "block": 16, **settings}
    )


def int8_weights(**settings: Any) -> onnx.ModelProto:
    return quantized_product(weight=INT8, activation=None, scale_shape=(96,), **settings)


def check(
    model: onnx.ModelProto, folder: Path, target: TargetName = "tensorrt-rtx", capability: Capability = ADA
) -> FusionRow:
    path = folder / "model.onnx"
    onnx.save(model, path)
    rows = check_fusion(path, target, capability).rows
    assert len(rows) == 1
    return rows[0]


Make = Callable[[], onnx.ModelProto]

FUSED: dict[str, tuple[Make, str]] = {
    "fp8": (quantized_product, "FP8 GEMM"),
    "fp8 in fp32": (lambda: quantized_product(base=FLOAT), "FP8 GEMM"),
    "fp8 in fp16": (lambda: quantized_product(base=FP16), "FP8 GEMM"),
    "fp8 per channel": (lambda: quantized_product(scale_shape=(96,)), "FP8 GEMM, then one multiplication"),
    "fp8 gemm": (
        lambda: quantized_product("Gemm", shape=(96, 64), scale_shape=(96,), axis=0, transB=1),
        "FP8 GEMM, then",
    ),
    "fp8 negative axis": (lambda: quantized_product(scale_shape=(96,), axis=-1), "FP8 GEMM, then"),
    "fp8 convolution": (conv, "FP8 convolution"),
    "fp8 convolution per channel": (lambda: conv(scale_shape=(64,), axis=0), "FP8 convolution, then"),
    "fp8 5x5": (lambda: conv((64, 32, 5, 5)), "FP8 convolution"),
    "fp8 weights": (lambda: quantized_product(activation=None), "FP8 weights are dequantised inside the GEMM"),
    "int8 weights": (int8_weights, "INT8 weights are dequantised inside the GEMM"),
    "int8 weights, odd channels": (
        lambda: quantized_product(weight=INT8, activation=None, shape=(60, 90), scale_shape=(90,)),
        "INT8 weights are",
    ),
    "int4": (int4, "INT4 weights are dequantised inside the GEMM"),
    "int4 gemm": (
        lambda: int4("Gemm", shape=(96, 64), scale_shape=(96, 4), axis=1, transB=1),
        "INT4 weights are dequantised inside the GEMM",
    ),
    "int8 table": (lambda: embedding(weight=INT8), "rows of the table are dequantised as they are read"),
    "fp8 table": (embedding, "rows of the table are dequantised as they are read"),
}

# On tensorrt-rtx, sm_89: the graph, the broken rule, and words of the reason.
BROKEN: dict[str, tuple[Make, str, str]] = {
    "activation alone": (lambda: quantized_product(weight=None), "weight_stored", "not quantised, only its act"),
    "int8 x fp8": (lambda: quantized_product(weight=INT8), "one_dtype", "multiplies INT8 weights and FP8 act"),
    "int4 x fp8": (lambda: int4(activation=FP8), "one_dtype", "multiplies INT4 weights and FP8"),
    "transpose": (lambda: quantized_product(shape=(64, 64), before_weight="Transpose"), "direct", "Transpose betw"),
    "multiplied": (lambda: quantized_product(before_activation="Mul"), "direct", "Mul between"),
    "computed scale": (lambda: quantized_product(computed_scale=True), "static_scales", "the scale of dq is comp"),
    "zero point": (
        lambda: quantized_product(weight=INT8, activation=INT8, zero=3),
        "static_scales",
        "the zero point of dq is not zero",
    ),
    "scale in fp32": (
        lambda: quantized_product(scale_dtype=FLOAT, opset=23),
        "scale_dtype",
        "a FLOAT scale on BFLOAT16 values",
    ),
    "activation per channel": (
        lambda: quantized_product(activation_scales=64),
        "activation_per_tensor",
        "more than one scale",
    ),
    "int8 activations": (lambda: quantized_product(weight=INT8, activation=INT8), "int8_activation", "weights only"),
    "int4 per channel": (lambda: int4(scale_shape=(96,), axis=1, block=0), "int4_groups", "two or more groups"),
    "int4 in one group": (lambda: int4(scale_shape=(1, 96), block=64), "int4_groups", "two or more groups"),
    "int8 groups": (
        lambda: quantized_product(weight=INT8, activation=None, scale_shape=(4, 96), axis=0, block=16),
        "groups_are_int4",
        "INT8 weights with one scale per group",
    ),
    "weights of a convolution": (
        lambda: conv(weight=INT8, activation=None, scale_shape=(64,), axis=0),
        "weight_only_conv",
        "a smaller file, no faster",
    ),
    "scales on inputs": (lambda: quantized_product(scale_shape=(64,), axis=0), "output_axis", "contracted axis"),
    "depthwise": (lambda: conv((64, 1, 3, 3), group=64), "grouped_conv", "grouped or depthwise"),
    "grouped": (lambda: conv((64, 16, 3, 3), group=4), "grouped_conv", "grouped or depthwise"),
    "7x7": (lambda: conv((64, 32, 7, 7)), "kernel_volume", "at most 32 positions, not 49"),
    "inputs": (lambda: quantized_product(shape=(60, 96)), "channels", "not 60 -> 96"),
    "outputs": (lambda: conv((3, 32, 3, 3)), "channels", "not 32 -> 3"),
}


def cast_between() -> onnx.ModelProto:
    """Both sides computed in fp32 behind a bf16 pair."""
    model = quantized_product()
    product = model.graph.node.pop()
    for index, name in enumerate(product.input):
        model.graph.node.append(helper.make_node("Cast", [name], [f"wide{index}"], to=FLOAT))
        product.input[index] = f"wide{index}"
    model.graph.node.append(product)
    model.graph.output[0].type.tensor_type.elem_type = FLOAT
    return model


def merged() -> onnx.ModelProto:
    """Two products of one [1, 8, 64] activation, as gate and up of a gated MLP."""
    model = int8_weights(x_shape=(1, 8, 64))
    model.graph.node.append(helper.make_node("MatMul", ["x", "wd"], ["again"], name="again"))
    model.graph.node.append(helper.make_node("Mul", ["y", "again"], ["z"]))
    model.graph.output[0].name = "z"
    return model


def after_transpose() -> onnx.ModelProto:
    """What attention's heads [1, 4, 8, 16] become."""
    model = onnx.shape_inference.infer_shapes(int8_weights(x_shape=(1, 4, 8, 16)))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 8, 64]), "merged"))
    turn = helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 2, 1, 3])
    join = helper.make_node("Reshape", ["turned", "merged"], ["joined"])
    product = model.graph.node.pop()
    product.input[0] = "joined"
    model.graph.node.extend([turn, join, product])
    del model.graph.value_info[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model)


BROKEN["after a transpose"] = (after_transpose, "after_transpose", "behind a transpose")
BROKEN["cast"] = (cast_between, "no_cast", "a Cast stands between")


@pytest.mark.parametrize("name", FUSED)
def test_good_patterns_fuse(tmp_path: Path, name: str) -> None:
    make, kernel = FUSED[name]
    row = check(make(), tmp_path)
    assert row.fused, row
    assert row.reason.startswith(kernel)
    assert row.node == "product"


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_refuses_the_graph_that_breaks_it(tmp_path: Path, name: str) -> None:
    make, rule, words = BROKEN[name]
    row = check(make(), tmp_path)
    assert not row.fused
    assert (row.rule, words in row.reason) == (rule, True), row


FP8_CHANNELS: Make = lambda: quantized_product(scale_shape=(96,))  # noqa: E731
INT8_W8A8: Make = lambda: quantized_product(weight=INT8, activation=INT8, scale_shape=(96,))  # noqa: E731

NO_FP8 = "fp8_capability"
# target, graph, and per compute capability the broken rule, "" where it fuses.
TABLE: list[tuple[TargetName, Make, dict[str, str]]] = [
    ("tensorrt-rtx", quantized_product, {"sm_80": NO_FP8, "sm_86": NO_FP8, "sm_89": "", "sm_120": ""}),
    ("tensorrt-rtx", quantized_product, {"sm_87": "gpu", "sm_90": "gpu", "sm_110": "gpu"}),
    ("tensorrt-rtx", FP8_CHANNELS, {"sm_86": NO_FP8, "sm_89": "", "sm_120": ""}),
    ("tensorrt-rtx", int8_weights, {"sm_80": "", "sm_86": "", "sm_90": "gpu", "sm_120": ""}),
    ("tensorrt-rtx", INT8_W8A8, dict.fromkeys(("sm_80", "sm_89", "sm_120"), "int8_activation")),
    ("tensorrt", quantized_product, {"sm_80": NO_FP8, "sm_86": NO_FP8, "sm_87": NO_FP8}),
    ("tensorrt", quantized_product, {"sm_89": "", "sm_90": "", "sm_110": "", "sm_120": ""}),
    ("tensorrt", FP8_CHANNELS, {"sm_87": NO_FP8, "sm_89": "fp8_per_channel", "sm_90": "", "sm_120": ""}),
    ("tensorrt", INT8_W8A8, dict.fromkeys(("sm_80", "sm_86", "sm_87", "sm_89", "sm_110"), "")),
    ("tensorrt", int4, {"sm_80": "", "sm_87": "", "sm_110": "", "sm_70": "gpu"}),
    ("tensorrt", int8_weights, {"sm_87": "weight_only_int4"}),
    ("tensorrt", embedding, {"sm_110": "weight_only_int4"}),
    ("onnxruntime", quantized_product, {"sm_89": "onnxruntime"}),
]
CAPABILITIES = [(target, sm, make, rule) for target, make, rules in TABLE for sm, rule in rules.items()]


@pytest.mark.parametrize(("target", "sm", "make", "rule"), CAPABILITIES)
def test_targets_and_capabilities(tmp_path: Path, target: TargetName, sm: str, make: Make, rule: str) -> None:
    row = check(make(), tmp_path, target, parse_capability(sm))
    assert (row.fused, row.rule) == (not rule, rule), row


def test_every_rule_is_broken_by_a_graph_of_these_tests() -> None:
    seen = {rule for _, rule, _ in BROKEN.values()} | {rule for *_, rule in CAPABILITIES} | {"used", "merged"}
    assert {rule.name for rule in RULES} == seen - {""}


def test_products_of_one_activation_with_a_batch_of_one_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(merged(), path)
    assert [row.rule for row in check_fusion(path, "tensorrt-rtx", ADA).rows] == ["merged", "merged"]
    model = merged()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)
    assert [row.rule for row in check_fusion(path, "tensorrt-rtx", ADA).rows] == ["", ""]


def test_a_pair_that_no_product_reads(tmp_path: Path) -> None:
    model = quantized_product()
    product = model.graph.node[-1]
    product.input[0] = "x"
    model.graph.node.append(helper.make_node("Relu", ["xd"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", BF16, None))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    report = check_fusion(path, "tensorrt-rtx", ADA)
    assert [(row.node, row.op, row.fused) for row in report.rows] == [
        ("product", "MatMul", True),
        ("dq", "Relu", False),
    ]
    assert report.rows[0].activation_dtype is None
    assert (report.rows[1].rule, report.rows[1].activation_dtype) == ("used", "float8e4m3fn")
    assert report.summary == (
        "tensorrt-rtx on sm_89: 1 of 2 quantised products fuse\n"
        "  fused 1: FP8 weights are dequantised inside the GEMM\n"
        "  not fused 1: no product reads it, but Relu"
    )


def test_a_product_of_two_quantised_activations_is_not_promised(tmp_path: Path) -> None:
    model = quantized_product(shape=(64, 64), weight=None)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 64
    model.graph.node[-1].input[1] = "xd"
    row = check(model, tmp_path)
    assert (row.fused, row.rule, row.weight_dtype) == (False, "weight_stored", None)


def test_an_unquantised_file_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantized_product(weight=None, activation=None), path)
    report = check_fusion(path, "tensorrt", HOPPER)
    assert report.rows == ()
    assert report.summary == "tensorrt on sm_90: nothing is quantised"


def test_weights_outside_the_file_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantized_product(), path, save_as_external_data=True, location="weights", size_threshold=64)
    (tmp_path / "weights").unlink()
    assert check_fusion(path, "tensorrt-rtx", BLACKWELL).fused == 1


@pytest.mark.parametrize("content", [None, b"", b"not a graph"], ids=["missing", "empty", "text"])
def test_a_file_that_is_no_graph(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx: cannot be read as an ONNX file"):
        check_fusion(path, "tensorrt-rtx", ADA)


@pytest.mark.parametrize(("text", "expected"), [("sm_87", (8, 7)), ("SM_120", (12, 0)), (" sm_90 ", (9, 0))])
def test_capabilities_are_read(text: str, expected: Capability) -> None:
    assert parse_capability(text) == expected


@pytest.mark.parametrize("text", ["", "89", "sm_", "sm_9", "sm_8.9", "ada"])
def test_what_is_no_capability(text: str) -> None:
    with pytest.raises(InputError, match="not a compute capability"):
        parse_capability(text)


# -------------------------------------------------------------------------------------------- the real compiler

# The compiler prints the layers it made when asked for all detail. It needs no GPU for that.
_CHILD = """
import importlib, sys
trt = importlib.import_module(sys.argv[1])
logger = trt.Logger(trt.Logger.VERBOSE)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[2])
config = builder.create_builder_config()
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
assert builder.build_serialized_network(network, config)
"""
_LAYER = re.compile(r"Name: \S+, LayerType: (\w+), Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs")
_STORED_NAMES = ("FP8", "Int8", "Int4")


def compiled_layers(path: Path) -> list[tuple[str, str, str]] | None:
    """(layer type, its inputs, its constants) of every kernel; None if the compiler refuses the graph."""
    library = find_tensorrt("tensorrt-rtx")
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, library.module, str(path)],
        env=child_environment(library.environment),
        cwd=os.path.dirname(path),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    log = child.stdout + child.stderr
    if child.returncode != 0:
        return None
    layers = log.rpartition("Layers:\n")[2].partition("I/O Tensors:")[0]
    found = [match.groups() for match in map(_LAYER.match, layers.splitlines()) if match]
    assert found, log[-2000:]
    return found


def fused_kernels(path: Path, weight_only: bool) -> int:
    """Kernels that multiply with stored weights. Both sides stored: stored constants and stored inputs. Weight only:
    stored constants and some input; a kernel without inputs only dequantises.
    """
    kinds = ("runtime_fusion", "kgen") if weight_only else ("gemm", "correlation")
    needed = ("Datatype",) if weight_only else _STORED_NAMES
    return sum(
        kind in kinds and any(name in constants for name in _STORED_NAMES) and any(name in inputs for name in needed)
        for kind, inputs, constants in compiled_layers(path) or ()
    )


def fuses_in_the_compiler(path: Path, weight_only: bool) -> bool:
    return fused_kernels(path, weight_only) > 0


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", FUSED)
def test_the_compiler_fuses_what_is_predicted(tmp_path: Path, name: str) -> None:
    row = check(FUSED[name][0](), tmp_path)
    assert fuses_in_the_compiler(tmp_path / "model.onnx", row.activation_dtype is None)


EVIDENCE = {rule.name: rule.evidence for rule in RULES}


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", [name for name, (_, rule, _) in BROKEN.items() if EVIDENCE[rule] == "compiler"])
def test_the_compiler_does_not_fuse_what_it_is_said_not_to(tmp_path: Path, name: str) -> None:
    row = check(BROKEN[name][0](), tmp_path)
    assert not fuses_in_the_compiler(tmp_path / "model.onnx", row.activation_dtype is None)


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("component", "recipe", "fused"),
    [
        ("transformer", "fp8", 14),
        ("transformer", "int8-weight-only", 14),
        ("text_encoder", "int8-weight-only", 3),
    ],
)
def test_prediction_for_a_whole_component_equals_the_compiler(
    tmp_path: Path, component: ComponentName, recipe: str, fused: int
) -> None:
    """Row by row where the compiler's kernels keep the rows apart: as many fused kernels as fused rows."""
    checkpoint = open_checkpoint("random:tiny")
    plan = next(plan for plan in plan_components(checkpoint, "bf16", 96, 64, 320) if plan.name == component)
    rules = resolve(load_recipe(recipe), component, layers_of(empty_module(plan), plan.prefix))
    scales = {layer: LayerScales(6.0) for layer, rule in rules.items() if rule.activation_dtype}
    path = tmp_path / "model.onnx"
    export_component(
        empty_module(plan),
        checkpoint.weights(component),
        plan.prefix,
        plan.inputs,
        plan.outputs,
        path,
        quantization=Quantization(rules, scales),
    )
    report = check_fusion(path, "tensorrt-rtx", ADA)
    assert (len(report.rows), report.fused) == (len(rules), fused)
    for weight_only in (False, True):
        rows = [row for row in report.rows if row.fused and (row.activation_dtype is None) == weight_only]
        assert fused_kernels(path, weight_only) == len(rows)
