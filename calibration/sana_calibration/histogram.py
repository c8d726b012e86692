"""Histograms of |x| that merge exactly in any order, and the amax they suggest."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

BINS = 4096
_LOG2_BINS = 12
# Below this power of two nothing is told apart: bin widths stay normal fp32 numbers.
_SMALLEST_EXPONENT = -100
_INT8_LEVELS = 128


@dataclass(frozen=True, eq=False)
class Histogram:
    """`counts` [4096] int64 of |x| over 0 .. 2^`exponent`.

    A width that is a power of two makes binning exact, and two histograms of different range merge by adding up
    whole bins: the result does not depend on the order in which tensors were seen.
    """

    exponent: int
    counts: npt.NDArray[np.int64]

    @property
    def width(self) -> float:
        """Width of one bin."""
        return float(2.0 ** (self.exponent - _LOG2_BINS))

    @classmethod
    def of(cls, magnitude: torch.Tensor, amax: float) -> "Histogram":
        """The histogram of a finite, non-negative fp32 tensor whose largest value is `amax`."""
        exponent = max(int(np.frexp(np.float32(amax))[1]), _SMALLEST_EXPONENT)
        index = (magnitude.flatten() * 2.0 ** (_LOG2_BINS - exponent)).to(torch.int64)
        return cls(exponent, torch.bincount(index, minlength=BINS).cpu().numpy())

    def merged(self, other: "Histogram") -> "Histogram":
        """The histogram of both tensors."""
        exponent = max(self.exponent, other.exponent)
        return Histogram(exponent, self._widened(exponent) + other._widened(exponent))

    def _widened(self, exponent: int) -> npt.NDArray[np.int64]:
        factor = 2 ** min(exponent - self.exponent, _LOG2_BINS)
        counts = np.zeros(BINS, np.int64)
        counts[: BINS // factor] = self.counts.reshape(-1, factor).sum(axis=1)
        return counts


def percentile_amax(histogram: Histogram, percentile: float) -> float:
    """The upper edge of the bin that holds the percentile (0..100] of |x|: at most one bin width too large."""
    cumulative = np.cumsum(histogram.counts)
    rank = cumulative[-1] * percentile / 100
    return (int(np.searchsorted(cumulative, rank)) + 1) * histogram.width


def entropy_amax(histogram: Histogram, stride: int = 8) -> float:
    """The clipping threshold whose 128 INT8 steps lose least information (KL divergence), as TensorRT's calibrator
    chose it. Every `stride`-th bin edge from the 128th on is tried.
    """
    bins = histogram.counts.astype(np.float64)
    used = int(np.flatnonzero(bins)[-1]) + 1
    bins = bins[: max(used, _INT8_LEVELS)]
    # Zeros are exact whatever the threshold: their peak must not decide it.
    bins[0] = bins[1]
    edges = range(_INT8_LEVELS, len(bins) + 1, stride)
    divergence = [_divergence(bins, edge) for edge in edges]
    # Of equal thresholds the widest.
    best = len(divergence) - 1 - int(np.argmin(divergence[::-1]))
    return edges[best] * histogram.width


def _divergence(bins: npt.NDArray[np.float64], edge: int) -> float:
    """KL divergence of |x| clipped at bin `edge` from its 128-step version."""
    kept = bins[:edge]
    occupied = kept > 0
    level = np.arange(edge) * _INT8_LEVELS // edge
    mass = np.bincount(level[occupied], kept[occupied], _INT8_LEVELS)
    share = np.bincount(level[occupied], minlength=_INT8_LEVELS)
    coarse = np.where(occupied, (mass / np.maximum(share, 1))[level], 0.0)
    clipped = kept.copy()
    clipped[-1] += bins[edge:].sum()
    present = clipped > 0
    if not kept.any() or not (coarse[present] > 0).all():
        return float("inf")
    p, q = clipped[present] / clipped.sum(), coarse[present] / coarse.sum()
    return float((p * np.log(p / q)).sum())
