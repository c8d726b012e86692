"""Inputs, an fp64 oracle and derived bounds for the middle of Mix-FFN; the tests and the benchmark use them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from sana_kernels.linear_attention.testing import CodeFinding, Finding, compare, compare_codes, dtype_name
from sana_kernels.mix_ffn_depthwise.api import Impl, mix_ffn_depthwise, tap_major
from sana_kernels.mix_ffn_depthwise.quantization import QUANTIZED_DTYPES
from sana_kernels.mix_ffn_depthwise.reference import (
    mix_ffn_depthwise_backward_reference,
    mix_ffn_depthwise_reference,
)

# fp32 roundings that one result can collect, relative to the sum of the sizes of its terms (README.md).
_ROUNDINGS = 40


@dataclass(frozen=True)
class Case:
    """One problem: x [batch, height * width, 2 * hidden]; `out_dtype` None or one of 8 bits."""

    batch: int
    height: int
    width: int
    hidden: int
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        out = "" if self.out_dtype is None else f"-{dtype_name(self.out_dtype)}"
        return f"b{self.batch}-{self.height}x{self.width}-f{self.hidden}-{dtype_name(self.dtype)}{out}"


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; `grad` is the gradient of the result."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    grad: torch.Tensor


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Random normal tensors, fresh for every seed; the weight is laid out by `tap_major`."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    tokens, channels = case.height * case.width, 2 * case.hidden
    x = 2 * normal(case.batch, tokens, channels)
    weight = tap_major(normal(channels, 1, 3, 3) / 3)
    bias, grad = normal(channels), normal(case.batch, tokens, case.hidden)
    return Inputs(*(t.to(case.dtype) for t in (x, weight, bias, grad)))


def oracle(inputs: Inputs, height: int, width: int) -> dict[str, torch.Tensor]:
    """The result and every gradient in fp64, by autograd. Written apart from the reference on purpose."""
    x, weight, bias = (t.double().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias))
    out = _exact(x, weight, bias, height, width)
    grads = torch.autograd.grad(out, (x, weight, bias), inputs.grad.double())
    return {"out": out.detach(), **dict(zip(("grad_x", "grad_weight", "grad_bias"), grads, strict=True))}


def _exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int) -> torch.Tensor:
    value, gate = _convolve(F.silu(x), weight, bias, height, width)
    return value * F.silu(gate)


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, ...]:
    """The halves of the depthwise convolution of tokens, as nine shifted products."""
    padded = F.pad(x.unflatten(1, (height, width)), (0, 0, 1, 1, 1, 1))
    out = bias.expand(x.shape[0], height, width, -1)
    for dy in range(3):
        for dx in range(3):
            out = out + padded[:, dy : dy + height, dx : dx + width] * weight[:, 0, dy, dx]
    return out.flatten(1, 2).chunk(2, dim=-1)


def verify(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> list[Finding]:
    """Compare the result and the gradients of `impl` with the oracle on fresh inputs. Raises AssertionError."""
    inputs = make_inputs(case, device, seed)
    sizes = (case.height, case.width)
    tensors = (inputs.x, inputs.weight, inputs.bias)
    reference = {
        "out": mix_ffn_depthwise_reference(*tensors, None, *sizes, None),
        **_named(mix_ffn_depthwise_backward_reference(inputs.grad, *tensors, *sizes)),
    }
    x, weight, bias = (t.detach().requires_grad_() for t in tensors)
    out = mix_ffn_depthwise(x, weight, bias, *sizes, impl=impl)
    candidate = {"out": out.detach(), **_named(torch.autograd.grad(out, (x, weight, bias), inputs.grad))}
    return compare(candidate, reference, oracle(inputs, *sizes))


def _named(grads: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    return dict(zip(("grad_x", "grad_weight", "grad_bias"), grads, strict=True))


def verify_codes(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> CodeFinding:
    """Hold the 8-bit results of `impl` to the reference's on fresh inputs. Raises AssertionError.

    Every value must be a code that the exact result may get when it is off by no more than the kernel may be, so it can
    differ from the reference's only that near to a tie.
    """
    assert case.out_dtype is not None
    inputs = make_inputs(case, device, seed)
    tensors, sizes = (inputs.x, inputs.weight, inputs.bias), (case.height, case.width)
    x, weight, bias = (t.double() for t in tensors)
    exact = _exact(x, weight, bias, *sizes)
    error = _fp32_error(x, weight, bias, *sizes)
    if case.dtype == torch.bfloat16 and (impl == "triton" or (impl is None and device == "cuda")):
        error += _rough_error(x, weight, bias, *sizes)
    # The largest results saturate.
    scale = (exact.abs().amax() / (QUANTIZED_DTYPES[case.out_dtype][1] * 1.5)).float()
    codes = mix_ffn_depthwise(*tensors, *sizes, out_scale=scale, out_dtype=case.out_dtype, impl=impl)
    reference = mix_ffn_depthwise_reference(*tensors, scale, *sizes, case.out_dtype)
    return compare_codes(codes, reference, exact, error, scale)


def _fp32_error(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What an fp32 computation of the result may lose, from fp64 inputs: README.md."""
    value, gate = _convolve(F.silu(x), weight, bias, height, width)
    value_size, gate_size = _convolve(F.silu(x).abs(), weight.abs(), bias.abs(), height, width)
    # |SiLU'| <= 1.1, and SiLU itself rounds relative to its result.
    return _ROUNDINGS * 2.0**-24 * (value_size * F.silu(gate).abs() + 1.1 * value.abs() * (gate_size + gate.abs()))


def _rough_error(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What the SiLUs of the kernel for bf16 may lose beside that, each up to 2^-12 of the size of its argument."""
    value, gate = _convolve(F.silu(x), weight, bias, height, width)
    value_reach, gate_reach = _convolve(x.abs(), weight.abs(), 0 * bias, height, width)
    return 2.0**-12 * (value_reach * F.silu(gate).abs() + value.abs() * (1.1 * gate_reach + gate.abs()))


def compile_ahead(
    kernel: Any,
    capability: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int = 1,
) -> Any:
    """Compile a Triton kernel for a GPU that need not be there: 89 is sm_89.

    `types` gives the arguments that are not i32, without `_ptr`: {"x": "*bf16"}. Pointers and strides
    are taken to be multiples of 16, as at a launch. Needs triton.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types.get(name.removesuffix("_ptr"), "i32") for name in names}
    aligned = [kernel.arg_names.index(name) for name in names if name.endswith(("_ptr", "_stride"))]
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=dict(constants),
        attrs={(position,): [["tt.divisibility", 16]] for position in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
