"""Graphs written for one target compute what the component's graph computes, over the same weights."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sana_export import build as build_module
from sana_export import stages
from sana_export.build import build
from sana_export.build_request import BuildRequest, CalibrationSettings
from sana_export.graph.opset import OPSET
from sana_export.graph.passes import gather_rows, plain_moves, quick_plugins
from sana_export.graph.variants import write_variant
from sana_runtime.errors import BuildError, InputError, TargetError
from sana_runtime.manifest import read_manifest
from sana_runtime.plan_builder import PlanResult, build_plan
from sana_runtime.plugins import KernelFolder
from sana_runtime.quick_plugins import float_bits, quick_ops
from sana_runtime.tensorrt_library import TensorrtLibrary
from tests.export.conftest import Recorder
from tests.plugins.test_plugin_build import EPS, NODES, NORM_EPS, write_onnx

# --- Quick plugins ---

_RMS = """
    k_wide = Cast <to = 1> (k)
    k_square = Mul (k_wide, k_wide)
    last = Constant <value_ints: ints = [-1]> ()
    k_mean = ReduceMean <keepdims = 0> (k_square, last)
    tiny = Constant <value_float: float = 3.2145e-6> ()
    shifted = Add (k_mean, tiny)
    root = Sqrt (shifted)
    key_scale = Reciprocal (root)
"""
_HEADS = """
    heads = Constant <value_ints: ints = [0, 0, -1, 32]> ()
    {x}_split = Reshape ({x}_ready, heads)
    {x}_heads = Transpose <perm = [0, 2, 1, 3]> ({x}_split)
"""
_STATE = """
    k_transposed = Transpose <perm = [0, 1, 3, 2]> (k_heads)
    s = MatMul (k_transposed, v_heads)
    tokens = Constant <value_ints: ints = [2]> ()
    z = ReduceSum <keepdims = 1> (k_heads, tokens)
    both = Concat <axis = 2> (s, z)
    parts = Unsqueeze (both, tokens)
"""
_APPLY = """
    tokens = Constant <value_ints: ints = [2]> ()
    sums = ReduceSum <keepdims = 0> (parts, tokens)
    sizes = Constant <value_ints: ints = [32, 1]> ()
    s, z = Split <axis = 2> (sums, sizes)
    z_column = Transpose <perm = [0, 1, 3, 2]> (z)
    numerator = MatMul (q_heads, s)
    mass = MatMul (q_heads, z_column)
    tiny = Constant <value_float: float = 1.2345e-9> ()
    denominator = Add (mass, tiny)
    ratio = Div (numerator, denominator)
    back = Transpose <perm = [0, 2, 1, 3]> (ratio)
    merged = Constant <value_ints: ints = [0, 0, -1]> ()
    out = Reshape (back, merged)
"""
_SPLIT = "    q, k, v = Split <axis = -1, num_outputs = 3> (qkv)\n"
_PLAIN_K = "    k_ready = Relu (k)\n    v_ready = Identity (v)\n"
_NORMED_K = """
    last = Constant <value_ints: ints = [-1]> ()
    column = Unsqueeze (key_scale, last)
    k_unit = Mul (k, column)
    k_weighted = Mul (k_unit, norm_k_weight)
    k_ready = Relu (k_weighted)
    v_ready = Identity (v)
"""
_NORMED_Q = """
    q_square = Mul (q, q)
    last = Constant <value_ints: ints = [-1]> ()
    q_mean = ReduceMean <keepdims = 1> (q_square, last)
    norm_tiny = Constant <value_float: float = 3.2145e-6> ()
    q_shifted = Add (q_mean, norm_tiny)
    q_root = Sqrt (q_shifted)
    q_unit = Div (q, q_root)
    q_weighted = Mul (q_unit, norm_q_weight)
    q_ready = Relu (q_weighted)
