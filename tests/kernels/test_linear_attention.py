"""The Triton kernels compute ReLU linear attention and its gradients as exactly as the reference does."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import library

from sana_kernels.linear_attention import linear_attention
from sana_kernels.linear_attention.testing import (
    Case,
    compare,
    make_inputs,
    oracle,
    reference_results,
    verify,
    verify_by_head,
    verify_codes,
)
from sana_kernels.mix_ffn_depthwise.testing import compile_ahead

ROOT = Path(__file__).resolve().parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

INTERPRETED = [
    Case(1, 1, 32, dtype=torch.float32),
    Case(3, 63, 64, dtype=torch.float32, qk_norm=True),
    Case(2, 300, 48, head_dim=16, dtype=torch.float16),
    Case(1, 129, 64, head_dim=64, dtype=torch.float16, qk_norm=True),
    Case(2, 130, 64, dtype=torch.bfloat16),
    Case(1, 65, 96, dtype=torch.bfloat16, qk_norm=True),
]

FP8, INT8 = torch.float8_e4m3fn, torch.int8
CODES_INTERPRETED = [
    Case(2, 130, 64, dtype=torch.bfloat16, out_dtype=FP8),
    Case(1, 65, 96, dtype=torch.float32, qk_norm=True, out_dtype=FP8),
    Case(3, 63, 64, dtype=torch.float16, head_dim=16, out_dtype=INT8),
]

INTERPRET = """
import sys, torch
from sana_kernels.linear_attention import testing
floats, codes = eval(sys.argv[1], {"Case": testing.Case, "torch": torch})
# The interpreter cuts fp32 off where bf16 ends instead of rounding: twice the error.
allowances = {torch.bfloat16: 2.0}
for case in floats:
    found = testing.verify(case, "cpu", "triton", allowance=allowances.get(case.dtype, 1.0))
    assert len(found) == (4 if case.qk_norm else 2)
    if not case.qk_norm:
        testing.verify_by_head(case, "cpu", "triton")
for case in codes:
    assert testing.verify_codes(case, "cpu", "triton").values
