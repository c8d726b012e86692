"""SmoothQuant: moving outlier channels of an activation into the weight's columns, where each row has its own scale."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sana_calibration.fake_quant import fake_quantized_product
from sana_calibration.rules import ALPHAS, BaseDtype, LayerRule
from sana_calibration.scales import LayerScales
from sana_runtime.errors import InputError

_LARGEST_EXPONENT: dict[BaseDtype, int] = {"float16": 14, "bfloat16": 30, "float32": 30}


def smooth_factor(
    channel_amax: np.ndarray, weight: torch.Tensor, alpha: float, base_dtype: BaseDtype = "bfloat16"
) -> np.ndarray:
    """s [I] fp32 with s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), rounded to three significant bits: 1, 1.25, 1.5 or
    1.75 times a power of two.

    Such a number is the same in every dtype, and its product with a 16-bit weight is exact in fp32. Powers of two would
    make the division of the activation exact as well, but leave channels up to an octave apart that smoothing means to
    make equal: that costs INT8 about 2 dB (benchmarks/results/outliers.csv, "powers of two"). Bounded so that s and 1/s
    are normal numbers of the base dtype. 1 for a channel that is always zero.
    """
    mantissa, exponent = np.frexp(exact_smooth_factor(channel_amax, weight, alpha))
    rounded = np.ldexp(np.rint(mantissa * 8) / 8, exponent)
    largest = 2.0 ** _LARGEST_EXPONENT[base_dtype]
    return np.clip(rounded, 1 / largest, largest).astype(np.float32)


def exact_smooth_factor(channel_amax: np.ndarray, weight: torch.Tensor, alpha: float) -> np.ndarray:
    """The factor before rounding: weight [O, I], channel_amax [I] -> [I] fp32."""
    activation = channel_amax.astype(np.float64)
    column = weight.detach().float().abs().amax(dim=0).cpu().numpy().astype(np.float64)
    usable = (activation > 0) & (column > 0)
    safe = np.where(usable, activation, 1.0) ** alpha / np.where(usable, column, 1.0) ** (1 - alpha)
    return np.where(usable, safe, 1.0).astype(np.float32)


@dataclass(frozen=True)
class AlphaSearch:
    """`alpha` with the smallest error; None: no smoothing was best. `errors`: alpha -> relative RMS of the output."""

    alpha: float | None
    errors: dict[float | None, float]


def search_alpha(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    rule: LayerRule,
    alphas: Sequence[float] = ALPHAS,
    channel_amax: np.ndarray | None = None,
    base_dtype: BaseDtype = "bfloat16",
) -> AlphaSearch:
    """Try smoothing a linear layer on inputs [R, I]: weight [O, I], fake-quantised as the rule says.

    The error is the relative RMS of the layer's output [R, O] against the unquantised one. Without smoothing is
    tried too, and taken where nothing is better. `channel_amax` [I] is what the channels reach beyond these inputs
    (None: just them). Raises `InputError` for a rule that leaves activations alone.
    """
    if rule.activation_dtype is None:
        raise InputError(
            "a weight-only layer has nothing to smooth",
            received=f"rule '{rule.pattern}' without activation_dtype",
            expected="a rule with an activation_dtype",
            action="leave the layer out of the search",
        )
    weight, inputs = weight.detach().float(), inputs.detach().float()
    if channel_amax is None:
        channel_amax = inputs.abs().amax(dim=0).cpu().numpy()
    plain = replace(rule, smoothing_alpha=None, smoothing_candidates=(), amax="max")
    exact = inputs @ weight.T
    errors: dict[float | None, float] = {}
    for alpha in (None, *alphas):
        scales = layer_scales_of_channels(channel_amax, weight, alpha, base_dtype)
        candidate = fake_quantized_product(inputs, weight, plain, scales)
        errors[alpha] = float((candidate - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    return AlphaSearch(min(errors, key=lambda alpha: errors[alpha]), errors)


def layer_scales_of_channels(
    channel_amax: np.ndarray, weight: torch.Tensor, alpha: float | None, base_dtype: BaseDtype = "bfloat16"
) -> LayerScales:
    """The scales of a linear layer whose input channels reach `channel_amax` [I]."""
    if alpha is None:
        return LayerScales(float(channel_amax.max()))
    factor = smooth_factor(channel_amax, weight, alpha, base_dtype)
    # Rounding keeps the order of numbers: this is the amax of the divided activation itself.
    return LayerScales(float((channel_amax / factor).max()), factor)
