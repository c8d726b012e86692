"""Gemma-2 as three pieces, one of which serves every layer: packed q/k/v and gate/up products, fp32 norms and softmax.

The mathematics of transformers' Gemma2Model with eager attention. Soft caps rule out library attention: a kernel of
ours computes that of the caption, and where it cannot run, Inductor fuses everything between the two products.

Attention is causal, and before most prompts stands the same long instruction. So the positions before the caption, the
*prefix*, have pieces of their own, whose keys, values and result the runtime keeps until those tokens change; what is
computed per prompt are the positions of the caption, which attend to both.

Most captions are far shorter than the model's 300 positions, and nothing reads what stands behind their last token. So
there are pieces for *short* captions, too, which compute fewer positions.

The embedding table, a fifth of the weights of Gemma-2-2B, stays with the host: a prompt needs one row per token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from sana_export.inductor.linear import LinearForm, Tensors, gated_linear, linear
from sana_export.inductor.piece import Piece
from sana_kernels.gemma_attention import MASKED, gemma_attention
from sana_kernels.gemma_attention.reference import gemma_attention_reference
from sana_kernels.modulated_norm.api import Impl
from sana_runtime.contract import CAPTION_LENGTH
from sana_runtime.inductor_program import Call, Lookup

# The layer's products, from the reference's layers that are stacked in each.
LAYER_LINEARS: dict[str, tuple[str, ...]] = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
# Positions that are computed per prompt: the caption's, and a few more so that products have a multiple of 8 rows.
_PER_PROMPT = -(-(CAPTION_LENGTH - 1) // 8) * 8
# A shorter prefix is not worth pieces of its own.
_SHORTEST_PREFIX = 64
# Positions that are computed for a short caption, of which there must be more than twice as many; two tiles of
# `weight_only_linear`.
_SHORT = 128
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


# Which positions a layer's piece is for.
Part = Literal["all", "prefix", "caption"]


@dataclass(frozen=True)
class TextEncoderLayout:
    """Shape of a Gemma-2 and what its pieces are made for; `tokens` is the padded prompt length L, `impl` that of our
    kernels.
    """

    channels: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    query_scale: float
    soft_cap: float | None
    norm_eps: float
    rope_theta: float
    tokens: int
    dtype: torch.dtype
    embedding_dtype: torch.dtype | None = None
    impl: Impl = "reference"

    @property
    def own_weight_only(self) -> bool:
        """Whether our kernel computes products of INT8 weights: it has none for fp32."""
        return self.impl == "triton" and self.dtype != torch.float32

    @property
    def own_attention(self) -> bool:
        """Whether our kernel computes the caption's attention: it has none for fp32 and for heads of other widths."""
        return self.own_weight_only and self.head_dim in (32, 64, 128, 256)

    @property
    def prefix(self) -> int:
        """How many positions stand before those that are computed per prompt."""
        return prefix_length(self.tokens)

    @property
    def short_end(self) -> int:
        """The position before which all valid tokens of a short caption stand; 0 where it saves little."""
        return short_end(self.tokens)

    @classmethod
    def from_upstream(
        cls,
        config: Mapping[str, Any],
        tokens: int,
        dtype: torch.dtype,
        embedding_dtype: torch.dtype | None = None,
        impl: Impl = "reference",
    ) -> "TextEncoderLayout":
        """From a `text_encoder/config.json`."""
        return cls(
            channels=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            key_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            query_scale=config["query_pre_attn_scalar"] ** -0.5,
            soft_cap=config["attn_logit_softcapping"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=config["rope_theta"],
            tokens=tokens,
            dtype=dtype,
            embedding_dtype=embedding_dtype,
            impl=impl,
        )


def prefix_length(tokens: int) -> int:
    """How many of a prompt's padded positions stand before those that are computed per prompt; 0 where that is few."""
    length = tokens - _PER_PROMPT
    return length if length >= _SHORTEST_PREFIX else 0


def short_end(tokens: int) -> int:
    """Before which of a prompt's padded positions all valid tokens of a short caption stand; 0: none is told apart."""
    prefix = prefix_length(tokens)
    return prefix + _SHORT if tokens - prefix > 2 * _SHORT else 0


def embed_piece(layout: TextEncoderLayout, first: int, end: int, name: str) -> Piece:
    """caption_mask [1, L] and the embedding rows [1, T, C] of the T positions from `first` to `end`, of 8-bit tables
    with the rows' scales [1, T] fp32 -> x [1, T, C], of all positions before `end` the bias towards them [end] fp32,
    and of the T cosine and sine [T, D].
    """
    inputs = ["caption_mask", "rows", *(["row_scales"] if layout.embedding_dtype is not None else [])]

    def embed(t: Tensors) -> tuple[torch.Tensor, ...]:
        mask, x = t["caption_mask"][:, :end], t["rows"]
        if layout.embedding_dtype is not None:
            x = (x.float() * t["row_scales"][..., None]).to(layout.dtype)
        # The factor is rounded to the dtype of the weights, as in transformers.
        factor = torch.tensor(layout.channels**0.5, dtype=layout.dtype).item()
        position = torch.arange(end, device=mask.device)
        bias = torch.where(mask[0].bool(), 0.0, MASKED)
        half = torch.arange(0, layout.head_dim, 2, dtype=torch.float32, device=mask.device) / layout.head_dim
        angle = torch.outer(position[first:].float(), 1.0 / layout.rope_theta**half)
        angle = torch.cat([angle, angle], dim=-1)
        return x * factor, bias, angle.cos().to(layout.dtype), angle.sin().to(layout.dtype)

    return Piece(name, tuple(inputs), embed)


def layer_piece(layout: TextEncoderLayout, forms: Mapping[str, LinearForm], name: str, part: Part) -> Piece:
    """x [1, T, C] -> x [1, T, C] of one decoder layer.

    Of the prefix also its keys and values [key_heads, prefix, D], which those of the caption take beside x.
    """
    inputs = ["x", "bias", "cosine", "sine", *(("past_key", "past_value") if part == "caption" else ())]
    for linear_name, form in forms.items():
        inputs += form.tensors(linear_name)
    inputs += [f"{norm}.weight" for norm in LAYER_NORMS]

    def layer(t: Tensors) -> tuple[torch.Tensor, ...]:
        def product(name: str, x: torch.Tensor, compute: Callable[..., torch.Tensor] = linear) -> torch.Tensor:
            return compute(x, t, name, forms[name], layout.dtype, own_weight_only=layout.own_weight_only)

        def norm(name: str, x: torch.Tensor) -> torch.Tensor:
            return gemma_norm(x, t[f"{name}.weight"], layout.norm_eps)

        x = t["x"]
        attended, *kept = _attention(product("self_attn.qkv", norm("input_layernorm", x)), t, layout, part)
        x = x + norm("post_attention_layernorm", product("self_attn.o_proj", attended))
        hidden = product("mlp.gate_up", norm("pre_feedforward_layernorm", x), gated_linear)
        x = x + norm("post_feedforward_layernorm", product("mlp.down_proj", hidden))
        return (x, *kept) if part == "prefix" else (x,)

    return Piece(name, tuple(inputs), layer)


def final_piece(layout: TextEncoderLayout, name: str) -> Piece:
    """x [1, T, C] of the prefix, if there is one, and of the rest -> caption_embeds [1, L, C], zeros behind them."""
    parts = ("prefix_x", "x") if layout.prefix else ("x",)

    def final(t: Tensors) -> tuple[torch.Tensor, ...]:
        found = gemma_norm(torch.cat([t[part] for part in parts], dim=1), t["norm.weight"], layout.norm_eps)
        return (F.pad(found, (0, 0, 0, layout.tokens - found.shape[1])),)

    return Piece(name, (*parts, "norm.weight"), final)


def gemma_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm times 1 + weight, in fp32; the result has the dtype of `x`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (1 + weight.float())).to(x.dtype)


