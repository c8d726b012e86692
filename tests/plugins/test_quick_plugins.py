"""The quick plugins are accepted by the vendor's own Python module and declare the launches of the plugin class."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sana_kernels.linear_attention.testing import EPS, NORM_EPS
from sana_runtime import cuda, plan_worker
from sana_runtime.environment import child_environment
from sana_runtime.errors import BundleError, TargetError
from sana_runtime.plugins import KernelFolder, LinearAttention, Problem, packed
from sana_runtime.quick_plugins import QUICK_OPS, float_bits, quick_ops, register_quick_plugins
from sana_runtime.tensorrt_library import find_tensorrt
from tests.plugins.quick_stand_ins import Launch, Tensor, declared, drive, vendor_tensorrt
from tests.plugins.test_linear_attention_plugin import VARIANTS

CAPABILITY = 87
TRT_NAMES = {"float32": "FLOAT", "bfloat16": "BF16", "float16": "HALF"}
QuickKernels = Callable[[int], KernelFolder]
# Every variant's shape, and the ends of the range of tokens.
PROBLEMS = sorted(
    {
        Problem(case.batch, tokens, case.channels, str(case.dtype).removeprefix("torch."), case.qk_norm)
        for case in VARIANTS
        for tokens in (1, 63, 64, 256, 1000, 1024, 4096, 16384)
    },
    key=str,
)


def chain(problem: Problem, ask: Callable[..., Launch]) -> dict[str, Launch]:
    """The launches of one linear-attention node by role; `ask(op, inputs, attributes)` answers for one plugin."""
    dtype = TRT_NAMES[problem.dtype]
    tensors = {
        "qkv": Tensor((problem.batch, problem.tokens, 3 * problem.channels), dtype),
        "norm_q_weight": Tensor((problem.channels,), dtype),
        "norm_k_weight": Tensor((problem.channels,), dtype),
    }
    values = {"head_dim": 32, "eps_bits": float_bits(EPS), "norm_eps_bits": float_bits(NORM_EPS)}
    launches = {}
    for role, op in quick_ops(problem.qk_norm).items():
        attributes = {name: values[name] for name in op.attributes}
        launches[role] = ask(op, [tensors[name] for name in op.inputs], attributes)
        tensors[{"key_rms": "key_scale", "state": "parts", "apply": "out"}[role]] = launches[role].output
    assert launches["apply"].output == Tensor((problem.batch, problem.tokens, problem.channels), dtype)
    return launches


@pytest.fixture
def tensorrt() -> Iterator[ModuleType]:
    try:
        with vendor_tensorrt() as library:
            yield library
    except ImportError as error:
        pytest.skip(str(error))


def test_ptx_takes_what_tensorrt_passes(quick_kernels_for: QuickKernels) -> None:
    """Inputs, scalars and outputs of the kernel are those of the plugin, and Triton's own pointers are gone."""
    kernels = quick_kernels_for(CAPABILITY)
    kernels.verify()
    ops = {(op.role, op.qk_norm): op for op in QUICK_OPS}
    found = {(entry.role, entry.qk_norm, entry.dtype) for entry in kernels.index.kernels}
    assert found == {(*key, dtype) for key in ops for dtype in TRT_NAMES}
    for entry in kernels.index.kernels:
        kinds = [argument.kind for argument in entry.arguments]
        names = [argument.name for argument in entry.arguments]
        inputs = ops[entry.role, entry.qk_norm].inputs
        assert tuple(names[: len(inputs)]) == inputs
        assert kinds == ["pointer"] * len(inputs) + ["int32"] * (len(kinds) - len(inputs) - 1) + ["pointer"]
        ptx = kernels.code(entry).decode()
        (declaration,) = re.findall(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.DOTALL)
        assert declaration[0] == entry.symbol
        widths = ["u64" if kind == "pointer" else "u32" for kind in kinds]
        assert re.findall(r"\.param \.(u\d\d)", declaration[1]) == widths
        assert ".py" not in ptx


def test_ptx_assembles_for_every_gpu(tmp_path: Path) -> None:
    """bf16, with and without qk-norm; without the parameters that were taken out, by the assembler itself."""
    triton = pytest.importorskip("triton")
    from sana_plugins.aot import CAPABILITIES, compile_kernels

    index = compile_kernels(tmp_path, dtypes=("bfloat16",), plugin_form="quick")
    assert {entry.capability for entry in index.kernels} == set(CAPABILITIES)
    assert len(index.kernels) == len(CAPABILITIES) * len(QUICK_OPS)
    for entry in index.kernels:
        nvidia = triton.knobs.nvidia
        assembler = nvidia.ptxas_blackwell if entry.capability >= 100 else nvidia.ptxas
        suffix = "a" if entry.capability >= 90 else ""
        command = [assembler.path, "-v", f"--gpu-name=sm_{entry.capability}{suffix}", str(tmp_path / entry.file)]
        run = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert " 0 bytes spill stores" in run.stderr


