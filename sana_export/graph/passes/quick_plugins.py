"""Spell linear attention as the chain of quick plugins that the full TensorRT takes (`sana_runtime.quick_plugins`).

Before: out = ReluLinearAttention(qkv) or (qkv, norm_q_weight, norm_k_weight), with a model-local function of that
name. After: parts = ReluLinearAttentionState(qkv), out = ReluLinearAttentionApply(qkv, parts), or the three plugins
with qk-norm; no function: what the parser does not know as a plugin it must refuse.
"""

import onnx_ir as ir

from sana_export.graph.linear_attention import DOMAIN, OP_TYPE, PLUGIN_ATTRIBUTES
from sana_runtime.plugins import Role
from sana_runtime.quick_plugins import float_bits, quick_ops

# What each plugin makes, by the name that the next one reads it under.
_OUTPUTS: dict[Role, str] = {"key_rms": "key_scale", "state": "parts", "apply": "out"}


def run(model: ir.Model) -> int:
    """Returns how many plugin nodes the graph has now."""
    nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
    made = sum(_replace(model.graph, node) for node in nodes)
    for identifier in [key for key in model.functions if key[:2] == (DOMAIN, OP_TYPE)]:
        del model.functions[identifier]
    return made


def _replace(graph: ir.Graph, node: ir.Node) -> int:
    named = zip(("qkv", "norm_q_weight", "norm_k_weight"), node.inputs, strict=False)
    values: dict[str, ir.Value] = {name: value for name, value in named if value is not None}
    attributes = {"head_dim": node.attributes["head_dim"].as_int(), "eps_bits": _bits(node, "eps")}
    qk_norm = "norm_k_weight" in values
    if qk_norm:
        attributes["norm_eps_bits"] = _bits(node, "norm_eps")
    out = node.outputs[0]
    ops = quick_ops(qk_norm)
    for role, op in ops.items():
        plugin = ir.node(
            op.name,
            [values[name] for name in op.inputs],
            {**{name: attributes[name] for name in op.attributes}, **PLUGIN_ATTRIBUTES},
            domain=DOMAIN,
            name=f"{node.name}_{role}",
        )
        values[_OUTPUTS[role]] = plugin.outputs[0]
        plugin.outputs[0].name = f"{out.name}_{_OUTPUTS[role]}"
        graph.insert_before(node, plugin)
    made = values["out"]
    made.shape, made.dtype = out.shape, out.dtype
    ir.convenience.replace_all_uses_with(out, made, replace_graph_outputs=True)
    made.name = out.name
    graph.remove(node, safe=True)
    return len(ops)


def _bits(node: ir.Node, name: str) -> int:
    return float_bits(node.attributes[name].as_float())
