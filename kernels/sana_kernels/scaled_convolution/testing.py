"""Inputs, an fp64 oracle and derived bounds for the scaled convolution; the tests and the benchmark use them."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from sana_kernels.linear_attention.testing import CodeFinding, Finding, compare, compare_codes, dtype_name
from sana_kernels.mix_ffn_depthwise.quantization import QUANTIZED_DTYPES, narrow
from sana_kernels.scaled_convolution.api import Impl, scaled_convolution, scaled_convolution_codes
from sana_kernels.scaled_convolution.reference import finish, scaled_convolution_reference
from sana_kernels.scaled_linear.testing import ROUNDOFF

FP8 = torch.float8_e4m3fn
Values = Literal["normal", "small integers"]


@dataclass(frozen=True)
class Case:
    """x [batch, height, width, inputs], weight [outputs, 3, 3, inputs] in `factors`, results in `dtype`.

    `scales`: of the weight's codes, one or one per output channel. `out_dtype`: codes instead of the result.
    """

    batch: int
    height: int
    width: int
    inputs: int
    outputs: int
    dtype: torch.dtype = torch.bfloat16
    factors: torch.dtype = FP8
    scales: Literal["tensor", "channel"] = "tensor"
    bias: bool = True
    silu: bool = False
    out_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        shape = f"b{self.batch}-{self.height}x{self.width}-c{self.inputs}-o{self.outputs}"
        out = "" if self.out_dtype is None else f"-to-{dtype_name(self.out_dtype)}"
        epilogue = "-bias" * self.bias + "-silu" * self.silu
        return f"{shape}-{dtype_name(self.dtype)}-of-{dtype_name(self.factors)}-per-{self.scales}{epilogue}{out}"


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case by the names of the arguments; None for what it does not have."""

    x: torch.Tensor
    weight: torch.Tensor
    activation_scale: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the public functions take by position."""
        return self.x, self.weight, self.activation_scale, self.weight_scale


def make_inputs(case: Case, device: str, seed: int = 0, values: Values = "normal") -> Inputs:
    """Fresh for every seed, results near one. Sums of "small integers" (-1, 0, 1) are exact in any arithmetic."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    size = {FP8: 64.0, torch.int8: 30.0}[case.factors] if values == "normal" else 1.0

    def factor(*shape: int) -> torch.Tensor:
        if values == "small integers":
            return torch.randint(-1, 2, shape, generator=generator, device=device).to(case.factors)
        return narrow(normal(*shape) * size, torch.ones((), device=device), case.factors)

    per_weight = (case.outputs,) if case.scales == "channel" else ()
    return Inputs(
        factor(case.batch, case.height, case.width, case.inputs),
        factor(case.outputs, 3, 3, case.inputs),
        torch.tensor(1.1 / size, device=device),
        (1 + 0.2 * normal(*per_weight)) * (9 * case.inputs) ** -0.5 / size,
        normal(case.outputs).to(case.dtype) if case.bias else None,
    )


def verify(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> list[Finding]:
    """Compare the result of `impl` with the oracle on normal values, and every single element of it on small integers.

    Raises AssertionError.
    """
    inputs = make_inputs(case, device, seed)
    found = compare(
        {"y": run(case, inputs, impl)},
        {"y": separate_operations(case, inputs)},
        {"y": oracle(case, inputs)[0]},
        least_bound=2.0**-24 * (9 * case.inputs / 6) ** 0.5,
    )
    inputs = make_inputs(case, device, seed, "small integers")
    exact, error = oracle(case, inputs)
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
    """Hold the codes of `impl` to the result that it gives without them, and that result to the oracle.

    Raises AssertionError.
    """
    assert case.out_dtype is not None
    inputs = make_inputs(case, device, seed)
    exact = oracle(case, inputs)[0]
    # The largest results saturate.
    scale = (exact.abs().amax() / (QUANTIZED_DTYPES[case.out_dtype][1] * 1.5)).float()
    y = run(case, inputs, impl)
    compare({"y": y}, {"y": separate_operations(case, inputs)}, {"y": exact})
    codes = scaled_convolution_codes(
        *inputs.tensors,
        dtype=case.dtype,
        out_scale=scale,
        out_dtype=case.out_dtype,
        bias=inputs.bias,
        silu=case.silu,
        impl=impl,
    )
    wanted = narrow(y.float(), scale, case.out_dtype)
    return compare_codes(codes, wanted, y.double(), torch.zeros_like(exact), scale)


def run(case: Case, inputs: Inputs, impl: Impl | None) -> torch.Tensor:
    """The result of the public function."""
    return scaled_convolution(*inputs.tensors, dtype=case.dtype, bias=inputs.bias, silu=case.silu, impl=impl)


def oracle(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 [B, H, W, O]: the result without any rounding on the way, and README.md's bound of one with exact sums."""
    sums = F.conv2d(inputs.x.double().permute(0, 3, 1, 2), inputs.weight.double().permute(0, 3, 1, 2), padding=1)
    scaled = sums.permute(0, 2, 3, 1) * inputs.activation_scale.double() * inputs.weight_scale.double()
    bias = torch.zeros_like(scaled) if inputs.bias is None else inputs.bias.double().expand_as(scaled)
    y = scaled + bias
    unit, fp32, least = ROUNDOFF[case.dtype], ROUNDOFF[torch.float32], torch.finfo(case.dtype).smallest_normal
    before = 4 * fp32 * (scaled.abs() + bias.abs())
    error = before + unit * (y.abs() + before) + unit * least
    if not case.silu:
        return y, error
    # SiLU's slope is at most 1.1; its own arithmetic rounds six times.
    result = F.silu(y)
    error = 1.1 * error + 8 * fp32 * (result.abs() + error)
    return result, error + unit * (result.abs() + error) + unit * least


def separate_operations(case: Case, inputs: Inputs) -> torch.Tensor:
    """The result as it comes without the kernel: of FP8 on a GPU by the library's products of the nine taps, which add
    in fewer bits than fp32 there as the kernel does; else the reference's.
    """
    x, weight, activation_scale, weight_scale = inputs.tensors
    if case.factors != FP8 or not x.is_cuda:
        return scaled_convolution_reference(*arguments(case, inputs, None))
    one = torch.ones_like(activation_scale)
    padded = F.pad(x.float(), (0, 0, 1, 1, 1, 1)).to(FP8)
    columns = torch.cat(
        [padded[:, i : i + case.height, j : j + case.width] for i in range(3) for j in range(3)], dim=-1
    )
    # The library wants sixteen output channels or a multiple.
    rows = F.pad(weight.flatten(1).float(), (0, 0, 0, -case.outputs % 16)).to(FP8)
    sums = torch._scaled_mm(columns.flatten(0, 2), rows.t(), one, one, out_dtype=torch.float32, use_fast_accum=True)[
        :, : case.outputs
    ]
    scale = activation_scale * weight_scale
    return finish(sums.reshape(*x.shape[:-1], -1), scale, inputs.bias, None, case.silu, case.dtype, None)


def arguments(case: Case, inputs: Inputs, out_scale: torch.Tensor | None) -> tuple[Any, ...]:
    """What the ops, the reference and the Triton forward take; codes are written where there is an `out_scale`."""
    out_dtype = None if out_scale is None else case.out_dtype
    return *inputs.tensors, inputs.bias, out_scale, case.silu, case.dtype, out_dtype
