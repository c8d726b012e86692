"""The ladder: each component on the same inputs, then the whole path from the same noise.

Candidate: a bundle's engines through `sana_runtime`. Reference: our PyTorch modules in fp32, which the test suite
holds equal to diffusers'.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sana_export.components import ComponentPlan, loaded_module, plan_components
from sana_export.parity import tolerance
from sana_export.parity.metrics import Parity, measure
from sana_export.weights.checkpoint import Checkpoint
from sana_runtime.contract import COMPONENTS, ComponentName
from sana_runtime.engine import DeviceTensor
from sana_runtime.errors import InputError
from sana_runtime.pipeline import Pipeline, Step, draw_noise, seeded_generator
from sana_runtime.scheduler import StepTable, step_table

Array = npt.NDArray
OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is painted twice: once by the engines, once by PyTorch."""

    prompt: str
    negative_prompt: str
    seed: int
    num_steps: int
    guidance_scale: float


@dataclass(frozen=True)
class LadderResult:
    """`components`: equal inputs, one engine call. `drift`: per step, each side on its own latents. `picture`: end
    to end. `images`: the two pictures [H, W, 3] uint8.
    """

    components: tuple[Parity, ...]
    drift: tuple[Parity, ...]
    picture: Parity
    images: tuple[Array, Array]


@dataclass(frozen=True)
class _Captions:
    embeds: Array  # [2 or 1, 300, C] fp32
    mask: Array  # [2 or 1, 300] int64


def climb(pipeline: Pipeline, checkpoint: Checkpoint, settings: Settings, on_progress: OnProgress) -> LadderResult:
    """Compare a loaded bundle with its checkpoint. Both sides start from the same noise, drawn from the seed.

    One reference component is in memory at a time. Raises `InputError` when the checkpoint is not the one the
    bundle was made from.
    """
    check_same_weights(pipeline, checkpoint)
    reference = _Reference(pipeline, checkpoint, settings)
    on_progress("reference text_encoder")
    with reference.module("text_encoder") as encoder:
        captions = reference.captions(encoder)
    on_progress("candidate text_encoder")
    rows = [_caption_parity(pipeline, settings, captions)]
    on_progress("candidate picture")
    trace: list[dict[str, Array]] = []
    candidate = pipeline.generate(
        settings.prompt,
        settings.negative_prompt,
        settings.seed,
        settings.num_steps,
        settings.guidance_scale,
        on_step=lambda step: trace.append(_outputs(step)),
    )
    with reference.module("transformer") as step_module:
        on_progress("reference denoising")
        latents = reference.denoise(step_module, captions, on_progress)
    drift = tuple(
        measure(f"step {index + 1}", "next_latent", mine["next_latent"], theirs["next_latent"])
        for index, (mine, theirs) in enumerate(zip(trace, latents, strict=True))
    )
    rows.append(_first_velocity_parity(trace, latents))
    on_progress("vae_decoder")
    final = latents[-1]["next_latent"]
    with reference.module("vae_decoder") as decoder:
        picture = decoder(torch.from_numpy(final)).numpy()[0]
    rows.append(measure("vae_decoder", "image", pipeline.decode(final), picture))
    whole = measure("picture", "image", candidate.pixels, picture)
    return LadderResult(tuple(rows), drift, whole, (candidate.pixels, picture))


def check_components(result: LadderResult, pipeline: Pipeline, checkpoint: Checkpoint) -> None:
    """Raise `ParityError` if a component's engine is further from the reference than its dtype explains."""
    blocks = {
        "text_encoder": checkpoint.text_encoder_config["num_hidden_layers"],
        "transformer": checkpoint.transformer_config["num_layers"],
        "vae_decoder": sum(checkpoint.vae_config["decoder_layers_per_block"]),
    }
    for row, name in zip(result.components, COMPONENTS, strict=True):
        tolerance.check(row, pipeline.manifest.component(name).dtype, blocks[name])


def check_same_weights(pipeline: Pipeline, checkpoint: Checkpoint) -> None:
    """Raise `InputError` unless the bundle was built from this checkpoint's weights."""
    for name in COMPONENTS:
        recorded, found = pipeline.manifest.component(name).weights_sha256, checkpoint.digest(name)
        if recorded != found:
            raise InputError(
                f"the bundle's {name} was not built from {checkpoint.source}",
                received=f"weights {found[:12]}…",
                expected=f"weights {recorded[:12]}…, from {pipeline.manifest.model.source}",
                action="name the checkpoint the bundle was built from: --checkpoint MODEL",
            )


