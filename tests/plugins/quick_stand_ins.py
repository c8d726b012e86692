"""TensorRT's side of a quick plugin, where TensorRT cannot run.

`vendor_tensorrt()` loads the vendor's own Python module `tensorrt.plugin` over stand-ins for the classes of the library
that it uses; `drive` then calls a registered plugin in TensorRT's order. `declared` gives the same answer without the
vendor's module, from plain integers.
"""

import enum
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from sana_runtime.plugins import KernelFolder
from sana_runtime.quick_plugins import QuickOp, QuickPlugin

Shape = tuple[int, ...]
VENDOR_PACKAGE = "tensorrt_bindings"


@dataclass(frozen=True)
class Tensor:
    """A tensor by what a plugin sees of it. `dtype` as TensorRT names it."""

    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Launch:
    """What TensorRT would launch: `scalars` are int32 arguments between the inputs' pointers and the output's."""

    symbol: str
    code: bytes
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    scalars: tuple[int, ...]
    output: Tensor


# --- The library behind the vendor's module ---


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    FP8 = 6
    BF16 = 7
    INT4 = 9


class TensorFormat(enum.Enum):
    LINEAR = 0


class DimensionOperation(enum.Enum):
    SUM = 0
    PROD = 1
    MAX = 2
    MIN = 3
    SUB = 4
    FLOOR_DIV = 7
    CEIL_DIV = 8


class QuickPluginCreationRequest(enum.Enum):
    UNKNOWN = 0
    STRICT_AOT = 4
    STRICT_JIT = 3


PluginFieldType = enum.Enum("PluginFieldType", "INT8 INT16 INT32 INT64 FLOAT16 FLOAT32 FLOAT64 CHAR UNKNOWN")
PluginArgType = enum.Enum("PluginArgType", "INT")
PluginArgDataType = enum.Enum("PluginArgDataType", "INT8 INT16 INT32")
TensorRTPhase = enum.Enum("TensorRTPhase", "BUILD RUNTIME")


