"""The Linear DiT as four pieces over tokens [B, N, C], written for speed.

Against `reference.transformer`: caption projection and all keys and values once per prompt; modulation tables of all
blocks in one sum; the residual of a block's last branch is added by the next block's first norm, in the pass that also
modulates and quantises; norms, modulation and sums in fp32, one rounding per result.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional as F

from sana_export.inductor.linear import LinearForm, Tensors, linear, residual_linear
from sana_export.inductor.piece import Piece
from sana_export.reference.transformer import TransformerConfig
from sana_kernels.cross_attention import cross_attention, key_counts
from sana_kernels.cross_attention.api import MASKED
from sana_kernels.linear_attention import linear_attention
from sana_kernels.linear_attention.reference import rms_norm
from sana_kernels.mix_ffn_depthwise import mix_ffn_depthwise
from sana_kernels.modulated_norm import residual_modulated_norm
from sana_kernels.modulated_norm.api import Impl
from sana_runtime.inductor_program import Call

_FP16_MAX = 65504.0
_NORM_EPS = 1e-5
# Rows of a block's table: shift, scale and gate of the attention, then of the Mix-FFN.
_SHIFT_A, _SCALE_A, _GATE_A, _SHIFT_M, _SCALE_M, _GATE_M = range(6)
SCALE_ROWS = (_SCALE_A, _SCALE_M)
ATTENTION_ROWS, FFN_ROWS = (_SHIFT_A, _SCALE_A), (_SHIFT_M, _SCALE_M)

# A block's linear layers, and whether the product adds a bias. That of conv_inverted is added where the depthwise
# convolution reads: there it is nearly free, and the library's product is slower with one.
BLOCK_LINEARS = {
    "linear_attention.qkv": False,
    "linear_attention.to_out": True,
    "cross_attention.to_q": True,
    "cross_attention.to_out": True,
    "mix_ffn.conv_inverted": False,
    "mix_ffn.conv_point": False,
}
BlockForms = Mapping[str, LinearForm]


def plain_forms() -> dict[str, LinearForm]:
    """Every layer of a block in the base dtype."""
    return {name: LinearForm(bias) for name, bias in BLOCK_LINEARS.items()}


FusedProducts = Literal["none", "quantised", "all"]


@dataclass(frozen=True)
class TransformerLayout:
    """What the pieces are made for. `height`, `width` of the latent; `batch` 2 with classifier-free guidance, else 1;
    `impl` of our kernels; `kv_weight_dtype` of the stacked key and value weights; `smooth_tables`: the tables carry
    the smooth factors of the layers behind the norms. `sigma_data` is TrigFlow's. `fused_products`: of which layers
    our kernel computes the product where the residual follows it ("quantised": those of 8-bit weights and activations),
    and unless it is "none", all INT8 products; the others are the library's, with a pass behind.
    """

    config: TransformerConfig
    dtype: torch.dtype
    height: int
    width: int
    batch: int
    impl: Impl
    kv_weight_dtype: torch.dtype | None = None
    smooth_tables: bool = False
    sigma_data: float = 0.5
    fused_products: FusedProducts = "quantised"

    @property
    def tokens(self) -> int:
        """Number of latent positions."""
        return self.height * self.width

    @property
    def own_int8(self) -> bool:
        """Whether our kernel computes INT8 products."""
        return self.impl == "triton" and self.fused_products != "none"

    def fuses(self, form: LinearForm) -> bool:
        """Whether our kernel computes a layer of this form together with the residual behind it.

        FP8 needs compute capability 8.9, as does the library's product: there is nothing to fall back to below.
        """
        wanted = {"none": False, "quantised": form.activation_dtype is not None, "all": True}
        return self.impl == "triton" and wanted[self.fused_products] and form.takes_residual


def caption_piece(layout: TransformerLayout) -> Piece:
    """caption_embeds [B, S, E], caption_mask [B, S] -> key_values [L, B, S, 2C], key_bias [B, S], key_counts [B]."""
    inputs = ["caption_embeds", "caption_mask"]
    inputs += [f"caption_projection.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")]
    inputs += ["caption_norm.weight", "to_kv.weight", "to_kv.bias"]
    inputs += ["to_kv.weight_scale"] * (layout.kv_weight_dtype is not None)
    inputs += ["cross_attention.norm_k.weight"] * layout.config.qk_norm

    def caption(t: Tensors) -> tuple[torch.Tensor, ...]:
        embeds = t["caption_embeds"].to(layout.dtype)
        x = F.linear(embeds, t["caption_projection.linear_1.weight"], t["caption_projection.linear_1.bias"])
        x = F.gelu(x, approximate="tanh")
        x = F.linear(x, t["caption_projection.linear_2.weight"], t["caption_projection.linear_2.bias"])
        x = rms_norm(x, t["caption_norm.weight"], _NORM_EPS)
        # [L, B * S, 2C]: all layers in one batched product.
        weight = t["to_kv.weight"].to(layout.dtype)
        rows = x.flatten(0, 1).expand(weight.shape[0], -1, -1)
        product = torch.bmm(rows, weight.transpose(1, 2)).float()
        if layout.kv_weight_dtype is not None:
            product = product * t["to_kv.weight_scale"].unsqueeze(1)
        key_values = (product + t["to_kv.bias"].float().unsqueeze(1)).to(layout.dtype)
        if layout.config.qk_norm:
            key, value = key_values.chunk(2, dim=-1)
            key = rms_norm(key, t["cross_attention.norm_k.weight"].unsqueeze(1), _NORM_EPS)
            key_values = torch.cat([key, value], dim=-1)
        mask = t["caption_mask"]
        bias = (1 - mask.float()) * MASKED
        return key_values.unflatten(1, tuple(mask.shape)), bias, key_counts(mask)

    return Piece("caption", tuple(inputs), caption)


def embed_piece(layout: TransformerLayout) -> Piece:
    """latent, timestep -> x and branch [B, N, C], tables [L + 1, 6, C] fp32, head_table [2, C] fp32.

    The first block adds gate x branch to x like every other: x is zero, branch the embedded latent, table 0 all ones.
    """
    config = layout.config
    inputs = ["latent", "timestep", "patch_embed.weight", "patch_embed.bias", "modulations", "modulation"]
    inputs += ["position_embedding"] * (config.interpolation_scale is not None)
    inputs += ["table_factors"] * layout.smooth_tables
    inputs += ["timestep_modulation.weight", "timestep_modulation.bias"]
    embedders = ["timestep_embedder"]
    if config.guidance_embeds:
        inputs.append("guidance_embeds")
        embedders.append("guidance_embedder")
    inputs += [f"{e}.linear_{i}.{part}" for e in embedders for i in (1, 2) for part in ("weight", "bias")]

    def embed(t: Tensors) -> tuple[torch.Tensor, ...]:
        tokens = _model_latent(t, layout).flatten(2).transpose(1, 2).to(layout.dtype)
        x = F.linear(tokens, t["patch_embed.weight"], t["patch_embed.bias"])
        if config.interpolation_scale is not None:
            x = x + t["position_embedding"].to(layout.dtype)
        branch = x.expand(layout.batch, -1, -1).contiguous()
        embedding = _sinusoidal_mlp(t, "timestep_embedder", t["timestep"] * config.timestep_scale)
        if config.guidance_embeds:
            guidance = t["guidance_embeds"] * config.guidance_embeds_scale
            embedding = embedding + _sinusoidal_mlp(t, "guidance_embedder", guidance)
        shared = F.linear(F.silu(embedding), t["timestep_modulation.weight"], t["timestep_modulation.bias"])
        tables = t["modulations"].float() + shared.float().unflatten(-1, (6, -1))  # [L, 6, C]
        if layout.smooth_tables:
            # The norm computes LN(x) (1 + scale) + shift: dividing that by s divides 1 + scale and shift.
            one = _scale_row_ones(tables)
            tables = (tables + one) * t["table_factors"] - one
        tables = torch.cat([torch.ones_like(tables[:1]), tables])
        head_table = t["modulation"].float() + embedding.float()
        return torch.zeros_like(branch), branch, tables, head_table

    return Piece("embed", tuple(inputs), embed)


def block_piece(layout: TransformerLayout, forms: BlockForms, name: str = "block") -> Piece:
    """x, branch [B, N, C] of the block before and the two tables [6, C] -> x, branch of this one."""
    config, dtype, impl = layout.config, layout.dtype, layout.impl
    inputs = ["x", "branch", "table_before", "table", "key_value", "key_bias", "key_counts"]
    for layer, form in forms.items():
        inputs += form.tensors(layer)
    inputs += ["mix_ffn.conv_inverted.bias", "mix_ffn.conv_depth.weight", "mix_ffn.conv_depth.bias"]
    if config.qk_norm:
        inputs += [f"linear_attention.norm_{p}.weight" for p in "qk"] + ["cross_attention.norm_q.weight"]

    def block(t: Tensors) -> tuple[torch.Tensor, ...]:
        def product(layer: str, x: torch.Tensor) -> torch.Tensor:
            return linear(x, t, layer, forms[layer], dtype, own_int8=layout.own_int8)

        def output(layer: str) -> dict[str, object]:
            form = forms[layer]
            return {"out_scale": form.scale_wanted(t, layer), "out_dtype": form.codes_wanted, "impl": impl}

        def row(table: str, index: int) -> torch.Tensor:
            return t[table][index].expand(layout.batch, -1)

        h, x = residual_modulated_norm(
            t["x"],
            t["branch"],
            row("table_before", _GATE_M),
            row("table", _SHIFT_A),
            row("table", _SCALE_A),
            eps=config.norm_eps,
            **output("linear_attention.qkv"),  # type: ignore[arg-type]
        )
        norms = (t["linear_attention.norm_q.weight"], t["linear_attention.norm_k.weight"]) if config.qk_norm else ()
        qkv = product("linear_attention.qkv", h)
        branch = linear_attention(
            qkv,
            *norms,
            head_dim=config.head_dim,
            **output("linear_attention.to_out"),  # type: ignore[arg-type]
        )
        limit = _FP16_MAX if config.attention_clip else None
        if layout.fuses(forms["linear_attention.to_out"]):
            layer, following = "linear_attention.to_out", "cross_attention.to_q"
            fed = (following, forms[following])
            x, fed_x = residual_linear(branch, t, layer, forms[layer], x, t["table"][_GATE_A], limit, fed)
        else:
            branch = product("linear_attention.to_out", branch)
            if limit is not None:
                branch = branch.clamp(-limit, limit)
            x = fed_x = (x.float() + t["table"][_GATE_A] * branch.float()).to(dtype)

        query = product("cross_attention.to_q", fed_x)
        if config.qk_norm:
            query = rms_norm(query, t["cross_attention.norm_q.weight"], _NORM_EPS)
        branch = cross_attention(
            query,
            t["key_value"],
            t["key_bias"],
            t["key_counts"],
            heads=config.cross_heads,
            **output("cross_attention.to_out"),  # type: ignore[arg-type]
        )
        branch = product("cross_attention.to_out", branch)

        h, x = residual_modulated_norm(
            x,
            branch,
            None,
            row("table", _SHIFT_M),
            row("table", _SCALE_M),
            eps=config.norm_eps,
            **output("mix_ffn.conv_inverted"),  # type: ignore[arg-type]
        )
        expanded = product("mix_ffn.conv_inverted", h)
        gated = mix_ffn_depthwise(
            expanded,
            taps_view(t["mix_ffn.conv_depth.weight"]),
            t["mix_ffn.conv_depth.bias"],
            layout.height,
            layout.width,
            x_bias=t["mix_ffn.conv_inverted.bias"],
            **output("mix_ffn.conv_point"),  # type: ignore[arg-type]
        )
        return x, product("mix_ffn.conv_point", gated)

    return Piece(name, tuple(inputs), block)


def head_piece(layout: TransformerLayout) -> Piece:
    """x, branch of the last block -> next_latent, x0, velocity [1, 32, h, w] fp32: the rest of one solver step."""
    inputs = ["x", "branch", "table_before", "head_table", "proj_out.weight", "proj_out.bias"]
    inputs += ["latent", "previous_x0", "timestep", "step_coefficients"]
    guided = layout.batch == 2
    inputs += ["sigma", "guidance_scale"] * guided

    def head(t: Tensors) -> tuple[torch.Tensor, ...]:
        def row(table: str, index: int) -> torch.Tensor:
            return t[table][index].expand(layout.batch, -1)

        h, _ = residual_modulated_norm(
            t["x"],
            t["branch"],
            row("table_before", _GATE_M),
            row("head_table", 0),
            row("head_table", 1),
            eps=layout.config.norm_eps,
            impl=layout.impl,
        )
        out = F.linear(h, t["proj_out.weight"], t["proj_out.bias"]).float()
        out = out.transpose(1, 2).unflatten(2, (layout.height, layout.width))
        latent = t["latent"]
        if guided:
            velocity = out[:1] + t["guidance_scale"] * (out[1:] - out[:1])
            x0 = latent - t["sigma"] * velocity
        else:
            velocity = out
            x0 = _trigflow_x0(t, layout, velocity)
        a, b, c = t["step_coefficients"].unbind(0)
        return a * latent + b * x0 + c * t["previous_x0"], x0, velocity.contiguous()

    return Piece("head", tuple(inputs), head)


def stored_taps(weight: torch.Tensor) -> torch.Tensor:
    """A depthwise weight [2F, 1, 3, 3] as it is stored: [9, 2F], each tap contiguous."""
    return weight.flatten(1).t().contiguous()


def taps_view(stored: torch.Tensor) -> torch.Tensor:
    """The weight [2F, 1, 3, 3] in the memory of `stored_taps`."""
    return stored.view(3, 3, 1, -1).permute(3, 2, 0, 1)


def transformer_pieces(layout: TransformerLayout, forms: tuple[BlockForms, ...]) -> tuple[dict[str, Piece], list[str]]:
    """All pieces by name, and the name of every block's piece: blocks of equal forms share one."""
    pieces = {piece.name: piece for piece in (caption_piece(layout), embed_piece(layout), head_piece(layout))}
    names: dict[tuple, str] = {}
    blocks = []
    for form in forms:
        key = tuple(form.items())
        if key not in names:
            names[key] = f"block_{len(names) + 1}" if names else "block"
            pieces[names[key]] = block_piece(layout, form, names[key])
        blocks.append(names[key])
    return pieces, blocks


