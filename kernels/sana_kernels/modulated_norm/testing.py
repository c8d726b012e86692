"""Inputs, an fp64 oracle and derived bounds for the norms; the tests and the benchmark use them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from sana_kernels.linear_attention.testing import CodeFinding, Finding, compare, compare_codes, dtype_name
from sana_kernels.mix_ffn_depthwise.quantization import QUANTIZED_DTYPES, narrow
from sana_kernels.modulated_norm.api import (
    Impl,
    channel_rms_norm,
    channel_rms_norm_codes,
    modulated_norm,
    residual_modulated_norm,
)
from sana_kernels.modulated_norm.reference import (
    Activation,
    channel_rms_norm_backward_reference,
    channel_rms_norm_reference,
    modulated_norm_backward_reference,
    modulated_norm_reference,
)

EPS = 1e-6
RMS_EPS = 1e-5
# fp32 roundings that one result can collect, relative to the sum of the sizes of its terms (README.md).
_ROUNDINGS = 16
_NAMES = ("x", "shift", "scale", "branch", "gate")


@dataclass(frozen=True)
class Case:
    """A modulated norm of x [batch, tokens, channels]; `branch` and `gate` say what is folded in."""

    batch: int
    tokens: int
    channels: int
    dtype: torch.dtype = torch.bfloat16
    branch: bool = False
    gate: bool = False
    out_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        folded = ("-branch" if self.branch else "") + ("-gate" if self.gate else "")
        out = "" if self.out_dtype is None else f"-{dtype_name(self.out_dtype)}"
        return f"b{self.batch}-n{self.tokens}-c{self.channels}-{dtype_name(self.dtype)}{folded}{out}"


@dataclass(frozen=True)
class RmsCase:
    """A channel RMS norm of x [rows, channels]."""

    rows: int
    channels: int
    dtype: torch.dtype = torch.bfloat16
    activation: Activation = "none"
    residual: bool = False
    out_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        residual = "-residual" if self.residual else ""
        out = "" if self.out_dtype is None else f"-{dtype_name(self.out_dtype)}"
        return f"rows{self.rows}-c{self.channels}-{dtype_name(self.dtype)}-{self.activation}{residual}{out}"


@dataclass(frozen=True)
class Inputs:
    """Tensors of a modulated norm and the gradients of its results."""

    x: torch.Tensor
    shift: torch.Tensor
    scale: torch.Tensor
    branch: torch.Tensor | None
    gate: torch.Tensor | None
    grad: torch.Tensor
    grad_updated: torch.Tensor | None

    @property
    def tensors(self) -> tuple[Any, ...]:
        """What the op takes, in its order."""
        return self.x, self.shift, self.scale, self.branch, self.gate


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Random normal tensors, fresh for every seed: rows off centre, modulations as slices of one table."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    shape = (case.batch, case.tokens, case.channels)
    table = normal(case.batch, 6, case.channels).to(case.dtype)
    shift, scale, gate = table[:, 0:1], table[:, 1:2], table[:, 5:6]
    x = (3 * normal(*shape) + normal(case.batch, case.tokens, 1)).to(case.dtype)
    branch, grad, grad_updated = (normal(*shape).to(case.dtype) for _ in range(3))
    if not case.branch:
        return Inputs(x, shift, scale, None, None, grad, None)
    return Inputs(x, shift, scale, branch, gate if case.gate else None, grad, grad_updated)


def make_rms_inputs(case: RmsCase, device: str, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """([x, weight, bias] and the residual where there is one, the gradient of the result)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    shape = (case.rows, case.channels)
    tensors = [3 * normal(*shape), 1 + normal(case.channels), normal(case.channels)]
    return tensors + ([normal(*shape)] if case.residual else []), normal(*shape)


