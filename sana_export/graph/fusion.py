"""Predict, from an ONNX file alone, which quantised products a target computes with low-precision kernels.

    report = check_fusion(path, "tensorrt-rtx", parse_capability("sm_89"))
    report.rows, report.summary

Strong typing turns a bad Q/DQ pattern into a slow engine, not a wrong one: nothing fails, the kernels fall back to the
base dtype while the rounding stays. `RULES` says what a product needs, rule by rule, in the order they are asked; the
first that a product breaks is the reason it does not fuse. `evidence` tells what stands behind a rule: "compiler" was
read off the layer list that the TensorRT-RTX 1.7 compiler prints for a graph that breaks it; "whole model" was read
off that list for Gemma-2, where neighbours matter, and may be too careful elsewhere; "documentation" is the vendor's
word, where the compiler accepts more or was not there to ask (full TensorRT).

The file's weights are not read, only its graph.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from sana_runtime.contract import TargetName
from sana_runtime.errors import InputError
from sana_runtime.targets import rtx_supports

Capability = tuple[int, int]
Evidence = Literal["compiler", "whole model", "documentation"]
Granularity = Literal["per_tensor", "per_channel", "per_input", "per_group"]

_CAPABILITY = re.compile(r"sm_(\d+)(\d)")
_FP8_FROM: Capability = (8, 9)
_FP8_PER_CHANNEL_FROM: Capability = (9, 0)
_TENSORRT_FROM: Capability = (7, 5)
_LARGEST_FP8_KERNEL = 32
_FP8_CHANNELS = 16

_STORED = {"FLOAT8E4M3FN": "float8e4m3fn", "INT8": "int8", "INT4": "int4"}
_WEIGHT_INPUT = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}
# Operators that a graph may put between a DequantizeLinear and the product that should read it.
_LAYOUT = ("Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_ARITHMETIC = ("Add", "Cast", "Div", "Mul", "Relu", "Sub")
_PASSED = frozenset((*_LAYOUT, *_ARITHMETIC))


@dataclass(frozen=True)
class FusionRow:
    """One product with a quantised input. `reason`: the kernel it becomes, or why it does not; `rule`: the name of the
    broken rule, "" if fused. A dtype is None where that side is not quantised.
    """

    node: str
    op: str
    weight_dtype: str | None
    activation_dtype: str | None
    fused: bool
    reason: str
    rule: str = ""


@dataclass(frozen=True)
class FusionReport:
    """The prediction for one file, target and compute capability."""

    target: TargetName
    compute_capability: Capability
    rows: tuple[FusionRow, ...]

    @property
    def fused(self) -> int:
        """How many products fuse."""
        return sum(row.fused for row in self.rows)

    @property
    def summary(self) -> str:
        """Counts: the kernels, most frequent first, then the reasons against."""
        where = f"{self.target} on sm_{self.compute_capability[0]}{self.compute_capability[1]}"
        if not self.rows:
            return f"{where}: nothing is quantised"
        lines = [f"{where}: {self.fused} of {len(self.rows)} quantised products fuse"]
        for fused in (True, False):
            counts = Counter(row.reason for row in self.rows if row.fused == fused)
            mark = "fused" if fused else "not fused"
            lines += [f"  {mark} {count}: {reason}" for reason, count in counts.most_common()]
        return "\n".join(lines)


def parse_capability(text: str) -> Capability:
    """(8, 9) of "sm_89", (12, 0) of "sm_120"."""
    match = _CAPABILITY.fullmatch(text.strip().lower())
    if match is None:
        raise InputError(
            "this is not a compute capability",
            received=text,
            expected="sm_ and two or three digits, such as sm_87, sm_89 or sm_120",
            action="see sana-export doctor for this machine's, or the vendor's list of GPUs",
        )
    return int(match[1]), int(match[2])


def check_fusion(onnx_path: Path, target: TargetName, compute_capability: Capability) -> FusionReport:
    """A row per product with a quantised weight or activation, in the file's order."""
    graph = _read(onnx_path)
    rows = tuple(_judge(product, target, compute_capability) for product in _products(_Graph(graph)))
    return FusionReport(target, compute_capability, rows)


