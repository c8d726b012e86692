"""The Triton kernel computes a linear layer of INT8 weights as exactly as its roundings allow."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import library

from sana_kernels.mix_ffn_depthwise.testing import compile_ahead
from sana_kernels.weight_only_linear import weight_only_linear
from sana_kernels.weight_only_linear.testing import Case, make_inputs, verify, verify_exact_sums

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Tiles are 64 rows x 128 columns: some shapes end inside one; the depth is cut or not.
ON_CPU = [
    Case(1, 1, 16, 8),
    Case(1, 161, 72, 100, FP16, "tensor", bias=True),
    Case(2, 70, 256, 130, bias=True),
    Case(1, 300, 272, 64),
    Case(3, 33, 512, 64, FP16),
    Case(2, 67, 512, 140, gated=True),
    Case(1, 9, 40, 258, FP16, "tensor", bias=True, gated=True),
]
# The layers of a Gemma-2-2B for a caption, and what is awkward.
LAYERS = [(2304, 4096), (2048, 2304), (2304, 18432), (9216, 2304)]
ON_GPU = [
    *(Case(1, 304, inputs, outputs) for inputs, outputs in LAYERS),
    Case(1, 304, 2304, 18432, gated=True),
    Case(2, 33, 2312, 1000, FP16, "tensor", bias=True, gated=True),
    Case(1, 512, 2304, 4096, FP16, "tensor", bias=True),
    Case(2, 1024, 1152, 3456, bias=True),
    Case(1, 7, 2312, 1000, bias=True),
    Case(1, 160, 256, 64),
]

INTERPRET = """
import sys, torch
from sana_kernels.weight_only_linear import testing
for case in eval(sys.argv[1], {"Case": testing.Case, "torch": torch}):
    assert len(testing.verify(case, "cpu", "triton")) == 1
    print(case)
