"""Inputs, an fp64 oracle and derived bounds for the scaled linear layer; the tests and the benchmark use them."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from sana_kernels.linear_attention.testing import CodeFinding, Finding, compare, compare_codes, dtype_name
from sana_kernels.mix_ffn_depthwise.quantization import QUANTIZED_DTYPES, narrow
from sana_kernels.scaled_linear.api import Impl, scaled_linear, scaled_linear_codes
from sana_kernels.scaled_linear.reference import residual_sum, scaled_linear_reference

FP8 = torch.float8_e4m3fn
Values = Literal["normal", "small integers"]
# Half the distance from 1 to the next number.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Case:
    """x [batch, tokens, inputs], weight [outputs, inputs] in `factors` (None: in `dtype`, that of the result).

    `scales`: of the weight's codes, one or one per row. `epilogue`: what follows the product. `out_dtype`: codes
    beside the result; with a scale per row they are smoothed.
    """

    batch: int
    tokens: int
    inputs: int
    outputs: int
    dtype: torch.dtype = torch.bfloat16
    factors: torch.dtype | None = None
    scales: Literal["tensor", "row"] = "tensor"
    epilogue: Literal["plain", "bias", "residual", "gate", "gate per batch"] = "plain"
    limit: float | None = None
    out_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        shape = f"b{self.batch}-n{self.tokens}-k{self.inputs}-n{self.outputs}"
        codes = "" if self.factors is None else f"-of-{dtype_name(self.factors)}-per-{self.scales}"
        out = "" if self.out_dtype is None else f"-{dtype_name(self.out_dtype)}"
        limit = "" if self.limit is None else f"-limit{self.limit:g}"
        return f"{shape}-{dtype_name(self.dtype)}{codes}-{self.epilogue.replace(' ', '-')}{limit}{out}"


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case by the names of the arguments; None for what it does not have."""

    x: torch.Tensor
    weight: torch.Tensor
    activation_scale: torch.Tensor | None
    weight_scale: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    gate: torch.Tensor | None
    inverse_smooth: torch.Tensor | None

    def keywords(self) -> dict[str, torch.Tensor | None]:
        """What the public functions take beside x and weight, without `inverse_smooth`."""
        names = ("activation_scale", "weight_scale", "bias", "residual", "gate")
        return {name: getattr(self, name) for name in names}


