"""Inputs, an fp64 oracle and derived bounds for the upsampling convolution; the tests and the benchmark use them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from sana_kernels.linear_attention.testing import CodeFinding, Finding, compare, compare_codes, dtype_name
from sana_kernels.mix_ffn_depthwise.quantization import QUANTIZED_DTYPES, narrow
from sana_kernels.scaled_linear.testing import ROUNDOFF
from sana_kernels.upsample_convolution.api import Impl, upsample_convolution, upsample_convolution_codes
from sana_kernels.upsample_convolution.reference import (
    upsample_convolution_backward_reference,
    upsample_convolution_reference,
)

Values = Literal["normal", "small integers"]
# x, weight and bias.
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_NAMES = ("grad_x", "grad_weight", "grad_bias")


@dataclass(frozen=True)
class Case:
    """An upsampling of x [batch, height, width, inputs] to `outputs` channels."""

    batch: int
    height: int
    width: int
    inputs: int
    outputs: int
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        out = "" if self.out_dtype is None else f"-to-{dtype_name(self.out_dtype)}"
        size = f"b{self.batch}-{self.height}x{self.width}-{self.inputs}to{self.outputs}"
        return f"{size}-{dtype_name(self.dtype)}{out}"


def make_inputs(case: Case, device: str, seed: int = 0, values: Values = "normal") -> tuple[Tensors, torch.Tensor]:
    """((x, weight, bias), the gradient of the result), fresh for every seed, results near one.

    Sums of "small integers" (-1, 0, 1) are exact in any arithmetic.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(*shape: int, size: float = 1.0) -> torch.Tensor:
        if values == "small integers":
            return torch.randint(-1, 2, shape, generator=generator, device=device).to(case.dtype)
        return (torch.randn(shape, generator=generator, device=device) * size).to(case.dtype)

    batch, height, width, inputs, outputs = case.batch, case.height, case.width, case.inputs, case.outputs
    weight = drawn(4 * outputs, 2, 2, inputs, size=(4 * inputs) ** -0.5)
    tensors = drawn(batch, height, width, inputs), weight, drawn(outputs)
    return tensors, drawn(batch, 2 * height, 2 * width, outputs)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, sizes: bool = False) -> torch.Tensor:
    """The result in the dtype of the tensors (fp64), one phase at a time; with `sizes` the sum of the terms' sizes.

    Written apart from the reference on purpose: each phase is a convolution by itself, of an image padded on its side.
    """
    batch, height, width, inputs = x.shape
    outputs = bias.shape[0]
    channels = torch.arange(outputs, device=x.device)
    out = x.new_zeros(batch, 2 * height, 2 * width, outputs)
    size = torch.abs if sizes else torch.clone
    for a in (0, 1):
        for b in (0, 1):
            block = weight[(2 * a + b) * outputs : (2 * a + b + 1) * outputs].permute(0, 3, 1, 2)
            padded = F.pad(x.permute(0, 3, 1, 2), (1 - b, b, 1 - a, a))
            sums = F.conv2d(padded, block).permute(0, 2, 3, 1)
            taken = (4 * channels + 2 * a + b) * inputs // (4 * outputs)
            out[:, a::2, b::2] = size(sums) + size(x[..., taken]) + size(bias)
    return out


def verify(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> list[Finding]:
    """Compare result and gradients of `impl` with fp64 on normal values, and every single result on small integers.

    Raises AssertionError.
    """
    tensors, grad = make_inputs(case, device, seed)
    reference = {"out": upsample_convolution_reference(*tensors, None, None)[0]}
    reference |= dict(zip(_NAMES, upsample_convolution_backward_reference(grad, *tensors), strict=True))
    wide = [t.double().requires_grad_() for t in tensors]
    wanted = exact(*wide)
    oracle = {"out": wanted.detach()}
    oracle |= dict(zip(_NAMES, torch.autograd.grad(wanted, wide, grad.double()), strict=True))
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = upsample_convolution(*leaves, impl=impl)
    found = {"out": out.detach(), **dict(zip(_NAMES, torch.autograd.grad(out, leaves, grad), strict=True))}
    findings = compare(found, reference, oracle, least_bound=2.0**-24 * (4 * case.inputs / 6) ** 0.5)

    tensors, _ = make_inputs(case, device, seed, "small integers")
    wide = [t.double() for t in tensors]
    wanted = exact(*wide)
    error = 2 * ROUNDOFF[torch.float32] * exact(*wide, sizes=True) + ROUNDOFF[case.dtype] * wanted.abs()
    difference = (upsample_convolution(*tensors, impl=impl).double() - wanted).abs()
    wrong = ~(difference <= error)  # also when NaN
    if wrong.any():
        worst = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} results of exact sums are wrong, the first at {worst}: off by "
            f"{float(difference[worst]):.3g}, at most {float(error[worst]):.3g}"
        )
    return findings


def verify_codes(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> CodeFinding:
    """Results and codes in one launch on fresh inputs: the result without codes, bit for bit, and its codes."""
    assert case.out_dtype is not None
    tensors, _ = make_inputs(case, device, seed)
    alone = upsample_convolution(*tensors, impl=impl)
    scale = alone.abs().amax().float() / (QUANTIZED_DTYPES[case.out_dtype][1] * 1.5)
    out, codes = upsample_convolution_codes(*tensors, out_scale=scale, out_dtype=case.out_dtype, impl=impl)
    if not torch.equal(out, alone):
        raise AssertionError(f"{int((out != alone).sum())} of {out.numel()} results are others where there are codes")
    wide = out.double()
    return compare_codes(codes, narrow(out.float(), scale, case.out_dtype), wide, torch.zeros_like(wide), scale)
