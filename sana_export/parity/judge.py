"""A loaded bundle against the checkpoint it was built from, on one prompt."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from sana_calibration.rules import Gate
from sana_export.calibration_run import DenoisingRun
from sana_export.parity.ladder import EngineCandidate, LadderResult, check_same_weights, climb
from sana_export.quantize import gate_entry
from sana_export.weights.checkpoint import Checkpoint
from sana_runtime.manifest import GateEntry, Manifest
from sana_runtime.pipeline import Pipeline


def judge(
    pipeline: Pipeline,
    checkpoint: Checkpoint,
    on_progress: Callable[[str], None],
    *,
    prompt: str,
    negative_prompt: str = "",
    seed: int = 0,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
) -> LadderResult:
    """Climb the ladder with the bundle's engines. None stands for the model's default.

    Raises `InputError` when the checkpoint is not the one the bundle was made from, or a setting is wrong.
    """
    manifest = pipeline.manifest
    check_same_weights(manifest, checkpoint)
    with TemporaryDirectory() as folder:
        run = DenoisingRun(
            checkpoint,
            (prompt,),
            seed,
            manifest.scheduler.default_num_steps if num_steps is None else num_steps,
            manifest.height,
            manifest.width,
            Path(folder),
            negative_prompt=negative_prompt,
            guidance=guidance_scale,
        )
        (result,) = climb(run, EngineCandidate(pipeline, run), on_progress)
    return result


def judged_gate(manifest: Manifest, result: LadderResult) -> GateEntry | None:
    """The verdict by the thresholds of a quantised bundle's recipe; None for a bundle that quantises nothing."""
    entry = manifest.quantization
    if entry is None:
        return None
    gate = Gate(entry.min_x0_sqnr_db, entry.min_psnr_db, entry.min_ssim)
    return gate_entry(gate, (result,), len(result.x0))
