"""A component's pieces, calls and stored tensors from a checkpoint and, where given, a recipe with its scales."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from sana_calibration.quantize import activation_scale, quantize_weight
from sana_calibration.rules import LayerRule, PerTensor
from sana_calibration.scales import LayerScales
from sana_export.components import ComponentPlan
from sana_export.inductor import decoder as dc_ae
from sana_export.inductor import text_encoder as gemma
from sana_export.inductor import transformer as dit
from sana_export.inductor.linear import LinearForm
from sana_export.inductor.piece import Piece
from sana_export.reference.dc_ae import AutoencoderConfig
from sana_export.reference.transformer import TransformerConfig, position_embedding
from sana_export.weights.checkpoint import Checkpoint
from sana_export.weights.lazy import LazyTensor
from sana_kernels.modulated_norm.api import Impl
from sana_runtime.errors import BuildError, TargetError
from sana_runtime.inductor_program import Call, Lookup, ShortStep, value_name

Weights = Mapping[str, LazyTensor]
Rules = Mapping[str, LayerRule]
_STORED = {"float8e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class Prepared:
    """A component to compile. `weights` by the names that the calls use, `tables` by those of the lookups; `notes` for
    people. A text encoder may have a `short_step`.
    """

    pieces: Mapping[str, Piece]
    prepare: tuple[Call, ...]
    step: tuple[Call, ...]
    weights: Mapping[str, LazyTensor]
    notes: tuple[str, ...] = ()
    tables: Mapping[str, LazyTensor] = field(default_factory=dict)
    lookups: tuple[Lookup, ...] = ()
    short_step: ShortStep | None = None

    @property
    def calls(self) -> tuple[Call, ...]:
        """All of them."""
        return (*self.prepare, *self.step, *(self.short_step.calls if self.short_step else ()))


@dataclass
class _Quantized:
    """A component's rules and scales in a base dtype; collects notes about what is computed otherwise."""

    rules: Rules
    scales: Mapping[str, LayerScales]
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)

    def factor(self, layer: str) -> torch.Tensor | None:
        """The smooth factor [I] that a layer's activation is divided by."""
        found = self.scales.get(layer)
        if layer not in self.rules or found is None or found.smooth_factor is None:
            return None
        return torch.from_numpy(np.asarray(found.smooth_factor, np.float32))

    def form(self, layer: str, bias: bool, *, smooth: bool = False) -> LinearForm:
        """How a layer is computed; `smooth`: its smooth factor, if it has one, is applied to its input."""
        rule = self.rules.get(layer)
        if rule is None:
            return LinearForm(bias)
        explicit = smooth and self.factor(layer) is not None
        activation = None if rule.activation_dtype is None else _STORED[rule.activation_dtype]
        return LinearForm(bias, _STORED[rule.weight_dtype], activation, explicit)

    def activation_scale(self, layer: str) -> torch.Tensor:
        """The static scale [] fp32, rounded to the base dtype as in the Q/DQ graph."""
        rule, amax = self.rules[layer], self.scales[layer].activation_amax
        assert rule.activation_dtype is not None
        assert amax is not None
        return torch.tensor(activation_scale(amax, rule.activation_dtype)).to(self.dtype).float()

    def tensors(
        self, layer: str, form: LinearForm, weight: LazyTensor, bias: LazyTensor | None
    ) -> dict[str, LazyTensor]:
        """What is stored of a layer, by the last part of its name. `weight` is that of the reference."""
        stored: dict[str, LazyTensor] = {}
        if bias is not None:
            stored["bias"] = cast(bias, self.dtype)
        if form.weight_dtype is None:
            return {"weight": cast(weight, self.dtype), **stored}
        rule, factor = self.rules[layer], self.factor(layer)
        smooth_factor = None if factor is None else factor.numpy()

        scale_shape = () if isinstance(rule.granularity, PerTensor) else weight.shape[:1]
        # Kept from when the codes were made: to find it takes as long, and it is small.
        known_scale: list[torch.Tensor] = []

        def values() -> torch.Tensor:
            found = quantize_weight(weight.load().to(self.dtype), rule, smooth_factor, self.dtype)
            known_scale[:] = [found.scale.reshape(scale_shape)]
            return found.values

        def scale() -> torch.Tensor:
            if not known_scale:
                values()
            return known_scale[0]

        stored["weight"] = LazyTensor(weight.shape, form.weight_dtype, values)
        stored["weight_scale"] = LazyTensor(scale_shape, torch.float32, scale)
        if form.activation_dtype is not None:
            stored["activation_scale"] = constant(self.activation_scale(layer))
        if form.smooth:
            assert factor is not None
            stored["inverse_smooth"] = constant(1 / factor)
        return stored


