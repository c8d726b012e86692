"""Inputs, an fp64 oracle and derived bounds for Gemma-2's attention; the tests and the benchmark use them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from sana_kernels.gemma_attention.api import Impl, gemma_attention
from sana_kernels.gemma_attention.reference import MASKED, gemma_attention_reference
from sana_kernels.linear_attention.testing import Finding, compare, dtype_name


@dataclass(frozen=True)
class Case:
    """`tokens` positions behind `past` kept ones; `valid` of the own ones are, the rest padding."""

    tokens: int
    past: int
    valid: int
    heads: int = 8
    key_heads: int = 4
    head_dim: int = 256
    soft_cap: float | None = 50.0
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = f"n{self.tokens}-of-{self.valid}-p{self.past}-h{self.heads}-g{self.key_heads}-d{self.head_dim}"
        return f"{shape}-{dtype_name(self.dtype)}{'' if self.soft_cap else '-uncapped'}"

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.head_dim**-0.5


class Inputs(NamedTuple):
    """The tensors that the op takes."""

    qkv: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor
    bias: torch.Tensor
    past_key: torch.Tensor
    past_value: torch.Tensor


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Random normal tensors, fresh for every seed, scores of some 4; one of the kept keys is masked."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    position = torch.arange(case.past + case.tokens, device=device)
    allowed = position < case.past + case.valid
    if case.past > 1:
        allowed[1] = False
    frequency = 10000.0 ** -(torch.arange(0, case.head_dim, 2, device=device) / case.head_dim)
    angle = torch.outer(position[case.past :].float(), frequency).repeat(1, 2)
    qkv = normal(case.tokens, case.heads + 2 * case.key_heads, case.head_dim)
    qkv[:, : case.heads] *= 4
    kept = (case.key_heads, case.past, case.head_dim)
    tensors = (qkv.flatten(1), angle.cos(), angle.sin(), normal(*kept), normal(*kept))
    qkv, cosine, sine, key, value = (t.to(case.dtype) for t in tensors)
    return Inputs(qkv, cosine, sine, torch.where(allowed, 0.0, MASKED), key, value)


def oracle(inputs: Inputs, case: Case) -> torch.Tensor:
    """The result in fp64, by another route than the reference."""
    qkv, cosine, sine, bias, past_key, past_value = (t.double() for t in inputs)
    query, key, value = qkv.unflatten(-1, (-1, case.head_dim)).split([case.heads, case.key_heads, case.key_heads], 1)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        half = case.head_dim // 2
        turned = torch.complex(*x.split(half, -1)) * torch.complex(cosine[:, None, :half], sine[:, None, :half])
        return torch.cat([turned.real, turned.imag], -1)

    groups = case.heads // case.key_heads
    keys = torch.cat([past_key.transpose(0, 1), rotated(key)]).repeat_interleave(groups, 1)
    values = torch.cat([past_value.transpose(0, 1), value]).repeat_interleave(groups, 1)
    scores = torch.einsum("nhd,shd->hns", rotated(query), keys) * case.scale
    if case.soft_cap:
        scores = case.soft_cap * (scores / case.soft_cap).tanh()
    bias = bias.expand(case.tokens, -1).clone()
    bias[:, case.past :].masked_fill_(torch.ones_like(bias[:, case.past :]).triu(1).bool(), -torch.inf)
    return torch.einsum("hns,shd->nhd", F.softmax(scores + bias, -1), values).flatten(1)


def verify(case: Case, device: str, impl: Impl | None, *, seed: int = 0) -> list[Finding]:
    """Compare the result of `impl` with the oracle on fresh inputs. Raises AssertionError."""
    inputs = make_inputs(case, device, seed)
    found = gemma_attention(*inputs, heads=case.heads, scale=case.scale, soft_cap=case.soft_cap, impl=impl)
    reference, *_ = gemma_attention_reference(*inputs, case.heads, case.scale, case.soft_cap)
    return compare({"out": found}, {"out": reference}, {"out": oracle(inputs, case)})
