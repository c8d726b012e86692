"""From a prompt to a picture: the whole of Sana's inference, over engines that do the arithmetic."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sana_runtime.bundle import check_contract, engine_entry, files_of_target
from sana_runtime.contract import CAPTION_LENGTH, COMPONENTS, ComponentName, TargetName, TensorSpec
from sana_runtime.engine import Backend, DeviceTensor, Engine, LoopEngine
from sana_runtime.errors import InputError
from sana_runtime.image import Picture, Settings
from sana_runtime.manifest import Manifest, read_manifest, verify_files
from sana_runtime.request import checked_latent, checked_settings, latent_shape
from sana_runtime.scheduler import StepTable, step_table
from sana_runtime.targets import choose_target, open_backend
from sana_runtime.tokenizer import CaptionTokenizer, CaptionTokens

Pixels = npt.NDArray[np.uint8]
Latent = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Caption:
    """What the transformer attends to: `embeds` [1, 300, C] on the device, `mask` [1, 300] on the host."""

    embeds: DeviceTensor
    mask: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """One finished solver step: 0 <= `index` < `num_steps`. Reading a tensor copies it from the device.

    The tensors are those of this step only until the next one starts: read them inside the callback.
    """

    index: int
    num_steps: int
    outputs: dict[str, DeviceTensor]

    @property
    def next_latent(self) -> Latent:
        """[1, 32, h, w] fp32, owned by the caller."""
        return self._numpy("next_latent")

    @property
    def x0(self) -> Latent:
        """The picture's latent as predicted by this step, [1, 32, h, w] fp32, owned by the caller."""
        return self._numpy("x0")

    @property
    def velocity(self) -> Latent:
        """The transformer's output after guidance, [1, 32, h, w] fp32, owned by the caller."""
        return self._numpy("velocity")

    def _numpy(self, name: str) -> Latent:
        return self.outputs[name].numpy().astype(np.float32, copy=False)


OnStep = Callable[[Step], None]