"""
_K_AND_V = _HEADS.format(x="k") + _HEADS.format(x="v").replace(
    "    heads = Constant <value_ints: ints = [0, 0, -1, 32]> ()\n", ""
)
# What each plugin computes, in plain fp32 operators, written from the formula.
BODIES = {
    "ReluLinearAttentionKeyRms": _SPLIT + _RMS,
    "ReluLinearAttentionState": _SPLIT + _PLAIN_K + _K_AND_V + _STATE,
    "ReluLinearAttentionNormedState": _SPLIT + _NORMED_K + _K_AND_V + _STATE,
    "ReluLinearAttentionApply": _SPLIT + "    q_ready = Relu (q)\n" + _HEADS.format(x="q") + _APPLY,
    "ReluLinearAttentionNormedApply": _SPLIT + _NORMED_Q + _HEADS.format(x="q") + _APPLY,
}
_MADE = {"key_rms": "key_scale", "state": "parts", "apply": "out"}


def with_bodies(model: onnx.ModelProto, qk_norm: bool) -> onnx.ModelProto:
    """The chain with a model-local function for every plugin, so that ONNX Runtime can run it."""
    for role, op in quick_ops(qk_norm).items():
        attributes = ", ".join((*op.attributes, "plugin_version", "plugin_namespace"))
        head = f'<domain: "sana", opset_import: ["" : {OPSET}]>\n{op.name} <{attributes}>'
        signature = f"({', '.join(op.inputs)}) => ({_MADE[role]})"
        model.functions.append(onnx.parser.parse_function(f"{head} {signature} {{\n{BODIES[op.name]}}}"))
    return model


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qknorm"])
def test_the_chain_of_quick_plugins_is_the_op(qk_norm: bool, tmp_path: Path) -> None:
    """Both graphs in ONNX Runtime, fp32. Their sums over 65 tokens run in the same order or another: 65 roundings of
    2^-24 at each of three nodes in a row are 2e-5 at the very most.
    """
    path = write_onnx(tmp_path / "blocks.onnx", torch.float32, qk_norm)
    chain, count = write_variant(path, "quick.onnx", quick_plugins.run)
    ops = quick_ops(qk_norm)
    assert count == NODES * len(ops)
    model = onnx.load(chain)
    nodes = [node for node in model.graph.node if node.domain == "sana"]
    assert Counter(node.op_type for node in nodes) == {op.name: NODES for op in ops.values()}
    values = {"head_dim": 32, "eps_bits": float_bits(EPS), "norm_eps_bits": float_bits(NORM_EPS)}
    for node in nodes:
        op = next(op for op in ops.values() if op.name == node.op_type)
        found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        wanted = {name: values[name] for name in op.attributes}
        assert found == {**wanted, "plugin_version": b"1", "plugin_namespace": b"sana"}
        assert len(node.input) == len(op.inputs)
    assert not model.functions
    x = {"x": np.random.default_rng(0).standard_normal((2, 65, 64), np.float32)}
    onnx.save(with_bodies(model, qk_norm), tmp_path / "runnable.onnx")
    candidate, reference = (run(tmp_path / name, x) for name in ("runnable.onnx", "blocks.onnx"))
    assert np.linalg.norm(candidate - reference) / np.linalg.norm(reference) < 2e-5


def test_a_graph_without_the_op_gets_no_variant(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_table(path, np.ones((4, 2), np.int8), np.ones(4, np.float32))
    variant, count = write_variant(path, "quick.onnx", quick_plugins.run)
    assert count == 0
    assert not variant.exists()


def run(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    (found,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)
    return found


def test_quick_plugins_are_built_into_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a compiler that counts plugin nodes: what it is given, what is checked, and what the manifest says."""
    pytest.importorskip("triton")
    given: dict[str, Any] = {}

    def compiler(source: Path, plan: Path, target: str, *, plugins: Path | None, plugin_form: str, **_: Any) -> Any:
        graph = onnx.load(source, load_external_data=False).graph
        names = Counter(node.op_type for node in graph.node if node.domain == "sana")
        given[source.parent.name] = (source, names)
        if plugins is not None:
            KernelFolder.open(plugins, plugin_form).verify()
        plan.write_bytes(b"plan")
        return PlanResult(1.0, 1, 4, "TensorRT", "0", len(graph.node), sum(names.values()) - given.get("lost", 0))

    library = TensorrtLibrary("tensorrt", "vendor", "tensorrt", "0", "0", "a stand-in")
    monkeypatch.setattr(build_module, "find_tensorrt", lambda target: library)
    monkeypatch.setattr(stages, "build_plan", compiler)
    monkeypatch.setattr(stages, "_PLUGIN_CAPABILITIES", {"tensorrt": (87,)})
    parts = ("transformer", "vae_decoder")
    wanted = BuildRequest("random:tiny", "bf16", ("tensorrt",), 64, 64, tmp_path / "bundle", components=parts)
    wanted = replace(wanted, plugin=True, plugin_form="quick")
    build(wanted, Recorder())
    ops = [op.name for op in quick_ops(False).values()]
    assert given["transformer"][1] == dict.fromkeys(ops, 2)
    assert given["vae_decoder"][1] == dict.fromkeys(ops, 18)
    manifest = read_manifest(wanted.output)
    for name in parts:
        (engine,) = manifest.component(name).engines
        assert engine.plugin == "quick"
        assert engine.files == (f"{name}/tensorrt.plan",)
        assert not given[name][0].exists()
    given["lost"] = 1
    with pytest.raises(BuildError, match="plugin layers"):
        build(replace(wanted, output=tmp_path / "other"), Recorder())


