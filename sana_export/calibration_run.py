"""Calibration: real denoising runs through the reference modules, with observers on the layers to quantise.

One component is in memory at a time. What a prompt contributed is a file of its own, and the files are merged in the
order of the prompts, so an interrupted run goes on where it stopped and ends at the same digest.
"""

import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from sana_calibration.aggregate import component_scales
from sana_calibration.gptq import gptq
from sana_calibration.layers import layers_of, resolve
from sana_calibration.observers import Observation, Observers, gathering, observing
from sana_calibration.prompts import prompts_digest
from sana_calibration.rules import BaseDtype, LayerRule, Recipe
from sana_calibration.scales import LayerScales, Provenance, Scales
from sana_export.components import ComponentPlan, loaded_module, parameters_on_meta, plan_components
from sana_export.prompting import scheduler_entry, tokenizer_entry
from sana_export.weights.checkpoint import Checkpoint
from sana_runtime.contract import (
    CAPTION_LENGTH,
    COMPONENTS,
    LATENT_CHANNELS,
    PIXELS_PER_LATENT,
    ComponentName,
    PrecisionName,
)
from sana_runtime.errors import InputError
from sana_runtime.files import whole_file
from sana_runtime.pipeline import draw_noise, seeded_generator
from sana_runtime.scheduler import StepTable, step_table
from sana_runtime.tokenizer import CaptionTokenizer, clean_prompt

Array = np.ndarray
Arrays = dict[str, Array]
Feed = dict[str, torch.Tensor]
StepModule = Callable[..., tuple[torch.Tensor, ...]]
# (fraction of the whole calibration that is done, what is being done)
OnProgress = Callable[[float, str], None]
_OBSERVED = "observed/"
# Sums are written again when that many times longer has been worked than the last writing took.
_WORK_PER_WRITE = 20
# The empty negative prompt's place before the first prompt: its caption is the same for all of them.
NEGATIVE = -1


def calibrate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    prompts: Sequence[str],
    *,
    seed: int,
    num_steps: int,
    height: int,
    width: int,
    work_folder: Path,
    on_progress: OnProgress,
    device: str = "cpu",
    precision: PrecisionName = "fp32",
) -> Scales:
    """Paint every prompt with the reference modules and return the scales that the recipe asks for.

    Prompt i is painted from `seed` + i at `height` x `width` pixels with the model's guidance scale, both guidance
    halves, all steps. Components behind the last one whose activations the recipe quantises are not run.
    `work_folder` keeps what is done; a run with other arguments does not disturb it. Equal arguments on one machine
    give equal digests. Raises `InputError`, also for activations that are not finite.
    """
    run = DenoisingRun(checkpoint, tuple(prompts), seed, num_steps, height, width, work_folder, device, precision)
    rules = {name: rules_of(recipe, run.plans[name]) for name in COMPONENTS}
    provenance = Provenance(
        {name: checkpoint.digest(name) for name in COMPONENTS},
        recipe.digest,
        prompts_digest(run.prompts),
        seed,
        num_steps,
        height,
        width,
        sampling_of(checkpoint),
    )
    folder = work_folder / _fingerprint(provenance, device, precision)
    progress = _Progress(on_progress, run, _needed_components(rules))
    found: dict[ComponentName, dict[str, LayerScales]] = {}
    for name in COMPONENTS:
        seen: dict[str, Observation] = {}
        if name in progress.components:
            seen = _observe_component(run, name, rules[name], folder, progress)
        weight = stored_weights(checkpoint, name)
        found[name] = component_scales(rules[name], seen, progress.smoothing(name, weight), recipe.base_dtype)
        for layer in [layer for layer, rule in rules[name].items() if rule.rounding == "gptq"]:
            on_progress(progress.fraction, f"rounding {name}, {layer}")
            found[name][layer] = _rounded(folder, name, layer, rules[name][layer], weight, recipe.base_dtype, device)
    on_progress(1.0, "calibrated")
    return Scales(found, provenance)


