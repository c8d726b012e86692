# Device code returns blocks, which have no Python types.
# ruff: noqa: ANN202
"""Cross-attention for training, three ways: `explicit` is the reference's matrices and fp32 softmax; `sdpa` is
PyTorch's memory-efficient attention; `triton` is one program per picture and head, forward and backward.

Captions are so short (32 rows) that all of keys and values of one head stay in registers, and no score is ever stored:
what costs time otherwise are the copies that bring heads into order and the fp32 scores.
"""

from typing import Any, Literal

import torch
from torch import library
from torch.nn import functional as F

from sana_export.reference.transformer import CrossAttention, TransformerConfig
from scripts.train_nano.depthwise import TRITON_PROBLEM

if TRITON_PROBLEM is None:
    import triton
    import triton.language as tl

CrossImpl = Literal["explicit", "sdpa", "triton"]
_TOKENS, _WARPS = 64, 4


def cross_attention_reference(
    query: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, heads: int
) -> torch.Tensor:
    """query [B, N, C], packed [B, S, 2C] of keys and values, bias [B, S] fp32 -> [B, N, C]; softmax in fp32."""
    key, value = packed.chunk(2, dim=-1)
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    weights = F.softmax(scores.float() + bias[:, None, None], dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).flatten(2)


def cross_attention_sdpa(query: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, heads: int) -> torch.Tensor:
    """The same by PyTorch's fused attention."""
    key, value = packed.chunk(2, dim=-1)
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    shape = (*query.shape[:3], key.shape[2])
    mask = bias[:, None, None].to(query.dtype).expand(shape)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


