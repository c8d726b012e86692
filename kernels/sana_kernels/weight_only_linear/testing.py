"""Inputs, an fp64 oracle and derived bounds for the weight-only linear layer; the tests and the benchmark use them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from sana_kernels.linear_attention.testing import Finding, compare, dtype_name
from sana_kernels.weight_only_linear.api import Impl, weight_only_linear
from sana_kernels.weight_only_linear.reference import weight_only_linear_reference

Values = Literal["normal", "small integers"]
# GELU is nowhere steeper, and what its exponential, division and products round, times 1 + |gate|^3 (README.md).
_GELU_SLOPE, _GELU_ROUNDINGS = 1.13, 16
_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Case:
    """x [batch, tokens, inputs] in `dtype`, weight [outputs, inputs] int8; `scales`: one or one per row of it."""

    batch: int
    tokens: int
    inputs: int
    outputs: int
    dtype: torch.dtype = torch.bfloat16
    scales: Literal["tensor", "row"] = "row"
    bias: bool = False
    gated: bool = False

    def __str__(self) -> str:
        shape = f"b{self.batch}-n{self.tokens}-k{self.inputs}-n{self.outputs}"
        return f"{shape}-{dtype_name(self.dtype)}-per-{self.scales}{'-bias' * self.bias}{'-gated' * self.gated}"


class Inputs(NamedTuple):
    """What the op takes."""

    x: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None


def make_inputs(case: Case, device: str, seed: int = 0, values: Values = "normal") -> Inputs:
    """Fresh for every seed, results near one. Sums of "small integers" (-1, 0, 1) are exact in any arithmetic."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def integers(most: int, *shape: int) -> torch.Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator, device=device)

    tokens = (case.batch, case.tokens, case.inputs)
    x = normal(*tokens) if values == "normal" else integers(1, *tokens)
    most = 127 if values == "normal" else 1
    weight = integers(most, case.outputs, case.inputs).to(torch.int8)
    scale = 1 + 0.2 * normal(*((case.outputs,) if case.scales == "row" else ()))
    bias = normal(case.outputs).to(case.dtype) if case.bias else None
    return Inputs(x.to(case.dtype), weight, scale / most * case.inputs**-0.5, bias)


def oracle(inputs: Inputs) -> torch.Tensor:
    """The linear layer in fp64, without any rounding on the way."""
    exact = torch.einsum("bnk,ok->bno", inputs.x.double(), inputs.weight.double()) * inputs.weight_scale.double()
    return exact if inputs.bias is None else exact + inputs.bias.double()


def gated(wide: torch.Tensor) -> torch.Tensor:
    """gelu(first half) * second half, in fp64 by the formula."""
    gate, rest = wide.chunk(2, dim=-1)
    return gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * rest


def verify(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> list[Finding]:
    """Compare the result of `impl` with the oracle on normal values, and every single element of it on small integers.

    Raises AssertionError.
    """
    inputs = make_inputs(case, device, seed)
    exact = oracle(inputs)
    found = compare(
        {"y": weight_only_linear(*inputs, gated=case.gated, impl=impl)},
        {"y": weight_only_linear_reference(*inputs, case.gated)},
        {"y": gated(exact) if case.gated else exact},
        # What additions one after the other lose (README.md).
        least_bound=2.0**-24 * (case.inputs / 6) ** 0.5,
    )
    verify_exact_sums(case, device, impl, seed=seed)
    return found


def verify_exact_sums(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> None:
    """Every element of exact sums to the bound of README.md. Raises AssertionError."""
    inputs = make_inputs(case, device, seed, "small integers")
    exact = oracle(inputs)
    x, weight, scale, bias = inputs
    before = 5 * 2.0**-24 * oracle(Inputs(x.abs(), weight.abs(), scale.abs(), None if bias is None else bias.abs()))
    if case.gated:
        gate, rest = exact.chunk(2, dim=-1)
        gate_error, rest_error = before.chunk(2, dim=-1)
        exact = gated(exact)
        before = _GELU_SLOPE * gate_error * (rest.abs() + rest_error) + gate.abs() * rest_error
        before += _GELU_ROUNDINGS * 2.0**-24 * (1 + gate.abs() ** 3) * exact.abs()
    error = before + _ROUNDOFF[case.dtype] * (exact.abs() + before + torch.finfo(case.dtype).smallest_normal)
    difference = (weight_only_linear(*inputs, gated=case.gated, impl=impl).double() - exact).abs()
    wrong = ~(difference <= error)  # also when NaN
    if wrong.any():
        worst = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} results of exact sums are wrong, the first at {worst}: off by "
            f"{float(difference[worst]):.3g}, at most {float(error[worst]):.3g}"
        )
