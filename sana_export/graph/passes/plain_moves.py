"""Write two operators that only move bf16 numbers as reshapes and transposes, for ONNX Runtime's CUDA provider.

Before: Resize(x) that repeats every pixel, or DepthToSpace(x) of mode CRD (pixel shuffle), x bf16. After:
Reshape(Expand(Reshape(x))), or Reshape(Transpose(Reshape(x))): the same numbers.

The provider has these two in fp32 and fp16 only (onnxruntime-gpu 1.31), and a session with a node that no provider
takes does not open.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

_RESIZE = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def run(model: ir.Model) -> int:
    """Returns how many nodes were rewritten. One of another dtype, mode or of unknown shapes is left alone."""
    graph, fired = model.graph, 0
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if source is None or source.dtype != ir.DataType.BFLOAT16 or node.op_type not in ("Resize", "DepthToSpace"):
            continue
        shapes = [_static(source), _static(node.outputs[0])]
        moves = _repeats(node, *shapes) if node.op_type == "Resize" else _shuffle(node, *shapes)
        if moves:
            _replace(graph, node, moves)
            fired += 1
    return fired


_Move = tuple[str, Sequence[int]]


def _repeats(node: ir.Node, before: list[int], after: list[int]) -> list[_Move]:
    """x [B, C, H, W] -> [B, C, s H, s W], every pixel s times."""
    asked = {name: _text(node, name) for name in _RESIZE}
    if len(before) != 4 or len(after) != 4 or asked != _RESIZE or before[:2] != after[:2]:
        return []
    batch, channels, height, width = before
    rows, columns = after[2] // height, after[3] // width
    if [height * rows, width * columns] != after[2:]:
        return []
    wide = (batch, channels, height, rows, width, columns)
    return [("Reshape", (batch, channels, height, 1, width, 1)), ("Expand", wide), ("Reshape", after)]


def _shuffle(node: ir.Node, before: list[int], after: list[int]) -> list[_Move]:
    """x [B, C s s, H, W] -> [B, C, s H, s W]."""
    if len(before) != 4 or len(after) != 4 or _text(node, "mode") != "CRD":
        return []
    size = node.attributes["blocksize"].as_int()
    batch, _, height, width = before
    split = (batch, after[1], size, size, height, width)
    return [("Reshape", split), ("Transpose", (0, 1, 4, 2, 5, 3)), ("Reshape", after)]


def _replace(graph: ir.Graph, node: ir.Node, moves: Sequence[_Move]) -> None:
    out = node.outputs[0]
    assert out.name is not None
    value, made = node.inputs[0], []
    for index, (op_type, numbers) in enumerate(moves):
        last = index == len(moves) - 1
        name = out.name if last else f"{out.name}_move_{index}"
        if op_type == "Transpose":
            step = ir.node(op_type, [value], {"perm": [*numbers]}, name=f"{name}_node")
        else:
            step = ir.node(op_type, [value, _constant(graph, f"{name}_shape", numbers)], name=f"{name}_node")
        value = step.outputs[0]
        value.name = f"{out.name}_moved" if last else name
        made.append(step)
    assert value is not None
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(out, value, replace_graph_outputs=True)
    sizes = [given for given in node.inputs[1:] if given is not None and given.is_initializer()]
    graph.remove(node, safe=True)
    value.name, value.shape, value.dtype = out.name, out.shape, out.dtype
    for given in sizes:
        if not given.uses() and given.name in graph.initializers:
            del graph.initializers[given.name]


def _constant(graph: ir.Graph, name: str, numbers: Sequence[int]) -> ir.Value:
    tensor = ir.Tensor(np.array(numbers, np.int64), name=name)
    shape = ir.Shape([len(numbers)])
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
    graph.register_initializer(value)
    return value


def _static(value: ir.Value) -> list[int]:
    """Its shape; empty where a size is not a number."""
    sizes = [*value.shape] if value.shape is not None else []
    return [int(size) for size in sizes] if all(isinstance(size, int) for size in sizes) else []


def _text(node: ir.Node, name: str) -> str:
    attribute = node.attributes.get(name)
    return "" if attribute is None else attribute.as_string()
