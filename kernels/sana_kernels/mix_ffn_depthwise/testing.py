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
    """One problem: x [batch, height * width, 2 * hidden]; `out_dtype` None or one of 8 bits; `biased`: with x_bias."""

    batch: int
    height: int
    width: int
    hidden: int
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None
    biased: bool = False

    def __str__(self) -> str:
        out = "" if self.out_dtype is None else f"-{dtype_name(self.out_dtype)}"
        what = dtype_name(self.dtype) + "-biased" * self.biased
        return f"b{self.batch}-{self.height}x{self.width}-f{self.hidden}-{what}{out}"


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; `grad` is the gradient of the result."""

    x: torch.Tensor
    x_bias: torch.Tensor | None
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
    x_bias = normal(channels).to(case.dtype) if case.biased else None
    x, weight, bias, grad = (t.to(case.dtype) for t in (x, weight, bias, grad))
    return Inputs(x, x_bias, weight, bias, grad)


def oracle(inputs: Inputs, height: int, width: int) -> dict[str, torch.Tensor]:
    """The result and every gradient in fp64, by autograd. Written apart from the reference on purpose."""
    leaves = {name: t.double().requires_grad_() for name, t in _tensors(inputs).items()}
    t = leaves["x"] + leaves["x_bias"] if "x_bias" in leaves else leaves["x"]
    out = _exact(t, leaves["weight"], leaves["bias"], height, width)
    return {"out": out.detach(), **_gradients(out, leaves, inputs.grad.double())}


def _tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    """What has a gradient, by name."""
    named = {"x": inputs.x, "x_bias": inputs.x_bias, "weight": inputs.weight, "bias": inputs.bias}
    return {name: t for name, t in named.items() if t is not None}


def _gradients(out: torch.Tensor, leaves: Mapping[str, torch.Tensor], grad: torch.Tensor) -> dict[str, torch.Tensor]:
    grads = torch.autograd.grad(out, [*leaves.values()], grad)
    return {f"grad_{name}": t for name, t in zip(leaves, grads, strict=True)}


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
    tensors = (inputs.x, inputs.x_bias, inputs.weight, inputs.bias)
    grads = mix_ffn_depthwise_backward_reference(inputs.grad, *tensors, *sizes)
    named = dict(zip(("grad_x", "grad_x_bias", "grad_weight", "grad_bias"), grads, strict=True))
    reference = {
        "out": mix_ffn_depthwise_reference(*tensors, None, *sizes, None),
        **{name: t for name, t in named.items() if t is not None},
    }
    leaves = {name: t.detach().requires_grad_() for name, t in _tensors(inputs).items()}
    out = mix_ffn_depthwise(
        leaves["x"], leaves["weight"], leaves["bias"], *sizes, x_bias=leaves.get("x_bias"), impl=impl
    )
    candidate = {"out": out.detach(), **_gradients(out, leaves, inputs.grad)}
    return compare(candidate, reference, oracle(inputs, *sizes))


def verify_codes(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> CodeFinding:
    """Hold the 8-bit results of `impl` to the reference's on fresh inputs. Raises AssertionError.

    Every value must be a code that the exact result may get when it is off by no more than the kernel may be, so it can
    differ from the reference's only that near to a tie.
    """
    assert case.out_dtype is not None
    inputs = make_inputs(case, device, seed)
    sizes = (case.height, case.width)
    x, weight, bias = (t.double() for t in (inputs.x, inputs.weight, inputs.bias))
    if inputs.x_bias is not None:
        x = x + inputs.x_bias.double()
    exact = _exact(x, weight, bias, *sizes)
    error = _fp32_error(x, weight, bias, *sizes)
    if case.biased:  # the rounding of x + x_bias, through a SiLU of slope 1.1 at most
        error += _size_error(1.1 * 2.0**-24, x, weight, bias, *sizes)
    if case.dtype == torch.bfloat16 and (impl == "triton" or (impl is None and device == "cuda")):
        error += _rough_error(x, weight, bias, *sizes)
    # The largest results saturate.
    scale = (exact.abs().amax() / (QUANTIZED_DTYPES[case.out_dtype][1] * 1.5)).float()
    codes = mix_ffn_depthwise(
        inputs.x,
        inputs.weight,
        inputs.bias,
        *sizes,
        x_bias=inputs.x_bias,
        out_scale=scale,
        out_dtype=case.out_dtype,
        impl=impl,
    )
    tensors = (inputs.x, inputs.x_bias, inputs.weight, inputs.bias)
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
    own = 2.0**-12 * value.abs() * gate.abs()
    return own + _size_error(2.0**-12, x, weight, bias, height, width)


def _size_error(
    share: float, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """What the result may lose when every SiLU(x) is off by `share` of |x|."""
    value, gate = _convolve(F.silu(x), weight, bias, height, width)
    value_reach, gate_reach = _convolve(x.abs(), weight.abs(), 0 * bias, height, width)
    return share * (value_reach * F.silu(gate).abs() + 1.1 * value.abs() * gate_reach)


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