def sampling_of(checkpoint: Checkpoint) -> str:
    """How a model is asked, so far as scales and gate depend on it: all of its scheduler's entry but the default steps,
    which calibration and gate do not take.
    """
    entry = scheduler_entry(checkpoint)
    schedule = f"{entry.kind}, flow shift {entry.flow_shift}, {entry.num_train_timesteps} timesteps"
    return f"{schedule}, sigma_data {entry.sigma_data}, guidance {entry.default_guidance_scale}"


def rules_of(recipe: Recipe, plan: ComponentPlan) -> dict[str, LayerRule]:
    """The recipe's rule of every layer of a component that it quantises, without loading weights."""
    with parameters_on_meta():
        module = plan.make()
    return resolve(recipe, plan.name, layers_of(module, plan.prefix))


def stored_weights(checkpoint: Checkpoint, component: ComponentName) -> Callable[[str], torch.Tensor]:
    """A function from a layer's name to its weight, read when called."""
    weights = checkpoint.weights(component)
    return lambda layer: weights[f"{layer}.weight"].load()


@dataclass(frozen=True)
class DenoisingRun:
    """What is painted, and how each component is fed. `tokenizer.json` is written to `work_folder`. `guidance` None:
    the model's default scale.
    """

    checkpoint: Checkpoint
    prompts: tuple[str, ...]
    seed: int
    num_steps: int
    height: int
    width: int
    work_folder: Path
    device: str = "cpu"
    precision: PrecisionName = "fp32"
    negative_prompt: str = ""
    guidance: float | None = None
    plans: Mapping[ComponentName, ComponentPlan] = field(init=False)
    tokenizer: CaptionTokenizer = field(init=False)
    table: StepTable = field(init=False)
    guidance_scale: float = field(init=False)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError(
                "calibration without prompts",
                received="an empty list",
                expected="at least one prompt",
                action="pass a file with one prompt per line, or leave it out for the shipped list",
            )
        for prompt in self.prompts:
            clean_prompt(prompt)
        content = self.checkpoint.tokenizer_json()
        with whole_file(self.work_folder / "tokenizer.json") as temporary:
            temporary.write_bytes(content)
        entry = tokenizer_entry(content, "tokenizer.json", self.checkpoint.pipeline_class)
        plans = plan_components(self.checkpoint, self.precision, self.height, self.width, entry.padded_length)
        scheduler = scheduler_entry(self.checkpoint)
        object.__setattr__(self, "plans", {plan.name: plan for plan in plans})
        object.__setattr__(self, "tokenizer", CaptionTokenizer(self.work_folder, entry))
        object.__setattr__(self, "table", step_table(scheduler, self.num_steps))
        scale = scheduler.default_guidance_scale if self.guidance is None else self.guidance
        object.__setattr__(self, "guidance_scale", scale)

    @cached_property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(1, 32, height / 32, width / 32)."""
        return 1, LATENT_CHANNELS, self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT

    @property
    def embedded(self) -> bool:
        """The guidance scale is a model input (Sprint): no negative half."""
        return self.checkpoint.guidance == "embedded"

    def items(self, name: ComponentName) -> range:
        """What passes through a component: every prompt, and the negative one through the text encoder."""
        return range(NEGATIVE if name == "text_encoder" and not self.embedded else 0, len(self.prompts))

    @property
    def _engine_guidance(self) -> float:
        """A scale of at most 1 turns classifier-free guidance off: u + 1 (c - u) is the conditional velocity."""
        return self.guidance_scale if self.embedded else max(self.guidance_scale, 1.0)

    @contextmanager
    def module(self, name: ComponentName) -> Iterator[nn.Module]:
        """A component with its weights on the device, freed afterwards."""
        module = loaded_module(self.plans[name], self.checkpoint, self.device)
        with torch.inference_mode():
            yield module
        del module
        gc.collect()

    def caption(self, encoder: nn.Module, index: int) -> Arrays:
        """Caption `index`, NEGATIVE or a prompt's: `embeds` [1, 300, C] fp32 and `mask` [1, 300] int64."""
        negative = index == NEGATIVE
        tokens = self.tokenizer.encode(self.negative_prompt if negative else self.prompts[index], negative=negative)
        rows = encoder(self._tensor(tokens.caption_tokens), self._tensor(tokens.caption_mask))
        selected = np.r_[0, tokens.tail_start : tokens.tail_start + CAPTION_LENGTH - 1]
        return {"embeds": rows.float().cpu().numpy()[:, selected], "mask": tokens.caption_mask[:, selected]}

    def halves(self, index: int) -> tuple[int, ...]:
        """The captions of a prompt's batch: [negative, positive], or [positive] where guidance is embedded."""
        return (index,) if self.embedded else (NEGATIVE, index)

    def caption_batch(self, captions: Mapping[int, Arrays], index: int) -> Arrays:
        """The transformer's captions for a prompt, from those of `caption`: `embeds` [2 or 1, 300, C], `mask`."""
        return {
            name: np.concatenate([captions[half][name] for half in self.halves(index)]) for name in ("embeds", "mask")
        }

    def denoise(
        self, module: StepModule, captions: Arrays, index: int, at: Callable[[int], None] = lambda step: None
    ) -> Iterator[Feed]:
        """Paint prompt `index`: yields every step's inputs before the step runs, and at last {"latent": the result}.

        `captions` is the prompt's `caption_batch`. `at` is told the step, counted from 0.
        """
        generator = seeded_generator(self.seed + index)
        latent = self._tensor(draw_noise(generator, self.latent_shape) * np.float32(self.table.initial_scale))
        previous_x0 = torch.zeros_like(latent)
        conditions = self._captions_feed(captions)
        for step in range(len(self.table)):
            if self.table.fresh_noise:
                previous_x0 = self._tensor(draw_noise(generator, self.latent_shape))
            feed = {"latent": latent, "previous_x0": previous_x0, **conditions, **self._step_feed(step)}
            at(step)
            yield feed
            latent, x0, _ = module(**feed)
            previous_x0 = previous_x0 if self.table.fresh_noise else x0
        yield {"latent": latent}

    def _captions_feed(self, captions: Arrays) -> Feed:
        dtype = getattr(torch, self.plans["text_encoder"].dtype)
        guidance = "guidance_embeds" if self.embedded else "guidance_scale"
        return {
            "caption_embeds": self._tensor(captions["embeds"]).to(dtype),
            "caption_mask": self._tensor(captions["mask"]),
            guidance: torch.tensor(float(self._engine_guidance), device=self.device),
        }

    def _step_feed(self, step: int) -> Feed:
        feed = {
            "timestep": self._tensor(np.float32(self.table.timesteps[step])),
            "step_coefficients": self._tensor(self.table.coefficients[step].astype(np.float32)),
        }
        return feed if self.embedded else {**feed, "sigma": self._tensor(np.float32(self.table.sigmas[step]))}

    def _tensor(self, array: Array | np.float32) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array)).to(self.device)


