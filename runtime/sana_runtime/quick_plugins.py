"""The linear-attention op as quick-deployable plugins of the full TensorRT, ahead-of-time form.

    register_quick_plugins(tensorrt, folder, capability)    # before parsing a graph with QUICK_OPS in it

TensorRT copies the PTX into the plan and launches it itself: the device then needs no plugin, no Python and no files.
In return a quick plugin is one kernel launch without scratch, so the op is a chain of plugins, and what the plugin
class keeps in its workspace are ordinary tensors between them (`QUICK_OPS`):

    State: qkv [B, N, 3C] -> parts [B, heads, splits, D + 1, D] fp32        Apply: qkv, parts -> out [B, N, C]

and with qk-norm KeyRms: qkv -> key_scale [B, N] fp32 in front. Kernels, tilings and grids are those of the class
(`sana_runtime.plugins`); only the order of the arguments differs: inputs, int32 scalars, outputs. Attributes are
integers: a float travels as its fp32 bits. TensorRT-RTX does not take quick plugins.

This has not been run in a TensorRT: no machine of the project had the full one. It is exercised against the vendor's
own Python module over stand-ins for the library, and its kernels run on a GPU with the launches it declares.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sana_runtime.errors import TargetError
from sana_runtime.plugins import PLUGIN_NAME, PLUGIN_NAMESPACE, KernelEntry, KernelFolder, Role

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
_WARP = 32


@dataclass(frozen=True)
class QuickOp:
    """One plugin: its ONNX operator, and its inputs and attributes by name, in order. One output."""

    name: str
    role: Role
    qk_norm: bool
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]

    @property
    def plugin_id(self) -> str:
        """As TensorRT names it."""
        return f"{PLUGIN_NAMESPACE}::{self.name}"


QUICK_OPS = (
    QuickOp(f"{PLUGIN_NAME}KeyRms", "key_rms", True, ("qkv",), ("head_dim", "norm_eps_bits")),
    QuickOp(f"{PLUGIN_NAME}State", "state", False, ("qkv",), ("head_dim",)),
    QuickOp(f"{PLUGIN_NAME}NormedState", "state", True, ("qkv", "key_scale", "norm_k_weight"), ("head_dim",)),
    QuickOp(f"{PLUGIN_NAME}Apply", "apply", False, ("qkv", "parts"), ("head_dim", "eps_bits")),
    QuickOp(f"{PLUGIN_NAME}NormedApply", "apply", True, ("qkv", "parts", "norm_q_weight"), ("head_dim", "eps_bits")),
)


def quick_ops(qk_norm: bool) -> dict[Role, QuickOp]:
    """The chain that one linear-attention node becomes, in order."""
    return {op.role: op for op in QUICK_OPS if op.qk_norm == qk_norm}


def float_bits(value: float) -> int:
    """The bits of a number as fp32, as a signed 32-bit integer."""
    return int(np.float32(value).view(np.int32))


@dataclass(frozen=True)
class QuickLaunch:
    """One kernel launch, in TensorRT's symbolic integers. `scalars`: the kernel's int32 arguments in order."""

    grid: tuple[Any, Any]
    scalars: tuple[Any, ...]


@dataclass(frozen=True)
class QuickPlugin:
    """What TensorRT asks of one plugin. `trtp`: the module `tensorrt.plugin`. `capability`: 89 for sm_89."""

    trtp: Any
    trt: Any
    op: QuickOp
    kernels: KernelFolder
    capability: int

    def describe(self, *tensors: Any, **attributes: int) -> Any:
        """The output's descriptor from the inputs'."""
        qkv = tensors[0]
        shapes = self._shapes(qkv, attributes["head_dim"])
        batch, tokens = qkv.shape_expr[0], qkv.shape_expr[1]
        wide = self.trt.DataType.FLOAT
        if self.op.role == "key_rms":
            return self.trtp.from_shape_expr((batch, tokens), wide)
        if self.op.role == "apply":
            return self.trtp.from_shape_expr((batch, tokens, shapes.channels), qkv.dtype)
        splits, _ = shapes.split(self._entry(qkv, attributes))
        d = attributes["head_dim"]
        return self.trtp.from_shape_expr((batch, shapes.channels // d, splits, d + 1, d), wide)

    def implement(self, *arguments: Any) -> tuple[str, bytes, Any, Any]:
        """(kernel name, PTX, launch parameters, scalar arguments); called with inputs, attributes, outputs, tactic."""
        count = len(self.op.inputs)
        attributes = dict(zip(self.op.attributes, arguments[count:-2], strict=True))
        entry = self._entry(arguments[0], attributes)
        launch = self.launch(entry, arguments[:count], attributes)
        params = self.trtp.KernelLaunchParams()
        params.grid_x, params.grid_y = launch.grid
        params.block_x, params.shared_mem = entry.num_warps * _WARP, entry.shared_bytes
        scalars = self.trtp.SymIntExprs(len(launch.scalars))
        for position, value in enumerate(launch.scalars):
            scalars[position] = self.trtp.SymInt32(value)
        return entry.symbol, self.kernels.code(entry), params, scalars

    def launch(self, entry: KernelEntry, inputs: Sequence[Any], attributes: Mapping[str, int]) -> QuickLaunch:
        """Grid and scalars of the kernel, as the class form has them for the same problem."""
        shapes = self._shapes(inputs[0], attributes["head_dim"])
        values = {"tokens": shapes.tokens, "channels": shapes.channels, **attributes}
        if self.op.role == "key_rms":
            values["rows"] = shapes.batch * shapes.tokens
            grid = (self.trtp.cdiv(values["rows"], entry.block_rows), 1)
        else:
            blocks, values["rows"] = shapes.split(entry)
            grid = (shapes.sequences, blocks)
        if self.op.role == "apply":
            values["splits"] = inputs[1].shape_expr[2]
        scalars = tuple(values[argument.name] for argument in entry.arguments if argument.kind == "int32")
        return QuickLaunch(grid, scalars)

    def _shapes(self, qkv: Any, head_dim: int) -> "_Shapes":
        batch, tokens, packed = (qkv.shape_expr[axis] for axis in range(3))
        return _Shapes(self.trtp, batch, tokens, packed // 3, head_dim)

    def _entry(self, qkv: Any, attributes: Mapping[str, int]) -> KernelEntry:
        dtype = _DTYPES.get(qkv.dtype.name, qkv.dtype.name)
        head_dim = attributes["head_dim"]
        return self.kernels.choose(self.op.role, dtype, self.op.qk_norm, head_dim, self.capability)


@dataclass(frozen=True)
class _Shapes:
    """The op's sizes as symbolic integers."""

    trtp: Any
    batch: Any
    tokens: Any
    channels: Any
    head_dim: int

    @property
    def sequences(self) -> Any:
        return self.batch * self.channels // self.head_dim

    def split(self, entry: KernelEntry) -> tuple[Any, Any]:
        """`sana_runtime.plugins.split_tokens` in symbolic integers."""
        cdiv, block = self.trtp.cdiv, entry.block_rows
        wanted = self.trtp.max(1, self.trtp.min(cdiv(entry.programs, self.sequences), cdiv(self.tokens, block)))
        rows = cdiv(self.tokens, wanted * block) * block
        return cdiv(self.tokens, rows), rows