def text_encoder_pieces(
    layout: TextEncoderLayout, forms: tuple[Mapping[str, LinearForm], ...]
) -> tuple[dict[str, Piece], list[str]]:
    """All pieces by name, and the name of every layer's piece: layers of equal forms share one. The prefix's pieces
    have names with "prefix_" before them, those of short captions "short_".
    """
    found = [embed_piece(layout, layout.prefix, layout.tokens, "embed"), final_piece(layout, "final")]
    if layout.prefix:
        found.append(embed_piece(layout, 0, layout.prefix, "prefix_embed"))
    if layout.short_end:
        found.append(embed_piece(layout, layout.prefix, layout.short_end, "short_embed"))
        found.append(final_piece(layout, "short_final"))
    names: dict[tuple, str] = {}
    layers = []
    for form in forms:
        key = tuple(form.items())
        if key not in names:
            name = names[key] = f"layer_{len(names) + 1}" if names else "layer"
            for part in ("", "short_") if layout.short_end else ("",):
                found.append(layer_piece(layout, form, f"{part}{name}", "caption" if layout.prefix else "all"))
            if layout.prefix:
                found.append(layer_piece(layout, form, f"prefix_{name}", "prefix"))
        layers.append(names[key])
    return {piece.name: piece for piece in found}, layers