class _Progress:
    """Turns finished passes into a fraction. A step of the transformer counts like a caption or a picture."""

    def __init__(self, report: OnProgress, run: DenoisingRun, components: tuple[ComponentName, ...]) -> None:
        self._report, self.components = report, components
        self._weights = {"text_encoder": 1, "transformer": run.num_steps, "vae_decoder": 1}
        self._total = sum(len(run.items(name)) * self._weights[name] for name in components)
        self._done = 0

    @property
    def fraction(self) -> float:
        """Of all passes, 1 where there are none."""
        return self._done / self._total if self._total else 1.0

    def passed(self, component: ComponentName) -> None:
        """A prompt is through a component."""
        self._done += self._weights[component]

    def at(self, text: str, step: int = 0) -> None:
        """Work within a prompt."""
        self._report((self._done + step) / self._total, text)

    def smoothing(
        self, component: ComponentName, weight: Callable[[str], torch.Tensor]
    ) -> Callable[[str], torch.Tensor]:
        """`weight`, which is asked for a layer's where it is smoothed, telling which: every alpha rounds it anew."""

        def told(layer: str) -> torch.Tensor:
            self._report(self.fraction, f"smoothing {component}, {layer}")
            return weight(layer)

        return told


def _needed_components(rules: Mapping[ComponentName, Mapping[str, LayerRule]]) -> tuple[ComponentName, ...]:
    """The components up to the last one with inputs to observe."""
    observed = [index for index, name in enumerate(COMPONENTS) if any(rule.calibrated for rule in rules[name].values())]
    return COMPONENTS[: observed[-1] + 1] if observed else ()


