"""Remove Identity nodes and casts to the type a value already has.

Before: y = Identity(x), or y = Cast(x) with x of the same dtype. After: consumers read x. A graph output keeps its
node, for the name is the contract.
"""

import onnx_ir as ir


def run(model: ir.Model) -> int:
    """Returns how many nodes were removed."""
    fired = 0
    outputs = set(model.graph.outputs)
    for node in list(model.graph):
        if node.outputs and node.outputs[0] not in outputs and _is_identity(node):
            source = node.inputs[0]
            assert source is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            model.graph.remove(node, safe=True)
            fired += 1
    return fired


def _is_identity(node: ir.Node) -> bool:
    if node.op_type == "Identity":
        return True
    source = node.inputs[0] if node.inputs else None
    return node.op_type == "Cast" and source is not None and source.dtype == node.attributes["to"].value