def text_encoder_calls(
    pieces: Mapping[str, Piece], layers: list[str]
) -> tuple[tuple[Call, ...], tuple[Call, ...], tuple[Call, ...]]:
    """The calls for the prefix, none without one, those of one caption, and those of a short one, none where there are
    no pieces for it; for weights named as the reference names them.
    """

    def caption(part: str) -> tuple[Call, ...]:
        last = f"x.{len(layers)}"
        inputs = {"x": f"{part}{last}", "prefix_x": f"prefix_{last}", "norm.weight": "norm.weight"}
        final = pieces[f"{part}final"]
        end = Call(final.name, tuple(inputs[name] for name in final.inputs), ("caption_embeds",))
        return (*_calls(pieces, part, layers, ()), end)

    prefix = _calls(pieces, "prefix_", layers, ("key", "value")) if "prefix_embed" in pieces else []
    return tuple(prefix), caption(""), caption("short_") if "short_embed" in pieces else ()


def text_encoder_lookups(layout: TextEncoderLayout) -> tuple[Lookup, ...]:
    """What the embed pieces take of the table "embed_tokens.weight" and, where it is of 8 bits, of its rows' scales."""
    ranges = {"": (layout.prefix, layout.tokens)}
    if layout.prefix:
        ranges["prefix_"] = (0, layout.prefix)
    if layout.short_end:
        ranges["short_"] = (layout.prefix, layout.short_end)
    tables = {"rows": "embed_tokens.weight"}
    if layout.embedding_dtype is not None:
        tables["row_scales"] = "embed_tokens.weight_scale"
    return tuple(
        Lookup(table, "caption_tokens", first, end, f"{part}{name}")
        for part, (first, end) in ranges.items()
        for name, table in tables.items()
    )


def _calls(pieces: Mapping[str, Piece], part: str, layers: list[str], kept: tuple[str, ...]) -> list[Call]:
    """Those of the prefix or of the rest, from the tokens to the last layer's x."""
    shared = {name: f"{part}{name}" for name in ("bias", "cosine", "sine")}
    embed = pieces[f"{part}embed"]
    looked_up = (name if name == "caption_mask" else f"{part}{name}" for name in embed.inputs)
    calls = [Call(embed.name, tuple(looked_up), (f"{part}x.0", *shared.values()))]
    for i, name in enumerate(layers):
        values = {**shared, "x": f"{part}x.{i}", "past_key": f"key.{i}", "past_value": f"value.{i}"}
        inputs = tuple(values.get(n, f"layers.{i}.{n}") for n in pieces[f"{part}{name}"].inputs)
        calls.append(Call(f"{part}{name}", inputs, (f"{part}x.{i + 1}", *(f"{n}.{i}" for n in kept))))
    return calls


def _attention(qkv: torch.Tensor, t: Tensors, layout: TextEncoderLayout, part: Part) -> tuple[torch.Tensor, ...]:
    """Packed qkv [1, T, (heads + 2 key_heads) D] -> [1, T, heads D], and for other parts the T keys and values."""
    tables = t["cosine"], t["sine"], t["bias"]
    settings = layout.heads, layout.query_scale, layout.soft_cap
    if part == "caption" and layout.own_attention:
        heads, scale, soft_cap = settings
        past = t["past_key"], t["past_value"]
        out = gemma_attention(qkv[0], *tables, *past, heads=heads, scale=scale, soft_cap=soft_cap, impl="triton")
        return (out[None],)
    out, *own = gemma_attention_reference(qkv[0], *tables, t.get("past_key"), t.get("past_value"), *settings)
    return (out[None], *own)
