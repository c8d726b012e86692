"""Store the weights of ruled layers in 8 or 4 bits, and round their activations to 8 bits.

Before: y = MatMul(x, W), Gemm(x, W, ...), Conv(x, W, ...) or Gather(W, i), W a floating-point initializer that nothing
else reads but, of a Conv, the same layer for other parts of the picture. After: W is stored in the rule's type and the
node reads DequantizeLinear(W, scale) directly; where the rule has an activation_dtype, x goes through QuantizeLinear
and DequantizeLinear with one scale, after a division by the smooth factor if there is one. Standard operators only.
Scales have the dtype of what they scale, as TensorRT wants them; weights carry no zero point, activations a constant
zero of the stored type. Consumers of one activation share one pair if everything about it is equal.

An embedding table is dequantised before its Gather: TensorRT-RTX refuses a Gather of 8-bit constants, ONNX Runtime one
of FP8; its compiler dequantises inside the Gather, only the rows it reads. `gather_rows` writes ONNX Runtime's graph.

Every layer under a rule is rewritten or refused, with the node and the reason; all refusals come before the first edit.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite, prod

import numpy as np
import onnx_ir as ir

from sana_calibration.quantize import activation_scale, calibrated_weight
from sana_calibration.recipe import LayerRule, PerGroup, StoredDtype
from sana_calibration.scales import LayerScales
from sana_export.graph.quantized_weights import (
    ONNX_TYPE,
    QuantizedInitializers,
    as_tensor,
    in_dtype,
    is_floating,
)
from sana_runtime.errors import BuildError

_GEMMS = ("MatMul", "Gemm", "Conv")
_WEIGHT_INPUT = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}


@dataclass(frozen=True)
class Quantization:
    """What to quantise: layer name -> rule, and layer name -> scales. Names are module paths below the prefix."""

    rules: Mapping[str, LayerRule]
    scales: Mapping[str, LayerScales]


@dataclass(frozen=True)
class QuantizedLayer:
    """One rewritten layer. `flops`: multiplications and additions of its product; 0 for a table that is only read.
    `weight_bytes` and `stored_bytes` (scale included): before and after.
    """

    layer: str
    node: str
    op: str
    weight_dtype: StoredDtype
    activation_dtype: StoredDtype | None
    granularity: str
    smoothed: bool
    flops: int
    weight_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class KeptProduct:
    """A MatMul, Gemm or Conv that stays in its dtype. `weight`: its initializer, "" for a product of activations."""

    node: str
    op: str
    weight: str
    flops: int


@dataclass(frozen=True)
class QuantizationReport:
    """What became of every product of the graph. The inside of the linear-attention function is not counted.

    `activation_pairs`: QuantizeLinear and DequantizeLinear pairs, fewer than layers where layers share an input.
    """

    layers: tuple[QuantizedLayer, ...]
    kept: tuple[KeptProduct, ...]
    activation_pairs: int

    @property
    def quantized_flops(self) -> int:
        """Of the products whose activations and weights are both stored in 8 bits."""
        return sum(layer.flops for layer in self.layers if layer.activation_dtype is not None)

    @property
    def weight_only_flops(self) -> int:
        """Of the products with stored weights that compute in the base dtype."""
        return sum(layer.flops for layer in self.layers if layer.activation_dtype is None)

    @property
    def total_flops(self) -> int:
        """Of all products, those of two activations included."""
        return sum(layer.flops for layer in self.layers) + sum(product.flops for product in self.kept)

    @property
    def quantized_fraction(self) -> float:
        """`quantized_flops` of `total_flops`, 0 to 1."""
        return self.quantized_flops / self.total_flops if self.total_flops else 0.0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the quantised layers' weights before."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the same weights now, scales included."""
        return sum(layer.stored_bytes for layer in self.layers)


