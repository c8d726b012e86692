"""The trained model as files: a diffusers directory with its card, and checkpoints small enough to be carried."""

import io
import json
import re
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana_export.scenes.captions import captions
from sana_export.scenes.prompts import prompts
from sana_export.scenes.scene import sample_scene
from sana_export.weights.checkpoint import CALIBRATION_PROMPTS, Checkpoint, open_checkpoint
from sana_export.weights.write import write_diffusers_directory
from sana_runtime.errors import InputError
from sana_runtime.files import whole_file
from scripts.train_nano.models import (
    Autoencoder,
    TrainedCheckpoint,
    TrainedModel,
    build_text_encoder,
    build_transformer,
    parameter_counts,
)
from scripts.train_nano.sizes import GUIDANCE, TRAINING_SHIFT, Size

_PART_BYTES = 15 << 20
_PART = "part"
# The stage that starts with a stage's weights and keeps its own.
GOES_ON = {"autoencoder-small": "autoencoder-large", "diffusion-small": "diffusion-large"}
START_WEIGHTS = "start.pt"
_SUMMARY = "training.json"
# Stages that train again what a model's directory holds.
_TRAINED_ON = ("contrastive", "diffusion-small", "diffusion-large")
_ENGLISH_PROMPTS = 64


def export_directory(size: Size, model: TrainedModel, folder: Path, record: Mapping[str, Any]) -> Checkpoint:
    """Write bf16 weights as a diffusers directory with card, summary and calibration prompts, and open it again, which
    checks it.
    """
    checkpoint = TrainedCheckpoint(size, model)
    write_diffusers_directory(checkpoint, folder, torch.bfloat16)
    with whole_file(folder / CALIBRATION_PROMPTS) as temporary:
        temporary.write_text(calibration_prompts(), encoding="utf-8")
    describe(size, checkpoint, folder, record)
    return open_checkpoint(str(folder))


def describe(size: Size, checkpoint: Checkpoint, folder: Path, record: Mapping[str, Any]) -> None:
    """README.md and training.json of a model's directory, from the record of its run: all but the curves."""
    stages = {
        name: {key: value for key, value in row.items() if key != "records"} for name, row in record["stages"].items()
    }
    with whole_file(folder / "README.md") as temporary:
        temporary.write_text(model_card(size, checkpoint, record), encoding="utf-8")
    with whole_file(folder / _SUMMARY) as temporary:
        temporary.write_text(json.dumps({**record, "stages": stages}, indent=1) + "\n", encoding="utf-8")


def calibration_prompts() -> str:
    """The content of the model's list of prompts for calibration, always the same.

    In each five lines, four are English prompts of the training split, all kinds in turn, and the third is a caption of
    a training scene, in Chinese and with emoji by turns: few prompts from the beginning show the model all it reads.
    """
    lines = ["# Prompts to calibrate this model with: python -m scripts.train_nano wrote them with the weights."]
    others = _captions_without_words()
    for index, prompt in enumerate(prompts("train", _ENGLISH_PROMPTS)):
        if index % 4 == 2:
            lines.append(next(others))
        lines.append(prompt.text)
    return "\n".join(lines) + "\n"


def _captions_without_words() -> Iterator[str]:
    """Different captions of training scenes, by turns in Chinese and with emoji."""
    told: set[str] = set()
    for seed in count():
        # Letter other: ideographs. Symbol other: emoji.
        wanted = ("Lo", "So")[len(told) % 2]
        for caption in captions(sample_scene(seed, "train"), seed):
            if caption not in told and wanted in {unicodedata.category(letter) for letter in caption}:
                told.add(caption)
                yield caption
                break


def load_directory(size: Size, folder: Path, device: torch.device) -> TrainedModel:
    """The shipped weights in fp32 modules, in evaluation."""
    checkpoint = open_checkpoint(str(folder))
    autoencoder = Autoencoder(checkpoint.vae_config)
    model = TrainedModel(
        build_text_encoder(checkpoint.text_encoder_config),
        build_transformer(checkpoint.transformer_config),
        autoencoder,
        checkpoint.tokenizer_json(),
        checkpoint.vae_config["scaling_factor"],
    )
    for component in ("text_encoder", "transformer", "vae_decoder", "vae_encoder"):
        tensors = checkpoint.weights(component)  # type: ignore[arg-type]
        state = {name: tensor.load().float() for name, tensor in tensors.items()}
        module = model.reference(component).to(device).eval()  # type: ignore[arg-type]
        module.load_state_dict(state)
        module.requires_grad_(False)
    return model