def prepare(
    checkpoint: Checkpoint,
    plan: ComponentPlan,
    height: int,
    width: int,
    tokens: int,
    rules: Rules,
    scales: Mapping[str, LayerScales],
    impl: Impl,
) -> Prepared:
    """A component for pictures of `height` x `width` latent positions and prompts of `tokens` positions.

    Raises `TargetError` for what this target cannot compute.
    """
    dtype = _base_dtype(plan)
    for layer, rule in rules.items():
        if rule.weight_dtype not in _STORED:
            raise TargetError(
                f"target 'inductor' has no kernel for {rule.weight_dtype} weights",
                received=f"{plan.name} layer '{layer}', rule '{rule.pattern}'",
                expected="weights in " + " or ".join(_STORED),
                action="--precision fp8, int8, int8-weight-only, bf16 or fp32",
            )
    quantized = _Quantized(rules, scales, dtype)
    weights = checkpoint.weights(plan.name)
    if plan.name == "transformer":
        config = TransformerConfig.from_upstream(
            checkpoint.transformer_config, attention_clip=checkpoint.attention_clip
        )
        layout = dit.TransformerLayout(
            config,
            dtype,
            height,
            width,
            batch=2 if checkpoint.guidance == "classifier_free" else 1,
            impl=impl,
            sigma_data=float(checkpoint.scheduler_config.get("sigma_data", 0.5)),
        )
        return prepare_transformer(layout, weights, quantized)
    if plan.name == "text_encoder":
        return _prepare_text_encoder(checkpoint, weights, quantized, tokens, impl)
    autoencoder = AutoencoderConfig.from_upstream(checkpoint.vae_config)
    decoder = dc_ae.DecoderLayout(autoencoder, dtype, height, width, impl)
    if impl == "reference":
        # The shifted sums are made for the GPU; a C++ compiler takes minutes over them.
        decoder = replace(decoder, depthwise="library", grouped="library")
    return _prepare_decoder(decoder, weights, quantized)


def quantized_by(rules: Rules, scales: Mapping[str, LayerScales], dtype: torch.dtype) -> _Quantized:
    """A component's rules and scales; none of either for a base precision."""
    return _Quantized(rules, scales, dtype)


def prepare_transformer(layout: dit.TransformerLayout, weights: Weights, quantized: _Quantized) -> Prepared:
    """The Linear DiT; `layout` says how it would be without a recipe."""
    depth, dtype = layout.config.depth, layout.dtype
    fold_kv = _folds_into_kv(quantized, depth)
    forms = tuple(_block_forms(quantized, i, fold_kv) for i in range(depth))
    kv_rules = [quantized.rules.get(f"blocks.{i}.cross_attention.to_kv") for i in range(depth)]
    kv_dtype = _kv_dtype(kv_rules, quantized)
    tables = any(quantized.factor(f"blocks.{i}.{layer}") is not None for i in range(depth) for layer in _BEHIND_NORMS)
    layout = replace(layout, kv_weight_dtype=kv_dtype, smooth_tables=tables)
    stored = {name: cast(weights[name], dtype) for name in _plain_names(layout)}
    stored["modulations"] = stacked([cast(weights[f"blocks.{i}.modulation"], torch.float32) for i in range(depth)])
    if layout.config.interpolation_scale is not None:
        shape = (1, layout.tokens, layout.config.channels)
        stored["position_embedding"] = LazyTensor(
            shape, torch.float32, lambda: position_embedding(layout.config, layout.height, layout.width)
        )
    if tables:
        stored["table_factors"] = stacked([constant(_table_factors(quantized, i, layout)) for i in range(depth)])
    stored |= _key_value_tensors(layout, weights, quantized, fold_kv)
    for i, form in enumerate(forms):
        stored |= _block_tensors(f"blocks.{i}", form, layout, weights, quantized)
    pieces, blocks = dit.transformer_pieces(layout, forms)
    before, step = dit.transformer_calls(pieces, blocks)
    return _checked(Prepared(pieces, before, step, stored, tuple(quantized.notes)), weights)


# The layers whose smooth factors go into the tables, with the rows that carry them.
_BEHIND_NORMS = {"linear_attention.qkv": dit.ATTENTION_ROWS, "mix_ffn.conv_inverted": dit.FFN_ROWS}


