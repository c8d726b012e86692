"""The Triton kernel computes a 3x3 convolution over codes, SiLU and the next codes as exactly as roundings allow."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import library
from torch.nn import functional as F

from sana_kernels.mix_ffn_depthwise.testing import compile_ahead
from sana_kernels.scaled_convolution import scaled_convolution, scaled_convolution_codes
from sana_kernels.scaled_convolution.testing import Case, arguments, make_inputs, run, verify, verify_codes

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
FP8, INT8 = torch.float8_e4m3fn, torch.int8
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Tiles are 32 pixels x 64 channels, or 128 x 128 in parts of 32: some shapes end inside a part, some inside a row.
ON_CPU = [
    Case(1, 1, 1, 16, 8, FP32),
    Case(2, 3, 5, 16, 70, BF16, FP8, "channel", silu=True),
    Case(1, 5, 13, 40, 40, FP16, INT8, bias=False),
    Case(2, 9, 8, 144, 40, BF16, INT8, "channel", silu=True),
    Case(1, 7, 19, 128, 150, BF16, FP8, silu=True),
    Case(1, 2, 65, 272, 64, FP32, FP8, bias=False),
]
CODES_ON_CPU = [
    Case(2, 3, 5, 16, 70, BF16, FP8, "channel", silu=True, out_dtype=FP8),
    Case(1, 9, 8, 144, 40, BF16, INT8, silu=True, out_dtype=INT8),
    Case(1, 7, 19, 128, 150, FP32, FP8, bias=False, out_dtype=FP8),
    Case(1, 4, 4, 64, 64, FP16, INT8, "channel", out_dtype=INT8),
]
ON_GPU = [
    Case(1, 128, 128, 512, 512, bias=False),
    Case(1, 256, 256, 256, 256, silu=True),
    Case(1, 514, 1024, 128, 128, silu=True),
    Case(1, 100, 67, 128, 128, FP32, FP8, "channel"),
    Case(2, 33, 20, 256, 40, FP16, FP8),
    Case(1, 128, 128, 512, 512, BF16, INT8, "channel", silu=True),
    Case(3, 20, 21, 144, 300, BF16, INT8),
]
CODES_ON_GPU = [
    Case(1, 128, 128, 512, 512, silu=True, out_dtype=FP8),
    Case(1, 514, 1024, 128, 128, silu=True, out_dtype=FP8),
    Case(1, 100, 67, 256, 256, BF16, INT8, "channel", silu=True, out_dtype=INT8),
]

INTERPRET = """
import sys, torch
from sana_kernels.scaled_convolution import testing
floats, codes = eval(sys.argv[1], {"Case": testing.Case, "torch": torch})
for case in floats:
    assert len(testing.verify(case, "cpu", "triton")) == 1
for case in codes:
    assert testing.verify_codes(case, "cpu", "triton").values
