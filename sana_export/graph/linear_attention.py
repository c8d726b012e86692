"""`sana::ReluLinearAttention`: the ONNX form of the linear-attention op.

A node that names the TensorRT plugin, and a model-local function of the same name that spells it out in plain
operators (sum form, fp32 inside). ONNX Runtime, and a TensorRT without the plugin, inline the function; a TensorRT
with the plugin registered takes the plugin. A file holds one of two bodies: with qk-norm or without.

The name is not plain `LinearAttention`: the TensorRT-RTX 1.7 parser has a built-in importer of that name, takes it
whatever the domain, and refuses the node.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Opset

import sana_kernels.linear_attention  # noqa: F401  (registers torch.ops.sana.linear_attention)
from sana_export.graph.opset import OPSET

DOMAIN = "sana"
OP_TYPE = "ReluLinearAttention"
PLUGIN_ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": DOMAIN}

_ATTENTION_BODY = """
    tail = Constant <value_ints: ints = [0, 0, -1]> ()
    d = Constant <value_int: int = @head_dim> ()
    axis = Constant <value_ints: ints = [0]> ()
    d_vector = Unsqueeze (d, axis)
    heads_shape = Concat <axis = 0> (tail, d_vector)
    q_relu = Relu (q)
    k_relu = Relu (k)
    q_wide = Cast <to = 1> (q_relu)
    k_wide = Cast <to = 1> (k_relu)
    v_wide = Cast <to = 1> (v)
    q_split = Reshape (q_wide, heads_shape)
    k_split = Reshape (k_wide, heads_shape)
    v_split = Reshape (v_wide, heads_shape)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q_split)
    k_columns = Transpose <perm = [0, 2, 3, 1]> (k_split)
    v_heads = Transpose <perm = [0, 2, 1, 3]> (v_split)
    state = MatMul (k_columns, v_heads)
    last = Constant <value_ints: ints = [-1]> ()
    k_sum = ReduceSum <keepdims = 1> (k_columns, last)
    mass = MatMul (q_heads, k_sum)
    tiny = Constant <value_float: float = @eps> ()
    denominator = Add (mass, tiny)
    numerator = MatMul (q_heads, state)
    ratio = Div (numerator, denominator)
    merged = Transpose <perm = [0, 2, 1, 3]> (ratio)
    wide_out = Reshape (merged, tail)
    out = CastLike (wide_out, qkv)
"""

_RMS_NORM = """
    {x}_raw_wide = Cast <to = 1> ({x}_raw)
    {x}_square = Mul ({x}_raw_wide, {x}_raw_wide)
    {x}_mean = ReduceMean <keepdims = 1> ({x}_square, channel_axis)
    {x}_shifted = Add ({x}_mean, norm_tiny)
    {x}_root = Sqrt ({x}_shifted)
    {x}_unit = Div ({x}_raw_wide, {x}_root)
    {x}_narrow = CastLike ({x}_unit, qkv)
    {x} = Mul ({x}_narrow, norm_{x}_weight)
"""

_PLAIN = f"""<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
{OP_TYPE} <head_dim, eps, plugin_version, plugin_namespace> (qkv) => (out) {{
    q, k, v = Split <axis = -1, num_outputs = 3> (qkv)
{_ATTENTION_BODY}}}"""

_QK_NORM = f"""<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
{OP_TYPE} <head_dim, eps, norm_eps, plugin_version, plugin_namespace>
    (qkv, norm_q_weight, norm_k_weight) => (out) {{
    q_raw, k_raw, v = Split <axis = -1, num_outputs = 3> (qkv)
    channel_axis = Constant <value_ints: ints = [-1]> ()
    norm_tiny = Constant <value_float: float = @norm_eps> ()
{_RMS_NORM.format(x="q")}{_RMS_NORM.format(x="k")}{_ATTENTION_BODY}}}"""


@cache
def _register_schema() -> Opset:
    """Tell onnx of the operator, so that onnxscript can emit it."""
    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    onnx.defs.register_schema(
        schema(
            OP_TYPE,
            DOMAIN,
            1,
            inputs=[
                schema.FormalParameter("qkv", "T"),
                schema.FormalParameter("norm_q_weight", "T", param_option=optional),
                schema.FormalParameter("norm_k_weight", "T", param_option=optional),
            ],
            outputs=[schema.FormalParameter("out", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
            attributes=[
                schema.Attribute("head_dim", schema.AttrType.INT),
                schema.Attribute("eps", schema.AttrType.FLOAT),
                schema.Attribute("norm_eps", schema.AttrType.FLOAT, required=False),
                *(schema.Attribute(name, schema.AttrType.STRING) for name in PLUGIN_ATTRIBUTES),
            ],
        )
    )
    return Opset(DOMAIN, 1)


def translation_table() -> dict[Any, Callable[..., Any]]:
    """What the PyTorch exporter needs to write `torch.ops.sana.linear_attention` as one node."""
    sana = _register_schema()

    def translate(qkv: Any, norm_q: Any, norm_k: Any, head_dim: int, eps: float, norm_eps: float) -> Any:
        attributes: dict[str, Any] = {"head_dim": head_dim, "eps": eps, **PLUGIN_ATTRIBUTES}
        if norm_q is None:
            return sana.ReluLinearAttention(qkv, **attributes)
        return sana.ReluLinearAttention(qkv, norm_q, norm_k, norm_eps=norm_eps, **attributes)

    return {torch.ops.sana.linear_attention.default: translate}


def add_function(model: ir.Model) -> int:
    """Add the model-local function if the graph has linear-attention nodes; return how many it has."""
    nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
    if nodes:
        forms = {len(node.inputs) for node in nodes}
        assert len(forms) == 1, f"one file holds one form of {OP_TYPE}, found inputs {forms}"
        text = _PLAIN if forms == {1} else _QK_NORM
        function = ir.from_proto(onnx.parser.parse_function(text))
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1
    return len(nodes)