def _read(onnx_path: Path) -> Any:
    """The file's graph, without the data outside the file."""
    import onnx

    try:
        graph = onnx.load(str(onnx_path), load_external_data=False).graph
        if not graph.node:
            raise ValueError("it holds no graph")
    except Exception as error:  # protobuf's error has no public base
        raise InputError(
            f"{onnx_path}: cannot be read as an ONNX file",
            received=str(error) or type(error).__name__,
            expected="an ONNX file, such as transformer/model.onnx of a bundle",
            action="name the component's .onnx file",
        ) from error
    return graph


def _judge(product: "Product", target: TargetName, capability: Capability) -> FusionRow:
    for rule in RULES:
        if target in rule.targets and (reason := rule.broken(product, target, capability)):
            return _row(product, False, reason, rule.name)
    return _row(product, True, _kernel(product))


def _row(product: "Product", fused: bool, reason: str, rule: str = "") -> FusionRow:
    return FusionRow(product.node, product.op, product.weight_dtype, product.activation_dtype, fused, reason, rule)


def _kernel(product: "Product") -> str:
    if product.op == "Gather":
        return "rows of the table are dequantised as they are read"
    what = "convolution" if product.op == "Conv" else "GEMM"
    if product.weight_only:
        return f"{_short(product.weight_dtype)} weights are dequantised inside the {what}"
    after = ", then one multiplication by the channels' scales" if product.granularity == "per_channel" else ""
    return f"{_short(product.weight_dtype)} {what}{after}"


def _short(dtype: str | None) -> str:
    return {"float8e4m3fn": "FP8", "int8": "INT8", "int4": "INT4"}.get(dtype or "", str(dtype))


# ------------------------------------------------------------------------------------------------------ rules


@dataclass(frozen=True)
class Product:
    """What the graph shows of one product with a quantised input.

    `granularity`: of the weight's scale; per_channel is one per output, per_input one per contracted index, and
    `weight_groups` counts the groups along it. `between`: operators between a DequantizeLinear and the product.
    `scale_mismatch`: a scale of another dtype than what it scales, in words. `dynamic`: a scale or zero point that is
    computed, or a zero point that is not zero. Channels are the product's inputs and outputs.
    `activation_shape`: () if unknown; `siblings`: other products with stored weights that read the same activation;
    `from_transpose`: the activation is a reshaped transpose.
    """

    node: str
    op: str
    weight_dtype: str | None = None
    activation_dtype: str | None = None
    granularity: Granularity = "per_tensor"
    weight_groups: int = 1
    activation_per_tensor: bool = True
    between: tuple[str, ...] = ()
    scale_mismatch: str = ""
    dynamic: str = ""
    conv_groups: int = 1
    kernel_volume: int = 1
    in_channels: int = 0
    out_channels: int = 0
    activation_shape: tuple[int, ...] = ()
    siblings: int = 0
    from_transpose: bool = False

    @property
    def weight_only(self) -> bool:
        """The weight is stored in 8 or 4 bits and the activation is not quantised."""
        return self.weight_dtype is not None and self.activation_dtype is None

    @property
    def both(self) -> bool:
        """Weight and activation are quantised."""
        return self.weight_dtype is not None and self.activation_dtype is not None

    @property
    def batch_of_one(self) -> bool:
        """The activation is [1, N, C]: the compiler keeps it a batched product, [B, N, C] becomes [B * N, C]."""
        return len(self.activation_shape) > 2 and prod(self.activation_shape[:-2]) == 1

    @property
    def fp8(self) -> bool:
        """One side is FP8."""
        return "float8e4m3fn" in (self.weight_dtype, self.activation_dtype)


