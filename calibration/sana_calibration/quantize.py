"""The arithmetic of quantisation: what ONNX QuantizeLinear and DequantizeLinear compute, and weights in 8 or 4 bits.

Symmetric throughout: no zero points. scale = amax / bound, quantised = saturate(round_half_even(x / scale)). INT4
weights take the scale that suits a group best (`_quantized_groups`).
"""

from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch

from sana_calibration.rules import LayerRule, PerGroup, PerTensor, StoredDtype
from sana_runtime.errors import InputError

# dtype -> (value that amax maps to, smallest and largest value it can hold)
BOUNDS: dict[str, tuple[float, float, float]] = {
    "float8e4m3fn": (448.0, -448.0, 448.0),
    "int8": (127.0, -128.0, 127.0),
    "int4": (7.0, -8.0, 7.0),
}
# Of amax / bound. With 15 steps a group's largest weight is better cut off than all others rounded that coarsely.
_INT4_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class QuantizedWeight:
    """`values` in the weight's shape: float8_e4m3fn, or int8 (also for int4: -8..7, one per byte). `scale` fp32 in the
    granularity's shape: weight ~ values x scale, a group's scale repeated over its inputs.
    """

    values: torch.Tensor
    scale: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """The fp32 weight that the quantised one stands for, in the weight's shape."""
        return self.values.float() * _spread(self.scale, self.values)


def quantize_weight(
    weight: torch.Tensor,
    rule: LayerRule,
    smooth_factor: np.ndarray | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:
    """Quantise a weight [O, I] or [O, I, kh, kw] as the rule says.

    `smooth_factor` [I] multiplies the columns first. The scale is rounded to `scale_dtype` before it is used, so that a
    graph whose scales have that dtype dequantises with exactly the scale that was quantised with (INT4 codes are chosen
    for the scale before its last correction).
    """
    wide = weight.detach().float()
    if smooth_factor is not None:
        factor = torch.from_numpy(np.asarray(smooth_factor, np.float32)).to(wide.device)
        wide = wide * factor.view(1, -1, *[1] * (wide.ndim - 2))
    scale = _weight_scale(wide, rule, scale_dtype)
    if rule.weight_dtype == "int4":
        return _quantized_groups(wide, scale, scale_dtype)
    return QuantizedWeight(quantize(wide, _spread(scale, wide), rule.weight_dtype), scale)


def calibrated_weight(codes: np.ndarray, scale: np.ndarray) -> QuantizedWeight:
    """A weight whose rounding calibration chose: int8 codes [O, I], -8..7, and fp32 scales [O, groups]."""
    return QuantizedWeight(torch.from_numpy(codes), torch.from_numpy(scale))


def activation_scale(amax: float, dtype: StoredDtype) -> float:
    """The scale of an activation whose largest absolute value is `amax`; 1 if nothing but zeros was seen."""
    if not isfinite(amax) or amax < 0:
        raise InputError("an activation's amax is not usable", received=amax, expected="a finite number from 0 on")
    scale = float(np.float32(amax) / np.float32(BOUNDS[dtype][0]))
    # The smallest normal fp32 number keeps a scale strictly positive, as ONNX and TensorRT want it.
    return max(scale, float(np.finfo(np.float32).tiny)) if amax else 1.0


def fake_quantize(x: torch.Tensor, scale: float | torch.Tensor, dtype: StoredDtype) -> torch.Tensor:
    """QuantizeLinear, then DequantizeLinear, in x's shape and dtype: bit for bit ONNX Runtime's result in fp32.

    For a 16-bit x the scale is rounded to x's dtype, as in the graph, and the arithmetic between is fp32.
    """
    step = torch.as_tensor(scale, dtype=torch.float32, device=x.device).to(x.dtype).float()
    return (quantize(x.float(), step, dtype).float() * step).to(x.dtype)


def quantize(x: torch.Tensor, scale: torch.Tensor, dtype: StoredDtype) -> torch.Tensor:
    """QuantizeLinear of fp32 x with a scale that broadcasts: float8_e4m3fn, or int8 values (int4: -8..7)."""
    _, low, high = BOUNDS[dtype]
    # The cast to float8 rounds half to even but turns what is too large into NaN: saturate before it.
    if dtype == "float8e4m3fn":
        return (x / scale).clamp_(low, high).to(torch.float8_e4m3fn)
    return (x / scale).round_().clamp_(low, high).to(torch.int8)


def _weight_scale(weight: torch.Tensor, rule: LayerRule, scale_dtype: torch.dtype) -> torch.Tensor:
    """amax / bound in the granularity's shape."""
    amax = _weight_amax(weight, rule)
    if not torch.isfinite(amax).all():
        raise InputError(
            f"a weight under the rule '{rule.pattern}' is not finite",
            received="NaN or infinity",
            expected="finite weights",
            action="use an undamaged checkpoint",
        )
    scale = _rounded_scale(amax / BOUNDS[rule.weight_dtype][0], scale_dtype)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def _rounded_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scale.clamp(min=torch.finfo(dtype).tiny).to(dtype).float()


def group_scale(weight: torch.Tensor, scale_dtype: torch.dtype) -> torch.Tensor:
    """The scale [O, 1] that suits one group of INT4 weights, fp32 [O, size], best."""
    amax = weight.abs().amax(dim=1, keepdim=True)
    scale = _rounded_scale(amax / BOUNDS["int4"][0], scale_dtype)
    return _quantized_groups(weight, torch.where(amax == 0, torch.ones_like(scale), scale), scale_dtype).scale


def _quantized_groups(weight: torch.Tensor, whole: torch.Tensor, scale_dtype: torch.dtype) -> QuantizedWeight:
    """[O, I] in int4 by the share of `whole`, amax / bound [O, groups], with the least squared error in each group."""
    # [O, groups, size]; sums in fp64, so that the order in which a tensor lies in memory tells in no result.
    groups = weight.contiguous().unflatten(1, (whole.shape[1], -1))
    values = torch.zeros_like(groups, dtype=torch.int8)
    scale, least = whole, torch.full_like(whole, torch.inf, dtype=torch.float64)
    for share in _INT4_SHARES:
        step = whole * share
        tried = quantize(groups, step[..., None], "int4")
        error = (tried * step[..., None] - groups).square().sum(2, dtype=torch.float64)
        better = error < least
        values = torch.where(better[..., None], tried, values)
        scale, least = torch.where(better, step, scale), torch.where(better, error, least)
    # What is cut off makes weights smaller on the whole, and a layer's results with them. With this scale they keep
    # their size, at next to no cost in error.
    overlap = (values * groups).sum(2, dtype=torch.float64)
    gained = torch.where(overlap > 0, groups.square().sum(2, dtype=torch.float64) / overlap, scale)
    return QuantizedWeight(values.flatten(1), _rounded_scale(gained.float(), scale_dtype))


def _weight_amax(weight: torch.Tensor, rule: LayerRule) -> torch.Tensor:
    if isinstance(rule.granularity, PerTensor):
        return weight.abs().amax()
    if isinstance(rule.granularity, PerGroup):
        return weight.unflatten(1, (-1, rule.granularity.size)).abs().amax(dim=2)
    return weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)


def _spread(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A scale that broadcasts against the weight: a group's scale repeated over its inputs."""
    if scale.ndim == 2 and 1 < scale.shape[1] != like.shape[1]:
        return scale.repeat_interleave(like.shape[1] // scale.shape[1], dim=1)
    return scale
