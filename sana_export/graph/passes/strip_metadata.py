"""Remove what the tracer notes about its own machine.

Before: values and nodes carry stack traces with file paths of the exporting machine. After: names, types, shapes
and attributes only, so that a graph depends on its inputs alone.
"""

import onnx_ir as ir


def run(model: ir.Model) -> int:
    """Returns how many nodes carried notes."""
    fired = 0
    for node in model.graph:
        fired += bool(node.metadata_props or node.doc_string)
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
    for owner in (model, model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        owner.metadata_props.clear()
        owner.doc_string = None
    return fired
