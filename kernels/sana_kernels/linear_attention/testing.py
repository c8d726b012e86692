"""Inputs, an fp64 oracle and derived tolerances for linear attention; the tests and the benchmark use them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sana_kernels.linear_attention.api import Impl, linear_attention
from sana_kernels.linear_attention.reference import (
    linear_attention_backward_reference,
    linear_attention_reference,
)
from sana_kernels.mix_ffn_depthwise.quantization import QUANTIZED_DTYPES, narrow

if TYPE_CHECKING:
    from sana_kernels.linear_attention.triton import Tilings

EPS = 1e-15
NORM_EPS = 1e-5
# What a result may lose at the least: one fp32 rounding, or that of a product of tf32 pairs (README.md).
_LEAST_LOSS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-20, torch.float16: 2.0**-20}
# One rounding to the dtype of the tensors, and how many of them the norms of q and k do at most (README.md).
_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
_NORM_ROUNDINGS = 4


@dataclass(frozen=True)
class Case:
    """One problem: qkv [batch, tokens, 3 * channels]; `out_dtype` None or one of 8 bits."""

    batch: int
    tokens: int
    channels: int
    head_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    qk_norm: bool = False
    out_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        norm = "-qknorm" if self.qk_norm else ""
        out = "" if self.out_dtype is None else f"-{dtype_name(self.out_dtype)}"
        return f"b{self.batch}-n{self.tokens}-c{self.channels}-d{self.head_dim}-{dtype_name(self.dtype)}{norm}{out}"


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; `grad` is the gradient of the output."""

    qkv: torch.Tensor
    norm_q_weight: torch.Tensor | None
    norm_k_weight: torch.Tensor | None
    grad: torch.Tensor

    def double(self) -> "Inputs":
        """The same values in fp64."""
        q, k = (w if w is None else w.double() for w in (self.norm_q_weight, self.norm_k_weight))
        return Inputs(self.qkv.double(), q, k, self.grad.double())


@dataclass(frozen=True)
class Finding:
    """How far one result is from the oracle, in relative RMS, and how far it may be."""

    name: str
    relative_rms: float
    bound: float


@dataclass(frozen=True)
class CodeFinding:
    """How many 8-bit values differ from the reference's, of how many, and how many may: those next to a tie."""

    different: int
    near_ties: int
    values: int


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Random normal tensors, fresh for every seed; norm weights of both signs around one."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    qkv = normal(case.batch, case.tokens, 3 * case.channels).to(case.dtype)
    grad = normal(case.batch, case.tokens, case.channels).to(case.dtype)
    if not case.qk_norm:
        return Inputs(qkv, None, None, grad)
    norm_q, norm_k = ((1 + normal(case.channels)).to(case.dtype) for _ in "qk")
    return Inputs(qkv, norm_q, norm_k, grad)


def oracle(inputs: Inputs, head_dim: int) -> dict[str, torch.Tensor]:
    """The result and every gradient in fp64, by autograd. Written apart from the reference on purpose."""
    wide = inputs.double()
    leaves = [x.requires_grad_() for x in (wide.qkv, wide.norm_q_weight, wide.norm_k_weight) if x is not None]
    out, _ = _exact(wide, head_dim)
    grads = torch.autograd.grad(out, leaves, wide.grad)
    return {"out": out.detach(), **dict(zip(("grad_qkv", "grad_q_weight", "grad_k_weight"), grads, strict=False))}