@dataclass(frozen=True)
class Rule:
    """`broken` returns why a product does not fuse on a target and capability, "" if the rule holds."""

    name: str
    evidence: Evidence
    targets: tuple[TargetName, ...]
    broken: Callable[[Product, TargetName, Capability], str]


_COMPILED: tuple[TargetName, ...] = ("tensorrt-rtx", "tensorrt")
_RTX: tuple[TargetName, ...] = ("tensorrt-rtx",)
_TENSORRT: tuple[TargetName, ...] = ("tensorrt",)


def _onnxruntime(product: Product, target: TargetName, capability: Capability) -> str:
    return "ONNX Runtime dequantises and computes in the base dtype"


def _gpu(product: Product, target: TargetName, capability: Capability) -> str:
    runs = rtx_supports(capability) if target == "tensorrt-rtx" else capability >= _TENSORRT_FROM
    return "" if runs else f"{target} does not run on sm_{capability[0]}{capability[1]}"


def _used(product: Product, target: TargetName, capability: Capability) -> str:
    return "" if product.op in _WEIGHT_INPUT else f"no product reads it, but {product.op or 'nothing'}"


def _weight_stored(product: Product, target: TargetName, capability: Capability) -> str:
    return "" if product.weight_dtype else "its weight is not quantised, only its activation"


def _one_dtype(product: Product, target: TargetName, capability: Capability) -> str:
    if product.both and product.weight_dtype != product.activation_dtype:
        pair = f"{_short(product.weight_dtype)} weights and {_short(product.activation_dtype)} activations"
        return f"no kernel multiplies {pair}"
    return ""


def _no_cast(product: Product, target: TargetName, capability: Capability) -> str:
    return "a Cast stands between DequantizeLinear and the product" if "Cast" in product.between else ""


def _direct(product: Product, target: TargetName, capability: Capability) -> str:
    ops = ", ".join(product.between)
    return f"{ops} between DequantizeLinear and the product" if ops else ""


def _static_scales(product: Product, target: TargetName, capability: Capability) -> str:
    return product.dynamic


def _scale_dtype(product: Product, target: TargetName, capability: Capability) -> str:
    return product.scale_mismatch


def _activation_per_tensor(product: Product, target: TargetName, capability: Capability) -> str:
    return "" if product.activation_per_tensor else "the activation has more than one scale"


def _fp8_capability(product: Product, target: TargetName, capability: Capability) -> str:
    if product.fp8 and capability < _FP8_FROM:
        return f"FP8 needs sm_89 or later, this is sm_{capability[0]}{capability[1]}"
    return ""


def _int8_activation(product: Product, target: TargetName, capability: Capability) -> str:
    if product.both and product.activation_dtype == "int8":
        return "TensorRT-RTX documents INT8 for weights only"
    return ""


def _int4_groups(product: Product, target: TargetName, capability: Capability) -> str:
    if product.weight_dtype != "int4" or product.op == "Gather":
        return ""
    if product.both:
        return "INT4 is for weights only"
    one_scale = product.granularity != "per_group" or product.weight_groups < 2
    return "INT4 needs two or more groups of inputs per output" if one_scale else ""


def _groups_are_int4(product: Product, target: TargetName, capability: Capability) -> str:
    if product.granularity == "per_group" and product.weight_dtype != "int4":
        return f"{_short(product.weight_dtype)} weights with one scale per group are dequantised in a kernel before"
    return ""


def _weight_only_conv(product: Product, target: TargetName, capability: Capability) -> str:
    if product.weight_only and product.op == "Conv":
        return "a convolution's weights are dequantised in a kernel before it: a smaller file, no faster"
    return ""


def _merged(product: Product, target: TargetName, capability: Capability) -> str:
    if product.weight_only and product.op == "MatMul" and product.batch_of_one and product.siblings:
        return "products of one activation, batch 1, are merged and their weights dequantised in a kernel before"
    return ""


