"""The ladder: each component on equal inputs, then the whole path from the same noise.

Reference: our PyTorch modules in fp32, which the test suite holds equal to diffusers'. Candidate: a bundle's engines,
or the fake-quantised modules that compute what a quantised graph computes. The reference is recorded first, one
component in memory at a time, and the candidate is fed what was recorded.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from sana_calibration.fake_quant import fake_quantize_in_place
from sana_export.calibration_run import NEGATIVE, Array, Arrays, DenoisingRun, Feed
from sana_export.graph.passes.insert_qdq import Quantization
from sana_export.parity import tolerance
from sana_export.parity.metrics import Parity, measure, ssim
from sana_export.weights.checkpoint import Checkpoint
from sana_runtime.contract import COMPONENTS, ComponentName
from sana_runtime.errors import InputError
from sana_runtime.manifest import Manifest
from sana_runtime.pipeline import Pipeline, Step

OnProgress = Callable[[str], None]
_OUTPUTS = ("next_latent", "x0", "velocity")
Steps = dict[str, tuple[Parity, ...]]


@dataclass(frozen=True)
class Recording:
    """What the reference did with one prompt. `steps`: every solver step's inputs and outputs. `picture` [H, W, 3]."""

    captions: Arrays
    steps: tuple[tuple[Feed, Feed], ...]
    picture: Array


@dataclass(frozen=True)
class LadderResult:
    """One prompt. `components`: equal inputs, one call each, of the transformer x0 at its worst step (an error of
    velocity is one of x0 over sigma, so it grows towards the end whatever computes it). `x0` and `velocity`: at every
    step on equal inputs. `drift`: the latent at every step, each side on its own. `picture`: end to end, and its
    `ssim`. `images`: candidate and reference, [H, W, 3] uint8. `guidance_scale`: 1 where no two halves are combined.
    """

    prompt: str
    guidance_scale: float
    components: tuple[Parity, ...]
    x0: tuple[Parity, ...]
    velocity: tuple[Parity, ...]
    drift: tuple[Parity, ...]
    picture: Parity
    ssim: float
    images: tuple[Array, Array]

    @property
    def min_x0_sqnr_db(self) -> float:
        """Signal to error ratio of x0 at the worst step, equal inputs."""
        return min(row.sqnr_db for row in self.x0)


class Candidate(Protocol):
    """What is judged. Inside `component(name)` the method that needs that component may be called."""

    def component(self, name: ComponentName) -> AbstractContextManager[None]: ...
    def captions(self) -> list[Arrays]: ...
    def step(self, **feed: torch.Tensor) -> tuple[torch.Tensor, ...]: ...
    def decode(self, latent: torch.Tensor) -> Array: ...
    def paint(self, index: int, captions: Arrays) -> list[Array]: ...


def climb(run: DenoisingRun, candidate: Candidate, on_progress: OnProgress) -> tuple[LadderResult, ...]:
    """Judge a candidate on every prompt of `run`. Raises `BuildError` for outputs that are not finite."""
    recordings = _record(run, on_progress)
    indices = range(len(run.prompts))
    on_progress("candidate text_encoder")
    with candidate.component("text_encoder"):
        captions = candidate.captions()
    steps, drifts, finals = [], [], []
    with candidate.component("transformer"):
        for index in indices:
            on_progress(f"candidate transformer, prompt {index + 1} of {len(indices)}")
            steps.append(_steps(candidate, recordings[index]))
            latents = candidate.paint(index, captions[index])
            drifts.append(_drift(latents, recordings[index]))
            finals.append(latents[-1])
    on_progress("candidate vae_decoder")
    with candidate.component("vae_decoder"):
        return tuple(
            _result(
                run, candidate, index, recordings[index], captions[index], steps[index], drifts[index], finals[index]
            )
            for index in indices
        )


def _result(
    run: DenoisingRun,
    candidate: Candidate,
    index: int,
    recording: Recording,
    captions: Arrays,
    steps: Steps,
    drift: tuple[Parity, ...],
    final: Array,
) -> LadderResult:
    last = recording.steps[-1][1]["next_latent"]
    components = (
        _caption_parity(captions, recording.captions),
        replace(max(steps["x0"], key=lambda row: row.relative_rms), stage="transformer"),
        measure("vae_decoder", "image", candidate.decode(last), recording.picture),
    )
    picture = candidate.decode(torch.from_numpy(final))
    return LadderResult(
        run.prompts[index],
        1.0 if run.embedded else run.guidance_scale,
        components,
        steps["x0"],
        steps["velocity"],
        drift,
        measure("picture", "image", picture, recording.picture),
        ssim(picture, recording.picture),
        (picture, recording.picture),
    )


