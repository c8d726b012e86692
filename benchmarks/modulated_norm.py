"""Time the norms on this GPU beside their peers, and render the table of the kernel's README.

    python benchmarks/modulated_norm.py             # check, measure, write the rows; needs a GPU
    python benchmarks/modulated_norm.py --render    # write the README's table from the rows; needs none

Checks, floor, ceiling and timing as in `mix_ffn_depthwise.py`. Peers: the reference (PyTorch's own layer norm between
element-wise operations, fp32 inside), eager and through torch.compile.
"""

from collections.abc import Callable, Mapping

import torch
from mix_ffn_depthwise import FP8, Call, Problem, input_sets, run

from sana_kernels.modulated_norm import (
    channel_rms_norm,
    channel_rms_norm_codes,
    modulated_norm,
    residual_modulated_norm,
)
from sana_kernels.modulated_norm.testing import (
    EPS,
    RMS_EPS,
    Case,
    RmsCase,
    make_inputs,
    make_rms_inputs,
    verify,
    verify_codes,
    verify_rms,
    verify_rms_codes,
)

CASES = {
    "0.6B, 1024 px, FP8 out": Case(2, 1024, 1152, out_dtype=FP8),
    "0.6B, 1024 px, with gated branch": Case(2, 1024, 1152, branch=True, gate=True),
    "0.6B, 1024 px, with gated branch, FP8 out": Case(2, 1024, 1152, branch=True, gate=True, out_dtype=FP8),
    "1.6B, 1024 px, with gated branch, FP8 out": Case(2, 1024, 2240, branch=True, gate=True, out_dtype=FP8),
    "1.6B, 4096 px, with gated branch, FP8 out": Case(2, 16384, 2240, branch=True, gate=True, out_dtype=FP8),
}
RMS_CASES = {
    "decoder stage 4, 1024 px, residual": RmsCase(4096, 1024, residual=True),
    "decoder stage 2, 1024 px, residual": RmsCase(65536, 512, residual=True),
    "decoder stage 0, 1024 px, residual": RmsCase(1048576, 128, residual=True),
    "decoder stage 2, 1024 px, residual, FP8 beside it": RmsCase(65536, 512, residual=True, out_dtype=FP8),
    "decoder stage 0, 1024 px, residual, FP8 beside it": RmsCase(1048576, 128, residual=True, out_dtype=FP8),
    "decoder output, 1024 px, ReLU": RmsCase(1048576, 128, activation="relu"),
}


def modulated_problem(name: str, case: Case) -> Problem:
    """A modulated norm as a line of the table."""
    rows = case.batch * case.channels
    elements = rows * case.tokens
    in_bytes, out_bytes = case.dtype.itemsize, (case.out_dtype or case.dtype).itemsize
    # x, and with a branch the branch and the updated x; the result; shift, scale and gate.
    floor = elements * (in_bytes * (3 if case.branch else 1) + out_bytes) + rows * (2 + case.gate) * in_bytes
    return Problem(name, str(case), floor, lambda: _check(case), lambda: _calls(case, floor))


def _check(case: Case) -> tuple[float, float]:
    if case.out_dtype is not None:
        codes = verify_codes(case, "cuda", "triton")
        return codes.different, codes.near_ties
    out = next(finding for finding in verify(case, "cuda", "triton") if finding.name == "out")
    return out.relative_rms, out.bound


def _calls(case: Case, bytes_per_call: int) -> Mapping[str, list[Call]]:
    sets = [make_inputs(case, "cuda", seed).tensors for seed in range(input_sets(bytes_per_call))]
    out_scale = None if case.out_dtype is None else torch.tensor(0.05, device="cuda")
    settings: dict = {"eps": EPS, "out_scale": out_scale, "out_dtype": case.out_dtype}

    def operator(tensors: tuple, impl: str) -> object:
        x, shift, scale, branch, gate = tensors
        if branch is None:
            return modulated_norm(x, shift, scale, impl=impl, **settings)
        return residual_modulated_norm(x, branch, gate, shift, scale, impl=impl, **settings)

    return _peers(operator, sets)


def _peers(operator: Callable[..., object], sets: list) -> Mapping[str, list[Call]]:
    compiled = torch.compile(operator)
    return {
        "triton": [lambda t=t: operator(t, "triton") for t in sets],
        "torch.compile": [lambda t=t: compiled(t, "reference") for t in sets],
        "eager": [lambda t=t: operator(t, "reference") for t in sets],
    }


def rms_problem(name: str, case: RmsCase) -> Problem:
    """A channel RMS norm as a line of the table."""
    arrays = 3 if case.residual else 2
    floor = (arrays * case.rows + 2) * case.channels * case.dtype.itemsize
    if case.out_dtype is not None:
        floor += case.rows * case.channels * case.out_dtype.itemsize

    def check() -> tuple[float, float]:
        if case.out_dtype is not None:
            codes = verify_rms_codes(case, "cuda", "triton")
            return codes.different, codes.near_ties
        out = next(finding for finding in verify_rms(case, "cuda", "triton") if finding.name == "out")
        return out.relative_rms, out.bound

    def calls() -> Mapping[str, list[Call]]:
        scale = None if case.out_dtype is None else torch.tensor(0.05, device="cuda")

        def operator(tensors: list[torch.Tensor], impl: str) -> object:
            x, weight, bias, *residual = tensors
            rest = residual[0] if residual else None
            settings: dict = {"residual": rest, "activation": case.activation, "eps": RMS_EPS, "impl": impl}
            if scale is None:
                return channel_rms_norm(x, weight, bias, **settings)
            return channel_rms_norm_codes(x, weight, bias, out_scale=scale, out_dtype=case.out_dtype, **settings)

        return _peers(operator, [make_rms_inputs(case, "cuda", seed)[0] for seed in range(input_sets(floor))])

    return Problem(name, str(case), floor, check, calls)


if __name__ == "__main__":
    modulated = [modulated_problem(name, case) for name, case in CASES.items()]
    run(__doc__, "modulated_norm", modulated + [rms_problem(name, case) for name, case in RMS_CASES.items()])