def _after_transpose(product: Product, target: TargetName, capability: Capability) -> str:
    if product.weight_only and product.op == "MatMul" and product.batch_of_one and product.from_transpose:
        return "behind a transpose, batch 1, weights are dequantised in a kernel before"
    return ""


def _weight_only_int4(product: Product, target: TargetName, capability: Capability) -> str:
    if product.weight_only and product.weight_dtype != "int4":
        return f"TensorRT documents INT4 alone for weights only, not {_short(product.weight_dtype)}"
    return ""


def _output_axis(product: Product, target: TargetName, capability: Capability) -> str:
    if product.both and product.granularity == "per_input":
        return "the weight's scales lie along the contracted axis, they must lie along the outputs"
    return ""


def _fp8_per_channel(product: Product, target: TargetName, capability: Capability) -> str:
    if product.both and product.fp8 and product.granularity == "per_channel" and capability < _FP8_PER_CHANNEL_FROM:
        return "FP8 weights with one scale per channel need sm_90 or later"
    return ""


def _grouped_conv(product: Product, target: TargetName, capability: Capability) -> str:
    return "no fast 8-bit kernel for a grouped or depthwise convolution" if product.conv_groups > 1 else ""


def _kernel_volume(product: Product, target: TargetName, capability: Capability) -> str:
    if product.both and product.fp8 and product.kernel_volume > _LARGEST_FP8_KERNEL:
        return f"FP8 convolutions have a kernel of at most {_LARGEST_FP8_KERNEL} positions, not {product.kernel_volume}"
    return ""


def _channels(product: Product, target: TargetName, capability: Capability) -> str:
    channels = (product.in_channels, product.out_channels)
    if product.both and product.fp8 and any(count % _FP8_CHANNELS for count in channels):
        return f"FP8 kernels take multiples of {_FP8_CHANNELS} channels, not {channels[0]} -> {channels[1]}"
    return ""


RULES: tuple[Rule, ...] = (
    Rule("onnxruntime", "documentation", ("onnxruntime",), _onnxruntime),
    Rule("gpu", "documentation", _COMPILED, _gpu),
    Rule("used", "compiler", _COMPILED, _used),
    Rule("weight_stored", "compiler", _COMPILED, _weight_stored),
    Rule("one_dtype", "compiler", _COMPILED, _one_dtype),
    Rule("no_cast", "compiler", _COMPILED, _no_cast),
    Rule("direct", "documentation", _COMPILED, _direct),
    Rule("static_scales", "documentation", _COMPILED, _static_scales),
    Rule("scale_dtype", "documentation", _COMPILED, _scale_dtype),
    Rule("activation_per_tensor", "compiler", _COMPILED, _activation_per_tensor),
    Rule("int8_activation", "documentation", _RTX, _int8_activation),
    Rule("int4_groups", "compiler", _COMPILED, _int4_groups),
    Rule("groups_are_int4", "compiler", _COMPILED, _groups_are_int4),
    Rule("weight_only_conv", "compiler", _COMPILED, _weight_only_conv),
    Rule("merged", "whole model", _RTX, _merged),
    Rule("after_transpose", "whole model", _RTX, _after_transpose),
    Rule("weight_only_int4", "documentation", _TENSORRT, _weight_only_int4),
    Rule("output_axis", "compiler", _COMPILED, _output_axis),
    Rule("grouped_conv", "documentation", _COMPILED, _grouped_conv),
    Rule("kernel_volume", "compiler", _COMPILED, _kernel_volume),
    Rule("channels", "documentation", _COMPILED, _channels),
    Rule("fp8_capability", "documentation", _COMPILED, _fp8_capability),
    Rule("fp8_per_channel", "documentation", _TENSORRT, _fp8_per_channel),
)


# ------------------------------------------------------------------------------------------- reading the graph


