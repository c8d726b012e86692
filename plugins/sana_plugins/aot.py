"""Compile the linear-attention kernels for chosen GPUs, without one, into a folder the plugin can load.

    index = compile_kernels(folder, capabilities=(86, 89, 120), dtypes=("bfloat16",), forms=(False,))

One file per kernel, compute capability, dtype and form, and `kernels.json`, which lists them with digests, argument
lists and tilings (schema: `sana_runtime.plugins`). The same inputs and compiler give the same bytes. The plugin class
launches cubins; a quick plugin hands PTX to TensorRT (`plugin_form="quick"`).
"""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sana_runtime.errors import BuildError, InputError, TargetError
from sana_runtime.files import whole_file
from sana_runtime.plugins import (
    INDEX_VERSION,
    KERNEL_INDEX,
    KernelArgument,
    KernelEntry,
    KernelIndex,
    PluginForm,
    Role,
)

if TYPE_CHECKING:
    from sana_kernels.linear_attention.triton import Tiling, Tilings

# Ampere data centre, RTX 30, Orin, RTX 40, Hopper, Thor, RTX 50.
CAPABILITIES = (80, 86, 87, 89, 90, 110, 120)
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
HEAD_DIM = 32
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FP32_POINTERS = ("key_scale", "parts")
_FLOATS = ("eps", "norm_eps")
# Tensors of TensorRT are aligned; rows hold whole heads of 16 channels or more.
_MULTIPLES_OF_16 = ("channels",)
# More than this needs an attribute set on the device before the launch.
_PLAIN_SHARED_BYTES = 48 << 10
# PTX of the oldest version that knows the GPU: a driver reads no newer version than its own.
_PTX_VERSIONS = {110: 90, 120: 87}
_OLDEST_PTX = 80

OnKernel = Callable[[int, int], None]


@dataclass(frozen=True)
class _Job:
    """One kernel to compile."""

    role: Role
    capability: int
    dtype: str
    qk_norm: bool
    head_dim: int
    plugin_form: PluginForm

    @property
    def name(self) -> str:
        norm = "_qknorm" if self.qk_norm else ""
        return f"relu_linear_attention_{self.role}_{self.dtype}{norm}_d{self.head_dim}_sm{self.capability}"

    @property
    def ptx_version(self) -> int | None:
        """For PTX; a cubin holds none."""
        return _PTX_VERSIONS.get(self.capability, _OLDEST_PTX) if self.plugin_form == "quick" else None


def compile_kernels(
    folder: Path,
    *,
    capabilities: Sequence[int] = CAPABILITIES,
    dtypes: Sequence[str] = tuple(DTYPES),
    forms: Sequence[bool] = (False, True),
    head_dims: Sequence[int] = (HEAD_DIM,),
    plugin_form: PluginForm = "class",
    on_kernel: OnKernel | None = None,
) -> KernelIndex:
    """Compile and write into `folder`, which is made; about half a second per kernel.

    `capabilities`: 89 is sm_89. `forms`: with qk-norm (True), without, or both. `plugin_form`: cubins for the plugin
    class, or PTX for the quick plugins. `on_kernel(done, total)` reports progress. The index is written last, so that
    a folder with one is whole.

    Raises `InputError` for a value not supported, `TargetError` without Triton, `BuildError` when Triton cannot
    compile or the disk is full.
    """
    _check(capabilities, dtypes, head_dims)
    _require_triton()
    jobs = [*_jobs(capabilities, dtypes, forms, head_dims, plugin_form)]
    entries = []
    for done, job in enumerate(jobs, 1):
        entries.append(_compile(job, folder))
        if on_kernel:
            on_kernel(done, len(jobs))
    import triton

    index = KernelIndex(INDEX_VERSION, f"triton {triton.__version__}", tuple(entries), plugin_form)
    content = msgspec.json.format(msgspec.json.encode(index), indent=1) + b"\n"
    _write(folder / KERNEL_INDEX, content)
    return index