class IDimensionExpr:
    """An expression that knows its value already."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


_RESULTS: Mapping[DimensionOperation, Any] = {
    DimensionOperation.SUM: lambda a, b: a + b,
    DimensionOperation.SUB: lambda a, b: a - b,
    DimensionOperation.PROD: lambda a, b: a * b,
    DimensionOperation.MAX: max,
    DimensionOperation.MIN: min,
    DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
    DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}


class ExprBuilder:
    def constant(self, value: int) -> IDimensionExpr:
        return IDimensionExpr(value)

    def operation(self, operation: DimensionOperation, left: IDimensionExpr, right: IDimensionExpr) -> IDimensionExpr:
        return IDimensionExpr(_RESULTS[operation](left.value, right.value))


class PluginField:
    def __init__(self, name: str, data: Any, type: Any) -> None:
        self.name, self.data, self.type = name, data, type


class PluginTensorDesc:
    def __init__(self, dims: Shape = (), type: DataType = DataType.FLOAT) -> None:
        self.dims, self.type, self.format, self.scale = dims, type, TensorFormat.LINEAR, 1.0


class DynamicPluginTensorDesc:
    def __init__(self, desc: PluginTensorDesc) -> None:
        self.desc = desc
        self.min = self.opt = self.max = desc.dims


class DimsExprs(list[Any]):
    """Made from a length or from expressions."""

    def __init__(self, content: int | Sequence[IDimensionExpr]) -> None:
        super().__init__([None] * content if isinstance(content, int) else content)


class Dims(tuple[int, ...]):
    MAX_DIMS = 8


class Logger:
    WARNING = 2

    def log(self, severity: int, text: str) -> None:
        return None


class Registry:
    """Remembers creators by name."""

    def __init__(self) -> None:
        self.creators: dict[str, Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        return self.creators.setdefault(f"{namespace}::{creator.name}", creator) is creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[f"{namespace}::{name}"]


def _library() -> ModuleType:
    """A module `tensorrt` with what `tensorrt.plugin` uses."""
    library = ModuleType("tensorrt")
    registry = Registry()
    names = (
        *("IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickRuntime"),
        *("IPluginV3QuickAOTBuild", "IPluginCreatorV3Quick", "ITensor", "ISymExpr"),
    )
    content: dict[str, Any] = {
        **{name: type(name, (), {}) for name in names},
        "PluginFieldCollection": type("PluginFieldCollection", (list,), {}),
        "get_plugin_registry": lambda: registry,
        "float16": DataType.HALF,
        "float32": DataType.FLOAT,
        "int32": DataType.INT32,
        "nptype": np.dtype,
        "__version__": "stand-in",
        "__path__": [],
    }
    known = (
        *(DataType, TensorFormat, DimensionOperation, QuickPluginCreationRequest, PluginFieldType, PluginArgType),
        *(PluginArgDataType, TensorRTPhase, IDimensionExpr, PluginField, PluginTensorDesc, DynamicPluginTensorDesc),
        *(DimsExprs, Dims, Logger),
    )
    library.__dict__.update(content, **{kind.__name__: kind for kind in known})
    library.__dict__["IExprBuilder"] = ExprBuilder
    return library


@contextmanager
def vendor_tensorrt() -> Iterator[ModuleType]:
    """The stand-in library as module `tensorrt`, with the vendor's `tensorrt.plugin` loaded over it.

    Raises ImportError where the vendor's Python package is not installed; its shared library is not needed.
    """
    found = importlib.util.find_spec(VENDOR_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"{VENDOR_PACKAGE} is not installed")
    folder = f"{found.submodule_search_locations[0]}/plugin"
    before = {name: module for name, module in sys.modules.items() if _is_tensorrt(name)}
    library = _library()
    try:
        for name in before:
            del sys.modules[name]
        sys.modules["tensorrt"] = library
        spec = importlib.util.spec_from_file_location(
            "tensorrt.plugin", f"{folder}/__init__.py", submodule_search_locations=[folder]
        )
        assert spec is not None
        assert spec.loader is not None
        plugin = sys.modules["tensorrt.plugin"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(plugin)
        yield library
    finally:
        for name in [name for name in sys.modules if _is_tensorrt(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _is_tensorrt(name: str) -> bool:
    return name == "tensorrt" or name.startswith("tensorrt.")


def drive(library: ModuleType, op: QuickOp, inputs: Sequence[Tensor], attributes: Mapping[str, int]) -> Launch:
    """Make a registered plugin as the parser does and ask it everything the builder asks, in the builder's order."""
    fields = library.PluginFieldCollection(
        PluginField(name, np.array([value]), PluginFieldType["INT64"]) for name, value in attributes.items()
    )
    creator = library.get_plugin_registry().get_creator(op.name, "1", "sana")
    assert [field.name for field in creator.field_names] == list(attributes)
    plugin = creator.create_plugin(op.name, "sana", fields, TensorRTPhase["BUILD"], QuickPluginCreationRequest.UNKNOWN)
    types = [DataType[tensor.dtype] for tensor in inputs]
    (out_type,) = plugin.get_output_data_types(types, [len(tensor.shape) for tensor in inputs])
    builder = ExprBuilder()
    dims = [DimsExprs([IDimensionExpr(size) for size in tensor.shape]) for tensor in inputs]
    (out_dims,) = plugin.get_output_shapes(dims, [], builder)
    output = Tensor(tuple(size.value for size in out_dims), out_type.name)
    descs = [
        DynamicPluginTensorDesc(PluginTensorDesc(tensor.shape, DataType[tensor.dtype])) for tensor in (*inputs, output)
    ]
    combination = plugin.get_supported_format_combinations(descs, len(inputs))
    assert [desc.type for desc in combination] == [desc.desc.type for desc in descs]
    plugin.configure_plugin(descs[:-1], descs[-1:])
    plugin.set_tactic(0)
    params, setter = SimpleNamespace(), _Setter()
    plugin.get_launch_params(dims, descs, len(inputs), params, setter, builder)
    symbol, code = plugin.get_kernel([desc.desc for desc in descs[:-1]], [descs[-1].desc])
    sizes = {name: value.expr.value if hasattr(value, "expr") else value for name, value in vars(params).items()}
    assert all(scalar.dtype is PluginArgDataType["INT32"] for scalar in setter.scalars.values())
    assert len(setter.scalars) == setter.nbSymExprs
    return Launch(
        symbol,
        code,
        (sizes["grid_x"], sizes["grid_y"], sizes["grid_z"]),
        (sizes["block_x"], sizes["block_y"], sizes["block_z"]),
        sizes["shared_mem"],
        tuple(setter.scalars[position].expr.value for position in range(setter.nbSymExprs)),
        output,
    )


class _Setter:
    """Takes the scalar arguments."""

    nbSymExprs = 0

    def __init__(self) -> None:
        self.scalars: dict[int, Any] = {}

    def __setitem__(self, position: int, scalar: Any) -> None:
        self.scalars[position] = scalar


# --- Without the vendor's module ---


class _Integers:
    """`tensorrt.plugin` with plain integers for symbolic ones."""

    SymInt32 = staticmethod(int)
    max = staticmethod(max)
    min = staticmethod(min)

    @staticmethod
    def cdiv(first: int, second: int) -> int:
        return -(-first // second)

    @staticmethod
    def from_shape_expr(shape: Shape, dtype: DataType) -> Any:
        return SimpleNamespace(shape_expr=shape, dtype=dtype)

    @staticmethod
    def SymIntExprs(length: int) -> list[Any]:
        return [None] * length

    @staticmethod
    def KernelLaunchParams() -> SimpleNamespace:
        return SimpleNamespace(grid_x=1, grid_y=1, grid_z=1, block_x=1, block_y=1, block_z=1, shared_mem=0)


def declared(
    op: QuickOp, kernels: KernelFolder, capability: int, inputs: Sequence[Tensor], attributes: Mapping[str, int]
) -> Launch:
    """What a plugin declares for these inputs."""
    plugin = QuickPlugin(_Integers, SimpleNamespace(DataType=DataType), op, kernels, capability)
    tensors = [_Integers.from_shape_expr(tensor.shape, DataType[tensor.dtype]) for tensor in inputs]
    out = plugin.describe(*tensors, **attributes)
    symbol, code, params, scalars = plugin.implement(*tensors, *attributes.values(), (out,), 0)
    return Launch(
        symbol,
        code,
        (params.grid_x, params.grid_y, params.grid_z),
        (params.block_x, params.block_y, params.block_z),
        params.shared_mem,
        tuple(scalars),
        Tensor(out.shape_expr, out.dtype.name),
    )