def test_the_vendors_module_computes_the_launches_of_the_plugin_class(
    tensorrt: ModuleType, quick_kernels_for: QuickKernels, kernels_for: QuickKernels
) -> None:
    """Every variant's shape: outputs, grids, blocks, memory and scalars, from the vendor's symbolic integers."""
    kernels = register_quick_plugins(tensorrt, quick_kernels_for(CAPABILITY).path, CAPABILITY)
    operation = LinearAttention(kernels_for(CAPABILITY), head_dim=32, eps=EPS, norm_eps=NORM_EPS)
    assert len(PROBLEMS) == 6 * 8
    for problem in PROBLEMS:
        launches = chain(problem, lambda op, inputs, attributes: drive(tensorrt, op, inputs, attributes))
        addresses = {"qkv": 1, "out": 2, "workspace": 3}
        steps = operation.launches(problem, CAPABILITY, addresses)
        assert [*launches] == [step.entry.role for step in steps]
        for step, launch in zip(steps, launches.values(), strict=True):
            assert launch.grid == step.grid
            assert launch.block == (32 * step.entry.num_warps, 1, 1)
            assert launch.shared_bytes <= 48 << 10
            values = {**step.values, "eps_bits": float_bits(EPS), "norm_eps_bits": float_bits(NORM_EPS)}
            entry = kernels.choose(step.entry.role, problem.dtype, problem.qk_norm, 32, CAPABILITY)
            scalars = [values[argument.name] for argument in entry.arguments if argument.kind == "int32"]
            assert launch.scalars == tuple(scalars)
            assert launch.code == kernels.code(entry)
        splits = steps[-1].values["splits"]
        heads = problem.channels // 32
        assert launches["state"].output == Tensor((problem.batch, heads, splits, 33, 32), "FLOAT")
        if problem.qk_norm:
            assert launches["key_rms"].output == Tensor((problem.batch, problem.tokens), "FLOAT")
        assert len(packed(steps[0].entry, steps[0].values)) > 0
        plain = chain(problem, lambda op, inputs, values: declared(op, kernels, CAPABILITY, inputs, values))
        assert plain == launches, "the GPU tests use plain integers"


def test_what_a_callback_raises_is_kept(tensorrt: ModuleType, quick_kernels_for: QuickKernels) -> None:
    kernels = register_quick_plugins(tensorrt, quick_kernels_for(CAPABILITY).path, 89)
    with pytest.raises(TargetError, match="sm_89"):
        drive(tensorrt, quick_ops(False)["state"], [Tensor((1, 64, 96), "BF16")], {"head_dim": 32})
    assert isinstance(kernels.problem, TargetError)


def test_the_worker_registers_for_the_gpu_it_builds_on(
    tensorrt: ModuleType, quick_kernels_for: QuickKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "compute_capability", lambda: (8, 7))
    folder = str(quick_kernels_for(87).path)
    request = plan_worker.BuildRequest("tensorrt", "", "", None, 0, folder, plugin_form="quick")
    kernels = plan_worker._register(tensorrt, request)
    launch = drive(tensorrt, quick_ops(False)["state"], [Tensor((1, 64, 96), "HALF")], {"head_dim": 32})
    assert launch.code == kernels.code(kernels.choose("state", "float16", False, 32, 87))


def test_registering_twice_is_refused(tensorrt: ModuleType, quick_kernels_for: QuickKernels) -> None:
    folder = quick_kernels_for(CAPABILITY).path
    register_quick_plugins(tensorrt, folder, CAPABILITY)
    with pytest.raises(TargetError, match="KeyRms"):
        register_quick_plugins(tensorrt, folder, CAPABILITY)


def test_a_tensorrt_without_quick_plugins_is_refused(quick_kernels_for: QuickKernels) -> None:
    with pytest.raises(TargetError, match=r"10\.9"):
        register_quick_plugins(ModuleType("tensorrt_of_old"), quick_kernels_for(CAPABILITY).path, CAPABILITY)


def test_the_forms_kernels_are_not_mixed_up(quick_kernels_for: QuickKernels, kernels_for: QuickKernels) -> None:
    with pytest.raises(BundleError, match="quick form"):
        KernelFolder.open(quick_kernels_for(CAPABILITY).path)
    with pytest.raises(BundleError, match="class form"):
        KernelFolder.open(kernels_for(CAPABILITY).path, "quick")


REAL_REGISTRY = """
import importlib, os, sys
from pathlib import Path
trt = sys.modules["tensorrt"] = importlib.import_module(sys.argv[1])
logger = trt.Logger(trt.Logger.ERROR)
from sana_runtime.quick_plugins import QUICK_OPS, register_quick_plugins
register_quick_plugins(trt, Path(sys.argv[2]), 87)
for op in QUICK_OPS:
    creator = trt.get_plugin_registry().get_creator(op.name, "1", "sana")
    assert creator is not None, op.name
    found = [(field.name, field.type) for field in creator.field_names]
    assert found == [(name, trt.PluginFieldType.INT64) for name in op.attributes], found
print("equal", flush=True)
os._exit(0)
"""


@pytest.mark.tensorrt
def test_the_real_registry_takes_the_creators(quick_kernels_for: QuickKernels) -> None:
    """The real bindings over the RTX library, which refuses only to put such a plugin into a network."""
    try:
        rtx = find_tensorrt("tensorrt-rtx")
    except TargetError as error:
        pytest.skip(" ".join(str(error).split()))
    command = [sys.executable, "-c", REAL_REGISTRY, rtx.module, str(quick_kernels_for(CAPABILITY).path)]
    run = subprocess.run(command, env=child_environment(rtx.environment), capture_output=True, text=True, check=False)
    assert run.stdout.split()[-1:] == ["equal"], run.stderr
