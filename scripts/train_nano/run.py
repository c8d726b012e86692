"""The whole training, stage by stage, from whatever is finished already."""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from sana_export.scenes.prompts import prompts
from sana_runtime.errors import InputError
from sana_runtime.files import whole_file
from scripts.train_nano.autoencoder import Latents, autoencoder_step, encode_scenes, reconstruction_psnr_db
from scripts.train_nano.captions import CaptionEncoder
from scripts.train_nano.charts import save_curves, save_sheet
from scripts.train_nano.data import SceneStore, make_tokenizer, scenes_of, start_pool
from scripts.train_nano.depthwise import Impl
from scripts.train_nano.diffusion import (
    Captions,
    Embed,
    Step,
    caption_shares,
    contrastive_step,
    diffusion_step,
    frozen_captions,
    trained_captions,
)
from scripts.train_nano.evaluation import CAN_JUDGE, RUNS, evaluate, final_evaluation
from scripts.train_nano.export import (
    GOES_ON,
    START_WEIGHTS,
    adopt,
    describe,
    export_directory,
    load_directory,
    load_weights,
    pack_directory,
)
from scripts.train_nano.models import (
    Autoencoder,
    ContrastiveHeads,
    TrainedCheckpoint,
    TrainedModel,
    build_text_encoder,
    build_transformer,
    caption_embeds,
    gemma_layer,
    parameter_counts,
)
from scripts.train_nano.objects import objects_of
from scripts.train_nano.sampling import Painter, Solver
from scripts.train_nano.sizes import Size
from scripts.train_nano.stage import OutOfTime, Schedule, Session, Stage

STAGES = ("autoencoder-small", "autoencoder-large", "contrastive", "diffusion-small", "diffusion-large")
Share = Mapping[str, float]
# Shares of the training minutes. "latents-small" and "latents-large" are for the latents of all scenes.
FROM_NOTHING: Share = {
    "autoencoder-small": 0.10,
    "autoencoder-large": 0.08,
    "contrastive": 0.03,
    "latents-small": 0.02,
    "latents-large": 0.03,
    "diffusion-small": 0.48,
    "diffusion-large": 0.26,
}
# With finished stages to start from: layout and binding are learnt at the small side, which is four times cheaper.
FROM_FINISHED: Share = {
    "latents-small": 0.035,
    "latents-large": 0.04,
    "diffusion-small": 0.60,
    "diffusion-large": 0.325,
}
_MUON_FACTOR = 2.0
_SHEET_PROMPTS = 32
_PSNR_SCENES = 128
_FIRST_TEST_SEED = 7_000_000


@dataclass(frozen=True)
class Plan:
    """What one command does. `minutes`: of training, all stages together. `stop_after`: the last stage to run.
    `start`: a folder of finished stages (`export.adopt`). `muon`: train the transformer's matrices by it.
    `frozen_text`: diffusion at the small side leaves the text encoder as it is; at the large side it always does.
    `stage_minutes`: instead of a stage's share; a diffusion stage of 0 minutes is left out.
    """

    size: Size
    minutes: float
    workers: int
    mix_ffn: Impl = "reference"
    test_prompts: int = 500
    validation_prompts: int = 200
    stop_after: str | None = None
    scenes: int | None = None
    runs: Sequence[tuple[Solver, int]] = RUNS
    start: Path | None = None
    muon: bool = True
    frozen_text: bool = False
    stage_minutes: Mapping[str, float] = field(default_factory=dict)

    @property
    def scene_count(self) -> int:
        """How many training scenes are drawn."""
        return self.scenes or self.size.scenes

    def seconds(self, stage: str) -> float:
        """Of training."""
        shares = FROM_FINISHED if self.start else FROM_NOTHING
        # A stage that was to be finished, but is not, gets what it would have from nothing.
        share = shares.get(stage, FROM_NOTHING[stage])
        return 60 * self.stage_minutes.get(stage, self.minutes * share)


