"""The TensorRT plugin of the linear-attention op: `ReluLinearAttention`, version "1", namespace "sana".

    kernels = register_plugins(tensorrt, folder)    # before parsing an ONNX file or loading a plan that uses it
    kernels.problem                                 # what a callback raised: TensorRT logs it and goes on

The plugin is a class-based IPluginV3 and launches kernels that were compiled ahead of time: cubins in `folder`,
listed in `kernels.json` with their digests, argument lists and tilings. The builder and the device use this same
class; the device needs neither torch nor triton, only numpy, cuda-core and the files. `sana_plugins` writes them.

Kernels of one call, queued on TensorRT's stream: with qk-norm `key_rms` (the reciprocal RMS of every row of k),
then `state` (per head and part of the tokens, S = sum k v^T and z = sum k), then `apply` (q S / (q . z + eps)).
Their scratch is the plugin's workspace: parts [B, heads, splits, D + 1, D] fp32, then key_scale [B, N] fp32.
"""

import hashlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from sana_runtime.errors import BundleError, TargetError

KERNEL_INDEX = "kernels.json"
INDEX_VERSION = 1
PLUGIN_NAME = "ReluLinearAttention"
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = "sana"

Role = Literal["key_rms", "state", "apply"]
PluginForm = Literal["class", "quick"]
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
_NO_VALUE = np.empty(0)
_ALIGNMENT = 256
_WARP = 32
_DEFAULT_EPS = 1e-15
_DEFAULT_NORM_EPS = 1e-5


# --- The compiled kernels ---


class KernelArgument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kernel parameter. A pointer is a device address; scalars are passed by value."""

    name: str
    kind: Literal["pointer", "int32", "float32"]


class KernelEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One compiled kernel: a cubin, or PTX for the quick form of the plugin.

    `capability`: 89 is sm_89, and the code runs on nothing else. `hidden_pointers`: null pointers the compiler
    expects after `arguments`. `block_rows`, `programs`: how tokens are split, see `split_tokens`. `shared_bytes`:
    dynamic shared memory per block.
    """

    role: Role
    capability: int
    dtype: str
    qk_norm: bool
    head_dim: int
    file: str
    size: int
    sha256: str
    symbol: str
    arguments: tuple[KernelArgument, ...]
    hidden_pointers: int
    shared_bytes: int
    num_warps: int
    block_rows: int
    programs: int


