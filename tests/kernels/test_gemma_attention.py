"""The Triton kernel computes Gemma-2's attention as exactly as its roundings allow."""

import os
import subprocess
import sys

import pytest
import torch
from torch import library

from sana_kernels.gemma_attention import gemma_attention
from sana_kernels.gemma_attention.testing import Case, make_inputs, verify
from sana_kernels.mix_ffn_depthwise.testing import compile_ahead

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

ON_CPU = [
    Case(1, 1, 1, 1, 1, 32),
    Case(70, 33, 51, 4, 2, 32),
    Case(33, 70, 33, 2, 2, 64, dtype=FP16),
    Case(40, 64, 5, 6, 2, 32, soft_cap=None),
]
ON_GPU = [
    Case(304, 224, 300),
    Case(304, 224, 17),
    Case(304, 208, 300, dtype=FP16),
    Case(304, 700, 300, 16, 8, 128),
    Case(33, 65, 33, 4, 4, 64, soft_cap=None),
]

INTERPRET = """
import dataclasses, sys, torch
from sana_kernels.gemma_attention import testing, triton as kernels
for case in eval(sys.argv[1], {"Case": testing.Case, "torch": torch}):
    for parts in (1, 3, 8):
        tile = dataclasses.replace(kernels.tiling(case.tokens, case.heads), parts=parts)
        kernels.tiling = lambda *_: tile
        assert len(testing.verify(case, "cpu", "triton")) == 1
    print(case)
"""


@pytest.mark.parametrize("case", [*ON_CPU, Case(20, 10, 20, 4, 2, 24, dtype=FP32)], ids=str)
def test_op_on_the_cpu_matches_the_oracle(case: Case) -> None:
    assert len(verify(case, "cpu", None)) == 1


def test_triton_matches_the_oracle_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRET, repr(ON_CPU)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [str(case) for case in ON_CPU]


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 110, 120])
@pytest.mark.parametrize(("kind", "soft_cap"), [("bf16", 50.0), ("fp16", 0.0)])
def test_kernel_compiles_without_a_gpu(capability: int, kind: str, soft_cap: float) -> None:
    pytest.importorskip("triton")
    from sana_kernels.gemma_attention import triton as kernels

    tile = kernels.tiling(304, 8)
    tensors = ("qkv", "cosine", "sine", "key", "past_key", "past_value")
    types = {**dict.fromkeys(tensors, f"*{kind}"), **dict.fromkeys(("bias", "out", "sums"), "*fp32")}
    constants = {"HEADS": 8, "KEY_HEADS": 4, "HEAD_DIM": 256, "SCALE": 0.0625, "SOFT_CAP": soft_cap}
    constants |= {"PARTS": tile.parts, "BLOCK_M": tile.positions, "BLOCK_N": tile.keys}
    warps, stages = tile.num_warps, tile.num_stages
    compiled = compile_ahead(kernels.gemma_attention_kernel, capability, types, constants, warps, stages)
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    assert "mma" in ptx
    # What every GPU since compute capability 8.0 gives a program.
    assert compiled.metadata.shared <= 99 << 10


def test_keys_are_cut_where_programs_are_few() -> None:
    pytest.importorskip("triton")
    from sana_kernels.gemma_attention.triton import tiling

    parts = [tiling(tokens, 8).parts for tokens in (1, 128, 304, 4096)]
    assert parts == sorted(parts, reverse=True)
    assert parts[0] > parts[-1] == 1


def test_no_position_sees_those_behind_it() -> None:
    case = Case(9, 3, 9, 2, 1, 32, dtype=FP32)
    inputs = make_inputs(case, "cpu")
    settings = {"heads": 2, "scale": case.scale, "soft_cap": case.soft_cap}
    whole = gemma_attention(*inputs, **settings)
    first = inputs._replace(qkv=inputs.qkv[:4], cosine=inputs.cosine[:4], sine=inputs.sine[:4], bias=inputs.bias[:7])
    torch.testing.assert_close(gemma_attention(*first, **settings), whole[:4])


def test_wrong_arguments_are_refused() -> None:
    case = Case(5, 3, 5, 4, 2, 32)
    inputs = make_inputs(case, "cpu")
    for name, wrong, what in (
        ("qkv", inputs.qkv[:, :-1], r"qkv must be \[T, 256\]"),
        ("qkv", inputs.qkv.double(), "float32, bfloat16 or float16"),
        ("cosine", inputs.cosine[:-1], "cosine must be"),
        ("sine", inputs.sine.float(), "sine must be torch.bfloat16"),
        ("bias", inputs.bias[:-1], "bias must be float32"),
        ("bias", inputs.bias.bfloat16(), "bias must be float32"),
        ("past_key", inputs.past_key[0], "past_key and past_value must be"),
        ("past_value", inputs.past_value[:, :-1], "past_key and past_value must be"),
        ("past_value", inputs.past_value.float(), "past_value must be torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=what):
            gemma_attention(*inputs._replace(**{name: wrong}), heads=4, scale=1.0)
    with pytest.raises(ValueError, match="heads must be a multiple"):
        gemma_attention(*inputs, heads=3, scale=1.0)
    with pytest.raises(ValueError, match="impl must be"):
        gemma_attention(*inputs, heads=4, scale=1.0, impl="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "what"),
    [
        (Case(5, 3, 5, 2, 1, 32), "needs a CUDA tensor"),
        (Case(5, 3, 5, 2, 1, 32, dtype=FP32), "needs bfloat16 or float16"),
        (Case(5, 3, 5, 2, 1, 48), "heads 32, 64, 128 or 256 wide, got 48"),
    ],
    ids=str,
)
def test_triton_refuses_what_it_cannot_run(case: Case, what: str) -> None:
    pytest.importorskip("triton")
    from sana_kernels.machine import UnsupportedByTriton

    with pytest.raises(UnsupportedByTriton, match=what):
        gemma_attention(*make_inputs(case, "cpu"), heads=case.heads, scale=case.scale, impl="triton")


def test_op_is_well_formed() -> None:
    case = Case(5, 3, 5, 4, 2, 32)
    arguments = (*make_inputs(case, "cpu"), case.heads, case.scale, case.soft_cap)
    library.opcheck(torch.ops.sana.gemma_attention.default, arguments)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_triton_matches_the_oracle(case: Case) -> None:
    for seed in range(5):
        assert len(verify(case, "cuda", "triton", seed=seed)) == 1
