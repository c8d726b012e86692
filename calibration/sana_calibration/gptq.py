"""GPTQ: weights rounded one input after the other, and what each rounding costs made up for by the inputs that follow.

A layer computes w x. With the Gram matrix G = sum of x x^T over the inputs that calibration saw, an error d of a row
costs d G d^T. When one weight is rounded, the best that the weights not yet rounded can do is to move by the row of the
inverse of G, restricted to them, that belongs to it. All those rows are the rows of one Cholesky factor of the inverse.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023.
"""

import torch

from sana_calibration.quantize import QuantizedWeight, group_scale
from sana_calibration.rules import LayerRule, PerGroup
from sana_runtime.errors import InputError

# Of the mean of G's diagonal, added to it: inputs that hardly occur, or that others determine, move no weight far.
DAMPING = 0.01


def gptq(weight: torch.Tensor, gram: torch.Tensor, rule: LayerRule, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Round a weight [O, I] to INT4 in groups for inputs with the Gram matrix `gram` [I, I], both fp32.

    A group's scale is chosen, as by `quantize_weight`, when its turn comes, for the weights as they are by then. All
    arithmetic is fp64. Raises `InputError` for a Gram matrix that is not one.
    """
    assert isinstance(rule.granularity, PerGroup)
    size, (outputs, inputs) = rule.granularity.size, weight.shape
    factor = _inverse_factor(gram, rule)
    left = weight.detach().double().clone()
    values = torch.zeros(outputs, inputs, dtype=torch.int8, device=weight.device)
    scales = []
    for start in range(0, inputs, size):
        group = slice(start, start + size)
        scale = group_scale(left[:, group].float(), scale_dtype)
        scales.append(scale)
        step, errors = scale[:, 0].double(), torch.zeros(outputs, size, dtype=torch.float64, device=weight.device)
        for i in range(start, start + size):
            rounded = (left[:, i] / step).round().clamp(-8, 7)
            values[:, i] = rounded.to(torch.int8)
            errors[:, i - start] = (left[:, i] - rounded * step) / factor[i, i]
            rest = slice(i + 1, start + size)
            left[:, rest] -= errors[:, i - start, None] * factor[i, rest]
        left[:, start + size :] -= errors @ factor[group, start + size :]
    return QuantizedWeight(values, torch.cat(scales, dim=1))


def _inverse_factor(gram: torch.Tensor, rule: LayerRule) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped Gram matrix, fp64 [I, I]."""
    gram = gram.double()
    mean = gram.diagonal().mean()
    if not (torch.isfinite(gram).all() and mean > 0):
        raise InputError(
            f"the inputs of layers under the rule '{rule.pattern}' cannot be rounded for",
            received="a Gram matrix that is not finite, or zero",
            expected="finite inputs that are not all zero",
            action="check the checkpoint and the calibration prompts, or use rounding: nearest",
        )
    damped = gram + DAMPING * mean * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