print(len(floats) + len(codes))
"""


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_op_on_the_cpu_matches_the_oracle(case: Case) -> None:
    assert len(verify(case, "cpu", None)) == (4 if case.qk_norm else 2)


@pytest.mark.parametrize("case", [case for case in INTERPRETED if not case.qk_norm], ids=str)
def test_heads_one_by_one_give_the_same_on_the_cpu(case: Case) -> None:
    verify_by_head(case, "cpu", None)


@pytest.mark.parametrize("case", CODES_INTERPRETED, ids=str)
def test_codes_on_the_cpu_are_those_the_roundings_allow(case: Case) -> None:
    assert verify_codes(case, "cpu", None).different == 0


def test_triton_matches_the_oracle_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRET, repr((INTERPRETED, CODES_INTERPRETED))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(len(INTERPRETED) + len(CODES_INTERPRETED))]


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qknorm"])
def test_op_is_well_formed(qk_norm: bool) -> None:
    inputs = make_inputs(Case(2, 10, 64, dtype=torch.float32, qk_norm=qk_norm), "cpu")
    weights = (inputs.norm_q_weight, inputs.norm_k_weight)
    for tensor in (inputs.qkv, *weights):
        if tensor is not None:
            tensor.requires_grad_()
    arguments = (inputs.qkv, *weights, 32, 1e-15, 1e-5)
    library.opcheck(torch.ops.sana.linear_attention.default, arguments)
    library.opcheck(torch.ops.sana.linear_attention.default, (*arguments, torch.tensor(0.01), FP8))
    if not qk_norm:
        heads = torch.randn(2, 6, 10, 32, requires_grad=True)
        library.opcheck(torch.ops.sana.linear_attention.default, (heads, None, None, 32, 1e-15, 1e-5))


def test_codes_have_no_gradient_and_the_shape_of_the_result() -> None:
    qkv = torch.randn(2, 10, 192, requires_grad=True)
    codes = linear_attention(qkv, head_dim=32, out_scale=torch.tensor(0.01), out_dtype=INT8)
    assert (codes.shape, codes.dtype, codes.requires_grad) == ((2, 10, 64), INT8, False)


def test_a_scale_and_an_8_bit_dtype_are_given_together() -> None:
    qkv, scale = torch.ones(1, 4, 96), torch.tensor(0.01)
    with pytest.raises(ValueError, match=r"linear_attention: .*given together"):
        linear_attention(qkv, head_dim=32, out_dtype=FP8)
    with pytest.raises(ValueError, match=r"linear_attention: .*given together"):
        linear_attention(qkv, head_dim=32, out_scale=scale)
    with pytest.raises(ValueError, match="out_dtype must be float8_e4m3fn or int8"):
        linear_attention(qkv, head_dim=32, out_scale=scale, out_dtype=torch.float16)


def test_export_sees_one_op() -> None:
    class Attention(torch.nn.Module):
        def forward(self, qkv: torch.Tensor) -> torch.Tensor:
            return linear_attention(qkv, head_dim=32)

    with torch.no_grad():
        graph = torch.export.export(Attention(), (torch.ones(2, 10, 192),)).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.sana.linear_attention.default]


def test_triton_refuses_what_it_cannot_run() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"needs a CUDA tensor.*Use impl='reference'"):
        linear_attention(torch.ones(1, 4, 96), head_dim=32, impl="triton")
    with pytest.raises(ValueError, match=r"head_dim in \(16, 32, 64\), got 8"):
        linear_attention(torch.ones(1, 4, 24), head_dim=8, impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        linear_attention(torch.ones(1, 4, 96), head_dim=32, impl="cuda")  # type: ignore[arg-type]


def test_wrong_norm_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[C\] with C=32"):
        linear_attention(torch.ones(1, 4, 96), torch.ones(31), torch.ones(32), head_dim=32)
    with pytest.raises(ValueError, match="given together"):
        linear_attention(torch.ones(1, 4, 96), torch.ones(32), head_dim=32)
    with pytest.raises(ValueError, match=r"norms need packed qkv .*got \(1, 3, 4, 32\)"):
        linear_attention(torch.ones(1, 3, 4, 32), torch.ones(32), torch.ones(32), head_dim=32)


@pytest.mark.parametrize("shape", [(4, 96), (1, 4, 95), (1, 4, 4, 32), (1, 3, 4, 16)], ids=str)
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"qkv must be \[B, N, 3C\].* or \[B, 3 heads, N, 32\]"):
        linear_attention(torch.ones(shape), head_dim=32)


@pytest.mark.parametrize("name", ["key_rms_kernel", "apply_kernel", "query_backward_kernel"])
def test_fp64_scalars_do_not_spread(name: str) -> None:
    """torch.compile passes Python's floats as fp64; a mixed product does not even compile."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sana_kernels.linear_attention import triton as kernels

    kernel = getattr(kernels, name)
    blocks = {"QK_NORM": True, "HEAD_DIM": 32, "BLOCK_N": 32, "BLOCK_ROWS": 4, "BLOCK_C": 128, "BY_HEAD": False}
    constants = {key: value for key, value in blocks.items() if key in kernel.arg_names}
    types = {
        argument: "*fp32" if argument.endswith("_ptr") else "fp64" if "eps" in argument else "i32"
        for argument in kernel.arg_names
    }
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 89, 32), options={"enable_fp_fusion": True}).asm["ptx"]
    assert set(re.findall(r"\b[\w.]+\.f64\b", ptx)) == {"cvt.rn.f32.f64"}


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 110, 120])
def test_the_kernel_that_writes_codes_compiles_without_a_gpu(capability: int) -> None:
    pytest.importorskip("triton")
    from sana_kernels.linear_attention import triton as kernels

    tile = kernels.tilings(2, 32).apply
    types = dict.fromkeys(("qkv", "norm_q_weight"), "*bf16") | dict.fromkeys(("parts", "scale"), "*fp32")
    types |= {"out": "*fp8e4nv" if capability >= 89 else "*i8", "eps": "fp32"}
    constants = {"QK_NORM": False, "HEAD_DIM": 32, "BLOCK_N": tile.block_rows, "BY_HEAD": True}
    compiled = compile_ahead(kernels.apply_codes_kernel, capability, types, constants, tile.num_warps)
    assert f".target sm_{capability}" in compiled.asm["ptx"]


