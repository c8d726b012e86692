"""The bounds of parity, against errors of known size."""

import numpy as np
import pytest

from sana_export.parity.metrics import measure
from sana_export.parity.tolerance import ParityError, check, guidance_amplification, relative_rms_bound


@pytest.mark.parametrize("scale", [1.5, 4.5, 8.0])
def test_guidance_amplifies_independent_roundings_as_the_bound_says(scale: float) -> None:
    draw = np.random.default_rng(0)
    negative, positive = draw.standard_normal((2, 1_000_000))
    guided = negative + scale * (positive - negative)
    # A million draws: the RMS is known to 1 / sqrt(2e6), of which six are 0.5 %.
    assert np.sqrt(np.mean(guided**2)) == pytest.approx(guidance_amplification(scale), rel=5e-3)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_without_guidance_nothing_is_amplified(scale: float) -> None:
    assert guidance_amplification(scale) == 1


def test_an_error_just_beyond_the_amplified_bound_is_refused() -> None:
    reference = np.ones((4, 4), np.float32)
    bound = relative_rms_bound("bfloat16", 20) * guidance_amplification(4.5)
    inside, outside = (
        measure("transformer", "x0", reference * (1 + error), reference) for error in (0.99 * bound, 1.01 * bound)
    )
    check(inside, "bfloat16", 20, guidance_amplification(4.5))
    with pytest.raises(ParityError, match="x0: relative RMS"):
        check(outside, "bfloat16", 20, guidance_amplification(4.5))
