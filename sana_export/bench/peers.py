"""The peers: diffusers with a checkpoint's weights, eager and by its documented recipes.

On a GPU in bf16, on a CPU in fp32. Stages are single calls with inputs and outputs on the device: `step` is one
transformer call at the batch of classifier-free guidance without guidance and solver, which ours has inside.
`total` goes from the prompt to a uint8 picture on the host; the caption of the empty negative prompt is made once and
kept, as ours is, which diffusers does not do by itself.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from sana_export.bench.child import Emit, describe
from sana_export.bench.cuda_graphs import GraphedCall
from sana_export.bench.subjects import PROMPT, Failed, Memory, Subject, Timed
from sana_export.bench.timing import Clock, Spread, watching_memory
from sana_export.upstream import upstream_autoencoder, upstream_text_encoder, upstream_transformer
from sana_export.weights.checkpoint import Checkpoint, open_checkpoint
from sana_runtime.contract import CAPTION_LENGTH, LATENT_CHANNELS, PIXELS_PER_LATENT
from sana_runtime.errors import TargetError

_GUIDANCE_SCALE = 4.5
_SPRINT_MIDDLE_STEP = 1.3
_LINEAR_ATTENTION_EPS = 1e-15
# From diffusers' guide to fast inference of image models.
_INDUCTOR_FLAGS = {
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "epilogue_fusion": False,
}
_MOST_VARIANTS = 64
_TUNED = "max-autotune-no-cudagraphs"
Call = Callable[[], object]


@dataclass(frozen=True)
class Recipe:
    """One way to run diffusers. `compile_with`: arguments of torch.compile, None for eager. `by_block`: compile one
    transformer block and use it for all, which saves minutes. `graph`: replay each module as a CUDA graph.
    """

    label: str
    compile_with: Mapping[str, Any] | None = None
    by_block: bool = False
    graph: bool = False
    fused_qkv: bool = False
    channels_last: bool = False
    inductor_flags: Mapping[str, Any] = field(default_factory=dict)


def _tuned(label: str, *, by_block: bool) -> Recipe:
    options = {"mode": _TUNED, "dynamic": False}
    return Recipe(label, options, by_block, True, True, True, _INDUCTOR_FLAGS)


PEERS: dict[str, Recipe] = {
    "eager": Recipe("eager"),
    "graph": Recipe("eager, CUDA graph", graph=True),
    "compile": Recipe("torch.compile, CUDA graph", {"dynamic": False}, graph=True),
    # The layout that diffusers' guide recommends for convolutions, of which the decoder is made.
    "channels-last": Recipe(
        "torch.compile, channels-last, CUDA graph", {"dynamic": False}, graph=True, channels_last=True
    ),
    # The recipe's mode and layout without its flags and its fused projections, as most users would write it.
    "max-autotune": Recipe(
        "max-autotune, channels-last, CUDA graph", {"mode": _TUNED, "dynamic": False}, graph=True, channels_last=True
    ),
    "recipe": _tuned("max-autotune by block, fused QKV, channels-last, CUDA graph", by_block=True),
    "recipe-whole": _tuned("max-autotune, fused QKV, channels-last, CUDA graph", by_block=False),
    "torch-tensorrt": Recipe(
        "torch-tensorrt",
        {"backend": "torch_tensorrt", "dynamic": False, "options": {"use_explicit_typing": True}},
        graph=True,
    ),
}


def measure_peer(subject: Subject, emit: Emit) -> None:
    """Time `subject.stages` of one peer."""
    recipe = PEERS[subject.peer]
    _check_available(subject.peer)
    checkpoint = open_checkpoint(subject.source, variant=subject.variant, base=subject.base)
    peer = DiffusersPeer(checkpoint, subject, recipe)
    with torch.no_grad():
        if "cold_start" in subject.stages:
            peer.picture()
            cold = (time.time() - subject.started) * 1e3
            emit(Timed("cold_start", cold, cold, cold, 1, "process start to first picture; files in the page cache"))
        for stage in ("step", "vae_decoder", "text_encoder", "total"):
            if stage in subject.stages:
                try:
                    emit(_timed(peer, stage, subject))
                except Exception as error:  # one stage's failure leaves the others their figures
                    emit(Failed(stage, describe(error)))
        if "total" in subject.stages:
            _emit_memory(peer, subject.device, emit)


def _check_available(peer: str) -> None:
    if peer != "torch-tensorrt":
        return
    try:
        import torch_tensorrt  # type: ignore[import-not-found]  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise TargetError("not available: torch_tensorrt cannot be imported", received=describe(error)) from error


def _timed(peer: "DiffusersPeer", stage: str, subject: Subject) -> Timed:
    started = time.perf_counter()
    call = peer.stage_call(stage)
    call()
    _synchronize(subject.device)
    prepared = time.perf_counter() - started
    # A picture ends on the host: its time is the host's.
    clock = Clock("cpu" if stage == "total" else subject.device)
    spread = Spread.of(clock.times_ms(call, runs=subject.runs, warmup=subject.warmup))
    notes = [f"first call {prepared:.1f} s", *peer.problems()]
    return Timed(stage, spread.p50_ms, spread.p20_ms, spread.p80_ms, spread.runs, "; ".join(notes))


def _emit_memory(peer: "DiffusersPeer", device: str, emit: Emit) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with watching_memory(device) as peak:
        peer.picture()
    emit(Memory(torch.cuda.max_memory_allocated() / (1 << 20) if device == "cuda" else None, peak.mib))


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class DiffusersPeer:
    """A diffusers pipeline of a checkpoint, prepared module by module as `recipe` says when a stage first needs it."""

    def __init__(self, checkpoint: Checkpoint, subject: Subject, recipe: Recipe) -> None:
        self._checkpoint, self._subject, self._recipe = checkpoint, subject, recipe
        self._device = subject.device
        self._dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        self._embedded = checkpoint.guidance == "embedded"
        self._graphs: dict[str, GraphedCall] = {}
        self._prepared: set[str] = set()
        self._negative: tuple[torch.Tensor, torch.Tensor] | None = None
        import torch._dynamo.config as dynamo_config
        import torch._inductor.config as inductor_config

        # At the default limit of 8 variants a function falls back to eager without a word.
        dynamo_config.recompile_limit = _MOST_VARIANTS
        torch.manual_seed(0)
        for name, value in recipe.inductor_flags.items():
            setattr(inductor_config, name, value)
        self.pipeline = _pipeline(checkpoint, self._device, self._dtype)
        if not self._embedded and {"total", "cold_start"} & {*subject.stages}:
            # Before the recipe: its length is another one, and compiling for a caption that is made once serves nobody.
            with torch.no_grad():
                self._negative = self._caption("", None)

    def problems(self) -> list[str]:
        """Modules whose CUDA graph could not be captured, and why."""
        return [f"{name}: {graph.problem}" for name, graph in self._graphs.items() if graph.problem]

    def stage_call(self, stage: str) -> Call:
        """A function that makes the stage's call once."""
        makers = {"step": self._step, "vae_decoder": self._vae, "text_encoder": self._text, "total": self._total}
        return makers[stage]()

    # --- Stages ---

    def _step(self) -> Call:
        self._prepare("transformer")
        batch = 1 if self._embedded else 2
        latent = self._random(batch, LATENT_CHANNELS, *self._latent_side())
        caption = self._random(batch, CAPTION_LENGTH, self._checkpoint.transformer_config["caption_channels"])
        mask = torch.ones(batch, CAPTION_LENGTH, device=self._device, dtype=torch.long)
        timestep = torch.full((batch,), 0.7 if self._embedded else 700.0, device=self._device)
        extra = {"guidance": torch.full((batch,), 0.45, device=self._device, dtype=self._dtype)}
        return lambda: self.pipeline.transformer(
            latent,
            encoder_hidden_states=caption,
            encoder_attention_mask=mask,
            timestep=timestep,
            return_dict=False,
            # Named as the pipeline names it, so that both are one graph.
            attention_kwargs=None,
            **(extra if self._embedded else {}),
        )

    def _vae(self) -> Call:
        self._prepare("vae")
        latent = self._random(1, LATENT_CHANNELS, *self._latent_side())
        return lambda: self.pipeline.vae.decode(latent, return_dict=False)

    def _text(self) -> Call:
        self._prepare("text_encoder")
        tokens = torch.full((1, self._subject.caption_tokens), 5, device=self._device)
        mask = torch.ones_like(tokens)
        return lambda: self.pipeline.text_encoder(tokens, attention_mask=mask)

    def _total(self) -> Call:
        for module in ("transformer", "vae", "text_encoder"):
            self._prepare(module)
        return self.picture

    def picture(self) -> Any:
        """One picture, prompt to uint8 on the host."""
        settings: dict[str, Any] = {
            "num_inference_steps": self._subject.num_steps,
            "guidance_scale": _GUIDANCE_SCALE,
            "height": self._subject.height,
            "width": self._subject.width,
            "use_resolution_binning": False,
        }
        if self._embedded:
            middle = _SPRINT_MIDDLE_STEP if self._subject.num_steps == 2 else None
            return self.pipeline(PROMPT, intermediate_timesteps=middle, **settings).images[0]
        positive, positive_mask = self._caption(PROMPT, self._instruction())
        assert self._negative is not None, "made for every subject that paints"
        negative, negative_mask = self._negative
        return self.pipeline(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=positive,
            prompt_attention_mask=positive_mask,
            negative_prompt_embeds=negative,
            negative_prompt_attention_mask=negative_mask,
            **settings,
        ).images[0]

    def _caption(self, text: str, instruction: list[str] | None) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, mask, *_ = self.pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, device=self._device, complex_human_instruction=instruction
        )
        return embeds, mask

    def _instruction(self) -> list[str] | None:
        import inspect

        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        return parameters["complex_human_instruction"].default

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self._device, dtype=self._dtype)

    def _latent_side(self) -> tuple[int, int]:
        return self._subject.height // PIXELS_PER_LATENT, self._subject.width // PIXELS_PER_LATENT

    # --- The recipe ---

    def _prepare(self, name: str) -> None:
        """Apply the recipe to a module, once. Its callable (`forward`, for the autoencoder `decode`) is replaced."""
        if name in self._prepared:
            return
        self._prepared.add(name)
        recipe, module = self._recipe, getattr(self.pipeline, name)
        if recipe.channels_last and name != "text_encoder":
            module.to(memory_format=torch.channels_last)
        if recipe.fused_qkv and name == "transformer":
            fuse_qkv(module)
        entry = "decode" if name == "vae" else "forward"
        function = getattr(module, entry)
        if recipe.compile_with is not None:
            if recipe.by_block and name == "transformer":
                for block in module.transformer_blocks:
                    block.compile(**recipe.compile_with)
            else:
                function = torch.compile(function, **recipe.compile_with)
        if recipe.graph and self._device == "cuda":
            function = self._graphs[name] = GraphedCall(function)
        setattr(module, entry, function)


