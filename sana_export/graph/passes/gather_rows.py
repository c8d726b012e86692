"""Read rows of a stored table before they are dequantised, for ONNX Runtime.

Before: Gather(DequantizeLinear(Q, scale), i), Q an INT8 initializer with one scale per row. After:
Mul(Cast(Gather(Q, i)), Unsqueeze(Gather(scale, i))), the same numbers to the bit: a stored value is exact in every
floating-point type, and their product is rounded once either way.

ONNX Runtime dequantises all of Q at every run: for Gemma-2 that is 2.2 GiB of fp32 for 300 rows. TensorRT-RTX needs the
form before: it refuses a Gather of an 8-bit constant, and dequantises inside the Gather by itself.
"""

import numpy as np
import onnx_ir as ir

_AXIS = "rows_axis"


def run(model: ir.Model) -> int:
    """Returns how many tables are read row by row now. One of another type or granularity is left alone."""
    graph, fired = model.graph, 0
    for gather in list(graph):
        dequantize = _table(gather)
        if dequantize is None:
            continue
        stored, scale = dequantize.inputs[:2]
        index, out = gather.inputs[1], gather.outputs[0]
        assert stored is not None
        assert scale is not None
        assert out.name is not None
        rows = ir.node("Gather", [stored, index], name=f"{out.name}_stored_node")
        wide = ir.node("Cast", [rows.outputs[0]], {"to": scale.dtype}, name=f"{out.name}_wide_node")
        steps = ir.node("Gather", [scale, index], name=f"{out.name}_steps_node")
        columns = ir.node("Unsqueeze", [steps.outputs[0], _last_axis(graph)], name=f"{out.name}_columns_node")
        product = ir.node("Mul", [wide.outputs[0], columns.outputs[0]], name=gather.name)
        for node, what in ((rows, "stored"), (wide, "wide"), (steps, "steps"), (columns, "columns")):
            node.outputs[0].name = f"{out.name}_{what}"
        graph.insert_before(gather, (rows, wide, steps, columns, product))
        ir.convenience.replace_all_uses_with(out, product.outputs[0], replace_graph_outputs=True)
        product.outputs[0].name, product.outputs[0].shape, product.outputs[0].dtype = out.name, out.shape, scale.dtype
        graph.remove(gather, safe=True)
        graph.remove(dequantize, safe=True)
        fired += 1
    return fired


def _table(gather: ir.Node) -> ir.Node | None:
    """The DequantizeLinear whose rows a Gather reads, if it has one INT8 initializer and one scale per row."""
    table = gather.inputs[0] if gather.op_type == "Gather" else None
    dequantize = table.producer() if table is not None else None
    if table is None or dequantize is None or dequantize.op_type != "DequantizeLinear" or not _only_use(table):
        return None
    stored, scale = dequantize.inputs[:2]
    if stored is None or scale is None or not stored.is_initializer() or stored.dtype != ir.DataType.INT8:
        return None
    by_row = len(scale.shape or ()) == 1 and _integer(dequantize, "axis", 1) == 0 and len(dequantize.inputs) == 2
    return dequantize if by_row and _integer(gather, "axis", 0) == 0 else None


def _only_use(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _last_axis(graph: ir.Graph) -> ir.Value:
    if _AXIS not in graph.initializers:
        tensor = ir.Tensor(np.array([-1]), name=_AXIS)
        graph.register_initializer(
            ir.Value(name=_AXIS, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
        )
    return graph.initializers[_AXIS]


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