def _caption_parity(candidate: Arrays, reference: Arrays) -> Parity:
    """Only rows that the transformer attends to: padding rows are masked out."""
    valid = reference["mask"].astype(bool)
    return measure("text_encoder", "caption_embeds", candidate["embeds"][valid], reference["embeds"][valid])


def _steps(candidate: Candidate, recording: Recording) -> Steps:
    rows: dict[str, list[Parity]] = {"x0": [], "velocity": []}
    for index, (feed, outputs) in enumerate(recording.steps):
        found = dict(zip(_OUTPUTS, candidate.step(**feed), strict=True))
        for name, measured in rows.items():
            stage = f"{name}, step {index + 1}"
            measured.append(measure(stage, name, found[name].numpy(), outputs[name].numpy()))
    return {name: tuple(measured) for name, measured in rows.items()}


def _drift(latents: list[Array], recording: Recording) -> tuple[Parity, ...]:
    return tuple(
        measure(f"latent, step {index + 1}", "next_latent", latent, outputs["next_latent"].numpy())
        for index, (latent, (_, outputs)) in enumerate(zip(latents, recording.steps, strict=True))
    )


def all_captions(run: DenoisingRun, encoder: nn.Module) -> list[Arrays]:
    """The transformer's caption batch of every prompt: `embeds` [2 or 1, 300, C] fp32 and `mask` int64."""
    found = {item: run.caption(encoder, item) for item in run.items("text_encoder")}
    return [run.caption_batch(found, index) for index in range(len(run.prompts))]


def _record(run: DenoisingRun, on_progress: OnProgress) -> list[Recording]:
    on_progress("reference text_encoder")
    with run.module("text_encoder") as encoder:
        captions = all_captions(run, encoder)
    traces = []
    with run.module("transformer") as module:
        for index in range(len(run.prompts)):
            tape = _Tape(module, run, on_progress)
            for _ in run.denoise(tape, captions[index], index):
                pass
            traces.append(tuple(tape.steps))
    on_progress("reference vae_decoder")
    with run.module("vae_decoder") as decoder:
        pictures = [decoder(trace[-1][1]["next_latent"]).numpy()[0] for trace in traces]
    return [Recording(*parts) for parts in zip(captions, traces, pictures, strict=True)]