def kernel_files(index: KernelIndex) -> tuple[str, ...]:
    """Names of the files in a kernel folder, the index first: what a bundle has to list."""
    return (KERNEL_INDEX, *dict.fromkeys(entry.file for entry in index.kernels))


def _check(capabilities: Sequence[int], dtypes: Sequence[str], head_dims: Sequence[int]) -> None:
    for name, values, known in (
        ("compute capability", capabilities, range(80, 200)),
        ("dtype", dtypes, DTYPES),
        ("head_dim", head_dims, (16, 32, 64)),
    ):
        for value in values:
            if value not in known:
                raise InputError(
                    f"plugin kernels: {name} is not supported",
                    received=value,
                    expected="80 or more" if name == "compute capability" else f"one of {[*known]}",
                    action="leave it out",
                )


def _require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise TargetError(
            "plugin kernels cannot be compiled on this machine",
            received="triton is not installed",
            expected="triton, which compiles for any GPU without one",
            action="pip install 'sana-export[plugin]', or build without --plugin",
        )


def _jobs(
    capabilities: Sequence[int],
    dtypes: Sequence[str],
    forms: Sequence[bool],
    head_dims: Sequence[int],
    plugin_form: PluginForm,
) -> Iterator[_Job]:
    for capability in capabilities:
        for dtype in dtypes:
            for qk_norm in forms:
                if qk_norm:  # it works on whole rows: one serves every head width
                    yield _Job("key_rms", capability, dtype, True, head_dims[0], plugin_form)
                for head_dim in head_dims:
                    yield _Job("state", capability, dtype, qk_norm, head_dim, plugin_form)
                    yield _Job("apply", capability, dtype, qk_norm, head_dim, plugin_form)


def _compile(job: _Job, folder: Path) -> KernelEntry:
    from sana_kernels.linear_attention import triton as kernels

    tilings = kernels.tilings(_ITEM_BYTES[job.dtype], job.head_dim)
    kernel, constants, tiling = _recipe(job, kernels, tilings)
    arguments = _arguments(kernel)
    compiled = _triton_compile(job, kernel, arguments, constants, tiling)
    ptx: str = compiled.asm["ptx"]
    hidden = _parameter_count(ptx) - len(arguments)
    _check_compiled(job, compiled.metadata, hidden)
    if job.plugin_form == "quick":
        suffix, code, hidden = "ptx", _without_parameters(ptx, hidden).encode(), 0
    else:
        suffix, code = "cubin", compiled.asm["cubin"]
    file = f"{job.name}.{suffix}"
    _write(folder / file, code)
    return KernelEntry(
        role=job.role,
        capability=job.capability,
        dtype=job.dtype,
        qk_norm=job.qk_norm,
        head_dim=job.head_dim,
        file=file,
        size=len(code),
        sha256=hashlib.sha256(code).hexdigest(),
        symbol=compiled.metadata.name,
        arguments=arguments,
        hidden_pointers=hidden,
        shared_bytes=compiled.metadata.shared,
        num_warps=tiling.num_warps,
        block_rows=tiling.block_rows,
        programs=tiling.programs,
    )


def _recipe(job: _Job, kernels: Any, tilings: "Tilings") -> tuple[Any, dict[str, int | bool], "Tiling"]:
    """The Triton function of a job, its constants and its tiling."""
    if job.role == "key_rms":
        tiling = kernels.Tiling(tilings.norm_block_rows, 0, num_warps=4, num_stages=1)
    else:
        tiling = {"state": tilings.state, "apply": tilings.apply}[job.role]
    constants = {
        "BLOCK_ROWS": tiling.block_rows,
        "BLOCK_C": tilings.norm_block_channels,
        "QK_NORM": job.qk_norm,
        "HEAD_DIM": job.head_dim,
        "BLOCK_N": tiling.block_rows,
        "BY_HEAD": False,
    }
    kernel = _quick_entry(job) if job.plugin_form == "quick" else getattr(kernels, f"{job.role}_kernel")
    return kernel, {name: constants[name] for name in kernel.arg_names if name.isupper()}, tiling


