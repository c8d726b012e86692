"""What a caller asks for, checked against the bundle before any engine runs."""

import hashlib
import math

import numpy as np
import numpy.typing as npt

from sana_runtime import __version__
from sana_runtime.contract import LATENT_CHANNELS, PIXELS_PER_LATENT, TargetName
from sana_runtime.errors import InputError
from sana_runtime.image import Settings
from sana_runtime.manifest import Manifest
from sana_runtime.scheduler import step_table
from sana_runtime.tokenizer import clean_prompt


def latent_shape(manifest: Manifest) -> tuple[int, int, int, int]:
    """(1, 32, height / 32, width / 32)."""
    height, width = manifest.height // PIXELS_PER_LATENT, manifest.width // PIXELS_PER_LATENT
    return 1, LATENT_CHANNELS, height, width


def checked_settings(
    manifest: Manifest,
    target: TargetName,
    *,
    prompt: str,
    negative_prompt: str = "",
    seed: int = 0,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    latent: npt.ArrayLike | None = None,
) -> Settings:
    """Fill in the model's defaults for None and check every value. Raises `InputError`."""
    scheduler = manifest.scheduler
    settings = Settings(
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=seed,
        num_steps=scheduler.default_num_steps if num_steps is None else num_steps,
        guidance_scale=scheduler.default_guidance_scale if guidance_scale is None else guidance_scale,
        height=manifest.height if height is None else height,
        width=manifest.width if width is None else width,
        latent_sha256=None if latent is None else _digest(checked_latent(manifest, latent)),
        model=manifest.model.source,
        bundle_digest=manifest.digest,
        target=target,
        sana_runtime=__version__,
    )
    clean_prompt(prompt)
    clean_prompt(negative_prompt)
    step_table(scheduler, settings.num_steps)
    _check_seed(settings.seed)
    _check_guidance(settings.guidance_scale)
    _check_size(manifest, settings)
    _check_negative(manifest, settings)
    return settings


def checked_latent(manifest: Manifest, latent: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The latent as fp32. Raises `InputError` unless it has the bundle's shape, a float dtype and no NaN."""
    shape = latent_shape(manifest)
    array = np.asarray(latent)
    expected = f"floating point {list(shape)}, all values finite"
    action = "save standard normal noise of that shape with numpy.save"
    if array.shape != shape or not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            "the latent has the wrong form",
            received=f"{array.dtype} {list(array.shape)}",
            expected=expected,
            action=action,
        )
    with np.errstate(over="ignore"):
        latent32 = array.astype(np.float32, copy=False)
    if bad := int(np.count_nonzero(~np.isfinite(latent32))):
        raise InputError(
            "the latent is not finite",
            received=f"{bad} of {array.size} values are NaN or infinite in fp32",
            expected=expected,
            action=action,
        )
    return latent32


def _check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError("the seed is wrong", received=seed, expected="a whole number >= 0", action="pass --seed 0")


def _check_guidance(guidance_scale: object) -> None:
    if not isinstance(guidance_scale, int | float) or not math.isfinite(guidance_scale):
        raise InputError(
            "the guidance scale is wrong",
            received=guidance_scale,
            expected="a finite number; above 1 guides, up to 1 does not",
            action="leave --guidance-scale away for the model's default",
        )


def _check_size(manifest: Manifest, settings: Settings) -> None:
    if (settings.height, settings.width) != (manifest.height, manifest.width):
        raise InputError(
            "this bundle makes pictures of one size",
            received=f"height {settings.height}, width {settings.width}",
            expected=f"height {manifest.height}, width {manifest.width}",
            action="leave --height and --width away, or build a bundle of that size",
        )


def _check_negative(manifest: Manifest, settings: Settings) -> None:
    if settings.negative_prompt and manifest.model.guidance == "embedded":
        raise InputError(
            "this model takes no negative prompt",
            received=settings.negative_prompt,
            expected="no negative prompt: its guidance is embedded (Sprint)",
            action="leave --negative-prompt away",
        )


def _digest(latent: npt.NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(latent).tobytes()).hexdigest()