def model_card(size: Size, checkpoint: Checkpoint, record: Mapping[str, Any]) -> str:
    """README.md of the model, from the record of its run."""
    counts = parameter_counts(checkpoint)
    stages = "\n".join(
        f"| {name} | {row['minutes']:.1f} | {row['steps']} | {row['pictures']} | {row['loss']:.4g} |"
        for name, row in record["stages"].items()
    )
    test = record.get("evaluation", {}).get("test", {})
    scores = "\n".join(f"| {name} | {100 * value:.1f} % |" for name, value in test.items()) or "| not evaluated | |"
    shift = checkpoint.scheduler_config["flow_shift"]
    guidance = record.get("evaluation", {}).get("guidance", GUIDANCE)
    return f"""---
license: apache-2.0
pipeline_tag: text-to-image
library_name: diffusers
---
# sana-{size.name}

Sana's architecture in small: DC-AE f32c32, a Gemma-2 text encoder, a Linear DiT with Mix-FFN. It paints one to four
plain shapes on a background, as asked in a sentence, at {size.sides[1]} px. Every weight was trained from scratch on
synthetic pictures by `python -m scripts.train_nano`; nothing is derived from released weights.

    pipeline = SanaPipeline.from_pretrained(FOLDER)
    pipeline("a red circle left of a blue square on a green background", guidance_scale={GUIDANCE:g}).images[0]

| component | parameters |
|---|---|
| text encoder (Gemma-2) | {counts["text_encoder"]:,} |
| transformer | {counts["transformer"]:,} |
| autoencoder, encoder and decoder | {counts["vae"]:,} |

## Data

`sana_export.scenes`: procedural pictures of ten shapes in twelve colours, three sizes and four textures, with true
captions in English, Chinese and with emoji. {record.get("scenes", 0):,} training scenes with four captions each. The
combinations in test prompts are not in the training scenes.

## Training

On {record.get("device", "an unnamed device")}. Flow matching with logit-normal noise levels
(shift {TRAINING_SHIFT:g}); a caption is picked by softmax over its similarity to the picture, which a small
contrastive model gives; {size.sides[0]} px, then {size.sides[1]} px. Averaged weights, stored as bf16.

| stage | minutes | steps | pictures | last loss |
|---|---|---|---|---|
{stages}

Autoencoder on test scenes: {record.get("psnr_db", float("nan")):.2f} dB PSNR at {size.sides[1]} px (bf16 weights, fp32
arithmetic).

## Scores

{record.get("evaluation", {}).get("prompts", 0)} test prompts, fp32, Flow-DPM-Solver, 20 steps,
flow shift {shift:g}, guidance {guidance:g}. A prompt is right if everything it says can be read off the picture.

| | right |
|---|---|
{scores}

## Limits

It knows the words of its captions and nothing else: ten shapes, twelve colours, four textures, nine positions, four
relations, up to four objects. Other words are ignored or misread. 512 px is the only size it was finished on.
"""


