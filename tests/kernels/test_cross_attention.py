"""The Triton kernel computes cross-attention, and its 8-bit outputs, as exactly as its roundings allow."""

import os
import subprocess
import sys

import pytest
import torch
from torch import library

from sana_kernels.cross_attention import cross_attention, key_counts
from sana_kernels.cross_attention.testing import Case, make_inputs, verify, verify_codes
from sana_kernels.mix_ffn_depthwise.testing import compile_ahead

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
FP8, INT8 = torch.float8_e4m3fn, torch.int8

ON_CPU = [
    Case(1, 1, 3, 3, 1, 16, torch.float32),
    Case(2, 63, 300, 300, 2, 72, torch.float32),
    Case(3, 33, 70, 5, 1, 112, torch.float32),
    Case(2, 40, 33, 20, 2, 24, torch.bfloat16),
    Case(1, 7, 65, 64, 2, 32, torch.float16),
]
CODES_ON_CPU = [
    Case(2, 63, 70, 65, 2, 72, torch.float32, FP8),
    Case(2, 9, 33, 20, 1, 112, torch.bfloat16, FP8),
    Case(1, 30, 40, 40, 2, 16, torch.float32, INT8),
]
ON_GPU = [
    *(Case(2, 1024, 300, valid, 16, 72) for valid in (300, 41)),
    Case(2, 1024, 300, 300, 20, 112),
    Case(1, 1000, 300, 257, 20, 112, torch.float16),
    Case(2, 250, 300, 300, 16, 72, torch.float32),
    Case(1, 16384, 300, 300, 16, 72),
]
CODES_ON_GPU = [
    Case(2, 1024, 300, 300, 16, 72, out_dtype=FP8),
    Case(2, 1024, 300, 77, 20, 112, out_dtype=FP8),
    Case(2, 1000, 300, 300, 20, 112, out_dtype=INT8),
]

INTERPRET = """
import sys, torch
from sana_kernels.cross_attention import testing
floats, codes = eval(sys.argv[1], {"Case": testing.Case, "torch": torch})
for case in floats:
    assert len(testing.verify(case, "cpu", "triton")) == 3
for case in codes:
    assert testing.verify_codes(case, "cpu", "triton").values
print(len(floats) + len(codes))
"""


@pytest.mark.parametrize("case", ON_CPU, ids=str)
def test_op_on_the_cpu_matches_the_oracle(case: Case) -> None:
    assert len(verify(case, "cpu", None)) == 3


@pytest.mark.parametrize("case", CODES_ON_CPU, ids=str)
def test_codes_on_the_cpu_are_those_the_roundings_allow(case: Case) -> None:
    assert verify_codes(case, "cpu", None).different == 0


def test_triton_matches_the_oracle_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRET, repr((ON_CPU, CODES_ON_CPU))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(len(ON_CPU) + len(CODES_ON_CPU))]


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 110, 120])
@pytest.mark.parametrize("head_dim", [72, 112])
def test_kernel_compiles_without_a_gpu(capability: int, head_dim: int) -> None:
    pytest.importorskip("triton")
    from sana_kernels.cross_attention import triton as kernels

    tile, (piece, rest) = kernels.tiling(2), kernels.pieces(head_dim)
    types = {"query": "*bf16", "key_value": "*bf16", "bias": "*fp32", "counts": "*i32", "scale": "*fp32"}
    types["out"] = "*fp8e4nv" if capability >= 89 else "*i8"
    constants = {"SCALE": 0.1, "HEAD_DIM": head_dim, "PIECE": piece, "REST": rest}
    constants |= {"BLOCK_N": tile.tokens, "BLOCK_S": tile.keys}
    compiled = compile_ahead(kernels.cross_attention_kernel, capability, types, constants, tile.num_warps)
    assert f".target sm_{capability}" in compiled.asm["ptx"]


@pytest.mark.parametrize(("head_dim", "expected"), [(16, (16, 0)), (32, (32, 0)), (72, (64, 16)), (112, (64, 64))])
def test_a_head_is_taken_in_pieces(head_dim: int, expected: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    from sana_kernels.cross_attention.triton import pieces

    assert pieces(head_dim) == expected


def test_key_counts_end_behind_the_last_valid_key() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert key_counts(mask).tolist() == [2, 3, 4, 4]
    assert key_counts(mask).dtype == torch.int32


def test_keys_behind_the_count_are_not_read() -> None:
    inputs = make_inputs(Case(2, 5, 9, 4, 2, 16, torch.float32), "cpu")
    expected = cross_attention(inputs.query, inputs.key_value, inputs.bias, inputs.counts, heads=2)
    spoiled = inputs.key_value.clone()
    spoiled[:, 4:, :32] = 1e3
    assert torch.equal(expected, cross_attention(inputs.query, spoiled, inputs.bias, inputs.counts, heads=2))


def test_wrong_arguments_are_refused() -> None:
    inputs = make_inputs(Case(2, 5, 9, 4, 2, 16, torch.float32), "cpu")
    tensors = [inputs.query, inputs.key_value, inputs.bias, inputs.counts]
    for position, wrong, what in (
        (0, inputs.query[0], "query must be"),
        (1, inputs.key_value[..., :-1], "key_value must be"),
        (1, inputs.key_value.double(), "key_value must be"),
        (2, inputs.bias[:, :-1], "bias must be"),
        (3, inputs.counts.long(), "counts must be"),
    ):
        with pytest.raises(ValueError, match=what):
            cross_attention(*[*tensors[:position], wrong, *tensors[position + 1 :]], heads=2)
    with pytest.raises(ValueError, match="multiple of heads=3"):
        cross_attention(*tensors, heads=3)
    with pytest.raises(ValueError, match="given together"):
        cross_attention(*tensors, heads=2, out_dtype=INT8)


def test_op_is_well_formed() -> None:
    inputs = make_inputs(Case(1, 3, 5, 4, 2, 16, torch.float32), "cpu")
    tensors = (inputs.query.requires_grad_(), inputs.key_value.requires_grad_(), inputs.bias, inputs.counts)
    library.opcheck(torch.ops.sana.cross_attention.default, (*tensors, None, 2, None))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_triton_matches_the_oracle(case: Case) -> None:
    assert len(verify(case, "cuda", "triton")) == 3


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CODES_ON_GPU, ids=str)
def test_triton_codes_are_those_the_roundings_allow(case: Case) -> None:
    assert verify_codes(case, "cuda", "triton").values