print(len(floats) + len(codes))
"""


@pytest.mark.parametrize("case", ON_CPU, ids=str)
def test_op_on_the_cpu_matches_the_oracle(case: Case) -> None:
    assert len(verify(case, "cpu", None)) == 1


@pytest.mark.parametrize("case", CODES_ON_CPU, ids=str)
def test_codes_on_the_cpu_are_those_of_the_result(case: Case) -> None:
    assert verify_codes(case, "cpu", None).different == 0


def test_triton_matches_the_oracle_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRET, repr((ON_CPU, CODES_ON_CPU))]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [str(len(ON_CPU) + len(CODES_ON_CPU))]


def test_scaled_codes_are_the_convolution_of_what_they_stand_for() -> None:
    case = Case(1, 6, 7, 16, 8, FP32)
    inputs = make_inputs(case, "cpu")
    x, weight = inputs.x.float() * inputs.activation_scale, inputs.weight.float() * inputs.weight_scale
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), inputs.bias, padding=1)
    torch.testing.assert_close(run(case, inputs, None), expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


# What a program may take, where it is more than on every GPU since compute capability 8.0.
SHARED_BYTES = {90: 227 << 10, 110: 227 << 10}
# Of the products' instructions: Ampere's, those with 8-bit floats, Hopper's for groups of warps.
INSTRUCTIONS = {
    ("i8", 80): r"mma\.sync\S+s8\.s8",
    ("i8", 86): r"mma\.sync\S+s8\.s8",
    ("i8", 87): r"mma\.sync\S+s8\.s8",
    ("fp8e4nv", 89): r"mma\.sync\S+e4m3\.e4m3",
    ("fp8e4nv", 90): r"wgmma\.mma_async\S+e4m3\.e4m3",
    ("i8", 90): r"wgmma\.mma_async\S+s8\.s8",
    ("fp8e4nv", 110): r"tcgen05\.mma",
    ("fp8e4nv", 120): r"mma\.sync\S+e4m3\.e4m3",
}


@pytest.mark.parametrize(("kind", "capability"), list(INSTRUCTIONS))
@pytest.mark.parametrize("channels", [128, 512])
@pytest.mark.parametrize("codes", [True, False], ids=["codes", "result"])
def test_kernel_compiles_without_a_gpu(kind: str, capability: int, channels: int, codes: bool) -> None:
    pytest.importorskip("triton")
    from sana_kernels.machine import COMMON_SHARED_BYTES
    from sana_kernels.scaled_convolution import triton as kernels

    shared = SHARED_BYTES.get(capability, COMMON_SHARED_BYTES)
    factors = {"fp8e4nv": FP8, "i8": INT8}[kind]

    def virtual(dtype: torch.dtype, *sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    one = virtual(FP32)
    x, weight = virtual(factors, 1, 256, 256, channels), virtual(factors, channels, 3, 3, channels)
    tensors = (x, weight, one, one, virtual(BF16, channels) if codes else None, one, x)
    _, constants = kernels.launch(tensors, codes, BF16, kernels.tiling(256 * 256, channels, shared))
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    types = dict.fromkeys(("activation_scale", "weight_scale", "out_scale"), "*fp32")
    types |= {"bias": "*bf16", "x": f"*{kind}", "weight": f"*{kind}", "out": f"*{kind}" if codes else "*bf16"}
    compiled = compile_ahead(kernels.scaled_convolution_kernel, capability, types, constants, warps, stages)
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    assert re.search(INSTRUCTIONS[kind, capability], ptx)
    # Loads are asynchronous copies of 16 bytes, and the results leave in 16 bytes a thread.
    assert "cp.async.cg.shared.global" in ptx
    assert "cp.async.ca" not in ptx
    assert {*re.findall(r"st\.global\.\S+", ptx)} == {"st.global.v4.b32"}
    assert compiled.metadata.shared <= shared


def test_wrong_arguments_are_refused() -> None:
    inputs = make_inputs(Case(1, 3, 3, 16, 8, BF16, INT8, "channel"), "cpu")
    good = {name: getattr(inputs, name) for name in ("x", "weight", "activation_scale", "weight_scale", "bias")}
    for changed, what in (
        ({"x": inputs.x[0]}, r"x must be \[B, H, W, C\]"),
        ({"weight": inputs.weight[:, :2]}, r"weight \[O, 3, 3, C\]"),
        ({"x": inputs.x.float()}, "must both be float8_e4m3fn or int8"),
        ({"weight": inputs.weight.to(FP8)}, "must both be float8_e4m3fn or int8"),
        ({"activation_scale": torch.ones(8)}, "activation_scale must be 1 float32"),
        ({"weight_scale": torch.ones(3)}, "weight_scale must be 1 or 8 float32"),
        ({"weight_scale": torch.ones(8, dtype=BF16)}, "weight_scale must be 1 or 8 float32"),
        ({"bias": torch.ones(7)}, r"bias must be \[8\]"),
        ({"impl": "cuda"}, "impl must be"),
    ):
        with pytest.raises(ValueError, match=what):
            scaled_convolution(**{**good, "dtype": BF16, **changed})
    with pytest.raises(ValueError, match="out_dtype must be float8_e4m3fn or int8"):
        scaled_convolution_codes(**good, dtype=BF16, out_scale=torch.ones(()), out_dtype=BF16)


def test_triton_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from sana_kernels.machine import UnsupportedByTriton
    from sana_kernels.scaled_convolution.triton import check_support

    case = Case(1, 3, 3, 16, 8)
    with pytest.raises(UnsupportedByTriton, match="needs a CUDA tensor"):
        run(case, make_inputs(case, "cpu"), "triton")

    class OnAmpere:
        dtype, device, shape = FP8, torch.device("cuda"), torch.Size((1, 2, 3, 16))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UnsupportedByTriton, match=r"needs compute capability 8\.9 .* got 8\.6"):
        check_support(OnAmpere(), BF16, None)  # type: ignore[arg-type]
    OnAmpere.dtype = INT8
    check_support(OnAmpere(), BF16, INT8)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedByTriton, match="rounds to float32"):
        check_support(OnAmpere(), torch.float64, None)  # type: ignore[arg-type]
    OnAmpere.shape = torch.Size((1, 1 << 16, 1 << 15, 16))
    with pytest.raises(UnsupportedByTriton, match="32 bits"):
        check_support(OnAmpere(), BF16, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [CODES_ON_CPU[1], ON_CPU[3]], ids=str)
def test_op_is_well_formed(case: Case) -> None:
    scale = None if case.out_dtype is None else torch.tensor(0.1)
    library.opcheck(torch.ops.sana.scaled_convolution.default, arguments(case, make_inputs(case, "cpu"), scale))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_triton_matches_the_oracle(case: Case) -> None:
    assert len(verify(case, "cuda", "triton")) == 1


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CODES_ON_GPU, ids=str)
def test_triton_codes_are_those_of_the_result(case: Case) -> None:
    assert verify_codes(case, "cuda", "triton").values