def run(model: ir.Model, prefix: str, quantization: Quantization) -> QuantizationReport:
    """Rewrite every layer under a rule. `prefix` + layer + ".weight" is its initializer.

    Raises `BuildError` for a layer that cannot be rewritten.
    """
    sites = _match(model.graph, prefix, quantization)
    kept = _kept(model.graph, {site.node for whole in sites for site in whole.each})
    before = [_nbytes(site.weight) for site in sites]
    rewriter = _Rewriter(model.graph)
    stored = [rewriter.rewrite(site) for site in sites]
    _check_after(sites)
    layers = tuple(
        QuantizedLayer(
            site.layer,
            site.node.name or "",
            site.node.op_type,
            site.rule.weight_dtype,
            site.rule.activation_dtype,
            str(site.rule.granularity),
            site.rule.activation_dtype is not None and site.scales.smooth_factor is not None,
            sum(product_flops(one.node) for one in site.each),
            bytes_before,
            bytes_after,
        )
        for site, bytes_before, bytes_after in zip(sites, before, stored, strict=True)
    )
    return QuantizationReport(layers, kept, rewriter.pairs)


# ---------------------------------------------------------------------------------------------------- pattern


@dataclass(frozen=True, eq=False)
class _Site:
    """Where a layer stands in the graph: its node, the initializer it reads, and the nodes behind it that read that in
    the same way, as a decoder's do that is computed in windows.
    """

    layer: str
    node: ir.Node
    weight: ir.Value
    rule: LayerRule
    scales: LayerScales
    others: tuple[ir.Node, ...] = ()

    @property
    def each(self) -> Iterator["_Site"]:
        """The site at each of its nodes."""
        for node in (self.node, *self.others):
            yield replace(self, node=node, others=())

    @property
    def activation(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def transposed(self) -> bool:
        """The weight is stored [in, out]."""
        return self.node.op_type == "MatMul" or (self.node.op_type == "Gemm" and not _integer(self.node, "transB", 0))


def _match(graph: ir.Graph, prefix: str, quantization: Quantization) -> list[_Site]:
    """A site per rule, in the graph's order; checked."""
    position = {node: index for index, node in enumerate(graph)}
    sites = []
    for layer, rule in quantization.rules.items():
        scales = quantization.scales.get(layer, LayerScales(None, None))
        sites.append(_site(graph, prefix, layer, rule, scales, position))
    for site in (site for whole in sites for site in whole.each):
        for check in _CHECKS:
            if reason := check(site):
                raise _refusal(site.layer, site.node, reason)
    return sorted(sites, key=lambda site: position[site.node])


def _site(
    graph: ir.Graph, prefix: str, layer: str, rule: LayerRule, scales: LayerScales, position: Mapping[ir.Node, int]
) -> _Site:
    weight = graph.initializers.get(f"{prefix}{layer}.weight")
    if weight is None:
        raise _refusal(layer, None, f"the graph has no initializer {prefix}{layer}.weight")
    uses = sorted(weight.uses(), key=lambda use: position.get(use.node, -1))
    alike = all(use.node.op_type == "Conv" and _alike(use.node, uses[0].node) for use in uses)
    if len(uses) != 1 and not (uses and alike):
        nodes = ", ".join(sorted(use.node.name or use.node.op_type for use in uses)) or "none"
        raise _refusal(layer, None, f"its weight is read by {len(uses)} nodes ({nodes}), one is needed")
    use = uses[0]
    if _WEIGHT_INPUT.get(use.node.op_type) != use.idx:
        raise _refusal(
            layer, use.node, f"its weight is input {use.idx} of {use.node.op_type}, not the weight of {_ops()}"
        )
    return _Site(layer, use.node, weight, rule, scales, tuple(other.node for other in uses[1:]))


def _alike(left: ir.Node, right: ir.Node) -> bool:
    """Whether two nodes are one layer: equal but for what they are applied to."""

    def rest(node: ir.Node) -> tuple[object, ...]:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return node.op_type, attributes, node.inputs[1:]

    return rest(left) == rest(right)


# ------------------------------------------------------------------------------------------------------ check


def _check_weight(site: _Site) -> str:
    tensor = site.weight.const_value
    if tensor is None:
        return f"{site.weight.name} has no value"
    if not is_floating(tensor.dtype):
        return f"{site.weight.name} is stored as {tensor.dtype} already"
    if len(tensor.shape) < 2 or 0 in tuple(tensor.shape):
        return f"{site.weight.name} has shape {list(tensor.shape)}, a matrix is needed"
    if len(tensor.shape) != 2 and site.node.op_type != "Conv":
        return f"{site.weight.name} has {len(tensor.shape)} axes, {site.node.op_type} needs 2"
    return ""


def _check_node(site: _Site) -> str:
    node = site.node
    if node.op_type == "Conv" and _integer(node, "group", 1) != 1:
        return "no target has an 8-bit kernel for a grouped or depthwise convolution"
    if node.op_type == "Gemm" and _integer(node, "transA", 0):
        return "Gemm reads its activation transposed"
    if node.op_type == "Gather":
        if site.rule.activation_dtype is not None:
            return "an embedding table can only be weight only: its input is token numbers"
        if _integer(node, "axis", 0) != 0:
            return "Gather does not read rows of its table"
    return ""


def _check_granularity(site: _Site) -> str:
    group, weight = site.rule.granularity, site.weight.const_value
    assert weight is not None
    if not isinstance(group, PerGroup):
        return "INT4 needs one scale per group" if site.rule.weight_dtype == "int4" else ""
    if site.rule.weight_dtype != "int4":
        # TensorRT-RTX fails in code generation for FP8 and dequantises the whole matrix first for INT8.
        return f"one scale per group is for INT4, not {site.rule.weight_dtype}"
    if site.node.op_type not in ("MatMul", "Gemm"):
        return f"one scale per group is for MatMul and Gemm, not {site.node.op_type}"
    inputs = int(weight.shape[0 if site.transposed else 1])
    return "" if inputs % group.size == 0 else f"{inputs} inputs are not a multiple of the group of {group.size}"


def _check_activation(site: _Site) -> str:
    if site.rule.activation_dtype is None:
        return ""
    x, weight = site.activation, site.weight.const_value
    assert weight is not None
    if site.rule.activation_dtype != site.rule.weight_dtype:
        # The TensorRT-RTX compiler stops on products of two different stored types.
        return f"activations in {site.rule.activation_dtype} and weights in {site.rule.weight_dtype} do not multiply"
    if x.dtype != weight.dtype:
        return f"its input is {x.dtype}, its weight {weight.dtype}: one dtype is needed"
    if x.is_initializer():
        return "its input is a constant"
    return _check_scale(site, weight.dtype)


def _check_scale(site: _Site, dtype: ir.DataType) -> str:
    amax = site.scales.activation_amax
    if amax is None:
        return f"the calibration has no amax for it, and its activations are to be {site.rule.activation_dtype}"
    assert site.rule.activation_dtype is not None
    scale = float(in_dtype(activation_scale(amax, site.rule.activation_dtype), dtype))
    if not (isfinite(scale) and scale > 0):
        return f"the scale of its activations (amax {amax:g}) is {scale:g} in {dtype}"
    return ""


def _check_smoothing(site: _Site) -> str:
    factor = site.scales.smooth_factor
    if factor is None or site.rule.activation_dtype is None:
        return ""
    if site.node.op_type == "Conv":
        return "smoothing is for linear layers"
    weight = site.weight.const_value
    assert weight is not None
    inputs = int(weight.shape[0 if site.transposed else 1])
    rounded = in_dtype(factor, weight.dtype).astype(np.float32)
    if factor.shape != (inputs,):
        return f"its smooth factor has shape {list(factor.shape)}, its {inputs} inputs need [{inputs}]"
    if not (np.isfinite(rounded).all() and (rounded > 0).all()):
        return f"its smooth factor is not positive and finite in {weight.dtype}"
    return ""


def _check_shapes(site: _Site) -> str:
    if site.node.op_type != "Gather" and not _static(site.activation):
        return "the shape of its input is not static"
    if site.node.op_type == "Conv" and not _static(site.node.outputs[0]):
        return "the shape of its output is not static"
    return ""


_CHECKS: tuple[Callable[[_Site], str], ...] = (
    _check_weight,
    _check_node,
    _check_granularity,
    _check_activation,
    _check_smoothing,
    _check_shapes,
)


# ---------------------------------------------------------------------------------------------------- rewrite


class _Rewriter:
    """Edits the graph; remembers the pairs it made, so that equal ones are shared."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._pairs: dict[tuple[object, ...], ir.Value] = {}
        self._pairs_of: dict[str, int] = {}
        self._zero_points: dict[StoredDtype, ir.Value] = {}

    @property
    def pairs(self) -> int:
        """How many QuantizeLinear and DequantizeLinear pairs were made."""
        return len(self._pairs)

    def rewrite(self, site: _Site) -> int:
        """Rewrite one layer; returns the bytes of its stored weight and scale."""
        if site.rule.activation_dtype is not None:
            for one in site.each:
                one.node.replace_input_with(0, self._quantized_activation(one))
        factor = self._factor(site)
        source = site.weight.const_value
        assert source is not None
        wide = None if factor is None else factor.astype(np.float32)
        codes, scale_of_codes = site.scales.weight_codes, site.scales.weight_scale
        rounded = None if codes is None or scale_of_codes is None else calibrated_weight(codes, scale_of_codes)
        initializers = QuantizedInitializers(source, site.rule, wide, site.transposed, rounded)
        name = site.weight.name
        assert name is not None
        site.weight.const_value = initializers.values(name)
        site.weight.dtype = ONNX_TYPE[site.rule.weight_dtype]
        scale = self._initializer(initializers.scale(f"{name}_scale"))
        dequantized = self._insert(
            site.node, "DequantizeLinear", [site.weight, scale], f"{name}_dequantized", initializers.layout.attributes
        )
        dequantized.shape, dequantized.dtype = ir.Shape(source.shape), source.dtype
        for one in site.each:
            one.node.replace_input_with(_WEIGHT_INPUT[one.node.op_type], dequantized)
        return _nbytes(site.weight) + _nbytes(scale)

    def _factor(self, site: _Site) -> np.ndarray | None:
        """The smooth factor [in], rounded to the activation's dtype: the weight is multiplied by the rounded one."""
        if site.scales.smooth_factor is None or site.rule.activation_dtype is None:
            return None
        assert site.activation.dtype is not None
        return in_dtype(site.scales.smooth_factor, site.activation.dtype)

    def _quantized_activation(self, site: _Site) -> ir.Value:
        """DequantizeLinear(QuantizeLinear(x or x / factor)), made once for equal x, factor and scale."""
        x, dtype, amax = site.activation, site.rule.activation_dtype, site.scales.activation_amax
        assert x.dtype is not None
        assert dtype is not None
        assert amax is not None
        scale, factor = in_dtype(activation_scale(amax, dtype), x.dtype), self._factor(site)
        key = (x, dtype, scale.tobytes(), None if factor is None else factor.tobytes())
        if key not in self._pairs:
            self._pairs[key] = self._pair(site, scale, factor, dtype)
        return self._pairs[key]

    def _pair(self, site: _Site, scale: np.ndarray, factor: np.ndarray | None, dtype: StoredDtype) -> ir.Value:
        x, stem = site.activation, (site.weight.name or "").removesuffix(".weight")
        shape, base = x.shape, x.dtype
        if factor is not None:
            divisor = self._initializer(as_tensor(factor, f"{stem}.smooth_factor"))
            x = self._insert(site.node, "Div", [x, divisor], f"{stem}.smoothed")
            x.shape, x.dtype = shape, base
        step = self._initializer(as_tensor(scale, f"{stem}.input_scale"))
        # One for each window that the layer is computed in, after the first with a number.
        count = self._pairs_of.get(stem, 0)
        self._pairs_of[stem] = count + 1
        stem += f".{count}" if count else ""
        zero = self._zero_point(dtype)
        quantized = self._insert(site.node, "QuantizeLinear", [x, step, zero], f"{stem}.input_quantized")
        quantized.shape, quantized.dtype = shape, ONNX_TYPE[dtype]
        back = self._insert(site.node, "DequantizeLinear", [quantized, step, zero], f"{stem}.input_dequantized")
        back.shape, back.dtype = shape, base
        return back

    def _zero_point(self, dtype: StoredDtype) -> ir.Value:
        if dtype not in self._zero_points:
            zero = np.zeros((), ONNX_TYPE[dtype].numpy())
            self._zero_points[dtype] = self._initializer(as_tensor(zero, f"zero_point_{dtype}"))
        return self._zero_points[dtype]

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        known = self._graph.initializers.get(tensor.name or "")
        if known is not None:  # the same layer's, for another window
            return known
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value

    def _insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        name: str,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes or {}, name=f"{name}_node")
        node.outputs[0].name = name
        self._graph.insert_before(before, node)
        return node.outputs[0]


