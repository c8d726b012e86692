"""Inputs, an fp64 oracle and derived bounds for cross-attention; the tests and the profile use them."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sana_kernels.cross_attention.api import MASKED, Impl, cross_attention, key_counts
from sana_kernels.cross_attention.reference import cross_attention_backward_reference, cross_attention_reference
from sana_kernels.linear_attention.testing import CodeFinding, Finding, compare, compare_codes, dtype_name
from sana_kernels.mix_ffn_depthwise.quantization import QUANTIZED_DTYPES

# Roundings between exact and computed result, relative to the weighted sum of |v|: README.md.
_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
_FP32_ROUNDINGS = 64
# The kernel rounds the softmax weights once to the dtype of the tensors, like the result (README.md).
_ALLOWANCE = 2**0.5


@dataclass(frozen=True)
class Case:
    """query [batch, tokens, heads * head_dim] on `keys` keys, of which `valid` are; `out_dtype` None or 8 bits."""

    batch: int
    tokens: int
    keys: int
    valid: int
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        out = "" if self.out_dtype is None else f"-{dtype_name(self.out_dtype)}"
        shape = f"b{self.batch}-n{self.tokens}-s{self.keys}-of-{self.valid}-h{self.heads}-d{self.head_dim}"
        return f"{shape}-{dtype_name(self.dtype)}{out}"


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; `grad` is the gradient of the result."""

    query: torch.Tensor
    key_value: torch.Tensor
    bias: torch.Tensor
    counts: torch.Tensor
    grad: torch.Tensor


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Random normal tensors, fresh for every seed; one masked key lies between the valid ones of the last row."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    channels = case.heads * case.head_dim
    mask = (torch.arange(case.keys, device=device) < case.valid).expand(case.batch, -1).clone()
    if case.valid > 1:
        mask[-1, 0] = False
    return Inputs(
        2 * normal(case.batch, case.tokens, channels),
        normal(case.batch, case.keys, 2 * channels),
        torch.where(mask, 0.0, MASKED),
        key_counts(mask),
        normal(case.batch, case.tokens, channels),
    )


def _exact(query: torch.Tensor, key_value: torch.Tensor, bias: torch.Tensor, heads: int) -> torch.Tensor:
    """All keys, in the dtype of the inputs, by another route than the reference."""
    key, value = key_value.chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (query, key, value))
    scores = torch.einsum("bnhd,bshd->bhns", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhns,bshd->bnhd", F.softmax(scores + bias[:, None, None].to(scores), -1), v).flatten(2)


def verify(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> list[Finding]:
    """Compare the result and the gradients of `impl` with the oracle on fresh inputs. Raises AssertionError."""
    inputs = make_inputs(case, device, seed)
    wide_query, wide_key_value = (t.double().requires_grad_() for t in (inputs.query, inputs.key_value))
    exact = _exact(wide_query, wide_key_value, inputs.bias.double(), case.heads)
    exact_grads = torch.autograd.grad(exact, (wide_query, wide_key_value), inputs.grad.double())
    mask = (inputs.bias, inputs.counts)
    reference = cross_attention_reference(inputs.query, inputs.key_value, *mask, None, case.heads, None)
    reference_grads = cross_attention_backward_reference(inputs.grad, inputs.query, inputs.key_value, *mask, case.heads)
    query, key_value = (t.detach().requires_grad_() for t in (inputs.query, inputs.key_value))
    out = cross_attention(query, key_value, *mask, heads=case.heads, impl=impl)
    grads = torch.autograd.grad(out, (query, key_value), inputs.grad)
    return compare(
        _named(out.detach(), *grads),
        _named(reference, *reference_grads),
        _named(exact.detach(), *exact_grads),
        allowance=_ALLOWANCE,
    )


def _named(out: torch.Tensor, grad_query: torch.Tensor, grad_key_value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"out": out, "grad_query": grad_query, "grad_key_value": grad_key_value}


def verify_codes(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> CodeFinding:
    """Hold the 8-bit results of `impl` to the exact ones: each must be a code that a result off by no more than its
    roundings may get. Raises AssertionError.
    """
    assert case.out_dtype is not None
    inputs = make_inputs(case, device, seed)
    wide = (inputs.query.double(), inputs.key_value.double(), inputs.bias.double())
    exact = _exact(*wide, case.heads)
    error = _rounding_error(inputs, case)
    scale = (exact.abs().amax() / (QUANTIZED_DTYPES[case.out_dtype][1] * 1.5)).float()
    mask = (inputs.bias, inputs.counts)
    codes = cross_attention(
        inputs.query,
        inputs.key_value,
        *mask,
        heads=case.heads,
        out_scale=scale,
        out_dtype=case.out_dtype,
        impl=impl,
    )
    reference = cross_attention_reference(inputs.query, inputs.key_value, *mask, scale, case.heads, case.out_dtype)
    return compare_codes(codes, reference, exact, error, scale)


def _rounding_error(inputs: Inputs, case: Case) -> torch.Tensor:
    """Bound of README.md, fp64 [B, N, C]: the weighted sum of |v| times what weights and sums may lose."""
    key, value = inputs.key_value.double().chunk(2, dim=-1)
    size = _exact(inputs.query.double(), torch.cat([key, value.abs()], -1), inputs.bias.double(), case.heads)
    scores = torch.einsum(
        "bnhd,bshd->bnh",
        inputs.query.double().abs().unflatten(-1, (case.heads, -1)),
        key.abs().unflatten(-1, (case.heads, -1)).amax(1, keepdim=True),
    )
    per_score = _FP32_ROUNDINGS * 2.0**-24 * (1 + scores / case.head_dim**0.5)
    return size * (_UNIT[case.dtype] + 2 * per_score.repeat_interleave(case.head_dim, dim=-1))