class _Graph:
    """Producers, consumers, and what the file says of types and shapes."""

    def __init__(self, graph: Any) -> None:
        self.nodes = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        values = (*graph.value_info, *graph.input, *graph.output)
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.shapes = {
            value.name: tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim) for value in values
        }

    def origin(self, name: str) -> tuple[Any | None, tuple[str, ...]]:
        """The DequantizeLinear that `name` comes from, and the operators between, nearest to it last."""
        passed: list[str] = []
        while (node := self.producers.get(name)) is not None:
            if node.op_type == "DequantizeLinear":
                return node, tuple(reversed(passed))
            inputs = [name for name in node.input if name and name not in self.initializers]
            if node.op_type not in _PASSED or len(inputs) != 1:
                return None, ()
            passed.append(node.op_type)
            name = inputs[0]
        return None, ()

    def dtype(self, name: str) -> int:
        """ONNX element type of a value, 0 if the file does not say."""
        tensor = self.initializers.get(name)
        return tensor.data_type if tensor is not None else self.types.get(name, 0)

    def dims(self, name: str) -> tuple[int, ...]:
        """Shape of an initializer."""
        return tuple(self.initializers[name].dims)


def _products(graph: _Graph) -> Iterator[Product]:
    claimed: set[str] = set()
    for node in graph.nodes:
        if node.op_type in _WEIGHT_INPUT:
            product, sources = _product(graph, node)
            claimed.update(sources)
            if product.weight_dtype or product.activation_dtype:
                yield product
    for node in graph.nodes:
        if node.op_type == "DequantizeLinear" and node.output[0] not in claimed:
            yield _stray(graph, node)


def _product(graph: _Graph, node: Any) -> tuple[Product, list[str]]:
    """The product at `node`, and the outputs of the DequantizeLinear nodes that it reads."""
    position = _WEIGHT_INPUT[node.op_type]
    weight, after_weight = graph.origin(node.input[position])
    activation, after_activation = graph.origin(node.input[1 - position])
    found: dict[str, Any] = {"between": after_weight + after_activation}
    if weight is not None and weight.input[0] in graph.initializers:
        found |= _weight_facts(graph, node, weight)
    if activation is not None:
        found |= _activation_facts(graph, activation)
    pairs = [pair for pair in (weight, activation) if pair is not None]
    found |= {
        "scale_mismatch": next(filter(None, (_scale_mismatch(graph, pair) for pair in pairs)), ""),
        "dynamic": next(filter(None, (_dynamic(graph, pair) for pair in pairs)), ""),
    }
    if node.op_type != "Gather":
        found |= _neighbours(graph, node)
    product = Product(node.name or node.output[0], node.op_type, **found)
    return product, [pair.output[0] for pair in pairs]


def _neighbours(graph: _Graph, node: Any) -> dict[str, Any]:
    read = node.input[0]
    readers = [other for other in graph.readers[read] if other.op_type == "MatMul" and other.input[0] == read]
    stored = [other for other in readers if graph.origin(other.input[1])[0] is not None]
    before = graph.producers.get(read)
    earlier = graph.producers.get(before.input[0]) if before is not None and before.op_type == "Reshape" else None
    return {
        "activation_shape": graph.shapes.get(read, ()),
        "siblings": sum(other.output[0] != node.output[0] for other in stored),
        "from_transpose": earlier is not None and earlier.op_type == "Transpose",
    }


def _stray(graph: _Graph, dequantize: Any) -> Product:
    readers = sorted({node.op_type for node in graph.readers.get(dequantize.output[0], [])})
    return Product(
        dequantize.name or dequantize.output[0], ", ".join(readers), activation_dtype=_stored(graph, dequantize)
    )


