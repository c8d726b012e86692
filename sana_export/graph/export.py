"""A component as an ONNX file: torch.export, the passes, and the weights streamed from the checkpoint."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import nn

from sana_export.graph import linear_attention
from sana_export.graph.opset import OPSET
from sana_export.graph.passes import drop_identity, insert_qdq, strip_metadata, transpose_weights
from sana_export.graph.passes.insert_qdq import Quantization, QuantizationReport
from sana_export.graph.weights import bind_weights
from sana_export.weights.lazy import LazyTensor
from sana_runtime.contract import TensorSpec

WEIGHTS_FILE = "model.onnx.data"
_INLINE_BYTES = 1024


@dataclass(frozen=True)
class ExportReport:
    """What an export did: how often each pass fired, the size of the graph and of its weights, and what became of
    each product of the graph if it was quantised.
    """

    passes: Mapping[str, int]
    nodes: int
    weight_bytes: int
    quantization: QuantizationReport | None = None


def example_inputs(specs: Sequence[TensorSpec]) -> dict[str, torch.Tensor]:
    """A distinct tensor of ones per input: the tracer would alias inputs that share one."""
    return {spec.name: torch.ones(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs}


def to_graph(module: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> ir.Model:
    """Trace `module` with static shapes. The graph's I/O must be exactly the contract's."""
    with _quiet_exporter(), torch.no_grad():
        program = torch.export.export(module, (), kwargs=example_inputs(inputs), strict=False)
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            custom_translation_table=linear_attention.translation_table(),
        )
    assert onnx_program is not None
    check_io(onnx_program.model, inputs, outputs)
    return onnx_program.model


def check_io(model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """The graph's inputs and outputs carry the contract's names, dtypes and shapes, in its order."""
    for kind, values, specs in (
        ("input", model.graph.inputs, inputs),
        ("output", model.graph.outputs, outputs),
    ):
        found = [(v.name, v.dtype.numpy().name if v.dtype else None, tuple(v.shape or ())) for v in values]
        wanted = [(spec.name, spec.dtype, spec.shape) for spec in specs]
        assert found == wanted, f"graph {kind}s {found} differ from the contract's {wanted}"


def run_passes(model: ir.Model) -> dict[str, int]:
    """Simplify the graph; weights must be bound, since passes may look at them."""
    # Before the optimizer, which would fold the small ones of these transposes and leave the large.
    fired = {"transpose_weights": transpose_weights.run(model)}
    nodes = len(model.graph)
    onnxscript.optimizer.optimize(model, inline=True, onnx_shape_inference=False)
    fired["optimizer_nodes_removed"] = nodes - len(model.graph)
    fired["drop_identity"] = drop_identity.run(model)
    fired["strip_metadata"] = strip_metadata.run(model)
    fired["linear_attention_function"] = linear_attention.add_function(model)
    return fired


def export_component(
    module: nn.Module,
    weights: Mapping[str, LazyTensor],
    prefix: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    path: Path,
    on_weight: Callable[[int, int], None] | None = None,
    quantization: Quantization | None = None,
) -> ExportReport:
    """Write `path` and, beside it, its weights. `module` may hold uninitialised parameters: values come from
    `weights` (reference names; `prefix` + name is the module's parameter), one tensor in memory at a time.
    `on_weight(done, total)` reports tensors written. `quantization` stores the layers under its rules in 8 or 4 bits;
    raises `BuildError` for one that cannot be.
    """
    model = to_graph(module, inputs, outputs)
    bind_weights(model, dict(module.named_parameters()), weights, prefix)
    passes = run_passes(model)
    quantized = insert_qdq.run(model, prefix, quantization) if quantization else None
    passes["insert_qdq"] = len(quantized.layers) if quantized else 0
    model.producer_name = "sana-export"
    ir.save(
        model,
        path,
        external_data=WEIGHTS_FILE,
        size_threshold_bytes=_INLINE_BYTES,
        callback=(lambda _, info: on_weight(info.index + 1, info.total)) if on_weight else None,
    )
    weight_bytes = (path.parent / WEIGHTS_FILE).stat().st_size
    return ExportReport(passes, len(model.graph), weight_bytes, quantized)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's notes on packages we do not use (torchvision) and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