class _Tape:
    """A step module that remembers what went in and came out."""

    def __init__(self, module: Callable[..., Any], run: DenoisingRun, on_progress: OnProgress) -> None:
        self._module, self._total, self._on_progress = module, run.num_steps, on_progress
        self.steps: list[tuple[Feed, Feed]] = []

    def __call__(self, **feed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self._on_progress(f"reference step {len(self.steps) + 1}/{self._total}")
        outputs = self._module(**feed)
        self.steps.append((feed, dict(zip(_OUTPUTS, outputs, strict=True))))
        return outputs


class EngineCandidate:
    """A loaded bundle."""

    def __init__(self, pipeline: Pipeline, run: DenoisingRun) -> None:
        self._pipeline, self._run = pipeline, run

    def component(self, name: ComponentName) -> AbstractContextManager[None]:
        """All engines are loaded."""
        return nullcontext()

    def captions(self) -> list[Arrays]:
        """The caption batch of every prompt, from the text-encoder engine."""
        run = self._run
        found = {
            item: self._caption(run.negative_prompt if item == NEGATIVE else run.prompts[item], item == NEGATIVE)
            for item in run.items("text_encoder")
        }
        return [run.caption_batch(found, index) for index in range(len(run.prompts))]

    def _caption(self, text: str, negative: bool) -> Arrays:
        caption = self._pipeline.encode_caption(text, negative=negative)
        return {"embeds": from_host(caption.embeds.numpy(), caption.embeds.spec.dtype), "mask": caption.mask}

    def step(self, **feed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One call of the transformer engine on given inputs."""
        specs = {spec.name: spec.dtype for spec in self._pipeline.manifest.component("transformer").inputs}
        arrays = {name: to_host(tensor, specs[name]) for name, tensor in feed.items()}
        outputs = self._pipeline.run_component("transformer", arrays)
        return tuple(torch.from_numpy(outputs[name]) for name in _OUTPUTS)

    def decode(self, latent: torch.Tensor) -> Array:
        """The decoder engine's picture."""
        return self._pipeline.decode(latent.numpy())

    def paint(self, index: int, captions: Arrays) -> list[Array]:
        """The latent after every step of the runtime's own loop."""
        latents: list[Array] = []

        def keep(step: Step) -> None:
            latents.append(step.next_latent)

        self._pipeline.generate(
            self._run.prompts[index],
            self._run.negative_prompt,
            self._run.seed + index,
            self._run.num_steps,
            self._run.guidance_scale,
            on_step=keep,
        )
        return latents


class FakeQuantizedCandidate:
    """The modules with the scales of a quantised graph: what its engines compute, up to the base dtype's rounding."""

    def __init__(self, run: DenoisingRun, quantization: dict[ComponentName, Quantization]) -> None:
        self._run, self._quantization = run, quantization
        self._module: nn.Module = nn.Identity()

    @contextmanager
    def component(self, name: ComponentName) -> Iterator[None]:
        """Load and fake-quantise a component."""
        found = self._quantization[name]
        with self._run.module(name) as module:
            fake_quantize_in_place(module, self._run.plans[name].prefix, found.rules, found.scales)
            self._module = module
            yield
            self._module = nn.Identity()

    def captions(self) -> list[Arrays]:
        """The caption batch of every prompt."""
        return all_captions(self._run, self._module)

    def step(self, **feed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One call of the transformer on given inputs."""
        return self._module(**feed)

    def decode(self, latent: torch.Tensor) -> Array:
        """The decoder's picture."""
        return self._module(latent).numpy()[0]

    def paint(self, index: int, captions: Arrays) -> list[Array]:
        """The latent after every step, from the candidate's own captions."""
        tape = _Tape(self._module, self._run, lambda _: None)
        for _ in self._run.denoise(tape, captions, index):
            pass
        return [outputs["next_latent"].numpy() for _, outputs in tape.steps]


def from_host(array: Array, dtype: str) -> Array:
    """An engine's tensor as fp32; bfloat16 lives on the host as its upper 16 bits."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def to_host(tensor: torch.Tensor, dtype: str) -> Array:
    """A tensor as an engine's input of `dtype`."""
    cast = tensor.to(getattr(torch, dtype))
    return cast.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else cast.numpy()


def component_bounds(result: LadderResult, manifest: Manifest, checkpoint: Checkpoint) -> tuple[float, ...]:
    """The most that each component's relative RMS may be where only its dtype rounds, in the order of the result's."""
    blocks = {
        "text_encoder": checkpoint.text_encoder_config["num_hidden_layers"],
        "transformer": checkpoint.transformer_config["num_layers"],
        "vae_decoder": sum(checkpoint.vae_config["decoder_layers_per_block"]),
    }
    guided = {"transformer": tolerance.guidance_amplification(result.guidance_scale)}
    return tuple(
        guided.get(name, 1.0)
        * tolerance.relative_rms_bound(manifest.component(name).dtype, blocks[name], image=row.tensor == "image")
        for row, name in zip(result.components, COMPONENTS, strict=True)
    )


def check_components(results: tuple[LadderResult, ...], manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raise `ParityError` if a component's engine is further from the reference than its dtype explains."""
    for result in results:
        bounds = component_bounds(result, manifest, checkpoint)
        for row, name, bound in zip(result.components, COMPONENTS, bounds, strict=True):
            tolerance.hold(row, bound, manifest.component(name).dtype)


def check_same_weights(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raise `InputError` unless the bundle was built from this checkpoint's weights."""
    for name in COMPONENTS:
        recorded, found = manifest.component(name).weights_sha256, checkpoint.digest(name)
        if recorded != found:
            raise InputError(
                f"the bundle's {name} was not built from {checkpoint.source}",
                received=f"weights {found[:12]}…",
                expected=f"weights {recorded[:12]}…, from {manifest.model.source}",
                action="name the checkpoint the bundle was built from: --checkpoint MODEL",
            )