def _pipeline(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> Any:
    import diffusers
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(checkpoint.tokenizer_json().decode()), padding_side="right", **special
    )
    scheduler = getattr(diffusers, checkpoint.scheduler_config["_class_name"])
    pipeline = getattr(diffusers, checkpoint.pipeline_class)(
        tokenizer=tokenizer,
        text_encoder=upstream_text_encoder(checkpoint, device, dtype),
        vae=upstream_autoencoder(checkpoint, device, dtype),
        transformer=upstream_transformer(checkpoint, device, dtype),
        scheduler=scheduler.from_config(checkpoint.scheduler_config),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _FusedLinearAttention:
    """diffusers' linear attention with q, k and v from one product. Its own processor ignores fused projections."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        dtype = hidden_states.dtype
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.transpose(1, 2).unflatten(1, (attn.heads, -1)) for x in (query, key, value))
        query, key, value = F.relu(query).float(), F.relu(key.transpose(2, 3)).float(), value.float()
        value = F.pad(value, (0, 0, 0, 1), mode="constant", value=1.0)
        out = (value @ key) @ query
        out = out[:, :, :-1] / (out[:, :, -1:] + _LINEAR_ATTENTION_EPS)
        out = attn.to_out[0](out.flatten(1, 2).transpose(1, 2).to(dtype))
        return out.clip(-65504, 65504) if dtype == torch.float16 else out


def fuse_qkv(transformer: Any) -> None:
    """Fuse the self-attention's projections and use them."""
    for block in transformer.transformer_blocks:
        attention = block.attn1
        attention.fuse_projections()
        for name in ("to_q", "to_k", "to_v"):  # their weights would stay in memory beside the fused copy
            delattr(attention, name)
        attention.set_processor(_FusedLinearAttention())
