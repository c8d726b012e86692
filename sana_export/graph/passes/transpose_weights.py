"""Store the weights of linears as MatMul reads them.

Before: MatMul(x, Transpose(W)) with W an initializer [out, in]. After: MatMul(x, Wt) with Wt [in, out] stored
transposed. Dequantisation must feed a MatMul directly for TensorRT to fuse it, and no engine should transpose at
run time.
"""

import onnx_ir as ir

from sana_export.graph.weights import transposed


def run(model: ir.Model) -> int:
    """Returns how many Transpose nodes were removed. A weight with another consumer keeps its node."""
    fired = 0
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or len(weight.uses()) != 1:
            continue
        output = node.outputs[0]
        consumers = [(use.node.op_type, use.idx) for use in output.uses()]
        if consumers != [("MatMul", 1)] or weight.const_value is None:
            continue
        weight.const_value = transposed(weight.const_value)
        weight.shape = weight.const_value.shape
        ir.convenience.replace_all_uses_with(output, weight)
        model.graph.remove(node, safe=True)
        fired += 1
    return fired