def _observe_component(
    run: DenoisingRun, name: ComponentName, rules: Mapping[str, LayerRule], folder: Path, progress: _Progress
) -> dict[str, Observation]:
    """Run what is missing of a component, prompt by prompt, and merge everything that was seen."""
    items = run.items(name)
    missing = [index for index in items if _read(_file(folder, name, index)) is None]
    for _ in range(len(items) - len(missing)):
        progress.passed(name)
    if missing:
        progress.at(f"loading {name}")
        num_steps = run.num_steps if name == "transformer" else 1
        prefix = run.plans[name].prefix
        with (
            run.module(name) as module,
            observing(module, prefix, rules, num_steps) as observers,
            gathering(module, prefix, rules) as grams,
        ):
            kept = _Kept(folder, name, grams)
            try:
                for index in missing:
                    result = _run_prompt(run, name, module, observers, folder, index, progress)
                    kept.add(index, result, observers.take())
                    progress.passed(name)
            finally:
                kept.write()
    merged: dict[str, Observation] = {}
    for index in items:
        for layer, observation in _observations(_needed(_file(folder, name, index))).items():
            merged[layer] = merged[layer].merged(observation) if layer in merged else observation
    return merged


def _run_prompt(
    run: DenoisingRun,
    name: ComponentName,
    module: nn.Module,
    observers: Observers,
    folder: Path,
    index: int,
    progress: _Progress,
) -> Arrays:
    """One prompt through one component; returns what the next component needs."""
    where = "negative prompt" if index == NEGATIVE else f"prompt {index + 1} of {len(run.prompts)}"
    quoted = where if index == NEGATIVE else f"{where} ({run.prompts[index][:60]!r})"

    def at(step: int) -> None:
        observers.at(step, quoted)
        progress.at(f"{name}, {where}" + (f", step {step + 1}" if name == "transformer" else ""), step)

    at(0)
    if name == "text_encoder":
        result = run.caption(module, index)
    elif name == "transformer":
        stored = {half: _needed(_file(folder, "text_encoder", half)) for half in run.halves(index)}
        captions = run.caption_batch(stored, index)
        *_, last = run.denoise(module, captions, index, at)
        result = {"latent": last["latent"].cpu().numpy()}
    else:
        latent = _needed(_file(folder, "transformer", index))["latent"]
        module(torch.from_numpy(latent).to(run.device))
        result = {}
    for tensor, values in result.items():
        if not np.isfinite(values).all():
            raise InputError(
                f"calibration: {name} gives {tensor} that are not finite",
                received=f"{int((~np.isfinite(values)).sum())} of {values.size} values, {quoted}",
                expected="finite values",
                action="check the checkpoint, or calibrate in fp32",
            )
    return result


def _fingerprint(provenance: Provenance, device: str, precision: str) -> str:
    """A folder's name: progress made with other arguments or another torch is not mixed in."""
    facts = (provenance, device, precision, str(torch.__version__))
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()[:16]


def _file(folder: Path, component: ComponentName, index: int) -> Path:
    name = "negative" if index == NEGATIVE else f"{index:04d}"
    return folder / component / f"{name}.safetensors"


def _write(path: Path, result: Arrays, observations: Mapping[str, Observation]) -> None:
    observed = {
        f"{_OBSERVED}{layer}/{what}": values
        for layer, observation in observations.items()
        for what, values in observation.arrays().items()
    }
    with whole_file(path) as temporary:
        # A file without tensors is legal, but this marks it as written by us.
        save_file({**result, **observed, "done": np.ones(1, np.uint8)}, temporary)


