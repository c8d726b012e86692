"""The Triton kernel computes a linear layer with its residual and its codes as exactly as its roundings allow."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import library

from sana_kernels.mix_ffn_depthwise.testing import compile_ahead
from sana_kernels.scaled_linear import scaled_linear, scaled_linear_codes
from sana_kernels.scaled_linear.testing import Case, arguments, make_inputs, run, verify, verify_codes

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
FP8, INT8 = torch.float8_e4m3fn, torch.int8
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Tiles are 64 rows x 128 columns, of which parts of 64: some shapes end inside a part, some with a whole one missing.
ON_CPU = [
    Case(1, 1, 16, 8, FP32),
    Case(2, 63, 72, 100, FP32, epilogue="gate per batch"),
    Case(3, 33, 40, 130, BF16, epilogue="gate"),
    Case(1, 7, 65, 64, FP16, epilogue="residual", limit=1.0),
    Case(2, 50, 272, 150, BF16, FP8, epilogue="gate"),
    Case(1, 70, 128, 64, FP32, FP8, "row", epilogue="bias"),
    Case(2, 50, 272, 150, BF16, INT8, "row", epilogue="gate per batch", limit=0.5),
    Case(1, 70, 1152, 70, FP32, INT8, "tensor", epilogue="plain"),
]
CODES_ON_CPU = [
    Case(2, 50, 272, 150, BF16, FP8, epilogue="gate", out_dtype=FP8),
    Case(2, 50, 272, 150, BF16, INT8, "row", epilogue="gate", out_dtype=INT8),
    Case(2, 9, 33, 20, FP32, epilogue="bias", out_dtype=FP8),
    Case(1, 40, 64, 64, FP16, epilogue="residual", out_dtype=INT8),
]
ON_GPU = [
    *(Case(2, 1024, 1152, outputs, factors=FP8, epilogue="bias") for outputs in (1152, 3456, 5760)),
    Case(2, 1024, 2880, 1152, factors=FP8, epilogue="gate"),
    Case(2, 1024, 2240, 2240, factors=FP8, epilogue="gate"),
    Case(2, 1000, 5600, 2240, factors=FP8, scales="row", epilogue="gate per batch", limit=1.0),
    Case(2, 1024, 1152, 1152, factors=INT8, scales="row", epilogue="gate"),
    Case(1, 999, 2240, 2240, factors=INT8, scales="row", epilogue="gate", limit=0.5),
    Case(2, 1024, 1152, 1152, epilogue="gate"),
    Case(2, 1023, 2240, 200, FP16, epilogue="residual"),
    Case(1, 250, 1152, 1152, FP32, epilogue="gate"),
    Case(1, 20, 1152, 1152, factors=FP8, epilogue="bias"),
    Case(2, 16384, 1152, 1152, factors=FP8, epilogue="gate"),
]
CODES_ON_GPU = [
    Case(2, 1024, 1152, 1152, factors=FP8, epilogue="gate", out_dtype=FP8),
    Case(2, 1024, 2240, 2240, factors=FP8, epilogue="gate", out_dtype=FP8),
    Case(2, 1000, 1152, 1152, factors=INT8, scales="row", epilogue="gate", out_dtype=INT8),
    Case(2, 1024, 1152, 1152, epilogue="gate", out_dtype=FP8),
    Case(2, 16384, 2240, 2240, factors=FP8, epilogue="gate", out_dtype=FP8),
]

INTERPRET = """
import sys, torch
from sana_kernels.scaled_linear import testing
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


# Of the products' instructions: Ampere's, those with 8-bit floats, Hopper's for groups of warps.
INSTRUCTIONS = {
    ("bf16", 80): r"mma\.sync\S+bf16\.bf16",
    ("i8", 80): r"mma\.sync\S+s8\.s8",
    ("i8", 86): r"mma\.sync\S+s8\.s8",
    ("bf16", 87): r"mma\.sync\S+bf16\.bf16",
    ("fp8e4nv", 89): r"mma\.sync\S+e4m3\.e4m3",
    ("fp8e4nv", 90): r"wgmma\.mma_async\S+e4m3\.e4m3",
    ("i8", 90): r"wgmma\.mma_async\S+s8\.s8",
    ("bf16", 90): r"wgmma\.mma_async\S+bf16\.bf16",
    ("fp8e4nv", 110): r"tcgen05\.mma",
    ("fp8e4nv", 120): r"mma\.sync\S+e4m3\.e4m3",
}


