"""The plugin's kernels are whole, its TensorRT calls are right, and what it queues on a stream is the op."""

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sana_kernels.linear_attention.testing import (
    EPS,
    NORM_EPS,
    Case,
    Inputs,
    compare,
    dtype_name,
    make_inputs,
    oracle,
    reference_results,
)
from sana_runtime import plugins
from sana_runtime.errors import BundleError, InputError, TargetError
from sana_runtime.plugins import KERNEL_INDEX, KernelFolder, LinearAttention, Problem, register_plugins
from tests.plugins import fake_tensorrt as trt

KernelsFor = Callable[[int], KernelFolder]
TRT_DTYPES = {torch.float32: trt.DataType.FLOAT, torch.bfloat16: trt.DataType.BF16, torch.float16: trt.DataType.HALF}


def make_plugin(kernels: KernelFolder, head_dim: int = 32) -> Any:
    operation = LinearAttention(kernels, head_dim=head_dim, eps=EPS, norm_eps=NORM_EPS)
    return plugins.plugin_class(trt)(trt, operation)


# --- Compiling ahead of time ---


@pytest.fixture(scope="module")
def every_target(tmp_path_factory: pytest.TempPathFactory) -> KernelFolder:
    """bf16 kernels without qk-norm for every shipped compute capability."""
    pytest.importorskip("triton")
    from sana_plugins.aot import compile_kernels

    folder = tmp_path_factory.mktemp("every")
    compile_kernels(folder, dtypes=("bfloat16",), forms=(False,))
    return KernelFolder.open(folder)


def test_every_target_compiles_without_a_gpu(every_target: KernelFolder) -> None:
    from sana_plugins.aot import CAPABILITIES, kernel_files

    every_target.verify()
    found = {(entry.capability, entry.role) for entry in every_target.index.kernels}
    assert found == {(capability, role) for capability in CAPABILITIES for role in ("state", "apply")}
    assert {path.name for path in every_target.path.iterdir()} == {*kernel_files(every_target.index)}


def test_cubins_name_no_file_of_this_machine(every_target: KernelFolder) -> None:
    for entry in every_target.index.kernels:
        assert b".py" not in every_target.code(entry)