def _grams_file(folder: Path, component: ComponentName) -> Path:
    return folder / component / "grams.safetensors"


class _Kept:
    """What prompts gave, until it is written: the sums of all of them into one file, then each prompt's own.

    The sums of a large model are gigabytes, so they are written when that takes a small part of the time.
    """

    def __init__(self, folder: Path, component: ComponentName, grams: Mapping[str, torch.Tensor]) -> None:
        self._folder, self._component, self._grams = folder, component, grams
        self._sums = (_read(_grams_file(folder, component)) or {}) if grams else {}
        self._added = self._sums.pop("prompts", np.empty(0, np.int64))
        self._prompts: dict[int, tuple[Arrays, Mapping[str, Observation]]] = {}
        self._due = 0.0

    def add(self, index: int, result: Arrays, observations: Mapping[str, Observation]) -> None:
        """Take over one prompt and clear its sums. A prompt that is among the written sums already was cut off before
        its own file was written, and is not added twice.
        """
        for layer, gram in self._grams.items():
            if index not in self._added:
                self._sums[layer] = gram.cpu().numpy() + self._sums.get(layer, np.float32(0))
            gram.zero_()
        self._added = np.union1d(self._added, [index])
        self._prompts[index] = result, observations
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Whatever is not written yet."""
        if not self._prompts:
            return
        started = time.monotonic()
        if self._grams:
            with whole_file(_grams_file(self._folder, self._component)) as temporary:
                save_file({**self._sums, "prompts": self._added}, temporary)
            self._due = time.monotonic() + _WORK_PER_WRITE * (time.monotonic() - started)
        for index, (result, observations) in self._prompts.items():
            _write(_file(self._folder, self._component, index), result, observations)
        self._prompts.clear()


def _rounded(
    folder: Path,
    component: ComponentName,
    layer: str,
    rule: LayerRule,
    weight: Callable[[str], torch.Tensor],
    base_dtype: BaseDtype,
    device: str,
) -> LayerScales:
    """The codes of a layer's weight, kept in `folder` as soon as they are found."""
    path = folder / component / "rounded" / f"{layer}.safetensors"
    kept = _read(path)
    if kept is None:
        dtype = getattr(torch, base_dtype)
        gram = torch.from_numpy(_needed(_grams_file(folder, component), layer)[layer]).to(device)
        found = gptq(weight(layer).to(device, dtype).float(), gram, rule, dtype)
        kept = {"codes": found.values.cpu().numpy(), "scale": found.scale.cpu().numpy()}
        with whole_file(path) as temporary:
            save_file(kept, temporary)
    return LayerScales(None, weight_codes=kept["codes"], weight_scale=kept["scale"])


def _read(path: Path, tensor: str | None = None) -> Arrays | None:
    """The file's arrays, or one of them; None if it is not there or not whole: then the prompt is run again."""
    try:
        if tensor is None:
            return load_file(path)
        with safe_open(path, framework="numpy") as file:
            return {tensor: file.get_tensor(tensor)}
    except (FileNotFoundError, SafetensorError):
        return None


def _needed(path: Path, tensor: str | None = None) -> Arrays:
    arrays = _read(path, tensor)
    if arrays is None:
        raise InputError(
            f"{path} was removed or changed during the calibration",
            expected="the file that the calibration wrote a moment ago",
            action="run the same command again: it redoes what is missing",
        )
    return arrays


def _observations(arrays: Arrays) -> dict[str, Observation]:
    grouped: dict[str, Arrays] = {}
    for name, values in arrays.items():
        if name.startswith(_OBSERVED):
            layer, _, what = name.removeprefix(_OBSERVED).rpartition("/")
            grouped.setdefault(layer, {})[what] = values
    return {layer: Observation.from_arrays(found) for layer, found in grouped.items()}