def test_rtx_takes_no_quick_plugins(tmp_path: Path) -> None:
    wanted = BuildRequest("random:tiny", "bf16", ("tensorrt-rtx",), 64, 64, tmp_path, plugin=True)
    with pytest.raises(TargetError, match="--target tensorrt"):
        replace(wanted, plugin_form="quick")
    with pytest.raises(InputError, match="plugin-form"):
        replace(wanted, plugin_form="other")


# --- Rows before dequantisation ---


def save_table(path: Path, stored: np.ndarray, scale: np.ndarray, axis: int = 0) -> None:
    """y = Gather(DequantizeLinear(stored, scale), i) with the table outside the file."""
    wide = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}[scale.dtype.type]
    by_row = {"axis": axis} if scale.ndim else {}
    nodes = [
        helper.make_node("DequantizeLinear", ["table", "scale"], ["wide"], **by_row),
        helper.make_node("Gather", ["wide", "i"], ["y"], name="rows"),
    ]
    graph = helper.make_graph(
        nodes,
        "table",
        [helper.make_tensor_value_info("i", TensorProto.INT64, [1, 3])],
        [helper.make_tensor_value_info("y", wide, [1, 3, stored.shape[1]])],
        [helper.make_tensor("scale", wide, scale.shape, scale.tobytes(), raw=True)],
    )
    if stored.dtype == np.int8:
        graph.initializer.append(numpy_helper.from_array(stored, "table"))
    else:
        kind = TensorProto.FLOAT8E4M3FN
        graph.initializer.append(helper.make_tensor("table", kind, stored.shape, stored.tobytes(), raw=True))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=16)


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])
def test_rows_are_the_same_to_the_bit(dtype: type, tmp_path: Path) -> None:
    """All 255 stored values against scales over many powers of two, subnormal fp16 products among them."""
    generator = np.random.default_rng(0)
    stored = generator.integers(-128, 128, (64, 48), np.int8)
    scale = np.exp2(generator.uniform(-14, 2, 64)).astype(dtype)
    save_table(tmp_path / "model.onnx", stored, scale)
    before = (tmp_path / "model.onnx.data").read_bytes()
    variant, count = write_variant(tmp_path / "model.onnx", "rows.onnx", gather_rows.run)
    assert count == 1
    onnx.checker.check_model(str(variant), full_check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data", "rows.onnx"]
    assert (tmp_path / "model.onnx.data").read_bytes() == before
    nodes = [node.op_type for node in onnx.load(variant, load_external_data=False).graph.node]
    assert sorted(nodes) == ["Cast", "Gather", "Gather", "Mul", "Unsqueeze"]
    for index in ([[0, 63, 63]], [[5, -1, 31]]):
        feed = {"i": np.array(index)}
        expected = run(tmp_path / "model.onnx", feed)
        np.testing.assert_array_equal(run(variant, feed), expected)
        assert np.unique(expected).size > 40


@pytest.mark.parametrize("kind", ["one scale", "scale per column", "fp8"])
def test_other_tables_are_left_alone(kind: str, tmp_path: Path) -> None:
    stored = np.ones((4, 4), ml_dtypes.float8_e4m3fn if kind == "fp8" else np.int8)
    scale = np.ones(() if kind == "one scale" else 4, np.float32)
    save_table(tmp_path / "model.onnx", stored, scale, axis=int(kind == "scale per column"))
    assert write_variant(tmp_path / "model.onnx", "rows.onnx", gather_rows.run)[1] == 0
    assert not (tmp_path / "rows.onnx").exists()


def test_a_table_that_something_else_reads_is_left_alone(tmp_path: Path) -> None:
    save_table(tmp_path / "model.onnx", np.ones((4, 4), np.int8), np.ones(4, np.float32))
    model = ir.load(tmp_path / "model.onnx")
    model.graph.outputs.append(next(node for node in model.graph if node.op_type == "DequantizeLinear").outputs[0])
    assert gather_rows.run(model) == 0


def test_the_bundles_onnxruntime_engine_reads_rows(tmp_path: Path, checkpoint_directory: Callable[[str], Path]) -> None:
    """A build lists the variant for ONNX Runtime and keeps the plain graph, and both give the same captions."""
    model = str(checkpoint_directory("random:tiny"))
    settings = CalibrationSettings(num_prompts=1, num_steps=1, side=64)
    wanted = BuildRequest(model, "int8-weight-only", ("onnxruntime",), 64, 64, tmp_path / "bundle", gate=False)
    wanted = replace(wanted, base_precision="fp32", components=("text_encoder",), calibration=settings)
    build(wanted, Recorder())
    (engine,) = read_manifest(wanted.output).component("text_encoder").engines
    assert engine.files == ("text_encoder/onnxruntime.onnx", "text_encoder/model.onnx.data")
    plain, by_row = (wanted.output / "text_encoder" / name for name in ("model.onnx", "onnxruntime.onnx"))
    shapes = {node.name: node.shape for node in onnxruntime.InferenceSession(plain).get_inputs()}
    feed = {name: np.ones(shape, np.int64) for name, shape in shapes.items()}
    feed["caption_tokens"][0, 1:9] = np.arange(10, 90, 10)
    np.testing.assert_array_equal(run(plain, feed), run(by_row, feed))


# --- Moves of bf16 numbers ---

_REPEAT = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def moving(kind: int = TensorProto.BFLOAT16, mode: str = "CRD", **resize: str) -> onnx.ModelProto:
    """x [2, 12, 3, 5] -> every pixel twice down and three times across, and the pixels shuffled: [2, 3, 12, 30]."""
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["large"], **{**_REPEAT, **resize}),
        helper.make_node("DepthToSpace", ["large"], ["y"], mode=mode, blocksize=2),
    ]
    values = {"x": [2, 12, 3, 5], "large": [2, 12, 6, 15], "y": [2, 3, 12, 30]}
    x, large, y = (helper.make_tensor_value_info(name, kind, shape) for name, shape in values.items())
    scales = numpy_helper.from_array(np.array([1, 1, 2, 3], np.float32), "scales")
    graph = helper.make_graph(nodes, "moves", [x], [y], [scales], value_info=[large])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def rewritten(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    graph = ir.serde.deserialize_model(model)
    fired = plain_moves.run(graph)
    return ir.serde.serialize_model(graph), fired


def test_moves_of_bf16_are_reshapes_of_the_same_numbers() -> None:
    moved, fired = rewritten(moving())
    onnx.checker.check_model(moved, full_check=True)
    assert fired == 2
    plain = ["Reshape", "Expand", "Reshape", "Reshape", "Transpose", "Reshape"]
    assert [node.op_type for node in moved.graph.node] == plain
    assert not [tensor.name for tensor in moved.graph.initializer if tensor.name == "scales"]
    # ONNX Runtime's CPU provider has bf16 Reshape and Transpose alone: ONNX's own evaluator judges, and it the same
    # numbers in fp32 by the two operators.
    x = np.random.default_rng(0).normal(size=(2, 12, 3, 5)).astype(ml_dtypes.bfloat16)
    session = onnxruntime.InferenceSession(moving(TensorProto.FLOAT).SerializeToString())
    (wanted,) = session.run(None, {"x": x.astype(np.float32)})
    (found,) = ReferenceEvaluator(moved).run(None, {"x": x})
    np.testing.assert_array_equal(found.astype(np.float32), wanted)


def test_other_moves_are_left_alone() -> None:
    assert rewritten(moving(TensorProto.FLOAT))[1] == 0
    assert rewritten(moving(TensorProto.FLOAT16))[1] == 0
    assert rewritten(moving(mode="DCR"))[1] == 1
    assert rewritten(moving(coordinate_transformation_mode="half_pixel"))[1] == 1
    symbolic = moving()
    symbolic.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    assert rewritten(symbolic)[1] == 1


def test_onnxruntimes_bf16_decoder_has_no_operator_that_cuda_lacks(
    tmp_path: Path, checkpoint_directory: Callable[[str], Path]
) -> None:
    model = str(checkpoint_directory("random:tiny"))
    wanted = BuildRequest(model, "bf16", ("onnxruntime",), 64, 64, tmp_path / "bundle", components=("vae_decoder",))
    build(wanted, Recorder())
    (engine,) = read_manifest(wanted.output).component("vae_decoder").engines
    assert engine.files == ("vae_decoder/onnxruntime.onnx", "vae_decoder/model.onnx.data")
    plain, moved = (
        Counter(node.op_type for node in onnx.load(wanted.output / name, load_external_data=False).graph.node)
        for name in ("vae_decoder/model.onnx", engine.files[0])
    )
    assert (plain["Resize"], plain["DepthToSpace"]) == (5, 5)
    assert {*moved} & {"Resize", "DepthToSpace"} == set()
    assert moved["Conv"] == plain["Conv"]
    onnx.checker.check_model(str(wanted.output / engine.files[0]), full_check=True)


@pytest.mark.tensorrt
def test_tensorrt_rtx_refuses_rows_of_8_bits(tmp_path: Path) -> None:
    """Why there are two graphs. Once this fails, one will do."""
    save_table(tmp_path / "model.onnx", np.ones((64, 64), np.int8), np.ones(64, np.float32))
    variant, _ = write_variant(tmp_path / "model.onnx", "rows.onnx", gather_rows.run)
    try:
        assert build_plan(tmp_path / "model.onnx", tmp_path / "plan", "tensorrt-rtx").size > 0
    except TargetError as error:
        pytest.skip(" ".join(str(error).split()))
    with pytest.raises(BuildError, match="only allowed before DQ"):
        build_plan(variant, tmp_path / "plan", "tensorrt-rtx")