class _Reference:
    """The PyTorch side: fp32 modules, and the pipeline's own tokenizer and schedule."""

    def __init__(self, pipeline: Pipeline, checkpoint: Checkpoint, settings: Settings) -> None:
        manifest = pipeline.manifest
        plans = plan_components(checkpoint, "fp32", manifest.height, manifest.width, manifest.tokenizer.padded_length)
        self._plans: dict[ComponentName, ComponentPlan] = {plan.name: plan for plan in plans}
        self._pipeline, self._checkpoint, self._settings = pipeline, checkpoint, settings
        self._embedded = checkpoint.guidance == "embedded"
        self.table: StepTable = step_table(manifest.scheduler, settings.num_steps)

    @contextmanager
    def module(self, name: ComponentName) -> Iterator[nn.Module]:
        """A component with its weights, freed afterwards."""
        module = loaded_module(self._plans[name], self._checkpoint)
        with torch.inference_mode():
            yield module
        del module
        gc.collect()

    def captions(self, encoder: nn.Module) -> _Captions:
        """The transformer's caption batch, [negative, positive] or [positive]."""
        texts = [(self._settings.prompt, False)]
        if not self._embedded:
            texts.insert(0, (self._settings.negative_prompt, True))
        embeds, masks = [], []
        for text, negative in texts:
            tokens = self._pipeline.tokenize(text, negative=negative)
            rows = encoder(torch.from_numpy(tokens.caption_tokens), torch.from_numpy(tokens.caption_mask))
            selected = np.r_[0, tokens.tail_start : tokens.tail_start + 299]
            embeds.append(rows.numpy()[:, selected])
            masks.append(tokens.caption_mask[:, selected])
        return _Captions(np.concatenate(embeds), np.concatenate(masks))

    def denoise(self, module: nn.Module, captions: _Captions, on_progress: OnProgress) -> list[dict[str, Array]]:
        """Every step's outputs, from the same draws of noise as the candidate."""
        generator = seeded_generator(self._settings.seed)
        shape = self._pipeline.latent_shape
        latent = torch.from_numpy(draw_noise(generator, shape) * np.float32(self.table.initial_scale))
        previous_x0 = torch.zeros(shape)
        trace = []
        for index in range(len(self.table)):
            on_progress(f"reference step {index + 1}/{len(self.table)}")
            if self.table.fresh_noise:
                previous_x0 = torch.from_numpy(draw_noise(generator, shape))
            outputs = module(latent, previous_x0, **self._conditions(index, captions))
            latent, x0, velocity = outputs
            previous_x0 = previous_x0 if self.table.fresh_noise else x0
            names = ("next_latent", "x0", "velocity")
            trace.append({name: tensor.numpy() for name, tensor in zip(names, (latent, x0, velocity), strict=True)})
        return trace

    def _conditions(self, index: int, captions: _Captions) -> dict[str, torch.Tensor]:
        table = self.table
        conditions = {
            "caption_embeds": torch.from_numpy(captions.embeds),
            "caption_mask": torch.from_numpy(captions.mask),
            "timestep": torch.tensor(float(table.timesteps[index])),
            "step_coefficients": torch.tensor(table.coefficients[index], dtype=torch.float32),
        }
        if self._embedded:
            return {**conditions, "guidance_embeds": torch.tensor(self._settings.guidance_scale)}
        scale = self._settings.guidance_scale if self._settings.guidance_scale > 1 else 1.0
        sigma = torch.tensor(float(table.sigmas[index]))
        return {**conditions, "sigma": sigma, "guidance_scale": torch.tensor(scale)}


def _caption_parity(pipeline: Pipeline, settings: Settings, captions: _Captions) -> Parity:
    """Only rows that the transformer attends to: padding rows are masked out."""
    caption = pipeline.encode_caption(settings.prompt)
    valid = caption.mask[0].astype(bool)
    candidate = _wide(caption.embeds)[0][valid]
    return measure("text_encoder", "caption_embeds", candidate, captions.embeds[-1][valid])


def _first_velocity_parity(trace: list[dict[str, Array]], latents: list[dict[str, Array]]) -> Parity:
    """Step 1 is the one whose latent is the same on both sides."""
    row = measure("transformer", "velocity", trace[0]["velocity"], latents[0]["velocity"])
    return replace(row, stage="transformer (step 1)")


def _wide(tensor: DeviceTensor) -> Array:
    """A tensor as fp32; bfloat16 arrives on the host as its upper 16 bits."""
    array = tensor.numpy()
    if tensor.spec.dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _outputs(step: Step) -> dict[str, Array]:
    return {"next_latent": step.next_latent, "x0": step.x0, "velocity": step.velocity}
