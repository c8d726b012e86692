"""The exported ONNX: the contract's tensors, what each pass did, and the same numbers in ONNX Runtime."""

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from sana_export.components import ComponentPlan, empty_module, loaded_module, plan_components
from sana_export.graph.export import ExportReport, export_component
from sana_export.graph.linear_attention import DOMAIN, OP_TYPE
from sana_export.parity.metrics import measure
from sana_export.weights.checkpoint import Checkpoint, open_checkpoint
from sana_runtime.contract import ComponentName, PrecisionName
from sana_runtime.plan_builder import build_plan

HEIGHT, WIDTH, TOKENS = 96, 64, 320
VARIANTS = ["random:tiny", "random:tiny-qknorm", "random:tiny-sprint", "random:tiny-4k"]

# Relative RMS. fp32: two orders of the same sums (see test_reference_modules). fp16: ONNX Runtime widens fp16 graphs to
# fp32 and rounds at other places than PyTorch does, one rounding of 2^-11 per layer on each side; the tiny models have
# about sixty layers in a row (decoder), in random walk sqrt(2 * 60) * 2^-11 = 5e-3.
TOLERANCE: dict[str, float] = {"fp32": 3e-5, "fp16": 5e-3}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    """export(model, component, precision) -> (path, report, plan, checkpoint), once per module."""

    @cache
    def export(
        model: str, name: ComponentName, precision: PrecisionName
    ) -> tuple[Path, ExportReport, ComponentPlan, Checkpoint]:
        checkpoint = open_checkpoint(model)
        plans = plan_components(checkpoint, precision, HEIGHT, WIDTH, TOKENS)
        plan = next(plan for plan in plans if plan.name == name)
        path = tmp_path_factory.mktemp("graph") / "model.onnx"
        weights = checkpoint.weights(name)
        report = export_component(empty_module(plan), weights, plan.prefix, plan.inputs, plan.outputs, path)
        return path, report, plan, checkpoint

    return export


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


def compare_with_reference(path: Path, plan: ComponentPlan, checkpoint: Checkpoint, tolerance: float) -> None:
    values = feeds(plan)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in values.items()})
    with torch.inference_mode():
        expected = loaded_module(plan, checkpoint)(**values)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(outputs) == len(expected) == len(plan.outputs)
    for spec, candidate, reference in zip(plan.outputs, outputs, expected, strict=True):
        assert candidate.shape == spec.shape
        row = measure(plan.name, spec.name, candidate, reference.numpy())
        if spec.dtype == "uint8":
            # Half a level of rounding on each side on top.
            assert row.max_abs <= 1 + 255 * tolerance, row
            assert candidate.std() > 5, "a flat picture compares nothing"
        else:
            assert row.relative_rms <= tolerance, row


@pytest.mark.parametrize("model", VARIANTS)
def test_transformer_in_onnxruntime_equals_the_reference(exported, model: str) -> None:
    path, _, plan, checkpoint = exported(model, "transformer", "fp32")
    compare_with_reference(path, plan, checkpoint, TOLERANCE["fp32"])


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder"])
def test_component_in_onnxruntime_equals_the_reference(exported, name: ComponentName) -> None:
    path, _, plan, checkpoint = exported("random:tiny", name, "fp32")
    compare_with_reference(path, plan, checkpoint, TOLERANCE["fp32"])


def test_fp16_decoder_in_onnxruntime_equals_the_reference(exported) -> None:
    path, _, plan, checkpoint = exported("random:tiny", "vae_decoder", "fp16")
    compare_with_reference(path, plan, checkpoint, TOLERANCE["fp16"])