def register_quick_plugins(trt: Any, folder: Path, capability: int) -> KernelFolder:
    """Make the plugins known to `trt` (an imported tensorrt module), with the kernels of `folder` for one GPU.

    `capability`: 89 is sm_89; a plan is bound to it. Raises `BundleError` for kernels that are missing or damaged,
    `TargetError` for a TensorRT without ahead-of-time quick plugins and for plugins that are registered already:
    TensorRT cannot forget them.
    """
    kernels = KernelFolder.open(folder, "quick")
    trtp = _plugin_module(trt)
    for op in QUICK_OPS:
        plugin = QuickPlugin(trtp, trt, op, kernels, capability)
        try:
            trtp.register(op.plugin_id)(_callback(kernels, plugin.describe, _description(trtp, op)))
            trtp.aot_impl(op.plugin_id)(_callback(kernels, plugin.implement, _implementation(trtp, op)))
        except (ValueError, RuntimeError) as error:
            raise TargetError(
                f"TensorRT refuses the quick plugin {op.plugin_id}",
                received=str(error),
                expected="a process that has not registered it",
                action="build in a fresh process, or with --plugin-form class",
            ) from error
    return kernels


def _plugin_module(trt: Any) -> Any:
    try:
        trtp = importlib.import_module(f"{trt.__name__}.plugin")
    except ImportError as error:
        raise _no_quick_plugins(trt, str(error)) from error
    if not hasattr(trtp, "aot_impl") or not hasattr(trtp, "KernelLaunchParams"):
        raise _no_quick_plugins(trt, "tensorrt.plugin without aot_impl")
    return trtp


def _no_quick_plugins(trt: Any, received: str) -> TargetError:
    return TargetError(
        "this TensorRT has no ahead-of-time quick plugins",
        received=f"{trt.__name__} {getattr(trt, '__version__', '')}: {received}",
        expected="TensorRT 10.9 or later, with its Python module tensorrt.plugin",
        action="install a later TensorRT, or build with --plugin-form class",
    )


def _description(trtp: Any, op: QuickOp) -> inspect.Signature:
    """(inputs, attributes) -> output, as `register` checks it."""
    return inspect.Signature([*_tensors(trtp, op), *_attributes(op)], return_annotation=trtp.TensorDesc)


def _implementation(trtp: Any, op: QuickOp) -> inspect.Signature:
    """(inputs, attributes, outputs, tactic) -> (name, PTX, launch, scalars), as `aot_impl` checks it."""
    rest = [_parameter("outputs", tuple[trtp.TensorDesc]), _parameter("tactic", int)]
    result = tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymExprs]
    return inspect.Signature([*_tensors(trtp, op), *_attributes(op), *rest], return_annotation=result)


def _tensors(trtp: Any, op: QuickOp) -> list[inspect.Parameter]:
    return [_parameter(name, trtp.TensorDesc) for name in op.inputs]


def _attributes(op: QuickOp) -> list[inspect.Parameter]:
    return [_parameter(name, int) for name in op.attributes]


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _callback(kernels: KernelFolder, method: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """A function that TensorRT sees with this signature. What it raises is kept: TensorRT logs it and goes on."""

    def call(*arguments: Any, **attributes: Any) -> Any:
        try:
            return method(*arguments, **attributes)
        except Exception as error:
            kernels.problem = kernels.problem or error
            raise

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call