@dataclass
class Run:
    """The state of a training. Everything is made when it is first used."""

    session: Session
    plan: Plan
    stages: dict[str, Stage] = field(default_factory=dict)

    # --- What the stages share ---

    @cached_property
    def tokenizer_json(self) -> bytes:
        """Learned once, then read."""
        path = self.session.work / "tokenizer.json"
        if not path.exists():
            with whole_file(path) as temporary:
                temporary.write_bytes(make_tokenizer(self.plan.size.vocabulary))
        return path.read_bytes()

    @cached_property
    def captions(self) -> CaptionEncoder:
        return CaptionEncoder(self.tokenizer_json, self.plan.size.caption_rows)

    @cached_property
    def prefix(self) -> torch.Tensor:
        return torch.from_numpy(self.captions.prefix).to(self.session.device)

    @cached_property
    def pool(self) -> Executor:
        return start_pool(self.plan.workers, self.tokenizer_json, self.plan.size.caption_rows)

    @cached_property
    def store(self) -> SceneStore:
        return SceneStore.start(self.pool, self.plan.scene_count, self.session.device)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        torch.manual_seed(1)
        model = Autoencoder(self.plan.size.configs.vae, self.plan.mix_ffn)
        return model.to(self.session.device, memory_format=torch.channels_last)

    @cached_property
    def text_encoder(self) -> Any:
        torch.manual_seed(2)
        return build_text_encoder(self.plan.size.configs.text_encoder).to(self.session.device)

    @cached_property
    def embed(self) -> Embed:
        """The text encoder for its training."""
        layer = self.session.compile(gemma_layer)
        return partial(caption_embeds, self.text_encoder, self.prefix, layer_function=layer)

    @cached_property
    def plain_embed(self) -> Embed:
        """The text encoder for one pass over all captions: sooner done than compiled."""
        return partial(caption_embeds, self.text_encoder, self.prefix)

    @cached_property
    def transformer(self) -> Any:
        torch.manual_seed(3)
        configs = self.plan.size.configs
        model = build_transformer(configs.transformer, self.plan.mix_ffn)
        model = model.to(self.session.device)
        if self.session.compiled:
            model.compile_parts()
        return model

    @cached_property
    def heads(self) -> ContrastiveHeads:
        torch.manual_seed(4)
        channels = self.plan.size.configs.text_encoder["hidden_size"]
        return ContrastiveHeads(self.plan.size, self.plan.size.sides[0] // 32, channels).to(self.session.device)

    @cached_property
    def latents(self) -> Latents:
        """Encoded once, then read: of the finished autoencoder, with its weights as they are shipped."""
        path = self.session.work / "latents.pt"
        if path.exists():
            read = Latents(**torch.load(path, map_location=self.session.device, weights_only=True))
            # Whoever has a latent asks for its captions: of scenes that another process is still sampling there are
            # none yet.
            self.store.wait_for(len(read))
            return read
        seconds = (self.plan.seconds("latents-small"), self.plan.seconds("latents-large"))
        found = encode_scenes(self.session, self.autoencoder, self.store, self.plan.size, seconds)
        temporary = path.with_suffix(".partial")
        torch.save(found.state(), temporary)
        os.replace(temporary, path)
        return found

    # --- Stages ---

    def train(self) -> bool:
        """Run every stage that is not finished. False if the session's time ended, or at `stop_after`."""
        self.adopt()
        # First of all: processes sample scenes while this one prepares itself.
        _ = self.pool, self.store
        counts = parameter_counts(TrainedCheckpoint(self.plan.size, self._untrained()))
        self.session.log(f"parameters: {counts}, together {sum(counts.values()):,}")
        self._say_plan()
        try:
            for name in STAGES:
                self._run_stage(name)
                if name == self.plan.stop_after:
                    return False
        except OutOfTime:
            self.session.log("the session's time is used up: run the same command again to go on")
            return False
        finally:
            self._write_record()
        return True

    def adopt(self) -> None:
        """Copy what is finished already from the folder that the plan names, if it does."""
        if self.plan.start:
            found = adopt(self.plan.size, self.plan.start, self.session.work, STAGES)
            self.session.log(f"started from {', '.join(found)} of {self.plan.start}")

    @property
    def _start_weights(self) -> Path:
        return self.session.work / START_WEIGHTS

    def _say_plan(self) -> None:
        times = ", ".join(f"{name} {self.plan.seconds(name):.0f} s" for name in FROM_NOTHING if not self._passed(name))
        self.session.log(f"plan: {times}")

    def _passed(self, name: str) -> bool:
        """Is nothing left to do for it? A stage whose successor has started needs no checkpoint of its own."""
        if name in GOES_ON and (self.session.work / f"{GOES_ON[name]}.pt").exists():
            return True
        return self._finished(name) if name in STAGES else (self.session.work / "latents.pt").exists()

    def _untrained(self) -> TrainedModel:
        return TrainedModel(self.text_encoder, self.transformer, self.autoencoder, self.tokenizer_json, 1.0)

    def _run_stage(self, name: str) -> None:
        if self.session.out_of_time():
            raise OutOfTime
        if name in GOES_ON and self._passed(name) and not self._finished(name):
            return
        if name.startswith("diffusion") and self.plan.seconds(name) == 0:
            return
        {
            "autoencoder-small": lambda: self._train_autoencoder(name, 0),
            "autoencoder-large": lambda: self._train_autoencoder(name, 1),
            "contrastive": lambda: self._train_contrastive(name),
            "diffusion-small": lambda: self._train_diffusion(name, 0),
            "diffusion-large": lambda: self._train_diffusion(name, 1),
        }[name]()

    def _stage(self, name: str, schedule: Schedule, modules: dict[str, Any], pictures: int) -> Stage:
        stage = Stage(name, self.session, schedule, modules, pictures)
        self.stages[name] = stage
        return stage

    def _train_autoencoder(self, name: str, phase: int) -> None:
        size = self.plan.size
        last = phase == 1
        schedule = Schedule(
            self.plan.seconds(name), peak=1e-3 if last else 2e-3, warmup=0.04, cooldown=0.6 if last else 0.3
        )
        stage = self._stage(name, schedule, {"autoencoder": self.autoencoder}, size.batches.autoencoder[phase])
        before = stage.finished
        step = autoencoder_step(self.session, self.autoencoder, self.store, size, phase)
        stage.run(step, self.store.collect, self._autoencoder_report)
        if last:
            # Latents are made, and the transformer is trained, with the weights that are shipped.
            for parameter in self.autoencoder.parameters():
                parameter.data.copy_(parameter.data.bfloat16().float())
        if not before:
            self.session.log(f"{name}: done{self._autoencoder_report(stage)}")

    def _autoencoder_report(self, stage: Stage) -> str:
        with stage.averaged():
            psnr = self.reconstruction_psnr_db()
        return f", {psnr:.2f} dB at {self.plan.size.sides[1]} px on test scenes"

    def reconstruction_psnr_db(self) -> float:
        """Mean PSNR of test scenes at the large side."""
        seeds = range(_FIRST_TEST_SEED, _FIRST_TEST_SEED + min(_PSNR_SCENES, self.plan.scene_count))
        scenes = scenes_of(seeds, "test").to(self.session.device)
        model = Autoencoder(self.plan.size.configs.vae).to(self.session.device)
        model.load_state_dict(self.autoencoder.state_dict())
        found = reconstruction_psnr_db(model, scenes, self.plan.size.sides[1], self.session.device)
        return sum(found) / len(found)

    def _train_contrastive(self, name: str) -> None:
        count = self.plan.size.batches.contrastive
        modules = {"text_encoder": self.text_encoder, "heads": self.heads}
        stage = self._stage(name, Schedule(self.plan.seconds(name), peak=1e-3, cooldown=0.5), modules, count)
        if stage.finished:
            stage.use_average()
            return
        # Where another training's transformer goes on, its text encoder does too.
        if stage.steps == 0 and self._start_weights.exists():
            load_weights(self._start_weights, {"text_encoder": self.text_encoder})
        latents = self.latents
        objects = objects_of(self.store.scenes.rows(slice(0, len(latents))))
        stage.run(contrastive_step(self.session, self.embed, self.heads, self.store, latents, objects, count))

    @cached_property
    def cumulated_shares(self) -> torch.Tensor:
        """Of the captions, by the contrastive model as it was when its stage ended. Made once, then read."""
        path = self.session.work / "shares.pt"
        if path.exists():
            shares: torch.Tensor = torch.load(path, map_location=self.session.device, weights_only=True)
            return shares
        count = self.plan.size.batches.contrastive
        with self.stages["contrastive"].averaged():
            shares = caption_shares(self.session, self.plain_embed, self.heads, self.store, self.latents, count)
        with whole_file(path) as temporary:
            torch.save(shares, temporary)
        return shares

    def _train_diffusion(self, name: str, phase: int) -> None:
        count, last = self.plan.size.batches.diffusion[phase], phase == 1
        # Before the stage is made: it puts its own weights into the text encoder.
        finished = self._finished(name)
        shares = None if finished else self.cumulated_shares
        first = not any(other.startswith("diffusion") for other in self.stages)
        if first and not finished and self._start_weights.exists():
            load_weights(self._start_weights, {"transformer": self.transformer})
        stage = self._stage(name, self.diffusion_schedule(name, last=last), self.diffusion_modules(), count)
        if shares is None:
            stage.use_average()
            return
        side = self.plan.size.sides[phase]
        stage.run(self.diffusion_step(phase, shares), report=lambda running: self._diffusion_report(running, side))
        self.session.log(f"{name}: done{self._diffusion_report(stage, side)}")

    def diffusion_step(self, phase: int, shares: torch.Tensor) -> Step:
        """The step of a phase, 0 or 1."""
        captions = self._captions(frozen=phase == 1 or self.plan.frozen_text)
        tensor, count = (self.latents.small, self.latents.large)[phase], self.plan.size.batches.diffusion[phase]
        return diffusion_step(self.session, captions, self.transformer, self.store, tensor, shares, count)

    def diffusion_schedule(self, name: str, *, last: bool) -> Schedule:
        """Of a phase; `last` is the large side's."""
        return Schedule(
            self.plan.seconds(name),
            peak=1e-3 if last else 1.5e-3,
            warmup=0.02,
            cooldown=0.6 if last else 0.4,
            muon=_MUON_FACTOR if self.plan.muon else 0.0,
        )

    def diffusion_modules(self) -> dict[str, Any]:
        """What a diffusion stage trains or keeps."""
        return {"transformer": self.transformer, "text_encoder": self.text_encoder}

    def _captions(self, *, frozen: bool) -> Captions:
        """Rows of the text encoder as it is now, or of the one that is trained."""
        self.text_encoder.requires_grad_(not frozen)
        if not frozen:
            return trained_captions(self.embed, self.store)
        begun, scenes = time.monotonic(), len(self.latents)
        count = self.plan.size.batches.contrastive // 4
        found = frozen_captions(self.session, self.plain_embed, self.store, scenes, count)
        self.session.log(f"captions of {scenes} scenes encoded in {time.monotonic() - begun:.1f} s")
        return found

    def _finished(self, name: str) -> bool:
        path = self.session.work / f"{name}.pt"
        return path.exists() and bool(torch.load(path, map_location="cpu", weights_only=True)["finished"])

    def _diffusion_report(self, stage: Stage, side: int) -> str:
        """Paint validation prompts with the averaged weights, save a sheet, say how many are right."""
        with stage.averaged():
            model = self._copy()
        painter = self._painter(model, side)
        asked = prompts("validation", _SHEET_PROMPTS)
        path = self.session.work / "sheets" / f"{stage.name}-{stage.elapsed:04.0f}s.png"
        if not CAN_JUDGE:
            texts = [prompt.text for prompt in asked]
            save_sheet(painter.paint(texts), texts, path)
            return ", a sheet was saved"
        found = evaluate(painter, asked, self.pool)
        found.save_sheet(path)
        return f", {100 * found.overall:.0f} % of {_SHEET_PROMPTS} validation prompts at {side} px"

    def _painter(self, model: TrainedModel, side: int) -> Painter:
        on_gpu = self.session.device.type == "cuda"
        return Painter(model, self.captions, side, self.plan.size.batches.sample, self.session.device, on_gpu)

    def _copy(self) -> TrainedModel:
        """The weights of this moment in modules that nothing was compiled for."""
        configs, device = self.plan.size.configs, self.session.device
        text_encoder = build_text_encoder(configs.text_encoder).to(device)
        text_encoder.load_state_dict(self.text_encoder.state_dict())
        transformer = build_transformer(configs.transformer).to(device)
        transformer.load_state_dict(self.transformer.state_dict())
        factor = self.latents.scaling_factor
        return TrainedModel(text_encoder, transformer, self.autoencoder, self.tokenizer_json, factor)

    # --- Results ---

    @property
    def _record_path(self) -> Path:
        return self.session.work / "record.json"

    def record(self) -> dict[str, Any]:
        """What is known of this training, of earlier commands too."""
        return json.loads(self._record_path.read_text()) if self._record_path.exists() else {"stages": {}}

    def _write_record(self, **more: Any) -> None:
        found = {**self.record(), **more}
        for name, stage in self.stages.items():
            if name in found["stages"] and not stage.steps:  # another training has finished it
                continue
            found["stages"][name] = {
                "minutes": stage.elapsed / 60,
                "steps": stage.steps,
                "pictures": stage.steps * stage.pictures,
                "loss": stage.records[-1]["loss"] if stage.records else float("nan"),
                "records": stage.records,
            }
        on_gpu = self.session.device.type == "cuda"
        device = f"one {torch.cuda.get_device_name()}" if on_gpu else "a CPU"
        if not found.get("device", "").endswith(device):
            found["device"] = f"{found['device']}, then {device}" if "device" in found else device
        found["torch"] = torch.__version__
        with whole_file(self._record_path) as temporary:
            temporary.write_text(json.dumps(found))
        records = {name: row["records"] for name, row in found["stages"].items()}
        names = ("loss", "psnr_db", "found", "gradient", "pictures_per_s", "rate")
        save_curves(records, names, self.session.work / "curves.png")

    @property
    def directory(self) -> Path:
        """The diffusers directory."""
        return self.session.work / "model"

    def export(self) -> Path:
        """Write the diffusers directory of the trained model, without scores. Needs every stage's checkpoint."""
        there = [name for name in STAGES if (self.session.work / f"{name}.pt").exists()]
        missing = [name for name in STAGES if name not in there and GOES_ON.get(name) not in there]
        if missing:
            raise InputError(
                "the training is not finished",
                received=f"no checkpoint of {', '.join(missing)}",
                expected="all stages",
                action="run the training first",
            )
        for name in there:
            if name not in self.stages:
                self._restore_for_export(name)
        model = self._copy()
        for parameter in self.autoencoder.parameters():
            parameter.data.copy_(parameter.data.bfloat16().float())
        self._write_record(scenes=len(self.latents), psnr_db=self.reconstruction_psnr_db())
        shutil.rmtree(self.directory, ignore_errors=True)
        export_directory(self.plan.size, model, self.directory, self.record())
        return self.directory

    def _restore_for_export(self, name: str) -> None:
        modules: dict[str, dict[str, Any]] = {
            "autoencoder": {"autoencoder": self.autoencoder},
            "contrastive": {"text_encoder": self.text_encoder, "heads": self.heads},
            "diffusion": {"transformer": self.transformer, "text_encoder": self.text_encoder},
        }
        self._stage(name, Schedule(1.0, 0.0), modules[name.split("-")[0]], 1).use_average()

    def evaluate(self) -> dict[str, Any]:
        """Score the exported directory, and write its card again, with the scores."""
        begun = time.monotonic()
        model = load_directory(self.plan.size, self.directory, self.session.device)
        side = self.plan.size.sides[1]
        painter = Painter(model, self.captions, side, self.plan.size.batches.sample, self.session.device)
        plan = self.plan
        found = final_evaluation(
            painter, self.pool, self.session.work, plan.test_prompts, plan.validation_prompts, plan.runs
        )
        self._write_record(evaluation=found)
        describe(self.plan.size, TrainedCheckpoint(self.plan.size, model), self.directory, self.record())
        self.session.log(f"evaluation: {found['test']} in {time.monotonic() - begun:.0f} s")
        return found

    def pack(self, archive: Path) -> None:
        """The directory as one file."""
        pack_directory(self.directory, archive)