def make_inputs(case: Case, device: str, seed: int = 0, values: Values = "normal") -> Inputs:
    """Fresh for every seed, results near one. Sums of "small integers" (-1, 0, 1) are exact in any arithmetic."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    factors = case.factors or case.dtype
    size = {FP8: 64.0, torch.int8: 30.0}.get(factors, 1.0) if values == "normal" else 1.0

    def factor(*shape: int) -> torch.Tensor:
        if values == "small integers":
            return torch.randint(-1, 2, shape, generator=generator, device=device).to(factors)
        wide = normal(*shape) * size
        return narrow(wide, torch.ones((), device=device) if factors in QUANTIZED_DTYPES else None, factors)

    x, weight = factor(case.batch, case.tokens, case.inputs), factor(case.outputs, case.inputs)
    spread = case.inputs**-0.5
    quantized = factors in QUANTIZED_DTYPES
    if not quantized and values == "normal":
        weight = (weight.float() * spread).to(factors)
    per_weight = (case.outputs,) if case.scales == "row" else ()
    gates = {"gate": (case.outputs,), "gate per batch": (case.batch, case.outputs)}
    smoothed = case.out_dtype is not None and case.scales == "row"
    has_residual = case.epilogue not in ("plain", "bias")
    return Inputs(
        x,
        weight,
        torch.tensor(1.1 / size, device=device) if quantized else None,
        (1 + 0.2 * normal(*per_weight)) * spread / size if quantized else None,
        normal(case.outputs).to(case.dtype) if case.epilogue != "plain" else None,
        normal(case.batch, case.tokens, case.outputs).to(case.dtype) if has_residual else None,
        normal(*gates[case.epilogue]) if case.epilogue in gates else None,
        1 + 0.2 * normal(case.outputs) if smoothed else None,
    )


def verify(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> list[Finding]:
    """Compare the result of `impl` with the oracle on normal values, and every single element of it on small integers.

    Raises AssertionError.
    """
    inputs = make_inputs(case, device, seed)
    found = compare(
        {"y": run(case, inputs, impl)},
        {"y": separate_operations(case, inputs)},
        {"y": oracle(case, inputs)},
        least_bound=2.0**-24 * (case.inputs / 6) ** 0.5,
    )
    inputs = make_inputs(case, device, seed, "small integers")
    exact, error = oracle(case, inputs), _rounding_error(case, inputs)
    difference = (run(case, inputs, impl).double() - exact).abs()
    wrong = ~(difference <= error)  # also when NaN
    if wrong.any():
        worst = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} results of exact sums are wrong, the first at {worst}: off by "
            f"{float(difference[worst]):.3g}, at most {float(error[worst]):.3g}"
        )
    return found


def verify_codes(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> CodeFinding:
    """Hold the codes of `impl` to the result that it writes beside them, and that result to the oracle.

    Raises AssertionError.
    """
    assert case.out_dtype is not None
    inputs = make_inputs(case, device, seed)
    exact = oracle(case, inputs)
    # The largest results saturate.
    scale = (exact.abs().amax() / (QUANTIZED_DTYPES[case.out_dtype][1] * 1.5)).float()
    y, codes = scaled_linear_codes(
        inputs.x,
        inputs.weight,
        dtype=case.dtype,
        out_scale=scale,
        out_dtype=case.out_dtype,
        inverse_smooth=inputs.inverse_smooth,
        limit=case.limit,
        impl=impl,
        **inputs.keywords(),
    )
    compare({"y": y}, {"y": separate_operations(case, inputs)}, {"y": exact})
    smooth = torch.ones((), device=y.device) if inputs.inverse_smooth is None else inputs.inverse_smooth
    wanted = narrow(y.float() * smooth, scale, case.out_dtype)
    unquantised = y.double() * smooth.double()
    return compare_codes(codes, wanted, unquantised, torch.zeros_like(unquantised), scale)


def run(case: Case, inputs: Inputs, impl: Impl | None) -> torch.Tensor:
    """The result of the public function."""
    return scaled_linear(inputs.x, inputs.weight, dtype=case.dtype, limit=case.limit, impl=impl, **inputs.keywords())


def oracle(case: Case, inputs: Inputs) -> torch.Tensor:
    """The result in fp64, without any rounding on the way."""
    return _parts(case, inputs)[0]


def separate_operations(case: Case, inputs: Inputs) -> torch.Tensor:
    """The result as it comes without the kernel: of FP8 on a GPU by the library's product, which adds in fewer bits
    than fp32 there as the kernel does; else the reference's.
    """
    x, weight, activation_scale, weight_scale = inputs.x, inputs.weight, inputs.activation_scale, inputs.weight_scale
    if case.factors != FP8 or not x.is_cuda:
        return scaled_linear_reference(*arguments(replace(case, out_dtype=None), inputs, None))[0]
    assert activation_scale is not None
    assert weight_scale is not None
    one = torch.ones_like(activation_scale)
    sums = torch._scaled_mm(x.flatten(0, -2), weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=True)
    wide = sums.unflatten(0, x.shape[:-1]) * (activation_scale * weight_scale)
    wide = wide if inputs.bias is None else wide + inputs.bias.float()
    return residual_sum(wide, inputs.residual, inputs.gate, case.limit, case.dtype)


def _parts(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """fp64: the exact result, its branch before the gate, the size of the branch's two terms, residual and gate."""
    exact = torch.einsum("bnk,ok->bno", inputs.x.double(), inputs.weight.double())
    if inputs.activation_scale is not None and inputs.weight_scale is not None:
        exact = exact * inputs.activation_scale.double() * inputs.weight_scale.double()
    zero = torch.zeros((), dtype=torch.float64, device=exact.device)
    bias, residual = (zero if t is None else t.double() for t in (inputs.bias, inputs.residual))
    gate = zero + 1 if inputs.gate is None else inputs.gate.double()
    gate = gate[:, None] if gate.ndim == 2 else gate
    branch = exact + bias
    if case.limit is not None:
        branch = branch.clamp(-case.limit, case.limit)
    return residual + gate * branch, branch, exact.abs() + bias.abs(), residual, gate


def _rounding_error(case: Case, inputs: Inputs) -> torch.Tensor:
    """Bound of README.md for exact sums, fp64 [B, N, outputs]."""
    y, branch, size, residual, gate = _parts(case, inputs)
    unit, fp32, least = ROUNDOFF[case.dtype], ROUNDOFF[torch.float32], torch.finfo(case.dtype).smallest_normal
    before = 4 * fp32 * size
    error = before + unit * (branch.abs() + before) + unit * least
    if case.epilogue in ("plain", "bias"):
        return error
    gated = gate.abs() * (branch.abs() + error)
    error = gate.abs() * error + 2 * fp32 * (residual.abs() + 2 * gated)
    return error + unit * (y.abs() + error) + unit * least


def arguments(case: Case, inputs: Inputs, out_scale: torch.Tensor | None) -> tuple[Any, ...]:
    """What the ops, the reference and the Triton forward take."""
    tensors = (inputs.x, inputs.weight, inputs.activation_scale, inputs.weight_scale, inputs.bias, inputs.residual)
    tail = (inputs.gate, inputs.inverse_smooth, out_scale, case.limit, case.dtype, case.out_dtype)
    return *tensors, *tail