@pytest.mark.parametrize(("model", "inputs"), [("random:tiny", 1), ("random:tiny-qknorm", 3)])
def test_linear_attention_is_a_plugin_node_and_a_function(exported, model: str, inputs: int) -> None:
    path, report, _, checkpoint = exported(model, "transformer", "fp32")
    graph = onnx.load(path, load_external_data=False)
    nodes = [node for node in graph.graph.node if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
    depth = checkpoint.transformer_config["num_layers"]
    assert len(nodes) == report.passes["linear_attention_function"] == depth
    for node in nodes:
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes["plugin_namespace"] == b"sana"
        assert attributes["plugin_version"] == b"1"
        assert attributes["head_dim"] == 32
        assert len(node.input) == inputs
    assert [(f.domain, f.name, len(f.input)) for f in graph.functions] == [(DOMAIN, OP_TYPE, inputs)]


def test_every_linear_reads_its_weight_untransposed(exported) -> None:
    path, report, _, _ = exported("random:tiny", "transformer", "fp32")
    graph = onnx.load(path, load_external_data=False).graph
    initializers = {tensor.name for tensor in graph.initializer}
    transposed = [node.input[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in initializers]
    assert transposed == []
    # patch_embed, two caption linears and proj_out, and per block: qkv, to_out, q, kv, to_out, inverted, point.
    assert report.passes["transpose_weights"] == 4 + 2 * 7


def test_graph_holds_the_whole_solver_step(exported) -> None:
    path, _, plan, _ = exported("random:tiny", "transformer", "fp32")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    values = {name: tensor.numpy() for name, tensor in feeds(plan).items()}
    a, b, c = values["step_coefficients"]
    next_latent, x0, velocity = session.run(None, values)
    np.testing.assert_allclose(x0, values["latent"] - values["sigma"] * velocity, atol=1e-5)
    np.testing.assert_allclose(next_latent, a * values["latent"] + b * x0 + c * values["previous_x0"], atol=1e-5)
    strong = session.run(["velocity"], {**values, "guidance_scale": np.array(2, np.float32)})[0]
    weak = session.run(["velocity"], {**values, "guidance_scale": np.array(0, np.float32)})[0]
    middle = session.run(["velocity"], {**values, "guidance_scale": np.array(1, np.float32)})[0]
    # Linear in the guidance scale; three fp32 sums of values of order one.
    np.testing.assert_allclose(middle, (strong + weak) / 2, atol=2e-5)


def test_fp16_islands_of_the_decoder(exported) -> None:
    path, _, _, _ = exported("random:tiny", "vae_decoder", "fp16")
    types = {
        tensor.name: onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.name.startswith("decoder.")
    }
    blocks = [f"decoder.stages.{stage}.blocks" for stage in (3, 4, 5)]  # the EfficientViT stages
    found = Counter((name.startswith(tuple(blocks)), dtype) for name, dtype in types.items())
    assert found[True, "float32"] > 0
    assert found[False, "float16"] > 0
    assert found[True, "float16"] == found[False, "float32"] == 0


def test_fp16_decoder_survives_activations_that_overflow_fp16() -> None:
    """Attention sums, Mix-FFN products and norm variances beyond 65504: the islands keep them finite."""
    checkpoint = open_checkpoint("random:tiny")
    plan = plan_components(checkpoint, "fp16", 64, 64, TOKENS)[2]
    module = loaded_module(plan, checkpoint)
    wide = loaded_module(plan_components(checkpoint, "fp32", 64, 64, TOKENS)[2], checkpoint)
    for decoder in (module, wide):
        decoder.decoder.conv_in.weight.mul_(300)
        decoder.decoder.conv_in.bias.mul_(300)
    latent = torch.randn(1, 32, 2, 2, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        stream = wide.decoder.conv_in(latent / wide.scaling_factor)
        assert stream.square().max() > 65504, "the input does not reach what the islands are for"
        row = measure("vae_decoder", "image", module(latent).numpy(), wide(latent).numpy())
    assert row.psnr_db > 30, row


def test_attention_clip_is_in_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint("random:tiny")
    counts = {}
    for clip in (False, True):
        monkeypatch.setattr(checkpoint, "attention_clip", clip)
        plan = plan_components(checkpoint, "fp32", 64, 64, TOKENS)[1]
        path = tmp_path / f"{clip}.onnx"
        weights = checkpoint.weights("transformer")
        export_component(empty_module(plan), weights, plan.prefix, plan.inputs, plan.outputs, path)
        graph = onnx.load(path, load_external_data=False).graph
        counts[clip] = sum(node.op_type in {"Clip", "Max", "Min"} for node in graph.node)
    assert counts[False] == 0
    assert counts[True] >= checkpoint.transformer_config["num_layers"]


def test_exporting_twice_gives_the_same_files(exported, tmp_path: Path) -> None:
    path, _, plan, checkpoint = exported("random:tiny", "transformer", "fp32")
    again = tmp_path / "model.onnx"
    weights = checkpoint.weights("transformer")
    export_component(empty_module(plan), weights, plan.prefix, plan.inputs, plan.outputs, again)
    assert again.read_bytes() == path.read_bytes()
    assert again.with_name("model.onnx.data").read_bytes() == path.with_name("model.onnx.data").read_bytes()


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("random:tiny", "text_encoder"),
        ("random:tiny", "transformer"),
        ("random:tiny-sprint", "transformer"),
        ("random:tiny", "vae_decoder"),
    ],
    ids=["text_encoder", "transformer", "sprint", "vae_decoder"],
)
def test_tensorrt_rtx_builds(
    exported, tmp_path: Path, model: str, name: ComponentName, precision: PrecisionName
) -> None:
    path, _, _, _ = exported(model, name, precision)
    result = build_plan(path, tmp_path / "plan", "tensorrt-rtx")
    assert result.size == (tmp_path / "plan").stat().st_size > path.with_name("model.onnx.data").stat().st_size
    assert result.layers > 0