# ------------------------------------------------------------------------------------------- report and errors


def product_flops(node: ir.Node) -> int:
    """Multiplications and additions of a MatMul, Gemm or Conv, from its static shapes; 0 for other nodes."""
    if node.op_type not in _GEMMS:
        return 0
    left, right = (_static(value) for value in node.inputs[:2])
    assert left, node.name
    assert right, node.name
    if node.op_type == "Conv":
        output = _static(node.outputs[0])
        assert output, node.name
        return 2 * prod(output) * prod(right[1:])
    if node.op_type == "Gemm":
        return 2 * left[0] * prod(right)
    batch = max(prod(left[:-2]), prod(right[:-2]))
    return 2 * batch * left[-2] * left[-1] * right[-1]


def _static(value: ir.Value | None) -> tuple[int, ...]:
    """The shape of a value; empty if it is not known in full."""
    shape = value.shape if value is not None else None
    if shape is None or not all(isinstance(size, int) for size in shape):
        return ()
    return tuple(int(size) for size in shape)


def _kept(graph: ir.Graph, rewritten: set[ir.Node]) -> tuple[KeptProduct, ...]:
    kept = []
    for node in graph:
        if node.op_type in _GEMMS and node not in rewritten:
            weight = node.inputs[1]
            name = weight.name if weight is not None and weight.is_initializer() else ""
            kept.append(KeptProduct(node.name or "", node.op_type, name or "", product_flops(node)))
    return tuple(kept)


