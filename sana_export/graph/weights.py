"""Weights in a graph: read from the checkpoint only while the file is written, one tensor at a time."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from sana_export.weights.lazy import LazyTensor


def lazy_initializer(name: str, tensor: LazyTensor, dtype: torch.dtype) -> ir.LazyTensor:
    """A checkpoint tensor as an initializer of the given dtype; `tensor.load` runs when bytes are asked for."""
    return ir.LazyTensor(
        lambda: TorchTensor(tensor.load().to(dtype).contiguous(), name),
        dtype=from_torch_dtype(dtype),
        shape=ir.Shape(tensor.shape),
        name=name,
    )


def transposed(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """The transpose of a matrix, as lazy as the matrix."""

    return ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype, name=tensor.name),
        dtype=tensor.dtype,
        shape=ir.Shape(tuple(tensor.shape)[::-1]),
        name=tensor.name,
    )


def bind_weights(
    model: ir.Model, parameters: Mapping[str, torch.Tensor], weights: Mapping[str, LazyTensor], prefix: str
) -> None:
    """Give every parameter's initializer its checkpoint tensor, in the parameter's dtype.

    `parameters` are the exported module's (empty) parameters; `prefix` + reference name is the parameter's name.
    """
    for name, initializer in model.graph.initializers.items():
        if name in parameters:
            source = weights[name.removeprefix(prefix)]
            assert source.shape == tuple(parameters[name].shape), (name, source.shape)
            initializer.const_value = lazy_initializer(name, source, parameters[name].dtype)
