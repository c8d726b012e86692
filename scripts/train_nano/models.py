"""The modules that are trained, their initial weights, and their weights under diffusers' names."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Gemma2Model

from sana_export.reference.dc_ae import (
    AutoencoderConfig,
    AutoencoderMixFFN,
    Decoder,
    EfficientViTBlock,
    Encoder,
    MultiscaleLinearAttention,
    ResBlock,
)
from sana_export.reference.text_encoder import gemma2_config
from sana_export.reference.transformer import (
    CrossAttention,
    LinearTransformer,
    TransformerConfig,
    modulated_norm,
    position_embedding,
)
from sana_export.weights import key_map
from sana_export.weights.architecture import (
    REFERENCES_OF,
    UPSTREAM_COMPONENTS,
    Config,
    ReferenceComponent,
    UpstreamComponent,
    completed,
    layout,
)
from sana_export.weights.checkpoint import Checkpoint, OnBytes
from sana_export.weights.lazy import LazyTensor
from scripts.train_nano.depthwise import Impl, TrainingAutoencoderMixFFN, TrainingMixFFN
from scripts.train_nano.objects import ObjectHead
from scripts.train_nano.sizes import Size

_MODULATION = "modulation"


# --- The autoencoder and the transformer: the project's reference modules ---


class Autoencoder(nn.Module):
    """DC-AE, both halves: pixels [B, 3, H, W] in -1..1 <-> latent [B, 32, H/32, W/32], unscaled."""

    def __init__(self, config: Config, mix_ffn: Impl = "reference") -> None:
        super().__init__()
        shape = AutoencoderConfig.from_upstream(completed("vae", config))
        self.encoder, self.decoder = Encoder(shape), Decoder(shape)
        for module in list(self.modules()):
            if isinstance(module, EfficientViTBlock):
                channels = module.mix_ffn.conv_inverted.in_features
                module.mix_ffn = TrainingAutoencoderMixFFN(channels, mix_ffn)
                nn.init.normal_(module.mix_ffn.conv_depth.weight, std=1 / 3)
                nn.init.zeros_(module.mix_ffn.conv_depth.bias)
        for module in self.modules():
            # Branches start at 0: what is left are the shortcuts, which alone are a coarse autoencoder.
            if isinstance(module, ResBlock | MultiscaleLinearAttention | AutoencoderMixFFN):
                nn.init.zeros_(module.norm.weight)


class PositionedPatchEmbed(nn.Linear):
    """The reference's patch embedding and, behind it, its position embedding, which here stays on the device: a CUDA
    graph may copy nothing from the CPU. For square grids.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.latent_channels, config.channels)
        self._config = config
        self._tables: dict[tuple[int, torch.device], torch.Tensor] = {}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(tokens.shape[1])
        assert side * side == tokens.shape[1], "trained on square pictures only"
        key = (side, tokens.device)
        if key not in self._tables:
            self._tables[key] = position_embedding(self._config, side, side).to(tokens.device)
        return super().forward(tokens) + self._tables[key]


class TrainingCrossAttention(CrossAttention):
    """The reference's, without qk-norm, with keys and values brought into heads together: what autocast makes bf16
    stays so up to the softmax.
    """

    def forward(self, x: torch.Tensor, caption: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """`bias` [B, 1, 1, S], as the reference's."""
        key, value = self.to_kv(caption).chunk(2, dim=-1)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), key, value))
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        weights = F.softmax(scores.float() + bias.float(), dim=-1).to(query.dtype)
        return self.to_out((weights @ value).transpose(1, 2).flatten(2))


