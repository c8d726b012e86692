"""The few classes of the tensorrt module that the plugin uses, for machines where TensorRT cannot run."""

import enum
from types import SimpleNamespace
from typing import Any

__version__ = "fake"


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    BF16 = 7


class TensorFormat(enum.Enum):
    LINEAR = 0
    CHW32 = 5


class PluginFieldType(enum.Enum):
    INT32 = 0
    FLOAT32 = 1


class DimensionOperation(enum.Enum):
    FLOOR_DIV = 0


class IPluginV3: ...


class IPluginV3OneCore: ...


class IPluginV3OneBuild: ...


class IPluginV3OneRuntime: ...


class IPluginCreatorV3One: ...


class DimsExprs(list[Any]): ...


class PluginField:
    def __init__(self, name: str, data: Any, type: PluginFieldType) -> None:
        self.name, self.data, self.type = name, data, type


class PluginFieldCollection(list[PluginField]): ...


class Registry:
    """Remembers creators; refuses a second one of a name, as TensorRT does."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        return self.creators.setdefault((namespace, creator.name), creator) is creator

    def deregister_creator(self, creator: Any) -> bool:
        self.creators = {key: known for key, known in self.creators.items() if known is not creator}
        return True


_registry = Registry()


def get_plugin_registry() -> Registry:
    return _registry


class ExprBuilder:
    """Evaluates dimension expressions at once."""

    def constant(self, value: int) -> int:
        return value

    def operation(self, operation: DimensionOperation, left: int, right: int) -> int:
        assert operation is DimensionOperation.FLOOR_DIV
        return left // right


def described(dtype: DataType, *dims: int, format: TensorFormat = TensorFormat.LINEAR) -> Any:
    """A PluginTensorDesc; also its own DynamicPluginTensorDesc (`desc`, `max`)."""
    desc = SimpleNamespace(type=dtype, format=format, dims=dims, max=dims)
    desc.desc = desc
    return desc