def _block_forms(quantized: _Quantized, block: int, fold_kv: bool) -> dict[str, LinearForm]:
    """Smooth factors behind a norm go into its tables, that of conv_point into the depthwise convolution, that of the
    cross-attention's output into the values where that is exact; the others are applied on the way.
    """
    smooth = {"linear_attention.to_out", "cross_attention.to_q"}
    if not fold_kv:
        smooth.add("cross_attention.to_out")
    return {
        layer: quantized.form(f"blocks.{block}.{layer}", bias, smooth=layer in smooth)
        for layer, bias in dit.BLOCK_LINEARS.items()
    }


def _folds_into_kv(quantized: _Quantized, depth: int) -> bool:
    """Rows of powers of two change no code of a weight that has a scale per row, nor one in the base dtype."""
    rules = (quantized.rules.get(f"blocks.{i}.cross_attention.to_kv") for i in range(depth))
    return not any(rule is not None and isinstance(rule.granularity, PerTensor) for rule in rules)


def _kv_dtype(rules: Sequence[LayerRule | None], quantized: _Quantized) -> torch.dtype | None:
    """All layers' keys and values are one product, so they are stored alike."""
    kinds = {None if rule is None else (rule.weight_dtype, str(rule.granularity)) for rule in rules}
    if any(rule is not None and rule.activation_dtype is not None for rule in rules):
        quantized.notes.append("transformer: keys and values of the caption are computed in the base dtype")
    if len(kinds) > 1:
        quantized.notes.append("transformer: cross_attention.to_kv differs between layers: kept in the base dtype")
        return None
    kind = kinds.pop()
    return None if kind is None else _STORED[kind[0]]


def _plain_names(layout: dit.TransformerLayout) -> list[str]:
    linears = ["patch_embed", "timestep_modulation", "proj_out"]
    embedders = ["caption_projection", "timestep_embedder"] + ["guidance_embedder"] * layout.config.guidance_embeds
    linears += [f"{embedder}.linear_{i}" for embedder in embedders for i in (1, 2)]
    return [f"{name}.{part}" for name in linears for part in ("weight", "bias")] + ["caption_norm.weight", "modulation"]


def _table_factors(quantized: _Quantized, block: int, layout: dit.TransformerLayout) -> torch.Tensor:
    """1 / s in the rows of the norm that feeds a smoothed layer, 1 elsewhere: [6, C] fp32."""
    factors = torch.ones(6, layout.config.channels)
    for layer, rows in _BEHIND_NORMS.items():
        smooth = quantized.factor(f"blocks.{block}.{layer}")
        if smooth is not None:
            for row in rows:
                factors[row] = 1 / smooth
    return factors


def _key_value_tensors(
    layout: dit.TransformerLayout, weights: Weights, quantized: _Quantized, fold: bool
) -> dict[str, LazyTensor]:
    """The stacked [L, ...] weights of all layers' keys and values."""
    parts: dict[str, list[LazyTensor]] = {}
    for i in range(layout.config.depth):
        name = f"blocks.{i}.cross_attention.to_kv"
        form = LinearForm(True, layout.kv_weight_dtype)
        factor = quantized.factor(f"blocks.{i}.cross_attention.to_out") if fold else None
        pair = [weights[f"{name}.{part}"] for part in ("weight", "bias")]
        if factor is not None:
            pair = [_mapped(tensor, _dividing_values(factor)) for tensor in pair]
        for part, tensor in quantized.tensors(name, form, *pair).items():
            tensor = _as_channels(tensor, 2 * layout.config.channels) if part == "weight_scale" else tensor
            parts.setdefault(f"to_kv.{part}", []).append(tensor)
        if layout.config.qk_norm:
            norm = cast(weights[f"blocks.{i}.cross_attention.norm_k.weight"], layout.dtype)
            parts.setdefault("cross_attention.norm_k.weight", []).append(norm)
    return {name: stacked(tensors) for name, tensors in parts.items()}