class TrainingTransformer(LinearTransformer):
    """The reference in parts that can be compiled (`compile_parts`). Parameters and mathematics are the reference's."""

    def compile_parts(self) -> None:
        """Compile blocks and what surrounds them, for the shapes they meet."""
        for block in self.blocks:
            block.compile(dynamic=False)
        self._enter = torch.compile(self._enter, dynamic=False)  # type: ignore[method-assign]
        self._leave = torch.compile(self._leave, dynamic=False)  # type: ignore[method-assign]

    def velocity(
        self, latent: torch.Tensor, caption_embeds: torch.Tensor, caption_mask: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """What `forward` gives, by the compiled parts."""
        height, width = latent.shape[-2:]
        x, embedding, modulation, caption, bias = self._enter(latent, caption_embeds, caption_mask, timestep)
        for block in self.blocks:
            x = block(x, caption, bias, modulation, (height, width))
        return self._leave(x, embedding).unflatten(2, (height, width))

    def _enter(
        self, latent: torch.Tensor, caption_embeds: torch.Tensor, caption_mask: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        x = self.patch_embed(latent.flatten(2).transpose(1, 2))
        embedding, modulation = self._embed_timestep(timestep, None)
        caption = self.caption_norm(self.caption_projection(caption_embeds))
        # Every block multiplies them in bf16 under autocast: converted once.
        kind = latent.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            caption = caption.to(torch.get_autocast_dtype(kind))
        return x, embedding, modulation, caption, (1 - caption_mask.float())[:, None, None, :] * -10000.0

    def _leave(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.modulation[None] + embedding[:, None]).split(1, dim=1)
        return self.proj_out(modulated_norm(x, shift, scale, self.config.norm_eps)).transpose(1, 2)


def build_transformer(config: Config, mix_ffn: Impl = "reference") -> TrainingTransformer:
    """The Linear DiT with the initial weights of Sana's training: velocity 0, cross-attention 0."""
    shape_of_model = TransformerConfig.from_upstream(completed("transformer", config))
    model = TrainingTransformer(replace(shape_of_model, interpolation_scale=None))
    model.patch_embed = PositionedPatchEmbed(shape_of_model)
    for block in model.blocks:
        block.cross_attention = TrainingCrossAttention(model.config)
        shape = block.mix_ffn.conv_inverted
        block.mix_ffn = TrainingMixFFN(shape.in_features, shape.out_features // 2, mix_ffn)
    for name, parameter in model.named_parameters():
        if name.endswith(_MODULATION):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith("conv_depth.weight"):
            nn.init.normal_(parameter, std=1 / 3)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    for layer in (model.timestep_embedder.linear_1, model.timestep_embedder.linear_2, model.timestep_modulation):
        nn.init.normal_(layer.weight, std=0.02)
    for layer in (model.caption_projection.linear_1, model.caption_projection.linear_2):
        nn.init.normal_(layer.weight, std=0.02)
    for block in model.blocks:
        nn.init.zeros_(block.cross_attention.to_out.weight)
    nn.init.zeros_(model.proj_out.weight)
    return model


# --- The text encoder: transformers' Gemma-2, run here behind a prefix that is computed once ---


def build_text_encoder(config: Config) -> Gemma2Model:
    """transformers' Gemma-2 with unit-variance embeddings."""
    model = Gemma2Model(gemma2_config(completed("text_encoder", config))).float()
    for name, parameter in model.named_parameters():
        if name.startswith("embed_tokens"):
            nn.init.normal_(parameter, std=model.config.hidden_size**-0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def caption_embeds(
    model: Gemma2Model, prefix: torch.Tensor, tokens: torch.Tensor, layer_function: Callable[..., Any] | None = None
) -> torch.Tensor:
    """prefix [P] (first token and instruction), tokens [B, T] behind it -> [B, 1 + T, C]: row 0 and the tail's rows.

    What transformers computes for the joined text, padded on the right: attention is causal, so that the prefix
    depends on nothing behind it and padding changes nothing before it. `layer_function`: `gemma_layer`, compiled.
    """
    run = layer_function or gemma_layer
    count, length = len(prefix), tokens.shape[1]
    cosine, sine = _rotations(model, count + length, prefix.device)
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    before, tail = _embedded(model, prefix[None]), _embedded(model, tokens)
    # causal[i, j]: may tail row i see key j? All keys of the prefix, and those of the tail up to itself.
    causal = torch.ones(count + length, count + length, dtype=torch.bool, device=prefix.device).tril()
    for layer in model.layers:
        before, key, value = run(layer, before, cosine[:count], sine[:count], causal[:count, :count])
        states.append((key, value))
    for layer, state in zip(model.layers, states, strict=True):
        tail, _, _ = run(layer, tail, cosine[count:], sine[count:], causal[count:], state)
    first = before[:, :1].expand(len(tokens), -1, -1)
    return model.norm(torch.cat([first, tail], dim=1))


def _embedded(model: Gemma2Model, tokens: torch.Tensor) -> torch.Tensor:
    return F.embedding(tokens, model.embed_tokens.weight) * model.config.hidden_size**0.5


def _rotations(model: Gemma2Model, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [length, head_dim] of the rotary embedding."""
    half = model.config.head_dim // 2
    base = _rope_theta(model)
    frequency = base ** -(torch.arange(half, dtype=torch.float32, device=device) / half)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def _rope_theta(model: Gemma2Model) -> float:
    parameters: Any = getattr(model.config, "rope_parameters", None)
    if isinstance(parameters, Mapping) and "rope_theta" in parameters:
        return float(parameters["rope_theta"])
    return float(model.config.rope_theta)


def gemma_layer(
    layer: nn.Module,
    x: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    allowed: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer of Gemma-2: x [B, T, C] -> (x, key, value), keys and values [B, heads, T, D] before those of `past`
    [1, heads, P, D] are put in front. `allowed` [T, P + T].
    """
    attention, config = layer.self_attn, layer.self_attn.config
    normed = layer.input_layernorm(x)
    query, key, value = (
        projection(normed).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = _rotated(query, cosine, sine), _rotated(key, cosine, sine)
    keys, values = key, value
    if past is not None:
        keys, values = (
            torch.cat([old.expand(len(x), -1, -1, -1), new], dim=2) for old, new in zip(past, (key, value), strict=True)
        )
    groups = config.num_attention_heads // config.num_key_value_heads
    keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values))
    scores = (query @ keys.transpose(-1, -2)) * config.query_pre_attn_scalar**-0.5
    cap = config.attn_logit_softcapping
    scores = torch.tanh(scores.float() / cap) * cap
    weights = scores.masked_fill(~allowed, -10000.0).softmax(dim=-1).to(value.dtype)
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    x = x + layer.post_attention_layernorm(attention.o_proj(mixed))
    normed, mlp = layer.pre_feedforward_layernorm(x), layer.mlp
    hidden = mlp.down_proj(F.gelu(mlp.gate_proj(normed), approximate="tanh") * mlp.up_proj(normed))
    return x + layer.post_feedforward_layernorm(hidden), key, value


def _rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine.to(x.dtype) + torch.cat([-second, first], dim=-1) * sine.to(x.dtype)


# --- The contrastive model, which scores captions: not shipped ---


class ContrastiveHeads(nn.Module):
    """A small image tower on scaled latents [B, 32, h, h], a projection of mean caption rows, a temperature, and what
    names objects.
    """

    def __init__(self, size: Size, side: int, text_channels: int) -> None:
        super().__init__()
        channels = size.contrastive_channels
        self.tower = nn.Sequential(
            nn.Conv2d(32, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(32 * side * side, 2 * channels),
            nn.GELU(),
            nn.Linear(2 * channels, channels),
        )
        self.text = nn.Linear(text_channels, channels)
        self.objects = ObjectHead(text_channels)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def images(self, latents: torch.Tensor) -> torch.Tensor:
        """Unit vectors [B, channels]."""
        return F.normalize(self.tower(latents).float(), dim=-1)

    def captions(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Unit vectors [B, channels] of caption rows [B, S, C] with mask [B, S]."""
        weights = (mask / mask.sum(-1, keepdim=True))[..., None]
        return F.normalize(self.text((embeds * weights).sum(1)).float(), dim=-1)


# --- Weights under diffusers' names ---


@dataclass(frozen=True)
class TrainedModel:
    """The shipped parts. `scaling_factor`: what a latent is multiplied with for the transformer."""

    text_encoder: Gemma2Model
    transformer: LinearTransformer
    autoencoder: Autoencoder
    tokenizer_json: bytes
    scaling_factor: float

    def reference(self, component: ReferenceComponent) -> nn.Module:
        """The module of a reference component."""
        return {
            "text_encoder": self.text_encoder,
            "transformer": self.transformer,
            "vae_decoder": self.autoencoder.decoder,
            "vae_encoder": self.autoencoder.encoder,
        }[component]


class TrainedCheckpoint(Checkpoint):
    """A trained model as a checkpoint that can be written as a diffusers directory."""

    def __init__(self, size: Size, model: TrainedModel) -> None:
        vae = {**size.configs.vae, "scaling_factor": model.scaling_factor}
        configs = replace(size.configs, vae=vae)
        super().__init__(size.name, configs, variant=None, attention_clip=False)
        self.model = model

    def upstream_weights(self, component: UpstreamComponent) -> dict[str, LazyTensor]:
        """All tensors of a component under upstream's names."""
        found: dict[str, torch.Tensor] = {}
        for reference in REFERENCES_OF[component]:
            state = self.model.reference(reference).state_dict()
            for assembly in key_map.assemblies(reference, layout(reference, self.config(component))):
                found.update(upstream_tensors(assembly, state[assembly.reference].cpu()))
        return {name: _stored(found[name]) for name in self.upstream_shapes(component)}

    def digest(self, component: ReferenceComponent, on_bytes: OnBytes | None = None) -> str:
        """A trained model is digested when it is a directory."""
        raise NotImplementedError

    def tokenizer_json(self) -> bytes:
        """The tokenizer trained on the captions."""
        return self.model.tokenizer_json


def _stored(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach())


def upstream_tensors(assembly: key_map.Assembly, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of a reference tensor: what `assembly.assemble` would make it from."""
    if assembly.transform == "heads_to_qkv":
        tensor = tensor.unflatten(0, (3, -1, assembly.head_dim)).transpose(0, 1).flatten(0, 2)
    rows = assembly.part_shape[0]
    return {
        name: tensor[index * rows : (index + 1) * rows].reshape(assembly.part_shape)
        for index, name in enumerate(assembly.upstream)
    }


def parameter_counts(checkpoint: Checkpoint) -> dict[str, int]:
    """Parameters of each component."""
    return {
        component: sum(math.prod(shape) for shape in checkpoint.upstream_shapes(component).values())
        for component in UPSTREAM_COMPONENTS
    }