class KernelIndex(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `kernels.json`. `compiler`: name and version of what made the kernels. `form`: which plugin they
    are for, this module's class or that of `sana_runtime.quick_plugins`, whose kernels are PTX.
    """

    schema_version: int
    compiler: str
    kernels: tuple[KernelEntry, ...]
    form: PluginForm = "class"


def split_tokens(tokens: int, sequences: int, block_rows: int, programs: int) -> tuple[int, int]:
    """(number of parts, tokens per part) for `sequences` = batch * heads independent sequences.

    About `programs` parts in all, each a multiple of `block_rows` tokens. The kernels' own package has the same
    rule.
    """
    wanted = max(1, min(-(-programs // sequences), -(-tokens // block_rows)))
    rows = -(-tokens // (wanted * block_rows)) * block_rows
    return -(-tokens // rows), rows


class KernelFolder:
    """The compiled kernels in a folder. Files are read, and their digests checked, on first use.

    `problem`: the first exception a plugin raised in one of TensorRT's callbacks. TensorRT only logs it, and may
    finish a build whose plan cannot run: whoever called TensorRT must look here.
    """

    def __init__(self, path: Path, index: KernelIndex) -> None:
        self.path = path
        self.index = index
        self.problem: Exception | None = None
        self._loaded: dict[str, Any] = {}

    @staticmethod
    def open(path: Path, form: PluginForm = "class") -> "KernelFolder":
        """Read `path/kernels.json`. Raises `BundleError` for a missing, damaged or foreign index."""
        index_path = path / KERNEL_INDEX
        try:
            index = msgspec.json.decode(index_path.read_bytes(), type=KernelIndex)
        except OSError as error:
            raise _no_kernels(index_path, error.strerror) from error
        except msgspec.DecodeError as error:
            raise _no_kernels(index_path, str(error)) from error
        if index.schema_version != INDEX_VERSION:
            raise _no_kernels(index_path, f"index version {index.schema_version}")
        if index.form != form:
            raise _no_kernels(index_path, f"kernels of the plugin's {index.form} form", f"those of its {form} form")
        for entry in index.kernels:
            if Path(entry.file).name != entry.file:
                raise _no_kernels(index_path, f"file name {entry.file!r}")
        return KernelFolder(path, index)

    def verify(self) -> None:
        """Check every file's size and digest. Raises `BundleError`."""
        for entry in self.index.kernels:
            self.code(entry)

    def code(self, entry: KernelEntry) -> bytes:
        """The cubin or PTX. Raises `BundleError` if it is not the one the index lists."""
        path = self.path / entry.file
        try:
            code = path.read_bytes()
        except OSError as error:
            raise _no_kernels(path, error.strerror) from error
        if len(code) != entry.size or hashlib.sha256(code).hexdigest() != entry.sha256:
            raise _no_kernels(path, f"{len(code)} bytes with another SHA-256")
        return code

    def matching(self, role: Role, dtype: str, qk_norm: bool, head_dim: int) -> list[KernelEntry]:
        """The entries of one kernel, of every compute capability. A key_rms kernel serves every head_dim.

        Raises `TargetError` when there is none.
        """
        found = [
            entry
            for entry in self.index.kernels
            if (entry.role, entry.dtype, entry.qk_norm) == (role, dtype, qk_norm)
            and (role == "key_rms" or entry.head_dim == head_dim)
        ]
        if not found:
            raise self._lacks(f"{role} kernel for {dtype}, head_dim {head_dim}, qk_norm {qk_norm}")
        return found

    def choose(self, role: Role, dtype: str, qk_norm: bool, head_dim: int, capability: int) -> KernelEntry:
        """The entry for one compute capability (89 is sm_89). Raises `TargetError` when there is none."""
        for entry in self.matching(role, dtype, qk_norm, head_dim):
            if entry.capability == capability:
                return entry
        raise self._lacks(f"{role} kernel for sm_{capability}")

    def load(self, entry: KernelEntry) -> Any:
        """The `cuda.core` kernel, loaded into the current context once."""
        if entry.file not in self._loaded:
            require_launcher()
            from cuda.core import ObjectCode

            self._loaded[entry.file] = ObjectCode.from_cubin(self.code(entry)).get_kernel(entry.symbol)
        return self._loaded[entry.file]

    def _lacks(self, what: str) -> TargetError:
        capabilities = sorted({entry.capability for entry in self.index.kernels})
        dtypes = sorted({entry.dtype for entry in self.index.kernels})
        return TargetError(
            f"{self.path}: no {PLUGIN_NAME} {what}",
            received=f"kernels for sm_{', sm_'.join(map(str, capabilities))}; {', '.join(dtypes)}",
            expected=f"a {what}",
            action="rebuild the bundle for this GPU, or build it without --plugin",
        )


def require_launcher() -> None:
    """Raise `TargetError` unless `cuda.core`, which launches the kernels, is installed."""
    try:
        importlib.import_module("cuda.core")
    except ImportError as error:
        raise TargetError(
            f"the plugin {PLUGIN_NAME} cannot launch its kernels",
            received=str(error),
            expected="the packages cuda-core and cuda-bindings",
            action="pip install 'sana-runtime[tensorrt-rtx]', or 'sana-runtime[tensorrt]'",
        ) from error


def _no_kernels(path: Path, received: str | None, expected: str = "") -> BundleError:
    return BundleError(
        f"{path}: the plugin's compiled kernels cannot be used",
        received=received,
        expected=expected or f"the files listed in {KERNEL_INDEX}, index version {INDEX_VERSION}, as they were written",
        action="copy the bundle again, or rebuild it with sana-export of the same version as this runtime",
    )


# --- One call ---


@dataclass(frozen=True)
class Problem:
    """The input of one plugin node: qkv [batch, tokens, 3 * channels], packed [q | k | v]."""

    batch: int
    tokens: int
    channels: int
    dtype: str
    qk_norm: bool


@dataclass(frozen=True)
class Launch:
    """One kernel of a call. `values`: every argument by name, addresses included."""

    entry: KernelEntry
    grid: tuple[int, int, int]
    values: Mapping[str, int | float]


@dataclass(frozen=True)
class LinearAttention:
    """The op with its attributes, over the kernels of a folder. `head_dim` in channels."""

    kernels: KernelFolder = field(repr=False)
    head_dim: int
    eps: float
    norm_eps: float

    def workspace_bytes(self, problem: Problem) -> int:
        """Scratch for one call, enough for every compute capability of the folder."""
        entries = self.kernels.matching("state", problem.dtype, problem.qk_norm, self.head_dim)
        parts = max(self._parts_bytes(problem, entry) for entry in entries)
        return parts + (4 * problem.batch * problem.tokens if problem.qk_norm else 0)

    def launches(self, problem: Problem, capability: int, addresses: Mapping[str, int]) -> list[Launch]:
        """The kernels of one call in order.

        `addresses`: qkv, out, workspace and with qk-norm norm_q_weight and norm_k_weight; device addresses.
        """
        state = self._entry("state", problem, capability)
        key_scale = addresses["workspace"] + self._parts_bytes(problem, state)
        splits, rows = self._split(problem, state)
        apply = self._entry("apply", problem, capability)
        blocks, apply_rows = self._split(problem, apply)
        shared = {
            "norm_q_weight": 0,
            "norm_k_weight": 0,
            **addresses,
            "parts": addresses["workspace"],
            "key_scale": key_scale,
            "tokens": problem.tokens,
            "channels": problem.channels,
            "splits": splits,
            "eps": self.eps,
            "norm_eps": self.norm_eps,
        }
        sequences = self._sequences(problem)
        queue = [
            Launch(state, (sequences, splits, 1), {**shared, "rows": rows}),
            Launch(apply, (sequences, blocks, 1), {**shared, "rows": apply_rows}),
        ]
        if problem.qk_norm:
            norm = self._entry("key_rms", problem, capability)
            all_rows = problem.batch * problem.tokens
            grid = (-(-all_rows // norm.block_rows), 1, 1)
            queue.insert(0, Launch(norm, grid, {**shared, "rows": all_rows}))
        return queue

    def enqueue(self, problem: Problem, capability: int, addresses: Mapping[str, int], stream: int) -> None:
        """Queue one call on a CUDA stream handle. Nothing is synchronised; a stream capture records it."""
        from cuda.core import LaunchConfig, Stream, launch

        queue = Stream.from_handle(stream)
        for step in self.launches(problem, capability, addresses):
            config = LaunchConfig(
                grid=step.grid,
                block=step.entry.num_warps * _WARP,
                shmem_size=step.entry.shared_bytes,
            )
            launch(queue, config, self.kernels.load(step.entry), *packed(step.entry, step.values))

    def preload(self, problem: Problem, capability: int) -> None:
        """Load the kernels of a call, so that its first run may already be captured."""
        roles: tuple[Role, ...] = ("key_rms", "state", "apply") if problem.qk_norm else ("state", "apply")
        for role in roles:
            self.kernels.load(self._entry(role, problem, capability))

    def _entry(self, role: Role, problem: Problem, capability: int) -> KernelEntry:
        return self.kernels.choose(role, problem.dtype, problem.qk_norm, self.head_dim, capability)

    def _sequences(self, problem: Problem) -> int:
        return problem.batch * problem.channels // self.head_dim

    def _split(self, problem: Problem, entry: KernelEntry) -> tuple[int, int]:
        return split_tokens(problem.tokens, self._sequences(problem), entry.block_rows, entry.programs)

    def _parts_bytes(self, problem: Problem, entry: KernelEntry) -> int:
        splits, _ = self._split(problem, entry)
        content = 4 * self._sequences(problem) * splits * (self.head_dim + 1) * self.head_dim
        return -(-content // _ALIGNMENT) * _ALIGNMENT


def packed(entry: KernelEntry, values: Mapping[str, int | float]) -> list[int | np.generic]:
    """Kernel arguments as `cuda.core` takes them: addresses as int, scalars as numpy scalars."""
    convert: dict[str, Any] = {"pointer": int, "int32": np.int32, "float32": np.float32}
    arguments = [convert[argument.kind](values[argument.name]) for argument in entry.arguments]
    return [*arguments, *[0] * entry.hidden_pointers]


# --- The TensorRT classes ---


class _PluginMethods:
    """What TensorRT calls on a plugin; `plugin_class` joins it with the interfaces of a tensorrt module."""

    def __init__(self, trt: Any, operation: LinearAttention) -> None:
        self._trt = trt
        self._operation = operation
        self.plugin_name = PLUGIN_NAME
        self.plugin_version = PLUGIN_VERSION
        self.plugin_namespace = PLUGIN_NAMESPACE
        self.num_outputs = 1

    def get_capability_interface(self, type: Any) -> Any:
        return self

    def clone(self) -> Any:
        return plugin_class(self._trt)(self._trt, self._operation)

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        return [input_types[0]]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expr_builder: Any) -> list[Any]:
        out = self._trt.DimsExprs(inputs[0])
        three = expr_builder.constant(3)
        out[2] = expr_builder.operation(self._trt.DimensionOperation.FLOOR_DIV, inputs[0][2], three)
        return [out]

    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Every tensor linear, and in the dtype of qkv."""
        described, first = in_out[pos].desc, in_out[0].desc
        return (
            described.format == self._trt.TensorFormat.LINEAR
            and described.type == first.type
            and described.type.name in _DTYPES
        )

    def configure_plugin(self, inp: Sequence[Any], out: Sequence[Any]) -> None:
        return None

    def get_workspace_size(self, inp: Sequence[Any], out: Sequence[Any]) -> int:
        with self._recorded():
            return self._operation.workspace_bytes(_problem(inp[0].desc.type, inp[0].max, len(inp)))

    def get_fields_to_serialize(self) -> Any:
        return self._fields[-1]

    @cached_property
    def _fields(self) -> tuple[Any, ...]:
        """The fields, last, and what they point into, kept on the object: TensorRT reads them after the call."""
        kinds = self._trt.PluginFieldType
        arrays = (
            np.array([self._operation.head_dim], np.int32),
            np.array([self._operation.eps], np.float32),
            np.array([self._operation.norm_eps], np.float32),
        )
        described = zip(
            ("head_dim", "eps", "norm_eps"), arrays, (kinds.INT32, kinds.FLOAT32, kinds.FLOAT32), strict=True
        )
        fields = self._trt.PluginFieldCollection([self._trt.PluginField(*field) for field in described])
        # What the binding would convert `fields` into. It can do so only below one of its own calls, and a
        # build into a stream is not one with the two wheels: the plan then silently lacks the fields.
        convert = getattr(self._trt, "PluginFieldCollection_", None)
        return (arrays, fields, convert(fields) if convert else fields)

    def attach_to_context(self, context: Any) -> Any:
        return self.clone()

    def on_shape_change(self, inp: Sequence[Any], out: Sequence[Any]) -> None:
        """Called before the first run: kernels are loaded here, since a stream capture does not allow it."""
        from sana_runtime.cuda import cuda_problem

        with self._recorded():
            if cuda_problem() is None:  # a builder may work without a GPU
                self._operation.preload(_problem(inp[0].type, inp[0].dims, len(inp)), _capability())

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Queue the call. The first input is qkv, then the norm weights if the node has them."""
        names = ("qkv", "norm_q_weight", "norm_k_weight")
        addresses = {"out": outputs[0], "workspace": workspace, **dict(zip(names, inputs, strict=False))}
        with self._recorded():
            problem = _problem(input_desc[0].type, input_desc[0].dims, len(inputs))
            self._operation.enqueue(problem, _capability(), addresses, stream)

    def get_valid_tactics(self) -> list[int]:
        return []

    def set_tactic(self, tactic: int) -> None:
        return None

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._operation.kernels.problem = self._operation.kernels.problem or error
            raise


def _problem(data_type: Any, dims: Any, num_inputs: int) -> Problem:
    batch, tokens, packed_channels = (int(size) for size in dims)
    return Problem(batch, tokens, packed_channels // 3, _DTYPES[data_type.name], num_inputs == 3)


@cache
def _capability() -> int:
    """The compute capability of device 0, 89 for sm_89. Kept: asking takes longer than a launch."""
    from sana_runtime.cuda import compute_capability

    major, minor = compute_capability()
    return 10 * major + minor


_plugin_classes: dict[str, type] = {}


def plugin_class(trt: Any) -> type:
    """The plugin as a class of the given tensorrt module: called with (trt, LinearAttention)."""
    if trt.__name__ not in _plugin_classes:

        class ReluLinearAttention(
            _PluginMethods,
            trt.IPluginV3,
            trt.IPluginV3OneCore,
            trt.IPluginV3OneBuild,
            trt.IPluginV3OneRuntime,
        ):
            def __init__(self, trt: Any, operation: LinearAttention) -> None:
                # Each of these is a C++ object of its own and refuses to be used before its __init__.
                trt.IPluginV3.__init__(self)
                trt.IPluginV3OneCore.__init__(self)
                trt.IPluginV3OneBuild.__init__(self)
                trt.IPluginV3OneRuntime.__init__(self)
                _PluginMethods.__init__(self, trt, operation)

        _plugin_classes[trt.__name__] = ReluLinearAttention
    return _plugin_classes[trt.__name__]


def plugin_creator(trt: Any, kernels: KernelFolder) -> Any:
    """An IPluginCreatorV3One that makes plugins over `kernels` from an ONNX node or a plan."""

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = PLUGIN_NAME
            self.plugin_version = PLUGIN_VERSION
            self.plugin_namespace = PLUGIN_NAMESPACE
            kinds = trt.PluginFieldType
            names = (("head_dim", kinds.INT32), ("eps", kinds.FLOAT32), ("norm_eps", kinds.FLOAT32))
            self._fields = [trt.PluginField(name, _NO_VALUE, kind) for name, kind in names]
            self.field_names = trt.PluginFieldCollection(self._fields)

        def create_plugin(self, name: str, field_collection: Any, phase: Any) -> Any:
            fields = {item.name: item.data[0] for item in field_collection}
            operation = LinearAttention(
                kernels,
                head_dim=int(fields["head_dim"]),
                eps=float(fields.get("eps", _DEFAULT_EPS)),
                norm_eps=float(fields.get("norm_eps", _DEFAULT_NORM_EPS)),
            )
            return plugin_class(trt)(trt, operation)

    return Creator()


_registered: dict[str, tuple[KernelFolder, Any]] = {}


def register_plugins(trt: Any, folder: Path) -> KernelFolder:
    """Make the plugin known to `trt` (an imported tensorrt module), with the kernels of `folder`.

    Again with equal kernels it does nothing; with others it replaces the creator, and plans loaded before keep
    theirs. Returns the kernels in use. Raises `BundleError` for kernels that are missing or damaged,
    `TargetError` if TensorRT refuses.
    """
    kernels = KernelFolder.open(folder)
    known, creator = _registered.get(trt.__name__, (None, None))
    if known is not None and known.index == kernels.index:
        return known
    registry = trt.get_plugin_registry()
    if creator is not None:
        registry.deregister_creator(creator)
    creator = plugin_creator(trt, kernels)
    if not registry.register_creator(creator, PLUGIN_NAMESPACE):
        raise TargetError(
            f"TensorRT refuses the plugin {PLUGIN_NAME}",
            received=f"{trt.__name__} {getattr(trt, '__version__', '')}",
            expected="a TensorRT with IPluginCreatorV3One, and no other plugin of this name",
            action="build without --plugin: the operator is then compiled from plain ones",
        )
    _registered[trt.__name__] = (kernels, creator)
    return kernels


def count_plugin_layers(trt: Any, network: Any) -> int:
    """How many layers of a parsed network are plugins."""
    kinds = (network.get_layer(position).type for position in range(network.num_layers))
    return sum(kind == trt.LayerType.PLUGIN_V3 for kind in kinds)