def _dividing_values(factor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Divide the second half of the rows, those of the values, by powers of two."""

    def divide(tensor: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([torch.ones_like(factor), factor])
        return (tensor.float() / rows.view(-1, *[1] * (tensor.ndim - 1))).to(tensor.dtype)

    return divide


def _block_tensors(
    name: str, forms: dit.BlockForms, layout: dit.TransformerLayout, weights: Weights, quantized: _Quantized
) -> dict[str, LazyTensor]:
    stored: dict[str, LazyTensor] = {}
    for layer, form in forms.items():
        path = f"{name}.{layer}"
        bias = weights[f"{path}.bias"] if form.bias else None
        for part, tensor in quantized.tensors(path, form, weights[f"{path}.weight"], bias).items():
            stored[f"{path}.{part}"] = tensor
    ffn_bias = f"{name}.mix_ffn.conv_inverted.bias"
    stored[ffn_bias] = cast(weights[ffn_bias], layout.dtype)
    factor = quantized.factor(f"{name}.mix_ffn.conv_point")
    for part in ("weight", "bias"):
        tensor = weights[f"{name}.mix_ffn.conv_depth.{part}"]
        if factor is not None:
            tensor = _mapped(tensor, _dividing_first_half(factor))
        tensor = cast(tensor, layout.dtype)
        if part == "weight":
            tensor = LazyTensor((9, tensor.shape[0]), tensor.dtype, _then(tensor, dit.stored_taps))
        stored[f"{name}.mix_ffn.conv_depth.{part}"] = tensor
    if layout.config.qk_norm:
        for norm in ("linear_attention.norm_q", "linear_attention.norm_k", "cross_attention.norm_q"):
            stored[f"{name}.{norm}.weight"] = cast(weights[f"{name}.{norm}.weight"], layout.dtype)
    return stored


def _dividing_first_half(factor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Divide the value half of the depthwise convolution, which its product with the gate is linear in."""

    def divide(tensor: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([factor, torch.ones_like(factor)])
        return (tensor.float() / rows.view(-1, *[1] * (tensor.ndim - 1))).to(tensor.dtype)

    return divide


def _prepare_text_encoder(
    checkpoint: Checkpoint, weights: Weights, quantized: _Quantized, tokens: int, impl: Impl
) -> Prepared:
    quantized = _weights_only(quantized, "text_encoder")
    dtype = quantized.dtype
    embedding = quantized.form("embed_tokens", False)
    layout = gemma.TextEncoderLayout.from_upstream(
        checkpoint.text_encoder_config, tokens, dtype, embedding.weight_dtype, impl
    )
    stored: dict[str, LazyTensor] = {"norm.weight": cast(weights["norm.weight"], dtype)}
    table = quantized.tensors("embed_tokens", embedding, weights["embed_tokens.weight"], None)
    if "weight_scale" in table:
        table["weight_scale"] = _as_channels(table["weight_scale"], table["weight"].shape[0])
    tables = {f"embed_tokens.{part}": tensor for part, tensor in table.items()}
    forms = []
    for i in range(layout.layers):
        form: dict[str, LinearForm] = {}
        for packed, sources in gemma.LAYER_LINEARS.items():
            names = [f"layers.{i}.{source}" for source in sources]
            form[packed], tensors = _packed(names, weights, quantized)
            stored |= {f"layers.{i}.{packed}.{part}": tensor for part, tensor in tensors.items()}
        for norm in gemma.LAYER_NORMS:
            stored[f"layers.{i}.{norm}.weight"] = cast(weights[f"layers.{i}.{norm}.weight"], dtype)
        forms.append(form)
    pieces, layers = gemma.text_encoder_pieces(layout, tuple(forms))
    prefix, caption, short = gemma.text_encoder_calls(pieces, layers)
    lookups = gemma.text_encoder_lookups(layout)
    prepared = Prepared(pieces, prefix, caption, stored, tuple(quantized.notes), tables, lookups)
    if short:
        prepared = replace(prepared, short_step=ShortStep(layout.short_end, short))
    return _checked(prepared, weights)


def _packed(names: list[str], weights: Weights, quantized: _Quantized) -> tuple[LinearForm, dict[str, LazyTensor]]:
    """Layers that share their input as one: rows below each other, a scale per row."""
    found = [quantized.form(name, False) for name in names]
    form = found[0] if len(set(found)) == 1 else LinearForm(False)
    tensors = [quantized.tensors(name, form, weights[f"{name}.weight"], None) for name in names]
    packed = {"weight": concatenated([t["weight"] for t in tensors])}
    if form.weight_dtype is not None:
        scales = [
            _as_channels(t["weight_scale"], weights[f"{name}.weight"].shape[0])
            for name, t in zip(names, tensors, strict=True)
        ]
        packed["weight_scale"] = concatenated(scales)
    return form, packed


def _prepare_decoder(layout: dc_ae.DecoderLayout, weights: Weights, quantized: _Quantized) -> Prepared:
    forms = convolution_forms(quantized)
    if left := len(quantized.rules) - len(forms):
        quantized.notes.append(
            f"vae_decoder: {left} quantised layers stay in the base dtype: this target has 8-bit kernels for 3 x 3 "
            "convolutions of residual blocks with quantised activations"
        )
    layout = replace(layout, forms=forms)
    pieces = dc_ae.decoder_pieces(layout)
    stored = {}
    calls = dc_ae.decoder_calls(layout)
    for layer, form in forms.items():
        bias = weights[f"{layer}.bias"] if form.bias else None
        for part, tensor in quantized.tensors(layer, form, weights[f"{layer}.weight"], bias).items():
            stored[f"{layer}.{part}"] = _stored_for_decoder(f"{layer}.{part}", tensor, layout)
    for name in dc_ae.decoder_weights(layout):
        if name not in stored:
            stored[name] = _stored_for_decoder(name, cast(weights[name], layout.dtype), layout)
    by_name = {piece.name: piece for piece in pieces}
    return _checked(Prepared(by_name, (), calls, stored, tuple(quantized.notes)), weights)


def convolution_forms(quantized: _Quantized) -> dict[str, LinearForm]:
    """Of the convolutions that our kernel computes."""
    names = [name for name in quantized.rules if name.endswith((".conv1", ".conv2"))]
    forms = {name: quantized.form(name, name.endswith(".conv1")) for name in names if quantized.factor(name) is None}
    return {name: form for name, form in forms.items() if form.activation_dtype == form.weight_dtype}


def _stored_for_decoder(name: str, tensor: LazyTensor, layout: dc_ae.DecoderLayout) -> LazyTensor:
    def change(weight: torch.Tensor) -> torch.Tensor:
        return dc_ae.stored_weight(name, weight, layout.upsampling)

    # On virtual memory: only the shape is wanted.
    shape = tuple(change(torch.empty(tensor.shape, dtype=tensor.dtype)).shape)
    return LazyTensor(shape, tensor.dtype, _then(tensor, change))


def _weights_only(quantized: _Quantized, component: str) -> _Quantized:
    """The same rules without quantised activations."""
    if not any(rule.activation_dtype for rule in quantized.rules.values()):
        return quantized
    rules = {name: replace(rule, activation_dtype=None, smoothing_alpha=None) for name, rule in quantized.rules.items()}
    note = f"{component}: activations stay in the base dtype, weights in 8 bits: this target has no other kernels there"
    return _Quantized(rules, {}, quantized.dtype, [*quantized.notes, note])


def _base_dtype(plan: ComponentPlan) -> torch.dtype:
    if plan.dtype == "float16":
        raise TargetError(
            "target 'inductor' computes in bf16 or fp32",
            received=f"{plan.name} in float16",
            expected="bfloat16, which every GPU of this target multiplies as fast, or float32",
            action="--precision bf16, or a recipe with --base-precision bf16",
        )
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[plan.dtype]


def _checked(prepared: Prepared, weights: Weights) -> Prepared:
    """Every tensor that a call reads exists: a mismatch is our mistake, found before anything is compiled."""
    made = {name for call in prepared.calls for name in call.outputs}
    read = {value_name(name) for call in prepared.calls for name in call.inputs}
    unused = set(prepared.weights) - read | set(prepared.tables) - {lookup.table for lookup in prepared.lookups}
    if unused:
        raise BuildError("weights that nothing reads", received=", ".join(sorted(unused)), expected="none")
    missing = {name for name in read - made - set(prepared.weights) if "." in name and name not in weights}
    if missing:
        raise BuildError("weights that are read and not stored", received=", ".join(sorted(missing)), expected="none")
    return prepared


# --- Lazy tensors ---


def cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """The tensor in another dtype."""
    return LazyTensor(tensor.shape, dtype, _then(tensor, lambda loaded: loaded.to(dtype)))


def constant(tensor: torch.Tensor) -> LazyTensor:
    """A tensor that is there already."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def stacked(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """[...] each -> [L, ...]."""
    shape = (len(tensors), *tensors[0].shape)
    return LazyTensor(shape, tensors[0].dtype, lambda: torch.stack([t.load() for t in tensors]))


def concatenated(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Below each other along the first axis."""
    shape = (sum(t.shape[0] for t in tensors), *tensors[0].shape[1:])
    return LazyTensor(shape, tensors[0].dtype, lambda: torch.cat([t.load() for t in tensors]))


def _mapped(tensor: LazyTensor, change: Callable[[torch.Tensor], torch.Tensor]) -> LazyTensor:
    return LazyTensor(tensor.shape, tensor.dtype, _then(tensor, change))


def _as_channels(scale: LazyTensor, rows: int) -> LazyTensor:
    """A scale [] or [O] as one per row [O]."""
    return scale if scale.shape else LazyTensor((rows,), scale.dtype, _then(scale, lambda s: s.expand(rows)))


def _then(tensor: LazyTensor, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: change(tensor.load())