if TRITON_PROBLEM is None:
    # Under TRITON_INTERPRET=1, which multiplies bf16 as the integers it keeps them in.
    _INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

    @triton.jit
    def _product(a, b):
        """a [M, K] times b [K, N], summed in fp32."""
        if _INTERPRETED:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        return tl.dot(a, b, input_precision="ieee")

    @triton.jit
    def _weights(query, key, bias, scale):
        """Softmax of the scores, fp32 [tokens, rows]."""
        scores = _product(query, tl.trans(key)) * scale + bias[None, :]
        scores = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        return scores / tl.sum(scores, axis=1)[:, None]

    @triton.jit
    def _keys_and_values(
        packed_ptr, bias_ptr, batch, head, rows, CHANNELS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr
    ):
        """Key and value [rows, head] of one head, and the bias [rows]; rows that are none get weight 0."""
        row, d = tl.arange(0, ROWS), tl.arange(0, HEAD)
        place = (batch * rows + row)[:, None] * (2 * CHANNELS) + head * HEAD + d[None, :]
        there = (row < rows)[:, None]
        key = tl.load(packed_ptr + place, mask=there, other=0.0)
        value = tl.load(packed_ptr + place + CHANNELS, mask=there, other=0.0)
        return key, value, tl.load(bias_ptr + batch * rows + row, mask=row < rows, other=-float("inf"))

    @triton.jit
    def _forward_kernel(
        query_ptr, packed_ptr, bias_ptr, out_ptr, tokens, rows, scale,
        CHANNELS: tl.constexpr, HEAD: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Program (picture x head, token block)."""
        heads = CHANNELS // HEAD
        batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        key, value, bias = _keys_and_values(packed_ptr, bias_ptr, batch, head, rows, CHANNELS, HEAD, ROWS)
        token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        place = (batch * tokens + token)[:, None] * CHANNELS + head * HEAD + tl.arange(0, HEAD)[None, :]
        there = (token < tokens)[:, None]
        query = tl.load(query_ptr + place, mask=there, other=0.0)
        mixed = _product(_weights(query, key, bias, scale).to(value.dtype), value)
        tl.store(out_ptr + place, mixed.to(out_ptr.dtype.element_ty), mask=there)

    @triton.jit
    def _backward_kernel(
        grad_ptr, query_ptr, packed_ptr, bias_ptr, query_grad_ptr, packed_grad_ptr, tokens, rows, scale,
        CHANNELS: tl.constexpr, HEAD: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Program (picture x head): all of its tokens, so that gradients of keys and values add up in registers."""
        heads = CHANNELS // HEAD
        batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        key, value, bias = _keys_and_values(packed_ptr, bias_ptr, batch, head, rows, CHANNELS, HEAD, ROWS)
        row, d = tl.arange(0, ROWS), tl.arange(0, HEAD)
        key_grad = tl.zeros((ROWS, HEAD), tl.float32)
        value_grad = tl.zeros((ROWS, HEAD), tl.float32)
        for start in range(0, tokens, TOKENS):
            token = start + tl.arange(0, TOKENS)
            place = (batch * tokens + token)[:, None] * CHANNELS + head * HEAD + d[None, :]
            there = (token < tokens)[:, None]
            query = tl.load(query_ptr + place, mask=there, other=0.0)
            grad = tl.load(grad_ptr + place, mask=there, other=0.0)
            weights = _weights(query, key, bias, scale)
            value_grad += _product(tl.trans(weights.to(grad.dtype)), grad)
            weight_grad = _product(grad, tl.trans(value))
            along = tl.sum(weights * weight_grad, axis=1)
            score_grad = (weights * (weight_grad - along[:, None]) * scale).to(query.dtype)
            key_grad += _product(tl.trans(score_grad), query)
            query_grad = _product(score_grad, key)
            tl.store(query_grad_ptr + place, query_grad.to(query_grad_ptr.dtype.element_ty), mask=there)
        place = (batch * rows + row)[:, None] * (2 * CHANNELS) + head * HEAD + d[None, :]
        there = (row < rows)[:, None]
        tl.store(packed_grad_ptr + place, key_grad.to(packed_grad_ptr.dtype.element_ty), mask=there)
        tl.store(packed_grad_ptr + place + CHANNELS, value_grad.to(packed_grad_ptr.dtype.element_ty), mask=there)


def _shapes(query: torch.Tensor, packed: torch.Tensor, heads: int) -> tuple[int, dict[str, int]]:
    head_dim = query.shape[2] // heads
    rows = max(16, triton.next_power_of_2(packed.shape[1]))
    return query.shape[0] * heads, {"CHANNELS": query.shape[2], "HEAD": head_dim, "TOKENS": _TOKENS, "ROWS": rows}


@library.custom_op("train_nano::cross_attention", mutates_args=())
def cross_attention(query: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, heads: int) -> torch.Tensor:
    """`cross_attention_reference` by the kernels: `query` and `packed` of one dtype, a power of 2 per head."""
    query, packed, bias = query.contiguous(), packed.contiguous(), bias.contiguous()
    out = torch.empty_like(query)
    programs, shapes = _shapes(query, packed, heads)
    tokens, rows = query.shape[1], packed.shape[1]
    scale = shapes["HEAD"] ** -0.5
    _forward_kernel[(programs, triton.cdiv(tokens, _TOKENS))](
        query, packed, bias, out, tokens, rows, scale, **shapes, num_warps=_WARPS
    )
    return out


@cross_attention.register_fake
def _(query: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, heads: int) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@library.custom_op("train_nano::cross_attention_backward", mutates_args=())
def cross_attention_backward(
    grad: torch.Tensor, query: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of query and packed."""
    grad, query, packed, bias = (tensor.contiguous() for tensor in (grad, query, packed, bias))
    query_grad, packed_grad = torch.empty_like(query), torch.empty_like(packed)
    programs, shapes = _shapes(query, packed, heads)
    tokens, rows = query.shape[1], packed.shape[1]
    scale = shapes["HEAD"] ** -0.5
    _backward_kernel[(programs,)](
        grad, query, packed, bias, query_grad, packed_grad, tokens, rows, scale, **shapes, num_warps=_WARPS
    )
    return query_grad, packed_grad


@cross_attention_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(query, memory_format=contiguous), torch.empty_like(packed, memory_format=contiguous)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, packed, bias, ctx.heads = inputs
    ctx.save_for_backward(query, packed, bias)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, packed, bias = ctx.saved_tensors
    return *cross_attention_backward(grad, query, packed, bias, ctx.heads), None, None


cross_attention.register_autograd(_gradients, setup_context=_setup_context)

_BY_NAME = {"explicit": cross_attention_reference, "sdpa": cross_attention_sdpa, "triton": cross_attention}


class TrainingCrossAttention(CrossAttention):
    """The transformer's cross-attention, without qk-norm: parameters and mathematics of the reference."""

    def __init__(self, config: TransformerConfig, impl: CrossImpl) -> None:
        super().__init__(config)
        self.impl = impl

    def forward(self, x: torch.Tensor, caption: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """`bias` [B, 1, 1, S], as the reference's."""
        attend: Any = _BY_NAME[self.impl]
        mixed = attend(self.to_q(x), self.to_kv(caption), bias[:, 0, 0].float(), self.heads)
        return self.to_out(mixed)
