"""The Triton kernels compute the norms, and their 8-bit outputs, as exactly as the references do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import library

from sana_kernels.mix_ffn_depthwise.testing import compile_ahead
from sana_kernels.modulated_norm import (
    channel_rms_norm,
    channel_rms_norm_codes,
    modulated_norm,
    residual_modulated_norm,
)
from sana_kernels.modulated_norm.testing import (
    Case,
    RmsCase,
    make_inputs,
    verify,
    verify_codes,
    verify_rms,
    verify_rms_codes,
)

ROOT = Path(__file__).resolve().parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FP8, INT8 = torch.float8_e4m3fn, torch.int8
ON_CPU = [
    Case(1, 1, 8, torch.float32),
    Case(3, 63, 40, torch.float32, branch=True, gate=True),
    Case(2, 5, 300, torch.bfloat16, branch=True),
    Case(2, 7, 70, torch.float16, branch=True, gate=True),
]
CODES_ON_CPU = [
    Case(2, 9, 70, torch.float32, out_dtype=FP8),
    Case(3, 7, 600, torch.bfloat16, branch=True, gate=True, out_dtype=FP8),
    Case(2, 9, 70, torch.float16, branch=True, out_dtype=INT8),
]
RMS_ON_CPU = [
    RmsCase(1, 8, torch.float32),
    RmsCase(63, 48, torch.float32, "silu", residual=True),
    RmsCase(130, 600, torch.bfloat16, "relu"),
    RmsCase(63, 128, torch.float16, residual=True),
]
RMS_CODES_ON_CPU = [
    RmsCase(63, 48, torch.float32, "silu", residual=True, out_dtype=FP8),
    RmsCase(130, 128, torch.bfloat16, residual=True, out_dtype=FP8),
    RmsCase(31, 600, torch.float16, residual=True, out_dtype=INT8),
]

INTERPRET = """
import sys, torch
from sana_kernels.modulated_norm import testing
names = {"Case": testing.Case, "RmsCase": testing.RmsCase, "torch": torch}
floats, codes, rms, rms_codes = eval(sys.argv[1], names)
for case in floats:
    assert len(testing.verify(case, "cpu", "triton")) == 4 + 2 * case.branch + case.gate
for case in codes:
    assert testing.verify_codes(case, "cpu", "triton").values
for case in rms:
    assert len(testing.verify_rms(case, "cpu", "triton")) == 4 + case.residual
for case in rms_codes:
    assert testing.verify_rms_codes(case, "cpu", "triton").values