def transformer_calls(pieces: Mapping[str, Piece], blocks: list[str]) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """(calls once per prompt, calls of a step) for weights named as the reference names them."""
    caption = Call("caption", pieces["caption"].inputs, ("key_values", "key_bias", "key_counts"))
    step = [Call("embed", pieces["embed"].inputs, ("x.0", "branch.0", "tables", "head_table"))]
    for i, name in enumerate(blocks):
        shared = {
            "x": f"x.{i}",
            "branch": f"branch.{i}",
            "table_before": f"tables[{i}]",
            "table": f"tables[{i + 1}]",
            "key_value": f"key_values[{i}]",
            "key_bias": "key_bias",
            "key_counts": "key_counts",
        }
        inputs = tuple(shared.get(n, f"blocks.{i}.{n}") for n in pieces[name].inputs)
        step.append(Call(name, inputs, (f"x.{i + 1}", f"branch.{i + 1}")))
    last = len(blocks)
    shared = {"x": f"x.{last}", "branch": f"branch.{last}", "table_before": f"tables[{last}]"}
    inputs = tuple(shared.get(n, n) for n in pieces["head"].inputs)
    step.append(Call("head", inputs, ("next_latent", "x0", "velocity")))
    return (caption,), tuple(step)


def in_reference_impl(layout: TransformerLayout) -> TransformerLayout:
    """The same layout with the kernels' references, for any device."""
    return replace(layout, impl="reference")