def _quick_entry(job: _Job) -> Any:
    """The entry point with a quick plugin's order of arguments."""
    from sana_plugins import quick_kernels

    normed = "normed_" if job.qk_norm and job.role != "key_rms" else ""
    return getattr(quick_kernels, f"{normed}{job.role}_quick")


def _arguments(kernel: Any) -> tuple[KernelArgument, ...]:
    """The run-time parameters of a Triton function; constants are spelled in capitals."""
    names = [name for name in kernel.arg_names if not name.isupper()]
    return tuple(
        KernelArgument(name.removesuffix("_ptr"), "pointer")
        if name.endswith("_ptr")
        else KernelArgument(name, "float32" if name in _FLOATS else "int32")
        for name in names
    )


def _triton_compile(
    job: _Job,
    kernel: Any,
    arguments: tuple[KernelArgument, ...],
    constants: dict[str, int | bool],
    tiling: "Tiling",
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = [_triton_type(argument, DTYPES[job.dtype]) for argument in arguments]
    aligned = [
        position
        for position, argument in enumerate(arguments)
        if argument.kind == "pointer" or argument.name in _MULTIPLES_OF_16
    ]
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(names, [*types, *["constexpr"] * len(constants)], strict=True)),
        constexprs=constants,
        attrs={(position,): [["tt.divisibility", 16]] for position in aligned},
    )
    options = {
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
        "enable_fp_fusion": True,
        "ptx_version": job.ptx_version,
    }
    try:
        with triton.knobs.compilation.scope():
            # Line tables would put this machine's paths into the code, and double its size.
            triton.knobs.compilation.disable_line_info = True
            return triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=options)
    except Exception as error:  # the compiler raises whatever it likes
        raise BuildError(
            f"{job.name}: Triton {triton.__version__} cannot compile it",
            received=f"{type(error).__name__}: {error}",
            expected="a cubin",
            action="leave this compute capability out, or install another version of triton",
        ) from error


def _triton_type(argument: KernelArgument, element: str) -> str:
    if argument.kind == "pointer":
        return "*fp32" if argument.name in _FP32_POINTERS else f"*{element}"
    return "fp32" if argument.kind == "float32" else "i32"


def _parameter_count(ptx: str) -> int:
    """How many parameters the entry function really takes: Triton adds pointers to scratch after ours."""
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None, "PTX without an entry function"
    return entry[1].count(".param")


def _without_parameters(ptx: str, count: int) -> str:
    """PTX whose entry function lacks its last `count` parameters, which nothing may read.

    TensorRT passes what the plugin declared, and nothing for the pointers that Triton adds.
    """
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None, "PTX without an entry function"
    parameters = entry[1].split(",")
    kept = parameters[: len(parameters) - count]
    for parameter in parameters[len(kept) :]:
        name = parameter.split()[-1]
        assert len(re.findall(rf"\b{name}\b", ptx)) == 1, f"{name} is read"
    return ptx[: entry.start(1)] + ",".join(kept).rstrip() + "\n" + ptx[entry.end(1) :]


def _check_compiled(job: _Job, metadata: Any, hidden: int) -> None:
    """What the launch relies on: no scratch behind the hidden pointers, one block per cluster, little memory."""
    assert 0 <= hidden <= 2, f"{job.name}: {hidden} hidden parameters"
    scratch = metadata.global_scratch_size + getattr(metadata, "profile_scratch_size", 0)
    assert scratch == 0, f"{job.name}: {scratch} bytes of scratch"
    assert metadata.num_ctas == 1, f"{job.name}: clusters of {metadata.num_ctas}"
    assert metadata.shared <= _PLAIN_SHARED_BYTES, f"{job.name}: {metadata.shared} bytes of shared memory"


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
