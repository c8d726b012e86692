"""The loop learns, and a whole run in miniature ends in a directory that diffusers and the exporter paint with."""

import json
import shutil
import tarfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline

from sana_export.build import build
from sana_export.build_request import BuildRequest
from sana_export.prompting import scheduler_entry
from sana_export.weights.checkpoint import CALIBRATION_PROMPTS, open_checkpoint
from sana_runtime import Pipeline
from sana_runtime.errors import CheckpointError, InputError
from scripts.train_nano import data, models
from scripts.train_nano import run as training
from scripts.train_nano.autoencoder import Latents
from scripts.train_nano.captions import CaptionEncoder
from scripts.train_nano.diffusion import diffusion_step, trained_captions
from scripts.train_nano.export import (
    adopt,
    calibration_prompts,
    load_directory,
    load_weights,
    pack_checkpoints,
    pack_directory,
    unpack_checkpoints,
)
from scripts.train_nano.run import STAGES, Plan, Run
from scripts.train_nano.sampling import Painter
from scripts.train_nano.sizes import GUIDANCE, TINY
from scripts.train_nano.stage import Schedule, Session, Stage

CPU = torch.device("cpu")
_STEPS = 70
PROMPT = "A red circle left of a blue square, 红色 🎨"


def test_transformer_paints_the_latents_it_was_trained_on(tmp_path: Path) -> None:
    """Eight latents with captions of their own: after training, each caption is sampled to its latent."""
    tokenizer = data.make_tokenizer(TINY.vocabulary)
    captions = CaptionEncoder(tokenizer, TINY.caption_rows)
    # The instruction is the same for all captions: what is learnt does not need 200 tokens of it.
    captions.prefix = captions.prefix[:8]
    store = data.SceneStore.start(data.start_pool(0, tokenizer, TINY.caption_rows), 8, CPU)
    torch.manual_seed(0)
    text_encoder = models.build_text_encoder(TINY.configs.text_encoder)
    transformer = models.build_transformer(TINY.configs.transformer)
    latents = torch.randn(8, 32, 2, 2)
    # One caption per latent.
    shares = torch.ones(8, data.CAPTIONS)
    prefix = torch.from_numpy(captions.prefix)
    session = Session(tmp_path, CPU, log=lambda text: None)
    # By steps, not by the clock: the same on every machine.
    schedule = Schedule(_STEPS, 4e-3, cooldown=0.5)
    stage = Stage("overfit", session, schedule, {"text": text_encoder, "transformer": transformer}, 64)

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        return models.caption_embeds(text_encoder, prefix, tokens)

    captioned = trained_captions(embed, store)
    replay = stage.prepared(diffusion_step(session, captioned, transformer, store, latents, shares, 64))
    for stage.steps in range(_STEPS):
        stage.elapsed = float(stage.steps)
        stage._set_numbers()
        replay()
    stage.use_average()
    model = models.TrainedModel(text_encoder, transformer, models.Autoencoder(TINY.configs.vae), tokenizer, 1.0)
    painter = Painter(model, captions, 64, 8, CPU)
    asked = [data.train_captions(seed)[0] for seed in range(8)]
    with torch.no_grad():
        found = painter.solve(torch.randn(8, 32, 2, 2), painter.embed(asked), 20, 1.0, "flow_dpm_solver")
    distances = torch.cdist(found.flatten(1), latents.flatten(1))
    assert distances.argmin(1).tolist() == list(range(8))
    # A constant is 1 from these latents in mean square, at best, and another latent is 2 from them.
    assert (found - latents).square().mean() < 0.5


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a few seconds, interrupted after its third stage and gone on with by another command."""
    work = tmp_path_factory.mktemp("nano")
    lines: list[str] = []
    plan = Plan(TINY, 0.12, workers=0, test_prompts=8, validation_prompts=4, scenes=64, runs=(("flow_dpm_solver", 20),))
    first = Run(Session(work, CPU, log=lines.append), Plan(TINY, 0.12, 0, scenes=64, stop_after="contrastive"))
    assert not first.train()
    assert {path.stem for path in work.glob("*.pt")} == {*STAGES[:3], "latents"}
    run = Run(Session(work, CPU, log=lines.append), plan)
    assert run.train()
    run.export()
    run.evaluate()
    return run


def test_run_writes_a_loadable_directory_with_its_card(finished: Run, tmp_path: Path) -> None:
    folder = finished.directory
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.architecture == "custom 2x64"
    assert checkpoint.transformer_config["interpolation_scale"] == 1.0
    assert (folder / CALIBRATION_PROMPTS).read_text(encoding="utf-8") == calibration_prompts()
    assert (
        scheduler_entry(checkpoint).default_guidance_scale == checkpoint.sampling_config["guidance_scale"] == GUIDANCE
    )
    card = (folder / "README.md").read_text()
    assert "nan dB" not in card
    assert "| nan" not in card
    assert "not evaluated" not in card
    for stage in STAGES:
        assert f"| {stage} |" in card
    record = json.loads((finished.session.work / "record.json").read_text())
    assert record["evaluation"]["prompts"] == 8
    assert 5 < record["psnr_db"] < 60
    assert (finished.session.work / "scores.csv").read_text().startswith("solver,steps,guidance,name,passed")
    assert {"curves.png", "test_sheet.png", "failures.png"} <= {p.name for p in finished.session.work.glob("*.png")}
    pack_directory(folder, tmp_path / "model.tar")
    with tarfile.open(tmp_path / "model.tar") as tar:
        names = set(tar.getnames())
    assert names == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"model_index.json", "tokenizer/tokenizer.json", "vae/diffusion_pytorch_model.safetensors"} <= names


def test_trained_captions_are_painted_like_diffusers_and_the_runtime_do(finished: Run, tmp_path: Path) -> None:
    """The trainer's sampler, SanaPipeline with its defaults, and an fp32 bundle: the same picture of one noise."""
    noise = torch.randn(1, 32, 2, 2, generator=torch.Generator().manual_seed(3))
    pipeline = SanaPipeline.from_pretrained(finished.directory, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPT, height=64, width=64, latents=noise.clone(), use_resolution_binning=False, output_type="np"
    ).images[0]
    expected = np.round(expected * 255).astype(int)
    model = load_directory(TINY, finished.directory, CPU)
    painter = Painter(model, finished.captions, 64, 1, CPU)
    with torch.no_grad():
        mine = painter._decode(painter.solve(noise, painter.embed([PROMPT]), 20, 4.5, "flow_dpm_solver"))[0]
    # fp32 on all sides, 20 steps in another order of sums, a rounding to whole levels.
    assert np.abs(mine.astype(int) - expected).max() <= 2
    bundle = tmp_path / "bundle"
    build(BuildRequest(str(finished.directory), "fp32", ("onnxruntime",), 64, 64, bundle), _Quiet())
    picture = Pipeline.load(bundle).generate(PROMPT, num_steps=20, guidance_scale=4.5, latent=noise.numpy()).pixels
    assert np.abs(picture.astype(int) - expected).max() <= 2
    assert picture.std() > 5, "a flat picture compares nothing"