def _exact(tensors: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both results in the dtype of the tensors (fp64). Written apart from the reference on purpose."""
    x, shift, scale, branch, gate = tensors
    if branch is not None:
        x = torch.addcmul(x, branch, torch.ones_like(branch) if gate is None else gate)
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return torch.addcmul(shift, (x - mean) / (variance + EPS).sqrt(), 1 + scale), x


def oracle(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Both results and every gradient in fp64, by autograd."""
    leaves = [None if t is None else t.double().requires_grad_() for t in inputs.tensors]
    out, updated = _exact(leaves)
    given = {name: t for name, t in zip(_NAMES, leaves, strict=True) if t is not None}
    loss = (out * inputs.grad.double()).sum()
    results = {"out": out.detach()}
    if inputs.grad_updated is not None:
        loss = loss + (updated * inputs.grad_updated.double()).sum()
        results["updated"] = updated.detach()
    grads = torch.autograd.grad(loss, [*given.values()])
    return results | {f"grad_{name}": grad for name, grad in zip(given, grads, strict=True)}


def _call(tensors: Sequence[Any], impl: Impl | None, **quantization: object) -> list[torch.Tensor]:
    """Both results, or the first alone without a branch, of the public functions."""
    x, shift, scale, branch, gate = tensors
    settings: dict = {"eps": EPS, "impl": impl, **quantization}
    if branch is None:
        return [modulated_norm(x, shift, scale, **settings)]
    return [*residual_modulated_norm(x, branch, gate, shift, scale, **settings)]


def verify(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> list[Finding]:
    """Compare results and gradients of `impl` with the oracle on fresh inputs. Raises AssertionError."""
    inputs = make_inputs(case, device, seed)
    names = ("out", "updated")[: 1 + case.branch]
    x, shift, scale, branch, gate = inputs.tensors
    results = modulated_norm_reference(x, shift, scale, branch, gate, None, EPS, None)
    grads = modulated_norm_backward_reference(inputs.grad, inputs.grad_updated, x, shift, scale, branch, gate, EPS)
    reference = dict(zip(names, results, strict=False))
    reference |= {f"grad_{name}": t for name, t in zip(_NAMES, grads, strict=True) if t is not None}
    reference = {name: t for name, t in reference.items() if name != "grad_gate" or case.gate}

    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs.tensors]
    outputs = _call(leaves, impl)
    given = [t for t in leaves if t is not None]
    grads_in = [g for g in (inputs.grad, inputs.grad_updated) if g is not None]
    found = torch.autograd.grad(outputs, given, grads_in)
    present = [name for name, t in zip(_NAMES, leaves, strict=True) if t is not None]
    candidate = {name: t.detach() for name, t in zip(names, outputs, strict=True)}
    candidate |= {f"grad_{name}": t for name, t in zip(present, found, strict=True)}
    return compare(candidate, reference, oracle(inputs))


def verify_codes(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> CodeFinding:
    """Hold the 8-bit results of `impl` to the reference's on fresh inputs: as in mix_ffn_depthwise.testing."""
    assert case.out_dtype is not None
    inputs = make_inputs(case, device, seed)
    wide = [None if t is None else t.double() for t in inputs.tensors]
    exact, error = _exact(wide)[0], _fp32_error(wide)
    scale = (exact.abs().amax() / (QUANTIZED_DTYPES[case.out_dtype][1] * 1.5)).float()
    codes = _call(inputs.tensors, impl, out_scale=scale, out_dtype=case.out_dtype)[0]
    x, shift, modulation, branch, gate = inputs.tensors
    results = modulated_norm_reference(x, shift, modulation, branch, gate, scale, EPS, case.out_dtype)
    return compare_codes(codes, results[0], exact, error, scale)


def _fp32_error(tensors: Sequence[Any]) -> torch.Tensor:
    """What an fp32 computation of the first result may lose, from fp64 inputs: README.md."""
    x, shift, scale, branch, gate = tensors
    size = x.abs()
    if branch is not None:
        size = size + (branch if gate is None else branch * gate).abs()
    out, updated = _exact(tensors)
    deviation = (updated.var(dim=-1, keepdim=True, correction=0) + EPS).sqrt()
    size = (size + size.mean(-1, keepdim=True)) / deviation
    return _ROUNDINGS * 2.0**-24 * (size * (1 + scale).abs() + shift.abs() + out.abs())


def verify_rms(case: RmsCase, device: str, impl: Impl | None, *, seed: int = 0) -> list[Finding]:
    """Compare result and gradients of the channel RMS norm with fp64 on fresh inputs. Raises AssertionError."""
    tensors, grad = make_rms_inputs(case, device, seed)
    names = ("grad_x", "grad_weight", "grad_bias", "grad_residual")

    def results(tensors: list[torch.Tensor], function: Callable, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves)
        return {"out": out.detach(), **dict(zip(names, torch.autograd.grad(out, leaves, grad), strict=False))}

    def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *residual: torch.Tensor) -> torch.Tensor:
        out = F.rms_norm(x, x.shape[-1:], weight, RMS_EPS) + bias
        out = {"none": lambda t: t, "silu": F.silu, "relu": F.relu}[case.activation](out)
        return out + residual[0] if residual else out

    def candidate(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *residual: torch.Tensor) -> torch.Tensor:
        rest = residual[0] if residual else None
        return channel_rms_norm(x, weight, bias, residual=rest, activation=case.activation, eps=RMS_EPS, impl=impl)

    x, weight, bias = tensors[:3]
    residual = tensors[3] if case.residual else None
    out, _ = channel_rms_norm_reference(x, weight, bias, residual, None, case.activation, RMS_EPS, None)
    reference = {"out": out}
    grads = channel_rms_norm_backward_reference(grad, x, weight, bias, case.activation, RMS_EPS)
    reference |= dict(zip(names, (*grads, *([grad] if case.residual else [])), strict=False))
    wide = results([t.double() for t in tensors], exact, grad.double())
    return compare(results(tensors, candidate, grad), reference, wide)


def verify_rms_codes(case: RmsCase, device: str, impl: Impl | None, *, seed: int = 0) -> CodeFinding:
    """Results and codes in one pass on fresh inputs: the result without codes, bit for bit, and its codes.

    Both in the same arithmetic, so that nothing but the division, or the product with its reciprocal, rounds apart.
    """
    assert case.out_dtype is not None
    (x, weight, bias, *rest), _ = make_rms_inputs(case, device, seed)
    settings: dict = {
        "residual": rest[0] if rest else None,
        "activation": case.activation,
        "eps": RMS_EPS,
        "impl": impl,
    }
    alone = channel_rms_norm(x, weight, bias, **settings)
    scale = alone.abs().amax().float() / (QUANTIZED_DTYPES[case.out_dtype][1] * 1.5)
    quantized: dict = {"out_scale": scale, "out_dtype": case.out_dtype}
    out, codes = channel_rms_norm_codes(x, weight, bias, **settings, **quantized)
    if not torch.equal(out, alone):
        raise AssertionError(f"{int((out != alone).sum())} of {out.numel()} results are others where there are codes")
    wide = out.double()
    return compare_codes(codes, narrow(out.float(), scale, case.out_dtype), wide, torch.zeros_like(wide), scale)
