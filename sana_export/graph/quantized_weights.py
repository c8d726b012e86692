"""Weights in 8 or 4 bits in a graph: quantised while the file is written, one tensor at a time.

A quantised weight is two initializers, its values and its scale, that come out of one look at the weight: whichever
is asked for first reads the weight and keeps the scale, which is small, for the other. A file writer that asks for
the values first reads each weight once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from sana_calibration.quantize import QuantizedWeight, quantize_weight
from sana_calibration.recipe import Granularity, LayerRule, PerChannel, PerGroup, PerTensor, StoredDtype

ONNX_TYPE: dict[StoredDtype, ir.DataType] = {
    "float8e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
}
_TORCH_TYPE = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
# Elements that are quantised together where rows do not depend on each other: the working copies are fp32.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class ScaleLayout:
    """How a stored weight and its scale fit together: the scale's shape and DequantizeLinear's attributes.

    Weight stored [in, out], as MatMul reads it: per tensor [] · per channel [out], axis 1 · per group
    [in / size, out], axis 0, block_size. Stored [out, in, ...]: [] · [out], axis 0 · [out, in / size], axis 1.
    """

    shape: tuple[int, ...]
    attributes: dict[str, int]


def scale_layout(shape: tuple[int, ...], granularity: Granularity, *, transposed: bool) -> ScaleLayout:
    """The scale of a weight of the stored `shape`; `transposed` says that it is [in, out]."""
    output_axis = int(transposed)
    match granularity:
        case PerTensor():
            return ScaleLayout((), {})
        case PerChannel():
            return ScaleLayout((shape[output_axis],), {"axis": output_axis})
        case PerGroup(size):
            axis = 1 - output_axis
            groups = [*shape]
            groups[axis] //= size
            return ScaleLayout(tuple(groups), {"axis": axis, "block_size": size})


@dataclass(eq=False)
class QuantizedInitializers:
    """The two initializers of one weight. `source` is the weight as the graph stores it, [in, out] if `transposed`.

    `smooth_factor` [in] fp32 multiplies the weight's columns. `rounded` is the weight where calibration chose how to
    round it. The scale has the dtype of `source`.
    """

    source: ir.TensorProtocol
    rule: LayerRule
    smooth_factor: np.ndarray | None
    transposed: bool
    rounded: QuantizedWeight | None = None
    _scale: np.ndarray | None = field(default=None, init=False)

    @property
    def layout(self) -> ScaleLayout:
        """Shape and attributes of the scale."""
        return scale_layout(_shape(self.source), self.rule.granularity, transposed=self.transposed)

    def values(self, name: str) -> ir.LazyTensor:
        """The weight in its stored type, in the shape of `source`."""
        dtype = ONNX_TYPE[self.rule.weight_dtype]
        shape = _shape(self.source)
        return _lazy(name, dtype, shape, lambda: _values_tensor(self._quantize()[0], dtype, shape))

    def scale(self, name: str) -> ir.LazyTensor:
        """The scale: stored value times scale is the weight."""
        assert self.source.dtype is not None
        return _lazy(name, self.source.dtype, self.layout.shape, lambda: ir.Tensor(self._get_scale()))

    def _get_scale(self) -> np.ndarray:
        if self._scale is None:
            self._quantize()
        assert self._scale is not None
        return self._scale

    def _quantize(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.source.dtype is not None
        scale_dtype = _TORCH_TYPE[self.source.dtype]
        if self.rounded is not None:
            self._scale = self._stored_scale(self.rounded.scale.to(scale_dtype))
            return self._stored_values(self.rounded.values), self._scale
        weight = _as_torch(self.source)
        if self.transposed:
            weight = weight.T  # [out, in], as rules and calibration have it
        parts = [
            quantize_weight(rows, self.rule, self.smooth_factor, scale_dtype)
            for rows in weight.split(_rows_at_once(weight, self.rule.granularity))
        ]
        values = torch.cat([part.values for part in parts]) if len(parts) > 1 else parts[0].values
        scale = torch.cat([part.scale for part in parts]) if len(parts) > 1 else parts[0].scale
        self._scale = self._stored_scale(scale.to(scale_dtype))
        return self._stored_values(values), self._scale

    def _stored_values(self, values: torch.Tensor) -> np.ndarray:
        """Values in the graph's orientation: float8_e4m3fn or int8, int4 as one int8 each."""
        stored = (values.T if self.transposed else values).contiguous()
        if self.rule.weight_dtype == "float8e4m3fn":
            return stored.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        return stored.numpy()

    def _stored_scale(self, scale: torch.Tensor) -> np.ndarray:
        if isinstance(self.rule.granularity, PerGroup) and self.transposed:
            scale = scale.T
        return _as_numpy(scale.reshape(self.layout.shape))


def as_tensor(array: np.ndarray, name: str) -> ir.Tensor:
    """A small array as an inline initializer of its own dtype."""
    return ir.Tensor(array, name=name)


def in_dtype(value: float | np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """Numbers rounded to a graph's floating-point dtype, infinite if too large; ml_dtypes for bfloat16."""
    with np.errstate(over="ignore"):
        return np.asarray(value, np.float32).astype(dtype.numpy())


def is_floating(dtype: ir.DataType | None) -> bool:
    """Whether weights of this dtype can be quantised."""
    return dtype in _TORCH_TYPE


def _lazy(
    name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], ir.TensorProtocol]
) -> ir.LazyTensor:
    return ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape), name=name)


def _values_tensor(values: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
    """Stored values as ONNX keeps them: two 4-bit values per byte, the first in the low half."""
    if dtype != ir.DataType.INT4:
        return ir.Tensor(values, dtype=dtype)
    flat = values.reshape(-1).view(np.uint8)
    pairs = np.pad(flat, (0, flat.size % 2)).reshape(-1, 2)
    return ir.PackedTensor((pairs[:, 0] & 0xF) | (pairs[:, 1] << 4), dtype, shape=shape)


def _rows_at_once(weight: torch.Tensor, granularity: Granularity) -> int:
    """Rows [out, ...] per chunk: all of them where one scale spans them."""
    if isinstance(granularity, PerTensor):
        return max(1, weight.shape[0])
    return max(1, _CHUNK // max(1, prod(weight.shape[1:])))


def _shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape)


def _as_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    array = tensor.numpy()
    if tensor.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()