def test_packed_checkpoints_export_the_same_model(finished: Run, tmp_path: Path) -> None:
    pack_checkpoints(finished.session.work, STAGES, tmp_path)
    work = tmp_path / "work"
    assert unpack_checkpoints(tmp_path, work) == list(STAGES)
    for name in ("latents.pt", "tokenizer.json"):
        shutil.copy(finished.session.work / name, work / name)
    run = Run(Session(work, CPU, log=lambda text: None), finished.plan)
    assert run.train(), "every stage is finished"
    folder = run.export()
    for path in finished.directory.rglob("*.safetensors"):
        assert (folder / path.relative_to(finished.directory)).read_bytes() == path.read_bytes()


class _Quiet:
    def __getattr__(self, name: str) -> object:
        return lambda *arguments: None


def test_run_starts_from_finished_stages(finished: Run, tmp_path: Path) -> None:
    """What another training leaves: two checkpoints, the tokenizer, its record, and weights for diffusion."""
    source, start, work = finished.session.work, tmp_path / "start", tmp_path / "work"
    start.mkdir()
    work.mkdir()
    for name in ("autoencoder-large.pt", "contrastive.pt", "tokenizer.json", "record.json"):
        shutil.copy(source / name, start / name)
    weights = torch.load(source / "diffusion-small.pt", weights_only=True)["ema"]
    kept = {name: tensor.bfloat16() for name, tensor in weights.items() if name.startswith("transformer.")}
    torch.save(kept, start / "start.pt")
    minutes = {"diffusion-small": 0.02, "diffusion-large": 0.02}
    plan = Plan(TINY, 0.05, 0, scenes=64, start=start, frozen_text=True, stage_minutes=minutes)
    run = Run(Session(work, CPU, log=lambda text: None), plan)
    before: dict[str, torch.Tensor] = {}
    diffusion = run.diffusion_step

    def watched(phase: int, shares: torch.Tensor) -> object:
        if phase == 0:
            before.update({name: value.clone() for name, value in run.transformer.state_dict().items()})
        return diffusion(phase, shares)

    run.diffusion_step = watched  # type: ignore[method-assign,assignment]
    assert run.train()
    assert set(run.stages) == set(STAGES) - {"autoencoder-small"}
    assert run.stages["autoencoder-large"].steps == finished.stages["autoencoder-large"].steps
    assert len(before) == len(kept)
    for name, tensor in before.items():
        torch.testing.assert_close(tensor, kept[f"transformer.{name}"].float(), rtol=0, atol=0)
    # The text encoder is the contrastive model's, and stays so.
    contrastive = torch.load(start / "contrastive.pt", weights_only=True)["ema"]
    for name, tensor in run.text_encoder.named_parameters():
        torch.testing.assert_close(tensor.detach(), contrastive[f"text_encoder.{name}"], rtol=0, atol=0)
    assert open_checkpoint(str(run.export())).architecture == "custom 2x64"
    assert set(json.loads((work / "record.json").read_text())["stages"]) == set(STAGES)