class Pipeline:
    """A bundle opened on one target. One thread at a time: every call reuses the same device buffers."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        target: TargetName,
        backend: Backend,
        report: Callable[[str], None] = print,
        *,
        one_at_a_time: bool = False,
    ) -> None:
        """Load all engines of an already verified bundle; `Pipeline.load` is the usual way here."""
        check_contract(manifest)
        self.manifest = manifest
        self.target = target
        self.backend = backend
        self._report = report
        self._memory = backend.memory
        self._bundle = bundle
        self._one_at_a_time = one_at_a_time
        self._tokenizer = CaptionTokenizer(bundle, manifest.tokenizer)
        self._engines: dict[ComponentName, Engine] = {}
        if not one_at_a_time:
            for name in COMPONENTS:
                self._engine(name)
        self._inputs = {name: self._allocate(manifest.component(name).inputs) for name in COMPONENTS}
        self._outputs = {name: self._allocate(manifest.component(name).outputs) for name in COMPONENTS}
        self._negative: tuple[str, Caption] | None = None

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        target: str | None = None,
        *,
        verify: bool = True,
        threads: int = 0,
        one_at_a_time: bool = False,
        report: Callable[[str], None] = print,
        on_bytes: Callable[[int], None] | None = None,
    ) -> "Pipeline":
        """Open a bundle on the first of its targets that this machine can run, or on `target`.

        `report` gets a line for every target that was skipped and for the chosen one. `verify=False` checks
        the sizes of the files but not their SHA-256; `on_bytes` is told the bytes verified. `threads` is for
        the CPU. `one_at_a_time` keeps one engine in memory: each is loaded when it is needed and dropped for the next,
        which costs the time of loading for every picture.
        Raises `BundleError` for a damaged bundle, `TargetError` if nothing in it can run here.
        """
        directory = Path(bundle)
        manifest = read_manifest(directory)
        verdicts = choose_target(manifest, target)
        for verdict in verdicts:
            report(f"target {verdict.target} {'chosen' if verdict.usable else 'skipped'}: {verdict.reason}")
        chosen = verdicts[-1].target
        verify_files(directory, files_of_target(manifest, chosen), digests=verify, on_bytes=on_bytes)
        backend = open_backend(chosen, manifest, threads=threads)
        return cls(directory, manifest, chosen, backend, report, one_at_a_time=one_at_a_time)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(1, 32, height / 32, width / 32)."""
        return latent_shape(self.manifest)

    def generate(
        self,
        prompt: str,
        negative_prompt: str = "",
        seed: int = 0,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        latent: npt.ArrayLike | None = None,
        on_step: OnStep | None = None,
    ) -> Picture:
        """Paint one picture.

        Defaults of `num_steps` and `guidance_scale` are the model's. `guidance_scale` <= 1 turns
        classifier-free guidance off, and the negative prompt with it. `height`, `width` in pixels must be the
        bundle's. `seed` feeds NumPy's PCG64, whose fp32 standard normal numbers are the noise.
        `latent` [1, 32, height/32, width/32] replaces the noise of unit variance that `seed` gives.
        Raises `InputError` before any work for a wrong argument.
        """
        settings = checked_settings(
            self.manifest,
            self.target,
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            latent=latent,
        )
        if negative_prompt and settings.guidance_scale <= 1:
            self._report(f"negative prompt ignored: guidance_scale {settings.guidance_scale:g} <= 1")
        # Drawn even if a latent is given: then the noise of trigflow's steps stays that of the seed.
        generator = seeded_generator(seed)
        noise = draw_noise(generator, self.latent_shape)
        if latent is not None:
            noise = checked_latent(self.manifest, latent)

        timings: dict[str, float] = {}
        with self._timed("total", timings):
            with self._timed("text_encoder", timings):
                positive = self.encode_caption(prompt)
                negative = self._negative_caption(settings)
            with self._timed("transformer", timings):
                final_latent = self.denoise(
                    positive,
                    negative,
                    noise,
                    num_steps=settings.num_steps,
                    guidance_scale=settings.guidance_scale,
                    generator=generator,
                    on_step=on_step,
                )
            with self._timed("vae_decoder", timings):
                pixels = self.decode(final_latent)
        return Picture(pixels, settings, timings)

    def tokenize(self, text: str, *, negative: bool = False) -> CaptionTokens:
        """Tokens of a prompt, or of a negative prompt, which gets no instruction."""
        return self._tokenizer.encode(text, negative=negative)

    def encode_caption(self, text: str, *, negative: bool = False) -> Caption:
        """Run the text encoder on a prompt, or on a negative prompt."""
        tokens = self.tokenize(text, negative=negative)
        inputs, outputs = self._inputs["text_encoder"], self._outputs["text_encoder"]
        self._memory.upload(tokens.caption_tokens, inputs["caption_tokens"])
        self._memory.upload(tokens.caption_mask, inputs["caption_mask"])
        self._engine("text_encoder").execute(inputs, outputs)

        rows = outputs["caption_embeds"]
        channels = rows.spec.shape[-1]
        shape = (1, CAPTION_LENGTH, channels)
        embeds = self._memory.allocate(TensorSpec("caption_embeds", rows.spec.dtype, shape))
        tail = slice(tokens.tail_start, tokens.tail_start + CAPTION_LENGTH - 1)
        self._memory.copy(rows, embeds, count=channels)
        self._memory.copy(
            rows,
            embeds,
            count=(CAPTION_LENGTH - 1) * channels,
            source_start=tail.start * channels,
            target_start=channels,
        )
        mask = np.concatenate([tokens.caption_mask[:, :1], tokens.caption_mask[:, tail]], axis=1)
        return Caption(embeds, mask)

    def denoise(
        self,
        positive: Caption,
        negative: Caption | None,
        noise: npt.ArrayLike,
        *,
        num_steps: int,
        guidance_scale: float,
        generator: np.random.Generator | None = None,
        on_step: OnStep | None = None,
    ) -> DeviceTensor:
        """Solve from `noise` [1, 32, h, w] (unit variance) to the latent to decode.

        Without `negative` there is no classifier-free guidance. `generator` draws the noise that trigflow
        adds at each step, and is needed by it alone. The returned tensor is the pipeline's: the next call
        overwrites it.
        """
        table = step_table(self.manifest.scheduler, num_steps)
        inputs, outputs = self._inputs["transformer"], self._outputs["transformer"]
        latent, previous_x0 = inputs["latent"], inputs["previous_x0"]
        self._feed_captions(positive, negative, guidance_scale)
        schedule = self._upload_schedule(table)
        self._memory.upload(checked_latent(self.manifest, noise) * np.float32(table.initial_scale), latent)
        self._memory.upload(np.zeros(self.latent_shape, np.float32), previous_x0)

        engine = self._engine("transformer")
        if on_step is None and isinstance(engine, LoopEngine):
            if table.fresh_noise:
                schedule["previous_x0"] = self._upload_noise(_needed(generator), len(table))
            engine.execute_loop(inputs, outputs, schedule, len(table))
            self._memory.copy(outputs["next_latent"], latent)
            return latent
        for index in range(len(table)):
            for name, rows in schedule.items():
                scalar = inputs[name]
                self._memory.copy(rows, scalar, count=scalar.size, source_start=index * scalar.size)
            if table.fresh_noise:
                self._memory.upload(draw_noise(_needed(generator), self.latent_shape), previous_x0)
            engine.execute(inputs, outputs)
            if on_step is not None:
                self._memory.synchronize()
                on_step(Step(index, len(table), outputs))
            self._memory.copy(outputs["next_latent"], latent)
            if not table.fresh_noise:
                self._memory.copy(outputs["x0"], previous_x0)
        return latent

    def decode(self, latent: DeviceTensor | npt.ArrayLike) -> Pixels:
        """Decode a latent [1, 32, h, w] to pixels [H, W, 3] uint8, owned by the caller."""
        if not isinstance(latent, DeviceTensor):
            spec = self._inputs["vae_decoder"]["latent"].spec
            latent = self._memory.tensor(checked_latent(self.manifest, latent), spec)
        outputs = self._outputs["vae_decoder"]
        self._engine("vae_decoder").execute({"latent": latent}, outputs)
        return outputs["image"].numpy()[0].astype(np.uint8, copy=False)

    def run_component(
        self, name: ComponentName, arrays: Mapping[str, npt.NDArray[np.generic]]
    ) -> dict[str, npt.NDArray[np.generic]]:
        """One engine call on given inputs, for parity checks: host arrays in and out, bfloat16 as bits in uint16."""
        inputs, outputs = self._inputs[name], self._outputs[name]
        for tensor, array in arrays.items():
            self._memory.upload(array, inputs[tensor])
        self._engine(name).execute(inputs, outputs)
        return {tensor: output.numpy() for tensor, output in outputs.items()}

    def _allocate(self, specs: tuple[TensorSpec, ...]) -> dict[str, DeviceTensor]:
        return {spec.name: self._memory.allocate(spec) for spec in specs}

    def _negative_caption(self, settings: Settings) -> Caption | None:
        if self.manifest.model.guidance == "embedded" or settings.guidance_scale <= 1:
            return None
        if self._negative is None or self._negative[0] != settings.negative_prompt:
            caption = self.encode_caption(settings.negative_prompt, negative=True)
            self._negative = (settings.negative_prompt, caption)
        return self._negative[1]

    def _feed_captions(self, positive: Caption, negative: Caption | None, guidance_scale: float) -> None:
        """Fill the engine's batch [negative, positive], or [positive] where guidance is embedded.

        Without a negative caption both halves are the positive one: the engine's u + 1 (c - u) is then c.
        """
        inputs = self._inputs["transformer"]
        if self.manifest.model.guidance == "embedded":
            halves = [positive]
            self._memory.upload(guidance_scale, inputs["guidance_embeds"])
        else:
            halves = [negative or positive, positive]
            self._memory.upload(guidance_scale if negative else 1.0, inputs["guidance_scale"])
        for index, caption in enumerate(halves):
            start = index * caption.embeds.size
            self._memory.copy(caption.embeds, inputs["caption_embeds"], target_start=start)
        self._memory.upload(np.concatenate([caption.mask for caption in halves]), inputs["caption_mask"])

    def _upload_schedule(self, table: StepTable) -> dict[str, DeviceTensor]:
        """The scalars of every step, on the device: the loop copies them there and waits for nothing."""
        rows = {
            "timestep": table.timesteps,
            "sigma": table.sigmas[:-1],
            "step_coefficients": table.coefficients,
        }
        return {
            name: self._memory.tensor(values, TensorSpec(name, "float32", values.shape))
            for name, values in rows.items()
            if name in self._inputs["transformer"]
        }

    def _upload_noise(self, generator: np.random.Generator, num_steps: int) -> DeviceTensor:
        """The noise of every step, drawn in the order in which single steps draw it."""
        noise = np.concatenate([draw_noise(generator, self.latent_shape) for _ in range(num_steps)])
        return self._memory.tensor(noise, TensorSpec("previous_x0", "float32", noise.shape))

    def _engine(self, name: ComponentName) -> Engine:
        """The engine of a component, loaded if it is not, after dropping the others where only one may stay."""
        if name not in self._engines:
            if self._one_at_a_time:
                self._engines.clear()
                self._memory.release()
            component = self.manifest.component(name)
            self._engines[name] = self.backend.load(
                self._bundle, component, engine_entry(self.manifest, name, self.target)
            )
        return self._engines[name]

    @contextmanager
    def _timed(self, stage: str, timings: dict[str, float]) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._memory.synchronize()
        timings[stage] = (time.perf_counter() - start) * 1e3


def seeded_generator(seed: int) -> np.random.Generator:
    """The generator of all noise of one picture: PCG64, the same on every platform for one NumPy release."""
    return np.random.Generator(np.random.PCG64(seed))


def draw_noise(generator: np.random.Generator, shape: tuple[int, ...]) -> Latent:
    """Standard normal fp32 noise. A picture's first draw is its latent; trigflow draws one more per step."""
    return generator.standard_normal(shape, dtype=np.float32)


def _needed(generator: np.random.Generator | None) -> np.random.Generator:
    if generator is None:
        raise InputError("this solver adds noise at every step", expected="a generator: seeded_generator(seed)")
    return generator