"""


@pytest.mark.parametrize("case", [*ON_CPU, Case(2, 5, 33, 20, FP32, bias=True)], ids=str)
def test_op_on_the_cpu_matches_the_oracle(case: Case) -> None:
    assert len(verify(case, "cpu", None)) == 1


def test_triton_matches_the_oracle_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRET, repr(ON_CPU)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [str(case) for case in ON_CPU]


# Of the product's instruction: Ampere's; Hopper's, with both factors in shared memory (descriptors behind the sums).
INSTRUCTIONS = {
    ("bf16", 80): r"mma\.sync\S+bf16\.bf16",
    ("fp16", 86): r"mma\.sync\S+f16\.f16",
    ("bf16", 87): r"mma\.sync\S+bf16\.bf16",
    ("bf16", 89): r"mma\.sync\S+bf16\.bf16",
    ("bf16", 90): r"wgmma\.mma_async\S+bf16\.bf16 \{[^{}]*\}, %rd\d+, %rd",
    ("fp16", 90): r"wgmma\.mma_async\S+f16\.f16 \{[^{}]*\}, %rd\d+, %rd",
    ("bf16", 110): r"tcgen05\.mma",
    ("bf16", 120): r"mma\.sync\S+bf16\.bf16",
}


@pytest.mark.parametrize(("kind", "capability"), list(INSTRUCTIONS))
@pytest.mark.parametrize(
    ("depth", "columns", "gated"), [(*LAYERS[0], False), (*LAYERS[3], False), (*LAYERS[2], True)]
)  # in one part, in four, gated
def test_kernel_compiles_without_a_gpu(kind: str, capability: int, depth: int, columns: int, gated: bool) -> None:
    pytest.importorskip("triton")
    from sana_kernels.weight_only_linear import triton as kernels

    dtype = {"bf16": BF16, "fp16": FP16}[kind]
    tile = kernels.tiling(304, columns, depth, gated)
    out = torch.empty(tile.parts, 304, columns // (1 + gated), dtype=dtype if tile.parts == 1 else FP32, device="meta")
    x, weight = torch.empty(304, depth, dtype=dtype, device="meta"), torch.empty(columns, depth, device="meta")
    _, constants = kernels.launch((x, weight, torch.empty(columns, device="meta"), None, out), tile, gated)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    types = {"x": f"*{kind}", "weight": "*i8", "scale": "*fp32", "bias": f"*{kind}"}
    types["out"] = "*fp32" if tile.parts > 1 else f"*{kind}"
    compiled = compile_ahead(kernels.weight_only_linear_kernel, capability, types, constants, warps, stages)
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    assert re.search(INSTRUCTIONS[kind, capability], ptx)
    # x arrives by asynchronous copies of 16 bytes.
    assert "cp.async.cg.shared.global" in ptx
    # What every GPU since compute capability 8.0 gives a program.
    assert compiled.metadata.shared <= 99 << 10


@pytest.mark.parametrize(("rows", "columns", "depth"), [(304, 2304, 9216), (1, 64, 64), (304, 64, 100)])
def test_depth_is_cut_only_where_tiles_are_few_and_parts_come_out_even(rows: int, columns: int, depth: int) -> None:
    pytest.importorskip("triton")
    from sana_kernels.weight_only_linear.triton import tiling

    tile = tiling(rows, columns, depth)
    assert depth % tile.parts == 0
    assert (tile.parts > 1) == (depth % 256 == 0)
    assert tiling(rows, columns, depth, gated=True).parts == 1


def test_wrong_arguments_are_refused() -> None:
    x, weight, scale, bias = make_inputs(Case(2, 5, 16, 8, bias=True), "cpu")
    for arguments, what in (
        ((x[..., :-1], weight, scale), r"weight \[N, K\]"),
        ((x[0, 0], weight, scale), r"x must be \[..., K\]"),
        ((x.double(), weight, scale), "x must be float32, bfloat16 or float16"),
        ((x, weight.float(), scale), "weight int8"),
        ((x, weight, scale[:3]), "weight_scale must be 1 or 8 float32"),
        ((x, weight, scale.double()), "weight_scale must be 1 or 8 float32"),
        ((x, weight, scale, bias[:3]), r"bias must be \[8\]"),
    ):
        with pytest.raises(ValueError, match=what):
            weight_only_linear(*arguments)
    with pytest.raises(ValueError, match="even number of rows in weight, got 7"):
        weight_only_linear(x, weight[:7], scale[:7], gated=True)
    with pytest.raises(ValueError, match="impl must be"):
        weight_only_linear(x, weight, scale, impl="cuda")  # type: ignore[arg-type]


def test_triton_refuses_what_it_cannot_run() -> None:
    pytest.importorskip("triton")
    from sana_kernels.machine import UnsupportedByTriton

    with pytest.raises(UnsupportedByTriton, match="needs a CUDA tensor"):
        weight_only_linear(*make_inputs(Case(1, 5, 16, 8), "cpu"), impl="triton")
    with pytest.raises(UnsupportedByTriton, match="needs bfloat16 or float16"):
        weight_only_linear(*make_inputs(Case(1, 5, 16, 8, FP32), "cpu"), impl="triton")


def test_nothing_in_is_nothing_out() -> None:
    _, *rest = make_inputs(Case(1, 5, 16, 8), "cpu")
    assert weight_only_linear(torch.empty(1, 0, 16, dtype=BF16), *rest).shape == (1, 0, 8)


@pytest.mark.parametrize("case", [ON_CPU[1], ON_CPU[2], ON_CPU[-1]], ids=str)
def test_op_is_well_formed(case: Case) -> None:
    library.opcheck(torch.ops.sana.weight_only_linear.default, (*make_inputs(case, "cpu"), case.gated))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_triton_matches_the_oracle(case: Case) -> None:
    assert len(verify(case, "cuda", "triton")) == 1
    # Copies that come too early would spoil a sum now and then.
    for seed in range(1, 20):
        verify_exact_sums(case, "cuda", "triton", seed=seed)