def test_run_goes_on_with_a_trained_models_directory(finished: Run, tmp_path: Path) -> None:
    """Text encoder and transformer start as they are shipped; a diffusion stage of 0 minutes is left out."""
    minutes = {"contrastive": 0.02, "diffusion-small": 0.0, "diffusion-large": 0.02}
    plan = Plan(TINY, 0.05, 0, scenes=64, start=finished.directory, frozen_text=True, stage_minutes=minutes)
    run = Run(Session(tmp_path, CPU, log=lambda text: None), plan)
    before: dict[str, torch.Tensor] = {}
    diffusion, load = run.diffusion_step, training.load_weights

    def watched(phase: int, shares: torch.Tensor) -> object:
        assert phase == 1
        before.update({name: value.clone() for name, value in run.transformer.state_dict().items()})
        return diffusion(phase, shares)

    run.diffusion_step = watched  # type: ignore[method-assign,assignment]
    loaded: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "load_weights", lambda path, modules: (loaded.extend(modules), load(path, modules)))
        assert run.train()
    assert loaded == ["text_encoder", "transformer"]
    shipped = load_directory(TINY, finished.directory, CPU)
    for name, tensor in shipped.transformer.state_dict().items():
        torch.testing.assert_close(before[name], tensor, rtol=0, atol=0)
    assert set(run.stages) == {"autoencoder-large", "contrastive", "diffusion-large"}
    assert run.stages["autoencoder-large"].steps == 0
    folder = run.export()
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (folder / vae).read_bytes() == (finished.directory / vae).read_bytes()
    told = json.loads((folder / "training.json").read_text())["stages"]
    assert told["diffusion-large, before"]["steps"] == finished.stages["diffusion-large"].steps
    assert told["diffusion-large"]["steps"] == run.stages["diffusion-large"].steps
    assert told["autoencoder-large"]["steps"] == finished.stages["autoencoder-large"].steps > 0
    third = tmp_path / "third"
    third.mkdir()
    adopt(TINY, folder, third, STAGES)
    record = json.loads((third / "record.json").read_text())
    assert {"diffusion-large, before", "diffusion-large, 2 before"} <= set(record["stages"])
    assert record["device"] == "a CPU"


def test_run_says_what_it_cannot_start_from(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to start from"):
        adopt(TINY, tmp_path, tmp_path / "work", STAGES)
    torch.save({"transformer.patch_embed.weight": torch.zeros(1)}, tmp_path / "start.pt")
    with pytest.raises(InputError, match=r"start\.pt does not fit the transformer"):
        load_weights(tmp_path / "start.pt", {"transformer": finished.transformer})


def test_latents_that_are_read_wait_for_their_captions(finished: Run) -> None:
    """A second command reads the latents at once, while its scenes are still being sampled."""
    run = Run(finished.session, finished.plan)
    whole = run.store
    chunks = [data.sample_chunk(start, 32) for start in (0, 32)]
    late: list[Future[data._Chunk]] = [Future() for _ in chunks]
    scenes = type(whole.scenes)(*(torch.zeros_like(tensor) for tensor in whole.scenes))
    tokens, fitting = torch.zeros_like(whole.tokens), torch.zeros_like(whole.fitting)
    run.store = data.SceneStore(scenes, tokens, fitting, torch.zeros(()), [*late])

    def arrive() -> None:
        for future, chunk in zip(late, chunks, strict=True):
            time.sleep(0.2)
            future.set_result(chunk)

    sampling = threading.Thread(target=arrive)
    sampling.start()
    found = run.latents
    captions = run.store.tokens.clone()
    sampling.join()
    count = len(found)
    assert count
    assert captions[:count].any(-1).all(), "every scene has its captions"
    torch.testing.assert_close(captions[:count], whole.tokens[:count], rtol=0, atol=0)


def test_latents_are_scaled_to_unit_deviation(finished: Run) -> None:
    found = finished.latents
    assert isinstance(found, Latents)
    assert found.large.shape[1:] == (32, 4, 4)
    assert found.small.shape[1:] == (32, 2, 2)
    # The factor is that of all scenes; these are the ones that there was time for.
    assert abs(found.large.float().std().item() - 1) < 0.1


def test_shipped_model_is_found_or_its_absence_said(monkeypatch: pytest.MonkeyPatch, finished: Run) -> None:
    from sana_export.weights import checkpoint

    monkeypatch.setattr(checkpoint, "shipped_directory", lambda: finished.directory)
    assert open_checkpoint("nano").source == "nano"
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "files", lambda package: Path("/nowhere"))
    with pytest.raises(CheckpointError, match="not part of this installation"):
        open_checkpoint("nano")
