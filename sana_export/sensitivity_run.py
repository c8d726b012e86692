"""Which transformer layers a recipe should leave alone: one layer group quantised at a time, velocity SQNR."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sana_calibration.rules import Recipe
from sana_calibration.scales import Scales
from sana_calibration.sensitivity import (
    GroupSensitivity,
    Proposal,
    Sensitivity,
    block_groups,
    layer_groups,
    sqnr_db,
)
from sana_export.calibration_run import DenoisingRun, Feed, OnProgress, rules_of
from sana_export.weights.checkpoint import Checkpoint
from sana_runtime.contract import PrecisionName

# fp32 loses nothing to measure a drop from: bf16 is what people run today.
_BASE_PRECISION: dict[str, PrecisionName] = {"float32": "bf16", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class SensitivityReport:
    """`whole_db`: the recipe's velocity SQNR, `base_db`: that of the base dtype alone (both the lowest over the steps,
    against fp32). `ranking`: every group alone, most sensitive first. `proposal`: exclusions for the budget, if asked.
    """

    whole_db: float
    base_db: float
    ranking: tuple[GroupSensitivity, ...]
    proposal: Proposal | None


def measure_sensitivity(
    checkpoint: Checkpoint,
    recipe: Recipe,
    scales: Scales,
    prompts: Sequence[str],
    *,
    seed: int,
    num_steps: int,
    height: int,
    width: int,
    work_folder: Path,
    on_progress: OnProgress,
    max_drop_db: float | None = None,
    by_layer: bool = False,
    device: str = "cpu",
    precision: PrecisionName = "fp32",
) -> SensitivityReport:
    """Rank the transformer's layer groups on real denoising steps, and propose exclusions for a budget.

    Groups are a layer's place in the block over all blocks, or single layers with `by_layer`. `max_drop_db`: how far
    the quantised velocity's SQNR may lie below that of the recipe's base dtype (bf16 where that is fp32). A few prompts
    are enough. Raises `InputError` if the budget cannot be kept.
    """
    run = DenoisingRun(checkpoint, tuple(prompts), seed, num_steps, height, width, work_folder, device, precision)
    plan = run.plans["transformer"]
    rules, found = rules_of(recipe, plan), scales.component("transformer")
    on_progress(0.0, "collecting denoising steps")
    feeds, exact = denoising_steps(run)
    base = replace(run, precision=_BASE_PRECISION[recipe.base_dtype])
    with base.module("transformer") as module:
        on_progress(0.2, f"{base.precision} alone")
        base_db = min(sqnr_db(velocity_of(module(**feed)), v) for feed, v in zip(feeds, exact, strict=True))
    with run.module("transformer") as module:
        sensitivity = Sensitivity(module, plan.prefix, rules, found, feeds, velocity_of)
        whole_db = sensitivity.sqnr_db(rules)
        on_progress(0.3, f"{recipe.name}: {whole_db:.1f} dB")
        ranking = sensitivity.ranking(layer_groups(rules) if by_layer else block_groups(rules))
        on_progress(0.7, f"most sensitive: {ranking[0].group}")
        proposal = None
        if max_drop_db is not None:
            proposal = sensitivity.propose("transformer", ranking, base_db - max_drop_db)
    on_progress(1.0, "measured")
    return SensitivityReport(whole_db, base_db, ranking, proposal)


def denoising_steps(run: DenoisingRun) -> tuple[list[Feed], list[torch.Tensor]]:
    """The inputs of every step of every prompt, on the unquantised model's own path, and the velocities there."""
    with run.module("text_encoder") as encoder:
        captions = {index: run.caption(encoder, index) for index in run.items("text_encoder")}
    feeds: list[Feed] = []
    with run.module("transformer") as module:
        for index in run.items("transformer"):
            *steps, _ = run.denoise(module, run.caption_batch(captions, index), index)
            feeds += steps
        return feeds, [velocity_of(module(**feed)) for feed in feeds]


def velocity_of(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The velocity among a step module's outputs (next_latent, x0, velocity)."""
    return outputs[2]