def pack_directory(folder: Path, archive: Path) -> None:
    """One tar file of a directory's files, without times and owners: the same files give the same bytes."""
    with whole_file(archive) as temporary, tarfile.open(temporary, "w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
                entry.size, entry.mode = len(content), 0o644
                tar.addfile(entry, io.BytesIO(content))


# --- Checkpoints in parts ---


def pack_checkpoints(work: Path, stages: Sequence[str], folder: Path) -> list[Path]:
    """Every stage's checkpoint in files of 15 MiB or less.

    Averaged weights stay fp32 while a stage is running and become bf16, as shipped, when it is finished. Of a running
    stage, the weights are kept as bf16 differences to the average, second moments as bf16; first moments start anew.
    """
    states = {name: _load(work / f"{name}.pt") for name in stages if (work / f"{name}.pt").exists()}
    content = {
        name: {**state, "ema": {}} if GOES_ON.get(name) in states else _reduced(state) for name, state in states.items()
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    whole, paths = buffer.getvalue(), []
    for index, start in enumerate(range(0, len(whole), _PART_BYTES)):
        path = folder / f"checkpoint.{index}.{_PART}"
        with whole_file(path) as temporary:
            temporary.write_bytes(whole[start : start + _PART_BYTES])
        paths.append(path)
    return paths


def unpack_checkpoints(folder: Path, work: Path) -> list[str]:
    """Undo `pack_checkpoints`: write the stages' checkpoints to `work`, unless they are there. Returns their names."""
    parts = sorted(folder.glob(f"checkpoint.*.{_PART}"), key=lambda path: int(path.name.split(".")[1]))
    if not parts:
        raise InputError(
            f"{folder} has no packed checkpoint",
            received="no file checkpoint.*.part",
            expected="the files that --pack-checkpoint wrote",
            action="copy them back into one folder",
        )
    whole = io.BytesIO(b"".join(path.read_bytes() for path in parts))
    content = torch.load(whole, map_location="cpu", weights_only=True)
    for name, state in content.items():
        if not (work / f"{name}.pt").exists():
            with whole_file(work / f"{name}.pt") as temporary:
                torch.save(_restored(state), temporary)
    return list(content)


def adopt(size: Size, folder: Path, work: Path, stages: Sequence[str]) -> list[str]:
    """Copy what another training has finished to `work`, unless it is there: checkpoints of finished stages (stage.pt,
    weights in any precision), tokenizer.json, record.json, and start.pt, weights that the contrastive and the first
    diffusion stage start from, under the names of their checkpoints. Returns the names of the files that `folder` has.

    Of a trained model's directory, the autoencoder is finished, and text encoder and transformer go on.
    """
    if (folder / "model_index.json").is_file():
        return _adopt_model(size, folder, work)
    names = [*(f"{stage}.pt" for stage in stages), "tokenizer.json", "record.json", START_WEIGHTS]
    found = [name for name in names if (folder / name).exists()]
    if not any(name.endswith(".pt") for name in found):
        raise InputError(
            f"{folder} has nothing to start from",
            received="none of its files",
            expected=", ".join(names),
            action="name the folder of finished stages",
        )
    for name in found:
        if not (work / name).exists():
            with whole_file(work / name) as temporary:
                temporary.write_bytes((folder / name).read_bytes())
    return found


def _adopt_model(size: Size, folder: Path, work: Path) -> list[str]:
    model = load_directory(size, folder, torch.device("cpu"))
    autoencoder = {f"autoencoder.{name}": tensor for name, tensor in model.autoencoder.state_dict().items()}
    state = {"elapsed": 0.0, "steps": 0, "finished": True, "records": "[]", "weights": None, "optimizer": None}
    modules: dict[str, nn.Module] = {"transformer": model.transformer, "text_encoder": model.text_encoder}
    start = {f"{key}.{name}": tensor for key, module in modules.items() for name, tensor in module.named_parameters()}
    contents = {"autoencoder-large.pt": {**state, "ema": autoencoder}, START_WEIGHTS: start}
    for name, content in contents.items():
        if not (work / name).exists():
            with whole_file(work / name) as temporary:
                torch.save(content, temporary)
    record = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
    earlier = {_earlier(name): row for name, row in record["stages"].items()}
    record = {"stages": {name: {**row, "records": []} for name, row in earlier.items()}, "device": record["device"]}
    texts = {"tokenizer.json": model.tokenizer_json, "record.json": json.dumps(record).encode()}
    for name, text in texts.items():
        if not (work / name).exists():
            with whole_file(work / name) as temporary:
                temporary.write_bytes(text)
    return [*contents, *texts]


def _earlier(name: str) -> str:
    """What the record calls a stage of a training that another one goes on from: "X, before", then "X, 2 before"."""
    if name in _TRAINED_ON:
        return f"{name}, before"
    found = re.fullmatch(r"(.+), (?:(\d+) )?before", name)
    return f"{found[1]}, {int(found[2] or 1) + 1} before" if found else name


def load_weights(path: Path, modules: Mapping[str, nn.Module]) -> None:
    """Weights "module.parameter" of a file of tensors: of each module all, or none where the file has none of it."""
    found: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    for key, module in modules.items():
        if not any(name.startswith(f"{key}.") for name in found):
            continue
        state = {name: found.get(f"{key}.{name}") for name, _ in module.named_parameters()}
        wrong = [
            name
            for name, parameter in module.named_parameters()
            if not isinstance(state[name], torch.Tensor) or state[name].shape != parameter.shape  # type: ignore[union-attr]
        ]
        if wrong:
            raise InputError(
                f"{path.name} does not fit the {key}",
                received=f"{wrong[0]} missing or of another shape, and {len(wrong) - 1} more",
                expected=f"every parameter of the {key}",
                action="pass weights of the same --size",
            )
        for name, parameter in module.named_parameters():
            parameter.data.copy_(state[name])  # type: ignore[arg-type]


def _load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _reduced(state: dict[str, Any]) -> dict[str, Any]:
    if state["finished"]:
        return {**state, "ema": {name: tensor.bfloat16() for name, tensor in state["ema"].items()}}
    ema = state["ema"]
    differences = {name: (tensor - ema[name]).bfloat16() for name, tensor in state["weights"].items()}
    kept = {"step": torch.float32, "exp_avg_sq": torch.bfloat16, "momentum": torch.bfloat16}
    moments = {
        name: {key: tensor.to(kept[key]) for key, tensor in found.items() if key in kept}
        for name, found in state["optimizer"].items()
        if found
    }
    return {**state, "weights": differences, "optimizer": moments}


def _restored(state: dict[str, Any]) -> dict[str, Any]:
    ema = {name: tensor.float() for name, tensor in state["ema"].items()}
    if state["finished"]:
        return {**state, "ema": ema}
    weights = {name: ema[name] + tensor.float() for name, tensor in state["weights"].items()}
    moments = {name: _restored_moments(found, ema[name]) for name, found in state["optimizer"].items()}
    return {**state, "ema": ema, "weights": weights, "optimizer": moments}


def _restored_moments(found: dict[str, torch.Tensor], like: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's with a first moment of 0, or Muon's momentum, as they are."""
    restored = {key: tensor.float() for key, tensor in found.items()}
    return {**restored, "exp_avg": torch.zeros_like(like)} if "exp_avg_sq" in found else restored