def _exact(inputs: Inputs, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in fp64, and what it would be with |v|: roundings count relative to that."""
    wide = inputs.double()
    query, key, value = wide.qkv.chunk(3, dim=-1)
    if wide.norm_q_weight is not None and wide.norm_k_weight is not None:
        query = torch.nn.functional.rms_norm(query, query.shape[-1:], wide.norm_q_weight, NORM_EPS)
        key = torch.nn.functional.rms_norm(key, key.shape[-1:], wide.norm_k_weight, NORM_EPS)
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in (query.relu(), key.relu(), value))
    denominator = (torch.einsum("bnhd,bhd->bnh", q, k.sum(1)) + EPS)[..., None]
    out, size = (
        (torch.einsum("bnhd,bhde->bnhe", q, torch.einsum("bnhd,bnhe->bhde", k, x)) / denominator).flatten(2)
        for x in (v, v.detach().abs())
    )
    return out, size.detach()


def reference_results(inputs: Inputs, head_dim: int) -> dict[str, torch.Tensor]:
    """The same tensors from the reference, in the dtype of the inputs."""
    arguments = (inputs.qkv, inputs.norm_q_weight, inputs.norm_k_weight, head_dim, EPS, NORM_EPS)
    grads = linear_attention_backward_reference(inputs.grad, *arguments)
    return _named(linear_attention_reference(*arguments), grads)


def candidate_results(inputs: Inputs, head_dim: int, impl: Impl | None) -> dict[str, torch.Tensor]:
    """The same tensors from the public function and autograd."""
    weights = [w for w in (inputs.norm_q_weight, inputs.norm_k_weight) if w is not None]
    leaves = [x.detach().requires_grad_() for x in (inputs.qkv, *weights)]
    out = linear_attention(*leaves, head_dim=head_dim, eps=EPS, norm_eps=NORM_EPS, impl=impl)
    return _named(out.detach(), torch.autograd.grad(out, leaves, inputs.grad))


def verify_by_head(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> None:
    """The same bits, of the result and of qkv's gradient, from heads one by one as from packed ones; AssertionError."""
    inputs = make_inputs(case, device, seed)
    heads = inputs.qkv.unflatten(2, (-1, case.head_dim)).transpose(1, 2)  # [B, 3 heads, N, D]
    found = []
    for qkv in (inputs.qkv, heads.contiguous()):
        leaf = qkv.detach().requires_grad_()
        out = linear_attention(leaf, head_dim=case.head_dim, eps=EPS, impl=impl)
        (grad,) = torch.autograd.grad(out, leaf, inputs.grad)
        found.append((out.detach(), grad))
    (out, grad), (out_by_head, grad_by_head) = found
    torch.testing.assert_close(out_by_head, out, rtol=0, atol=0)
    torch.testing.assert_close(grad_by_head.transpose(1, 2).flatten(2), grad, rtol=0, atol=0)


def _named(out: torch.Tensor, grads: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    names = ("grad_qkv", "grad_q_weight", "grad_k_weight")
    return {"out": out, **{name: x for name, x in zip(names, grads, strict=False) if x.numel()}}


def relative_rms(candidate: torch.Tensor, exact: torch.Tensor) -> float:
    """RMS of the difference over RMS of `exact`; NaN in the candidate gives NaN."""
    return float((candidate.double() - exact.double()).norm() / exact.double().norm())


def compare(
    candidate: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    *,
    allowance: float = 1.0,
    least_bound: float = 0.0,
) -> list[Finding]:
    """Hold every tensor to twice what the reference loses, or twice the least that the dtype can lose.

    No bound is below `least_bound`, what another order of the same sums may lose. `allowance` widens a bound where the
    caller can say why. Raises AssertionError naming the tensor, the largest difference and its index.
    """
    assert candidate.keys() == exact.keys(), f"{sorted(candidate)} instead of {sorted(exact)}"
    findings = []
    for name, wanted in exact.items():
        loss = max(relative_rms(reference[name], wanted), _LEAST_LOSS[reference[name].dtype])
        finding = Finding(name, relative_rms(candidate[name], wanted), max(2 * allowance * loss, least_bound))
        findings.append(finding)
        if not finding.relative_rms <= finding.bound:  # also when NaN
            raise AssertionError(_difference(finding, candidate[name], wanted))
    return findings


def _difference(finding: Finding, candidate: torch.Tensor, exact: torch.Tensor) -> str:
    difference = (candidate.double() - exact).abs().nan_to_num(nan=torch.inf)
    worst = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    return (
        f"{finding.name}: relative RMS {finding.relative_rms:.3e} > {finding.bound:.3e}; "
        f"max abs {float(difference.max()):.3e} at {worst}: "
        f"{float(candidate[worst]):.9g} instead of {float(exact[worst]):.9g}"
    )


def verify(case: Case, device: str, impl: Impl | None, *, seed: int = 0, allowance: float = 1.0) -> list[Finding]:
    """Compare forward and backward of `impl` with the oracle on fresh inputs. Raises AssertionError."""
    inputs = make_inputs(case, device, seed)
    exact = oracle(inputs, case.head_dim)
    reference = reference_results(inputs, case.head_dim)
    return compare(candidate_results(inputs, case.head_dim, impl), reference, exact, allowance=allowance)


def verify_codes(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> CodeFinding:
    """Hold the 8-bit results of `impl` to the exact ones: each must be a code that a result off by no more than its
    roundings may get. Raises AssertionError.
    """

    def candidate(inputs: Inputs, scale: torch.Tensor) -> torch.Tensor:
        return linear_attention(
            inputs.qkv,
            inputs.norm_q_weight,
            inputs.norm_k_weight,
            head_dim=case.head_dim,
            eps=EPS,
            norm_eps=NORM_EPS,
            out_scale=scale,
            out_dtype=case.out_dtype,
            impl=impl,
        )

    return verify_codes_of(candidate, case, device, seed=seed)


def verify_codes_of(
    candidate: Callable[[Inputs, torch.Tensor], torch.Tensor], case: Case, device: str, *, seed: int = 0
) -> CodeFinding:
    """`verify_codes` of any function of the inputs and the scale."""
    assert case.out_dtype is not None
    inputs = make_inputs(case, device, seed)
    exact, size = _exact(inputs, case.head_dim)
    # The largest results saturate.
    scale = (exact.abs().amax() / (QUANTIZED_DTYPES[case.out_dtype][1] * 1.5)).float()
    arguments = (inputs.qkv, inputs.norm_q_weight, inputs.norm_k_weight, case.head_dim, EPS, NORM_EPS)
    reference = linear_attention_reference(*arguments, scale, case.out_dtype)
    return compare_codes(candidate(inputs, scale), reference, exact, _relative_error(case) * size, scale)


def verify_tilings(case: Case, device: str, tiles: "Tilings", *, allowance: float = 1.0) -> Finding | CodeFinding:
    """Hold the forward kernels with these tilings to the oracle on fresh inputs, floats or codes as `case` has it.
    Raises AssertionError.
    """
    from sana_kernels.linear_attention import triton as kernels

    def candidate(inputs: Inputs, scale: torch.Tensor | None) -> torch.Tensor:
        tensors = (inputs.qkv, inputs.norm_q_weight, inputs.norm_k_weight)
        return kernels.forward(*tensors, case.head_dim, EPS, NORM_EPS, scale, case.out_dtype, tiles=tiles)

    if case.out_dtype is not None:
        return verify_codes_of(candidate, case, device)
    inputs = make_inputs(case, device)
    reference = linear_attention_reference(
        inputs.qkv, inputs.norm_q_weight, inputs.norm_k_weight, case.head_dim, EPS, NORM_EPS
    )
    exact, _ = _exact(inputs, case.head_dim)
    (found,) = compare({"out": candidate(inputs, None)}, {"out": reference}, {"out": exact}, allowance=allowance)
    return found


def _relative_error(case: Case) -> float:
    """Bound of README.md, relative to the result with |v| instead of v."""
    per_sum = (case.tokens / 8 + 64) * 2.0**-24 + 2.0**-20
    normed = _NORM_ROUNDINGS * _UNIT[case.dtype] if case.qk_norm else 0.0
    return 2 * (per_sum + normed)


def compare_codes(
    codes: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor, error: torch.Tensor, scale: torch.Tensor
) -> CodeFinding:
    """`codes` must lie between those of exact - error and exact + error (fp64, before quantisation)."""
    assert codes.dtype == reference.dtype, f"{codes.dtype} instead of {reference.dtype}"
    # The division by the scale, or the product with its reciprocal, rounds twice more.
    error = error + exact.abs() * 2.0**-22
    low, high = (narrow(y, scale, codes.dtype).float() for y in (exact - error, exact + error))
    found = codes.float()
    wrong = ~((low <= found) & (found <= high))  # also when NaN
    if wrong.any():
        worst = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {found.numel()} codes are wrong, the first at {worst}: {float(found[worst]):g} "
            f"instead of {float(low[worst]):g} to {float(high[worst]):g}"
        )
    saturated = found.abs() >= QUANTIZED_DTYPES[codes.dtype][1]
    assert saturated.any(), "no result saturates: the case does not test it"
    assert not saturated.all(), "every result saturates"
    different = int((found != reference.float()).sum())
    return CodeFinding(different, int((low != high).sum()), found.numel())