def _weight_facts(graph: _Graph, node: Any, dequantize: Any) -> dict[str, Any]:
    shape = graph.dims(dequantize.input[0])
    output_axis = _output_axis_of(node, len(shape))
    granularity, groups = _granularity(graph, dequantize, shape, output_axis)
    facts: dict[str, Any] = {
        "weight_dtype": _stored(graph, dequantize),
        "granularity": granularity,
        "weight_groups": groups,
        "out_channels": shape[output_axis],
        "in_channels": prod(shape) // shape[output_axis] if shape[output_axis] else 0,
    }
    if node.op_type == "Conv":
        conv_groups = _attribute(node, "group", 1)
        facts |= {
            "conv_groups": conv_groups,
            "kernel_volume": prod(shape[2:]),
            "in_channels": shape[1] * conv_groups,
        }
    return facts


def _output_axis_of(node: Any, rank: int) -> int:
    if node.op_type == "MatMul":
        return rank - 1
    return int(node.op_type == "Gemm" and not _attribute(node, "transB", 0))


def _granularity(graph: _Graph, dequantize: Any, shape: tuple[int, ...], output_axis: int) -> tuple[Granularity, int]:
    """Of the weight's scale, and the number of groups along the axis that has them."""
    scale = dequantize.input[1]
    if scale not in graph.initializers or prod(graph.dims(scale)) == 1:
        return "per_tensor", 1
    axis = _attribute(dequantize, "axis", 1) % max(1, len(shape))
    if block := _attribute(dequantize, "block_size", 0):
        return "per_group", -(-shape[axis] // block)
    return ("per_channel" if axis == output_axis else "per_input"), 1


def _activation_facts(graph: _Graph, dequantize: Any) -> dict[str, Any]:
    scale = dequantize.input[1]
    single = scale not in graph.initializers or prod(graph.dims(scale)) == 1
    return {"activation_dtype": _stored(graph, dequantize), "activation_per_tensor": single}


def _stored(graph: _Graph, dequantize: Any) -> str:
    """The stored type, in lower case as ONNX writes it."""
    import onnx

    number = graph.dtype(dequantize.input[0])
    quantize = graph.producers.get(dequantize.input[0])
    if not number and quantize is not None and len(quantize.input) > 2:
        number = graph.dtype(quantize.input[2])  # the zero point decides QuantizeLinear's output type
    name = onnx.TensorProto.DataType.Name(number) if number else "unknown"
    return _STORED.get(name, name.lower())


def _pair(graph: _Graph, dequantize: Any) -> list[Any]:
    """The DequantizeLinear and, for an activation, its QuantizeLinear."""
    quantize = graph.producers.get(dequantize.input[0])
    return [dequantize, quantize] if quantize is not None and quantize.op_type == "QuantizeLinear" else [dequantize]


def _scale_mismatch(graph: _Graph, dequantize: Any) -> str:
    import onnx

    names = onnx.TensorProto.DataType.Name
    for node in _pair(graph, dequantize):
        scale = graph.dtype(node.input[1])
        scaled = graph.dtype(node.input[0] if node.op_type == "QuantizeLinear" else node.output[0])
        if scale and scaled and scale != scaled:
            return f"a {names(scale)} scale on {names(scaled)} values: scales need the dtype of what they scale"
    return ""


def _dynamic(graph: _Graph, dequantize: Any) -> str:
    for node in _pair(graph, dequantize):
        if node.input[1] not in graph.initializers:
            return f"the scale of {node.name or node.op_type} is computed, it must be a constant"
        zero = node.input[2] if len(node.input) > 2 else ""
        if zero and zero not in graph.initializers:
            return f"the zero point of {node.name or node.op_type} is computed, it must be a constant zero"
        if zero and _is_not_zero(graph.initializers[zero]):
            return f"the zero point of {node.name or node.op_type} is not zero"
    return ""


def _is_not_zero(tensor: Any) -> bool:
    """For tensors inside the file; one kept outside is not read and taken for zero."""
    return any(tensor.raw_data) or any(tensor.int32_data)


def _attribute(node: Any, name: str, default: int) -> int:
    attributes: Mapping[str, Any] = {attribute.name: attribute for attribute in node.attribute}
    return int(attributes[name].i) if name in attributes else default