def _sinusoidal_mlp(t: Tensors, name: str, scalar: torch.Tensor) -> torch.Tensor:
    """Sinusoid of a scalar [] (cos first, 256 wide, fp32), then Linear, SiLU, Linear -> [1, C]."""
    weight = t[f"{name}.linear_1.weight"]
    half = weight.shape[1] // 2
    index = torch.arange(half, dtype=torch.float32, device=scalar.device)
    angle = scalar.float().reshape(1, 1) * torch.exp(index * (-math.log(10000.0) / half))[None]
    sinusoid = torch.cat([angle.cos(), angle.sin()], dim=-1).to(weight.dtype)
    hidden = F.silu(F.linear(sinusoid, weight, t[f"{name}.linear_1.bias"]))
    return F.linear(hidden, t[f"{name}.linear_2.weight"], t[f"{name}.linear_2.bias"])


def _scale_row_ones(tables: torch.Tensor) -> torch.Tensor:
    """1 in the rows that hold scales, 0 elsewhere: [6, 1] fp32."""
    row = torch.arange(6, device=tables.device)
    return ((row == _SCALE_A) | (row == _SCALE_M)).float()[:, None]


def _model_latent(t: Tensors, layout: TransformerLayout) -> torch.Tensor:
    """What the network sees: the latent itself, or with TrigFlow the latent at flow matching's scale."""
    latent = t["latent"]
    return latent if layout.batch == 2 else latent / layout.sigma_data * _trigflow_k(t["timestep"])


def _trigflow_k(timestep: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(timestep * timestep + (1 - timestep) * (1 - timestep))


def _trigflow_x0(t: Tensors, layout: TransformerLayout, velocity: torch.Tensor) -> torch.Tensor:
    """x0 as in `reference.solver_step.TrigFlowStep`."""
    s, k = t["timestep"], _trigflow_k(t["timestep"])
    trig_velocity = ((1 - 2 * s) * _model_latent(t, layout) + (1 - 2 * s + 2 * s * s) * velocity) * (
        layout.sigma_data / k
    )
    return ((1 - s) * t["latent"] - s * trig_velocity) / k