@pytest.mark.parametrize(("kind", "capability"), list(INSTRUCTIONS))
@pytest.mark.parametrize("shape", [(2048, 1152, 1152), (32768, 2240, 2240)], ids=str)
def test_kernel_compiles_without_a_gpu(kind: str, capability: int, shape: tuple[int, int, int]) -> None:
    pytest.importorskip("triton")
    from sana_kernels.scaled_linear import triton as kernels

    rows, columns, depth = shape
    factors, codes = {"fp8e4nv": (FP8, FP8), "i8": (INT8, INT8), "bf16": (BF16, INT8)}[kind]

    def virtual(dtype: torch.dtype, *sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    one, row = virtual(FP32), virtual(FP32, columns)
    scales = {"fp8e4nv": (one, one), "i8": (one, row), "bf16": (None, None)}[kind]
    results = virtual(BF16, rows, columns), virtual(codes, rows, columns)
    epilogue = (virtual(BF16, columns), results[0], row, row if kind == "i8" else None, one)
    tensors = (virtual(factors, rows, depth), virtual(factors, columns, depth), *scales, *epilogue, *results)
    tile = kernels.tiling(*shape, itemsize=factors.itemsize, residual=True)
    _, constants = kernels.launch(tensors, None, tile)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    types = dict.fromkeys(("activation_scale", "weight_scale", "gate", "inverse_smooth", "out_scale"), "*fp32")
    types |= dict.fromkeys(("bias", "residual", "out"), "*bf16")
    types |= {"x": f"*{kind}", "weight": f"*{kind}", "codes": "*i8" if kind == "bf16" else f"*{kind}"}
    compiled = compile_ahead(kernels.scaled_linear_kernel, capability, types, constants, warps, stages)
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    assert re.search(INSTRUCTIONS[kind, capability], ptx)
    # Loads are asynchronous copies of 16 bytes, and the results leave in 16 bytes a thread.
    assert "cp.async.cg.shared.global" in ptx
    assert "cp.async.ca" not in ptx
    assert {*re.findall(r"st\.global\.\S+", ptx)} == {"st.global.v4.b32"}
    # What every GPU since compute capability 8.0 gives a program.
    assert compiled.metadata.shared <= 99 << 10


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 32, 2048, 32768])
@pytest.mark.parametrize(("columns", "depth"), [(1152, 1152), (11200, 2240), (64, 64)])
@pytest.mark.parametrize("residual", [False, True])
def test_tilings_are_what_the_kernel_takes(rows: int, columns: int, depth: int, itemsize: int, residual: bool) -> None:
    pytest.importorskip("triton")
    from sana_kernels.scaled_linear.triton import tiling

    tile = tiling(rows, columns, depth, itemsize, residual=residual)
    assert tile.columns // min(tile.columns, tile.part_columns) in (1, 2, 4)
    assert (tile.rows + tile.columns) * tile.depth * itemsize * tile.num_stages <= 96 << 10


def test_a_result_that_is_not_a_number_stays_one() -> None:
    x, weight = torch.full((1, 2, 16), torch.nan), torch.ones(4, 16)
    out = scaled_linear(x, weight, dtype=FP32, limit=1.0, residual=torch.zeros(1, 2, 4))
    assert out.isnan().all()


def test_wrong_arguments_are_refused() -> None:
    inputs = make_inputs(Case(2, 5, 16, 8, BF16, INT8, "row", epilogue="gate"), "cpu")
    good = inputs.keywords()
    for changed, what in (
        ({"activation_scale": None}, "activation_scale belongs to codes"),
        ({"weight_scale": torch.ones(3)}, "weight_scale must be 1 or 8 float32"),
        ({"weight_scale": torch.ones(8, dtype=BF16)}, "weight_scale must be 1 or 8 float32"),
        ({"bias": torch.ones(7)}, r"bias must be \[8\]"),
        ({"residual": torch.ones(2, 5, 7)}, "residual must be torch.bfloat16"),
        ({"residual": torch.ones(2, 5, 8)}, "residual must be torch.bfloat16"),
        ({"gate": torch.ones(3, 8)}, r"gate must be \[8\] or \[2, 8\]"),
        ({"residual": None}, "gate is for a residual"),
        ({"limit": -1.0}, "limit must be positive"),
        ({"impl": "cuda"}, "impl must be"),
    ):
        with pytest.raises(ValueError, match=what):
            scaled_linear(inputs.x, inputs.weight, dtype=BF16, **{**good, **changed})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one dtype"):
        scaled_linear(inputs.x, inputs.weight.float(), dtype=BF16, **good)
    with pytest.raises(ValueError, match=r"weight \[N, K\]"):
        scaled_linear(inputs.x[..., :-1], inputs.weight, dtype=BF16, **good)
    with pytest.raises(ValueError, match="out_dtype must be float8_e4m3fn or int8"):
        scaled_linear_codes(inputs.x, inputs.weight, dtype=BF16, out_scale=torch.ones(()), out_dtype=BF16, **good)


def test_triton_refuses_what_it_cannot_run() -> None:
    pytest.importorskip("triton")
    from sana_kernels.machine import UnsupportedByTriton

    inputs = make_inputs(Case(1, 5, 16, 8, BF16, FP8), "cpu")
    with pytest.raises(UnsupportedByTriton, match="needs a CUDA tensor"):
        run(Case(1, 5, 16, 8, BF16, FP8), inputs, "triton")
    with pytest.raises(UnsupportedByTriton, match="writes float32, bfloat16 or float16"):
        run(Case(1, 5, 16, 8, torch.float64, FP8), inputs, "triton")


def test_eight_bit_floats_need_a_gpu_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from sana_kernels.machine import UnsupportedByTriton
    from sana_kernels.scaled_linear.triton import check_support

    class OnAmpere:
        dtype, device = FP8, torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UnsupportedByTriton, match=r"needs compute capability 8\.9 .* got 8\.6"):
        check_support(OnAmpere(), BF16, None)  # type: ignore[arg-type]
    OnAmpere.dtype = INT8
    check_support(OnAmpere(), BF16, INT8)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedByTriton, match=r"8\.9"):
        check_support(OnAmpere(), BF16, FP8)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [CODES_ON_CPU[1], ON_CPU[3]], ids=str)
def test_op_is_well_formed(case: Case) -> None:
    scale = None if case.out_dtype is None else torch.tensor(0.1)
    library.opcheck(torch.ops.sana.scaled_linear.default, arguments(case, make_inputs(case, "cpu"), scale))


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