@functools.cache
def load_benchmark() -> ModuleType:
    path = ROOT / "benchmarks" / "linear_attention.py"
    spec = importlib.util.spec_from_file_location("linear_attention_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark  # dataclasses look their module up
    spec.loader.exec_module(benchmark)
    return benchmark


def test_a_sweep_tries_the_tiling_in_use_first_and_none_twice() -> None:
    pytest.importorskip("triton")
    from sana_kernels.linear_attention import triton as kernels

    tiles, benchmark = kernels.tilings(2, 32), load_benchmark()
    for kernel in ("state", "apply"):
        tried = [*benchmark.candidates(kernel, tiles)]
        assert tried[0] == getattr(tiles, kernel)
        assert len({*tried}) == len(tried) > 10


def test_the_readme_shows_the_committed_rows() -> None:
    benchmark = load_benchmark()
    readme = benchmark.README.read_text(encoding="utf-8")
    assert readme == benchmark.rendered(readme, benchmark.read_rows())


def test_a_wrong_result_is_found() -> None:
    case = Case(1, 20, 32, dtype=torch.float32)
    inputs = make_inputs(case, "cpu")
    exact, reference = oracle(inputs, 32), reference_results(inputs, 32)
    wrong = {**reference, "out": reference["out"].clone()}
    wrong["out"][0, 19, 3] = torch.nan
    with pytest.raises(AssertionError, match=r"out: .* at \(0, 19, 3\)"):
        compare(wrong, reference, exact)


# --- On a GPU ---

VARIANTS = {"0.6b": (2, 1152, False), "1.6b": (2, 2240, False), "sprint": (1, 1152, True)}
DECODER = {"stage-3": (1, 512, False), "stage-5": (1, 1024, False)}
HALF = [
    Case(batch, tokens, channels, qk_norm=norm)
    for batch, channels, norm in (*VARIANTS.values(), *DECODER.values())
    for tokens in (64, 1000, 1024, 4096, 16384)
]
OTHERS = [
    Case(3, 63, 64, dtype=torch.float32, qk_norm=True),
    Case(1, 1, 96, dtype=torch.float16),
    Case(5, 1, 64),
    Case(2, 4097, 1152, dtype=torch.float32),
    Case(2, 4097, 2240, dtype=torch.float16, qk_norm=True),
    Case(1, 16384, 512, dtype=torch.float32),
    Case(1, 65536, 1152),
    Case(1, 65536, 256, dtype=torch.float16, qk_norm=True),
    Case(70, 127, 64),
    Case(2, 1025, 128, head_dim=16),
    Case(2, 1025, 256, head_dim=64),
    Case(2, 1025, 256, head_dim=64, dtype=torch.float32, qk_norm=True),
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", HALF + OTHERS, ids=str)
def test_triton_matches_the_oracle(case: Case) -> None:
    assert len(verify(case, "cuda", "triton", seed=case.tokens)) == (4 if case.qk_norm else 2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [Case(1, 16384, 512), Case(2, 1000, 96, dtype=torch.float32)], ids=str)
def test_heads_one_by_one_give_the_same(case: Case) -> None:
    verify_by_head(case, "cuda", "triton")


CODES = [
    Case(2, 1024, 1152, out_dtype=FP8),
    Case(2, 1000, 2240, out_dtype=INT8),
    Case(1, 1024, 1152, qk_norm=True, out_dtype=FP8),
    Case(3, 63, 64, dtype=torch.float32, out_dtype=FP8),
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CODES, ids=str)
def test_triton_codes_are_those_the_roundings_allow(case: Case) -> None:
    assert verify_codes(case, "cuda", "triton", seed=case.tokens).values


@pytest.mark.gpu
@needs_gpu
def test_the_same_input_gives_the_same_bits() -> None:
    inputs = make_inputs(Case(2, 4097, 1152), "cuda")
    first, second = (linear_attention(inputs.qkv, head_dim=32, impl="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("poisoned")
def test_the_default_on_cuda_is_triton_also_for_views() -> None:
    inputs = make_inputs(Case(2, 200, 96, dtype=torch.float16), "cuda")
    view = inputs.qkv.transpose(1, 2).contiguous().transpose(1, 2)
    assert not view.is_contiguous()
    expected = linear_attention(inputs.qkv, head_dim=32, impl="triton")
    assert torch.equal(linear_attention(view, head_dim=32), expected)


@pytest.mark.gpu
@needs_gpu
def test_nan_is_not_swallowed() -> None:
    qkv = torch.randn(1, 300, 96, device="cuda")
    qkv[0, 7, 40] = torch.nan  # in k of the only head
    assert linear_attention(qkv, head_dim=32, impl="triton").isnan().any()


@pytest.mark.gpu
@needs_gpu
def test_compiled_triton_op_matches_eager() -> None:
    inputs = make_inputs(Case(2, 333, 64, dtype=torch.float32, qk_norm=True), "cuda")
    leaves = [x.requires_grad_() for x in (inputs.qkv, inputs.norm_q_weight, inputs.norm_k_weight) if x is not None]

    def loss(qkv: torch.Tensor, norm_q: torch.Tensor, norm_k: torch.Tensor) -> torch.Tensor:
        out = linear_attention(qkv, norm_q, norm_k, head_dim=32, impl="triton")
        return (out * inputs.grad).sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
