"""Figures of how far a candidate is from its reference."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sana_runtime.errors import BuildError


@dataclass(frozen=True)
class Parity:
    """Distance of one tensor. `psnr_db` is over the reference's value range (255 for uint8), infinite if equal."""

    stage: str
    tensor: str
    max_abs: float
    relative_rms: float
    cosine: float
    psnr_db: float
    worst_index: tuple[int, ...]

    @property
    def sqnr_db(self) -> float:
        """Signal to error ratio in dB, infinite if equal."""
        return -20 * math.log10(self.relative_rms) if self.relative_rms else math.inf


def measure(stage: str, tensor: str, candidate: npt.ArrayLike, reference: npt.ArrayLike) -> Parity:
    """Compare two arrays of one shape, in float64.

    Raises `BuildError` for different shapes and for a candidate that is not finite where the reference is: a
    distance would hide both.
    """
    left, right = np.asarray(candidate), np.asarray(reference)
    _check(stage, tensor, left, right)
    peak = 255.0 if right.dtype == np.uint8 else float(np.ptp(right.astype(np.float64)))
    left, right = left.astype(np.float64), right.astype(np.float64)
    error = np.abs(left - right)
    mean_square = float(np.mean(error**2))
    norms = float(np.linalg.norm(left) * np.linalg.norm(right))
    power = float(np.mean(right**2))
    return Parity(
        stage,
        tensor,
        float(error.max()),
        math.sqrt(mean_square / power) if power else (0.0 if mean_square == 0 else math.inf),
        float(np.vdot(left, right)) / norms if norms else float(mean_square == 0),
        10 * math.log10(peak**2 / mean_square) if mean_square and peak else math.inf,
        tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape)),
    )


def ssim(candidate: npt.NDArray, reference: npt.NDArray) -> float:
    """Structural similarity (0..1) of two pictures [H, W, 3] uint8, with the Gaussian window of the original paper."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            candidate, reference, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def _check(stage: str, tensor: str, left: npt.NDArray, right: npt.NDArray) -> None:
    if left.shape != right.shape or not left.size:
        raise BuildError(
            f"{stage}: {tensor} cannot be compared",
            received=f"candidate {left.shape}",
            expected=f"reference {right.shape}, not empty",
            action="rebuild the bundle from the checkpoint it is compared with",
        )
    bad = int(np.count_nonzero(~np.isfinite(left)))
    if bad:
        raise BuildError(
            f"{stage}: {tensor} is not finite",
            received=f"{bad} of {left.size} values are NaN or infinite",
            expected="finite values, as in the reference",
            action="build this component in a wider precision: --precision bf16 or fp32",
        )