print(len(floats) + len(codes) + len(rms) + len(rms_codes))
"""


@pytest.mark.parametrize("case", ON_CPU, ids=str)
def test_op_on_the_cpu_matches_the_oracle(case: Case) -> None:
    assert len(verify(case, "cpu", None)) == 4 + 2 * case.branch + case.gate


@pytest.mark.parametrize("case", RMS_ON_CPU, ids=str)
def test_rms_op_on_the_cpu_matches_the_oracle(case: RmsCase) -> None:
    assert len(verify_rms(case, "cpu", None)) == 4 + case.residual


@pytest.mark.parametrize("case", CODES_ON_CPU, ids=str)
def test_codes_on_the_cpu_are_the_exact_ones_but_beside_ties(case: Case) -> None:
    found = verify_codes(case, "cpu", None)
    assert found.different <= found.near_ties < found.values / 100


@pytest.mark.parametrize("case", RMS_CODES_ON_CPU, ids=str)
def test_rms_codes_on_the_cpu_are_those_of_the_result(case: RmsCase) -> None:
    found = verify_rms_codes(case, "cpu", None)
    assert found.different <= found.near_ties


def test_triton_matches_the_oracle_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    cases = (ON_CPU, CODES_ON_CPU, RMS_ON_CPU, RMS_CODES_ON_CPU)
    command = [sys.executable, "-c", INTERPRET, repr(cases)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(sum(map(len, cases)))]


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 110, 120])
def test_kernels_compile_without_a_gpu(capability: int) -> None:
    pytest.importorskip("triton")
    from sana_kernels.modulated_norm import triton as kernels

    out = "*fp8e4nv" if capability >= 89 else "*i8"
    names = ("x", "shift", "scale", "branch", "gate", "updated", "weight", "bias", "residual", "out")
    types = {**dict.fromkeys(names, "*bf16"), "out_scale": "*fp32", "codes": out}
    modulated = {"HAS_BRANCH": True, "HAS_GATE": True, "CHANNELS": 2240}
    rms = {"HAS_RESIDUAL": True, "HAS_CODES": True, "ACTIVATION": "silu", "CHANNELS": 128}
    for kernel, kernel_types, flags, tile in (
        (kernels.modulated_norm_kernel, {**types, "out": out}, modulated, kernels.tiling(2240)),
        (kernels.channel_rms_norm_kernel, types, rms, kernels.rms_tiling(128)),
    ):
        constants = {**flags, "EPS": 1e-6, "ROWS": tile.rows, "BLOCK_C": tile.block_channels}
        compiled = compile_ahead(kernel, capability, kernel_types, constants, tile.num_warps)
        assert compiled.asm["cubin"]
        assert f".target sm_{capability}" in compiled.asm["ptx"]


@pytest.mark.parametrize("out_dtype", [None, INT8], ids=str)
@pytest.mark.parametrize("folded", [False, True], ids=["plain", "branch"])
def test_op_is_well_formed(folded: bool, out_dtype: torch.dtype | None) -> None:
    inputs = make_inputs(Case(2, 5, 6, torch.float32, branch=folded, gate=folded), "cpu")
    tensors = [None if t is None else t.detach().requires_grad_(out_dtype is None) for t in inputs.tensors]
    scale = None if out_dtype is None else torch.tensor(0.1)
    library.opcheck(torch.ops.sana.modulated_norm.default, (*tensors, scale, 1e-6, out_dtype))


@pytest.mark.parametrize("activation", ["none", "silu", "relu"])
def test_rms_op_is_well_formed(activation: str) -> None:
    x, residual = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(4, requires_grad=True) for _ in range(2))
    library.opcheck(torch.ops.sana.channel_rms_norm.default, (x, weight, bias, residual, None, activation, 1e-5, None))


def test_rms_op_with_codes_is_well_formed() -> None:
    x, residual, weight, bias = (torch.randn(shape) for shape in ((3, 4), (3, 4), (4,), (4,)))
    arguments = (x, weight, bias, residual, torch.tensor(0.1), "none", 1e-5, FP8)
    library.opcheck(torch.ops.sana.channel_rms_norm.default, arguments)


def test_rms_codes_have_no_gradient() -> None:
    x, residual = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    out, codes = channel_rms_norm_codes(
        x, torch.ones(4), torch.ones(4), residual=residual, out_scale=torch.tensor(0.1), out_dtype=FP8
    )
    assert not codes.requires_grad
    assert torch.equal(torch.autograd.grad(out.sum(), residual)[0], torch.ones_like(x))


def test_with_codes_only_the_updated_residual_has_a_gradient() -> None:
    inputs = make_inputs(Case(1, 5, 8, torch.float32, branch=True), "cpu")
    x, branch = inputs.x.requires_grad_(), inputs.branch
    assert branch is not None
    codes, updated = residual_modulated_norm(
        x, branch, None, inputs.shift, inputs.scale, out_scale=torch.tensor(0.1), out_dtype=FP8
    )
    assert not codes.requires_grad
    assert torch.equal(torch.autograd.grad(updated.sum(), x)[0], torch.ones_like(x))


def test_modulation_of_rank_two_is_the_same() -> None:
    inputs = make_inputs(Case(2, 5, 8, torch.float32), "cpu")
    expected = modulated_norm(inputs.x, inputs.shift, inputs.scale)
    assert torch.equal(modulated_norm(inputs.x, inputs.shift[:, 0], inputs.scale[:, 0]), expected)


def test_export_sees_one_op() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return modulated_norm(x, shift, scale)

    with torch.no_grad():
        modulation = torch.ones(2, 1, 8)
        graph = torch.export.export(Norm(), (torch.ones(2, 10, 8), modulation, modulation)).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert torch.ops.sana.modulated_norm.default in called
    assert all(target is torch.ops.sana.modulated_norm.default or "getitem" in str(target) for target in called)


def test_what_does_not_fit_is_refused() -> None:
    x, modulation = torch.ones(2, 6, 8), torch.ones(2, 1, 8)
    with pytest.raises(ValueError, match=r"shift must be \[2, 1, 8\] or \[2, 8\], got \(1, 1, 8\)"):
        modulated_norm(x, modulation[:1], modulation)
    with pytest.raises(ValueError, match="x and branch must be"):
        residual_modulated_norm(x, x[:1], None, modulation, modulation)
    with pytest.raises(ValueError, match="given together"):
        modulated_norm(x, modulation, modulation, out_dtype=INT8)
    with pytest.raises(ValueError, match="impl must be"):
        modulated_norm(x, modulation, modulation, impl="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be \[C\] with C=8"):
        channel_rms_norm(x, torch.ones(7), torch.ones(8))
    with pytest.raises(ValueError, match="residual must have x's shape"):
        channel_rms_norm(x, torch.ones(8), torch.ones(8), residual=x[:1])
    with pytest.raises(ValueError, match="out_dtype must be float8_e4m3fn or int8"):
        channel_rms_norm_codes(x, torch.ones(8), torch.ones(8), out_scale=torch.ones(()), out_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="activation must be"):
        channel_rms_norm(x, torch.ones(8), torch.ones(8), activation="gelu")  # type: ignore[arg-type]


def test_triton_refuses_what_it_cannot_run() -> None:
    pytest.importorskip("triton")
    x, modulation = torch.ones(2, 6, 8), torch.ones(2, 1, 8)
    with pytest.raises(ValueError, match=r"modulated_norm: .* needs a CUDA tensor.*Use impl='reference'"):
        modulated_norm(x, modulation, modulation, impl="triton")
    with pytest.raises(ValueError, match=r"channel_rms_norm: .* needs float32, bfloat16 or float16"):
        channel_rms_norm(x.double(), torch.ones(8), torch.ones(8), impl="triton")


def test_the_readme_shows_the_committed_rows() -> None:
    render = (
        "import mix_ffn_depthwise as b; text = b.readme_path(b_name).read_text(encoding='utf-8'); "
        "assert text == b.rendered(text, b_name, b.read_rows(b_name))"
    ).replace("b_name", repr("modulated_norm"))
    run = subprocess.run(
        [sys.executable, "-c", render], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


# --- On a GPU ---

FOLDED = [{}, {"branch": True}, {"branch": True, "gate": True}]
TRANSFORMER = [
    Case(2, tokens, channels, **folded)
    for channels in (1152, 2240)
    for tokens in (256, 1024, 4096)
    for folded in FOLDED
]
OTHERS = [
    Case(2, 16384, 2240, branch=True, gate=True),
    Case(3, 63, 70, torch.float32, branch=True, gate=True),
    Case(1, 1, 1152, torch.float16),
    Case(5, 1, 8, torch.float32, branch=True),
    Case(2, 4097, 1152, torch.float32, branch=True, gate=True),
    Case(2, 1000, 2240, torch.float16, branch=True, gate=True),
    Case(70, 7, 33),
]
CODES = [
    Case(2, 1024, channels, out_dtype=dtype, **folded)
    for channels in (1152, 2240)
    for dtype in (FP8, INT8)
    for folded in FOLDED
] + [Case(3, 63, 70, torch.float32, branch=True, gate=True, out_dtype=FP8), Case(2, 4096, 1152, out_dtype=FP8)]
DECODER = [
    RmsCase(1024, 1024, residual=True),
    RmsCase(4096, 1024, torch.float32, residual=True),
    RmsCase(16384, 512, residual=True),
    RmsCase(65536, 512, torch.float16, residual=True),
    RmsCase(262144, 256, residual=True),
    RmsCase(1048576, 128, activation="relu"),
    RmsCase(63, 70, torch.float32, "silu", residual=True),
    RmsCase(1, 1, torch.float32),
    RmsCase(4097, 1000, activation="silu"),
    RmsCase(100000, 8, torch.float16, "relu", residual=True),
]
RMS_CODES = [
    RmsCase(65536, 512, residual=True, out_dtype=FP8),
    RmsCase(262144, 256, residual=True, out_dtype=INT8),
    RmsCase(524288, 128, residual=True, out_dtype=FP8),
    RmsCase(4097, 1000, torch.float16, "silu", out_dtype=FP8),
    RmsCase(63, 70, torch.float32, residual=True, out_dtype=INT8),
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", TRANSFORMER + OTHERS, ids=str)
def test_triton_matches_the_oracle(case: Case) -> None:
    assert len(verify(case, "cuda", "triton", seed=case.tokens)) == 4 + 2 * case.branch + case.gate


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CODES, ids=str)
def test_codes_are_the_references_but_beside_ties(case: Case) -> None:
    found = verify_codes(case, "cuda", "triton", seed=case.tokens)
    print(f"{case}: {found}")
    assert found.different <= found.near_ties < found.values / 100


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", DECODER, ids=str)
def test_rms_triton_matches_the_oracle(case: RmsCase) -> None:
    assert len(verify_rms(case, "cuda", "triton", seed=case.rows)) == 4 + case.residual


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", RMS_CODES, ids=str)
def test_rms_codes_are_those_of_the_result(case: RmsCase) -> None:
    found = verify_rms_codes(case, "cuda", "triton", seed=case.rows)
    assert found.different <= found.near_ties


@pytest.mark.gpu
@needs_gpu
def test_rms_of_pixels_in_channels_last_memory() -> None:
    pixels = torch.randn(2, 64, 9, 7, device="cuda").to(memory_format=torch.channels_last)
    weight, bias = torch.randn(64, device="cuda"), torch.randn(64, device="cuda")
    tokens = pixels.permute(0, 2, 3, 1)
    out = channel_rms_norm(tokens, weight, bias, residual=tokens, impl="triton").permute(0, 3, 1, 2)
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = channel_rms_norm(tokens, weight, bias, residual=tokens, impl="reference").permute(0, 3, 1, 2)
    torch.testing.assert_close(out, expected)


@pytest.mark.gpu
@needs_gpu
def test_nan_stays_in_its_row() -> None:
    inputs = make_inputs(Case(1, 30, 96), "cuda")
    inputs.x[0, 7, 40] = torch.nan
    scale = torch.tensor(0.05, device="cuda")
    out = modulated_norm(inputs.x, inputs.shift, inputs.scale, impl="triton")
    codes = modulated_norm(inputs.x, inputs.shift, inputs.scale, out_scale=scale, out_dtype=FP8, impl="triton")
    relu = channel_rms_norm(
        inputs.x, torch.ones(96, device="cuda"), torch.ones(96, device="cuda"), activation="relu", impl="triton"
    )
    for result in (out, codes.float(), relu):
        assert result[0, 7].isnan().all()
        assert result.isnan().sum() == 96


@pytest.mark.gpu
@needs_gpu
def test_compiled_triton_op_matches_eager() -> None:
    inputs = make_inputs(Case(2, 33, 64, torch.float32, branch=True, gate=True), "cuda")
    leaves = [t.detach().requires_grad_() for t in inputs.tensors if t is not None]

    def loss(
        x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        out, updated = residual_modulated_norm(x, branch, gate, shift, scale, impl="triton")
        out = channel_rms_norm(out, shift[0, 0], scale[0, 0], activation="silu", impl="triton")
        return (out * inputs.grad).sum() + (updated * inputs.grad_updated).sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