def _check_after(sites: list[_Site]) -> None:
    """Every ruled layer's node reads a dequantised stored weight, and its activation where the rule has one."""
    for site in (site for whole in sites for site in whole.each):
        producer = site.node.inputs[_WEIGHT_INPUT[site.node.op_type]].producer()
        assert producer is not None, site.layer
        assert producer.op_type == "DequantizeLinear", site.layer
        assert producer.inputs[0] is site.weight, site.layer
        assert site.weight.dtype == ONNX_TYPE[site.rule.weight_dtype], site.layer
        if site.rule.activation_dtype is not None:
            activation = site.activation.producer()
            assert activation is not None, site.layer
            assert activation.op_type == "DequantizeLinear", site.layer


def _refusal(layer: str, node: ir.Node | None, reason: str) -> BuildError:
    where = f" at node '{node.name}' ({node.op_type})" if node is not None else ""
    return BuildError(
        f"layer '{layer}' is under a rule of the recipe and cannot be quantised{where}",
        received=reason,
        expected=f"a weight that is read by one {_ops()}, and scales that fit it",
        action=f"add an exclusion with a reason for '{layer}' to the recipe, or another rule before this one",
    )


def _ops() -> str:
    return ", ".join(_WEIGHT_INPUT)


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _nbytes(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes
