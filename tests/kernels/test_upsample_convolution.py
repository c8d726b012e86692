"""The Triton kernel upsamples and convolves as exactly as roundings allow."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import library
from torch.nn import functional as F

from sana_kernels.mix_ffn_depthwise.testing import compile_ahead
from sana_kernels.upsample_convolution import phase_weight, upsample_convolution, upsample_convolution_codes
from sana_kernels.upsample_convolution.testing import Case, make_inputs, verify, verify_codes

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
FP8, INT8 = torch.float8_e4m3fn, torch.int8
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Tiles are 32 pixels x 64 channels, or 128 x 128 in parts of 32: some shapes end inside a part, some inside a row.
ON_CPU = [
    Case(1, 1, 1, 4, 4, FP32),
    Case(2, 3, 5, 16, 8, FP32),
    Case(1, 4, 3, 40, 40, BF16),
    Case(2, 2, 7, 48, 12, FP16),
    Case(1, 3, 3, 8, 6, FP32),  # three repeats, of which no two phases share one
    Case(1, 2, 3, 4, 72, FP32),
    Case(1, 7, 19, 80, 160, BF16),
]
CODES_ON_CPU = [
    Case(2, 3, 5, 16, 8, FP32, FP8),
    Case(1, 4, 7, 96, 48, BF16, FP8),
    Case(1, 5, 6, 24, 24, FP16, INT8),
]
INTERPRET = """
import sys, torch
from sana_kernels.upsample_convolution import testing
floats, codes = eval(sys.argv[1], {"Case": testing.Case, "torch": torch})
for case in floats:
    assert len(testing.verify(case, "cpu", "triton")) == 4
for case in codes:
    assert testing.verify_codes(case, "cpu", "triton").values
print(len(floats) + len(codes))
"""


@pytest.mark.parametrize("case", ON_CPU, ids=str)
def test_op_on_the_cpu_matches_the_oracle(case: Case) -> None:
    assert len(verify(case, "cpu", None)) == 4


@pytest.mark.parametrize("case", CODES_ON_CPU, ids=str)
def test_codes_on_the_cpu_are_those_of_the_result(case: Case) -> None:
    assert verify_codes(case, "cpu", None).different == 0


def test_triton_matches_the_oracle_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRET, repr((ON_CPU, CODES_ON_CPU))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(len(ON_CPU) + len(CODES_ON_CPU))]


def test_it_is_the_convolution_of_the_upsampled_image_and_the_shuffled_channels() -> None:
    x, weight, bias = torch.randn(2, 16, 3, 5), torch.randn(8, 16, 3, 3), torch.randn(8)
    shortcut = F.pixel_shuffle(x.repeat_interleave(2, dim=1), 2)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1) + shortcut
    stored = phase_weight(weight).permute(0, 2, 3, 1)
    found = upsample_convolution(x.permute(0, 2, 3, 1), stored, bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# What a program may take, where it is more than on every GPU since compute capability 8.0.
SHARED_BYTES = {90: 227 << 10, 110: 227 << 10}
# Of the products' instructions: Ampere's, Hopper's for groups of warps, Blackwell's.
INSTRUCTIONS = {
    80: r"mma\.sync\S+bf16",
    86: r"mma\.sync\S+bf16",
    87: r"mma\.sync\S+bf16",
    89: r"mma\.sync\S+bf16",
    90: r"wgmma\.mma_async\S+bf16",
    110: r"tcgen05\.mma",
    120: r"mma\.sync\S+bf16",
}


@pytest.mark.parametrize("capability", list(INSTRUCTIONS))
@pytest.mark.parametrize(("inputs", "outputs", "codes"), [(256, 128, True), (512, 512, False)])
def test_kernel_compiles_without_a_gpu(capability: int, inputs: int, outputs: int, codes: bool) -> None:
    pytest.importorskip("triton")
    from sana_kernels.machine import COMMON_SHARED_BYTES
    from sana_kernels.upsample_convolution import triton as kernels

    shared = SHARED_BYTES.get(capability, COMMON_SHARED_BYTES)
    out_dtype = (FP8 if capability >= 89 else INT8) if codes else None
    kind = {FP8: "*fp8e4nv", INT8: "*i8", None: "*bf16"}[out_dtype]
    x = torch.empty(1, 128, 128, inputs, dtype=BF16, device="meta")
    constants = kernels.constants(x, out_dtype, kernels.tiling(128 * 128, outputs, BF16, shared), outputs)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    types = {**dict.fromkeys(("x", "weight", "bias", "out"), "*bf16"), "out_scale": "*fp32", "codes": kind}
    compiled = compile_ahead(kernels.upsample_convolution_kernel, capability, types, constants, warps, stages)
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    assert re.search(INSTRUCTIONS[capability], ptx)
    # Factors are loaded by asynchronous copies of 16 bytes, and the results leave in 16 bytes a thread.
    assert "cp.async.cg.shared.global" in ptx
    assert "cp.async.ca" not in ptx
    assert "st.global.v4.b32" in ptx
    assert compiled.metadata.shared <= shared


@pytest.mark.parametrize("out_dtype", [None, INT8], ids=str)
def test_op_is_well_formed(out_dtype: torch.dtype | None) -> None:
    tensors, _ = make_inputs(Case(2, 3, 5, 16, 8, FP32), "cpu")
    tensors = [t.requires_grad_(out_dtype is None) for t in tensors]
    scale = None if out_dtype is None else torch.tensor(0.1)
    library.opcheck(torch.ops.sana.upsample_convolution.default, (*tensors, scale, out_dtype))


def test_codes_have_no_gradient() -> None:
    (x, weight, bias), _ = make_inputs(Case(1, 3, 5, 16, 8, FP32), "cpu")
    quantized: dict = {"out_scale": torch.tensor(0.1), "out_dtype": FP8}
    out, codes = upsample_convolution_codes(x, weight, bias.requires_grad_(), **quantized)
    assert not codes.requires_grad
    assert torch.equal(torch.autograd.grad(out.sum(), bias)[0], torch.full_like(bias, 6 * 10))


def test_what_does_not_fit_is_refused() -> None:
    (x, weight, bias), _ = make_inputs(Case(1, 3, 5, 16, 8), "cpu")
    with pytest.raises(ValueError, match=r"weight must be \(32, 2, 2, 16\).*got \(31, 2, 2, 16\)"):
        upsample_convolution(x, weight[1:], bias)
    with pytest.raises(ValueError, match="I a divisor of 4 O"):
        upsample_convolution(x, weight, bias[:3])
    with pytest.raises(ValueError, match="must have one dtype"):
        upsample_convolution(x, weight.float(), bias)
    with pytest.raises(ValueError, match="impl must be"):
        upsample_convolution(x, weight, bias, impl="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out_scale must be one float32 number"):
        upsample_convolution_codes(x, weight, bias, out_scale=torch.ones(2), out_dtype=FP8)


def test_triton_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from sana_kernels.upsample_convolution import triton as kernels

    (x, weight, bias), _ = make_inputs(Case(1, 3, 5, 16, 8), "cpu")
    with pytest.raises(ValueError, match=r"upsample_convolution: .* needs a CUDA tensor.*Use impl='reference'"):
        upsample_convolution(x, weight, bias, impl="triton")
    monkeypatch.setattr(kernels.mix_ffn_depthwise, "check_support", lambda *_: None)
    many = torch.empty(1, 2**15, 2**14, 16, dtype=BF16, device="meta")
    with pytest.raises(ValueError, match="counts pixels in 32 bits, got 2147483648"):
        upsample_convolution(many, weight, bias, impl="triton")


# --- On a GPU ---

DECODER = [
    Case(1, 128, 128, 512, 512),
    Case(1, 256, 256, 512, 256),
    Case(1, 260, 512, 256, 128),
    Case(1, 40, 33, 256, 128, FP32),
    Case(2, 16, 16, 1024, 1024, FP16),
    Case(3, 7, 9, 48, 12),
]
CODES = [
    Case(1, 128, 128, 512, 512, out_dtype=FP8),
    Case(1, 256, 256, 512, 256, out_dtype=INT8),
    Case(1, 260, 512, 256, 128, out_dtype=FP8),
    Case(2, 7, 9, 48, 12, FP32, FP8),
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", DECODER, ids=str)
def test_triton_matches_the_oracle(case: Case) -> None:
    assert len(verify(case, "cuda", "triton", seed=case.height)) == 4


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CODES, ids=str)
def test_codes_are_those_of_the_result(case: Case) -> None:
    found = verify_codes(case, "cuda", "triton", seed=case.height)
    assert found.different <= found.near_ties


@pytest.mark.gpu
@needs_gpu
def test_compiled_triton_op_matches_eager() -> None:
    tensors, grad = make_inputs(Case(2, 5, 7, 16, 8, FP32), "cuda")
    leaves = [t.requires_grad_() for t in tensors]

    def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (upsample_convolution(x, weight, bias, impl="triton") * grad).sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