def test_compiling_again_gives_the_same_bytes(
    kernels_for: KernelsFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    from sana_plugins.aot import compile_kernels

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    first, second = (compile_kernels(tmp_path / name, capabilities=(89,), dtypes=("float16",)) for name in "ab")
    assert first == second
    known = {entry.file: entry.sha256 for entry in kernels_for(89).index.kernels}
    assert all(known[entry.file] == entry.sha256 for entry in first.kernels)


def test_launch_values_cover_every_argument(kernels_for: KernelsFor) -> None:
    kernels = kernels_for(89)
    operation = LinearAttention(kernels, head_dim=32, eps=EPS, norm_eps=NORM_EPS)
    for dtype in ("float32", "bfloat16", "float16"):
        for qk_norm in (False, True):
            problem = Problem(2, 1000, 1152, dtype, qk_norm)
            steps = operation.launches(problem, 89, {"qkv": 1, "out": 2, "workspace": 3})
            assert [step.entry.role for step in steps] == [*["key_rms"] * qk_norm, "state", "apply"]
            for step in steps:
                count = len(plugins.packed(step.entry, step.values))
                assert count == len(step.entry.arguments) + step.entry.hidden_pointers


def test_tokens_are_split_as_the_kernels_split_them() -> None:
    triton_kernels = pytest.importorskip("sana_kernels.linear_attention.triton")
    for tokens in (1, 63, 64, 65, 1000, 4096, 65536):
        for sequences in (1, 16, 72, 140, 5000):
            for block, programs in ((64, 288), (32, 576), (128, 1)):
                tiling = triton_kernels.Tiling(block, programs, num_warps=4, num_stages=1)
                splits, rows = plugins.split_tokens(tokens, sequences, block, programs)
                assert (splits, rows) == tiling.split(tokens, sequences)
                assert (splits - 1) * rows < tokens <= splits * rows


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    from sana_plugins.aot import compile_kernels

    with pytest.raises(InputError, match="compute capability"):
        compile_kernels(tmp_path, capabilities=(75,))
    with pytest.raises(InputError, match="dtype"):
        compile_kernels(tmp_path, dtypes=("float8",))
    with pytest.raises(InputError, match="head_dim"):
        compile_kernels(tmp_path, head_dims=(40,))
    assert not list(tmp_path.iterdir())


# --- Damage ---


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with one listed file."""
    entry = plugins.KernelEntry(
        role="state",
        capability=89,
        dtype="bfloat16",
        qk_norm=False,
        head_dim=32,
        file="state.cubin",
        size=4,
        sha256=hashlib.sha256(b"code").hexdigest(),
        symbol="state_kernel",
        arguments=(),
        hidden_pointers=2,
        shared_bytes=0,
        num_warps=4,
        block_rows=64,
        programs=288,
    )
    (tmp_path / "state.cubin").write_bytes(b"code")
    write_index(tmp_path, plugins.KernelIndex(plugins.INDEX_VERSION, "triton 0", (entry,)))
    return tmp_path


def write_index(folder: Path, index: plugins.KernelIndex) -> None:
    (folder / KERNEL_INDEX).write_bytes(msgspec.json.encode(index))


def test_a_whole_folder_verifies(small: Path) -> None:
    KernelFolder.open(small).verify()


@pytest.mark.parametrize("content", [b"edit", b"longer code", None], ids=["edited", "longer", "missing"])
def test_a_damaged_cubin_is_refused(small: Path, content: bytes | None) -> None:
    path = small / "state.cubin"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(BundleError, match=r"state\.cubin"):
        KernelFolder.open(small).verify()


def test_a_foreign_index_is_refused(small: Path) -> None:
    index = KernelFolder.open(small).index
    write_index(small, msgspec.structs.replace(index, schema_version=99))
    with pytest.raises(BundleError, match="index version 99"):
        KernelFolder.open(small)
    outside = msgspec.structs.replace(index.kernels[0], file="../state.cubin")
    write_index(small, msgspec.structs.replace(index, kernels=(outside,)))
    with pytest.raises(BundleError, match=r"\.\./state\.cubin"):
        KernelFolder.open(small)
    (small / KERNEL_INDEX).write_text("{}")
    with pytest.raises(BundleError, match=KERNEL_INDEX):
        KernelFolder.open(small)


def test_missing_kernels_are_named(small: Path) -> None:
    kernels = KernelFolder.open(small)
    with pytest.raises(TargetError, match="sm_87"):
        kernels.choose("state", "bfloat16", False, 32, 87)
    with pytest.raises(TargetError, match="float16"):
        kernels.matching("state", "float16", False, 32)


# --- TensorRT's calls ---


def test_shapes_formats_and_workspace(kernels_for: KernelsFor) -> None:
    plugin = make_plugin(kernels_for(89))
    qkv, out = trt.described(trt.DataType.BF16, 2, 1000, 3456), trt.described(trt.DataType.BF16, 2, 1000, 1152)
    assert plugin.get_output_shapes([trt.DimsExprs([2, 1000, 3456])], [], trt.ExprBuilder()) == [[2, 1000, 1152]]
    assert plugin.get_output_data_types([trt.DataType.BF16]) == [trt.DataType.BF16]
    assert plugin.supports_format_combination(1, [qkv, out], 1)
    wrong = [
        trt.described(trt.DataType.FLOAT, 2, 1000, 1152),
        trt.described(trt.DataType.BF16, 2, 1000, 1152, format=trt.TensorFormat.CHW32),
    ]
    assert not any(plugin.supports_format_combination(1, [qkv, other], 1) for other in wrong)
    integer = trt.described(trt.DataType.INT32, 2, 1000, 3456)
    assert not plugin.supports_format_combination(0, [integer, integer], 1)
    # 72 heads in 4 parts of 33 x 32 fp32.
    assert plugin.get_workspace_size([qkv], [out]) == 72 * 4 * 33 * 32 * 4
    weight = trt.described(trt.DataType.BF16, 1152)
    assert plugin.get_workspace_size([qkv, weight, weight], [out]) == 72 * 4 * 33 * 32 * 4 + 2 * 1000 * 4


def test_serialised_fields_make_the_same_plugin(kernels_for: KernelsFor) -> None:
    plugin = make_plugin(kernels_for(89))
    creator = plugins.plugin_creator(trt, kernels_for(89))
    made = creator.create_plugin("", plugin.get_fields_to_serialize(), None)
    assert made._operation.head_dim == 32
    assert made._operation.eps == pytest.approx(EPS)
    assert made._operation.norm_eps == pytest.approx(NORM_EPS)
    clone = made.attach_to_context(None)
    assert clone is not made
    assert clone._operation == made._operation


def test_registering_again_replaces_other_kernels(small: Path, kernels_for: KernelsFor) -> None:
    first = register_plugins(trt, small)
    assert register_plugins(trt, small) is first
    second = register_plugins(trt, kernels_for(89).path)
    assert second is not first
    assert len(trt.get_plugin_registry().creators) == 1


def test_a_failing_callback_is_remembered(small: Path) -> None:
    kernels = KernelFolder.open(small)
    plugin = make_plugin(kernels)
    half = trt.described(trt.DataType.HALF, 1, 10, 96)
    with pytest.raises(TargetError, match="float16"):
        plugin.get_workspace_size([half], [half])
    assert isinstance(kernels.problem, TargetError)


# --- On a GPU: real pointers, a real stream, the ahead-of-time kernels ---

VARIANTS = [
    Case(batch, tokens, channels, qk_norm=norm, dtype=dtype)
    for batch, channels, norm, dtype in (
        (2, 1152, False, torch.bfloat16),
        (2, 2240, False, torch.bfloat16),
        (1, 1152, True, torch.bfloat16),
        (2, 2240, True, torch.float16),
        (1, 512, False, torch.bfloat16),
        (1, 1024, False, torch.float32),
    )
    for tokens in (64, 1000, 1024, 4096, 16384)
]
UGLY = [
    Case(3, 63, 64, dtype=torch.float32, qk_norm=True),
    Case(1, 1, 96, dtype=torch.float16),
    Case(1, 65536, 1152),
]
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@dataclasses.dataclass
class Bound:
    """A plugin with the tensors of one case and its own stream."""

    plugin: Any
    inputs: Inputs
    out: torch.Tensor
    workspace: torch.Tensor
    stream: torch.cuda.Stream

    def enqueue(self) -> None:
        tensors = [x for x in (self.inputs.qkv, self.inputs.norm_q_weight, self.inputs.norm_k_weight) if x is not None]
        self.plugin.enqueue(
            [self._desc(x) for x in tensors],
            [self._desc(self.out)],
            [x.data_ptr() for x in tensors],
            [self.out.data_ptr()],
            self.workspace.data_ptr(),
            self.stream.cuda_stream,
        )

    def _desc(self, tensor: torch.Tensor) -> Any:
        return trt.described(TRT_DTYPES[tensor.dtype], *tensor.shape)

    def prepare(self) -> None:
        """As TensorRT does before the first run."""
        tensors = [x for x in (self.inputs.qkv, self.inputs.norm_q_weight, self.inputs.norm_k_weight) if x is not None]
        self.plugin.on_shape_change([self._desc(x) for x in tensors], [self._desc(self.out)])


def bind(case: Case, kernels: KernelFolder) -> Bound:
    """Outputs and workspace start as NaN; the workspace has exactly the size the plugin asks for."""
    inputs = make_inputs(case, "cuda", seed=case.tokens)
    plugin = make_plugin(kernels, case.head_dim).attach_to_context(None)
    problem = Problem(case.batch, case.tokens, case.channels, dtype_name(case.dtype), case.qk_norm)
    size = plugin._operation.workspace_bytes(problem)
    assert size % 4 == 0
    workspace = torch.full((size // 4,), torch.nan, device="cuda")
    out = torch.full((case.batch, case.tokens, case.channels), torch.nan, dtype=case.dtype, device="cuda")
    return Bound(plugin, inputs, out, workspace, torch.cuda.Stream())


def check(bound: Bound, case: Case) -> None:
    torch.cuda.synchronize()
    exact = {"out": oracle(bound.inputs, case.head_dim)["out"]}
    reference = {"out": reference_results(bound.inputs, case.head_dim)["out"]}
    assert len(compare({"out": bound.out}, reference, exact)) == 1


@pytest.fixture(scope="session")
def device_kernels(kernels_for: KernelsFor) -> KernelFolder:
    major, minor = torch.cuda.get_device_capability()
    return kernels_for(10 * major + minor)


class TestOnGpu:
    pytestmark = on_gpu

    def test_kernels_take_the_arguments_listed(self, device_kernels: KernelFolder) -> None:
        major, minor = torch.cuda.get_device_capability()
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        mine = [entry for entry in device_kernels.index.kernels if entry.capability == 10 * major + minor]
        for entry in mine:
            kernel = device_kernels.load(entry)
            assert kernel.num_arguments == len(entry.arguments) + entry.hidden_pointers
        assert mine

    @pytest.mark.parametrize("case", VARIANTS + UGLY, ids=str)
    def test_enqueue_matches_the_oracle(self, case: Case, device_kernels: KernelFolder) -> None:
        bound = bind(case, device_kernels)
        torch.cuda.synchronize()
        bound.enqueue()
        check(bound, case)

    @pytest.mark.parametrize(
        "case", [Case(2, 1024, 1152), Case(2, 1000, 2240, qk_norm=True), Case(1, 16384, 512)], ids=str
    )
    def test_captured_graph_replays_on_new_inputs(self, case: Case, device_kernels: KernelFolder) -> None:
        # A folder of its own: nothing is loaded when the capture begins but what `prepare` loads.
        bound = bind(case, KernelFolder.open(device_kernels.path))
        bound.prepare()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=bound.stream):
            bound.enqueue()
        torch.cuda.synchronize()
        assert bound.out.isnan().all(), "a capture runs nothing"
        for seed in (11, 12):
            bound.inputs.qkv.copy_(make_inputs(case, "cuda", seed).qkv)
            bound.out.fill_(torch.nan)
            bound.workspace.fill_(torch.nan)
            graph.replay()
            check(bound, case)

    def test_the_device_needs_neither_torch_nor_triton(self, device_kernels: KernelFolder) -> None:
        command = [sys.executable, "-c", WITHOUT_TORCH, str(device_kernels.path)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout.split()[0] == "equal"


WITHOUT_TORCH = """
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import numpy as np
from sana_runtime.contract import TensorSpec
from sana_runtime.cuda import CudaGraph, CudaMemory, compute_capability
from sana_runtime.plugins import KernelFolder, LinearAttention, Problem

memory = CudaMemory()
kernels = KernelFolder.open(Path(sys.argv[1]))
operation = LinearAttention(kernels, head_dim=32, eps=1e-15, norm_eps=1e-5)
problem = Problem(2, 1000, 96, "float32", True)
random = np.random.default_rng(0)
content = {
    "qkv": random.standard_normal((2, 1000, 288), np.float32),
    "norm_q_weight": random.standard_normal(96, np.float32),
    "norm_k_weight": random.standard_normal(96, np.float32),
    "out": np.full((2, 1000, 96), np.nan, np.float32),
    "workspace": np.full(operation.workspace_bytes(problem) // 4, np.nan, np.float32),
}
tensors = {name: memory.tensor(x, TensorSpec(name, "float32", x.shape)) for name, x in content.items()}
addresses = {name: tensor.address for name, tensor in tensors.items()}
major, minor = compute_capability()
capability = 10 * major + minor
operation.preload(problem, capability)
graph = CudaGraph(memory.stream, lambda: operation.enqueue(problem, capability, addresses, memory.stream))
graph.replay()

q, k, v = np.split(content["qkv"].astype(np.float64), 3, axis=-1)
scaled = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * content[w]
heads = lambda x: x.reshape(2, 1000, 3, 32)
q, k = (heads(np.maximum(scaled(x, w), 0)) for x, w in ((q, "norm_q_weight"), (k, "norm_k_weight")))
numerator = np.einsum("bnhd,bhde->bnhe", q, np.einsum("bnhd,bnhe->bhde", k, heads(v)))
exact = (numerator / np.einsum("bnhd,bhd->bnh", q, k.sum(1))[..., None]).reshape(2, 1000, 96)
error = np.linalg.norm(tensors["out"].numpy() - exact) / np.linalg.norm(exact)
assert error < 1e-6, error
print("equal", error)
"""
