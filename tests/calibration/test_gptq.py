"""GPTQ rounds a weight for the inputs it meets: as a textbook version does, and better than to the nearest numbers."""

import numpy as np
import pytest
import torch

from sana_calibration.gptq import DAMPING, gptq
from sana_calibration.quantize import group_scale, quantize_weight
from sana_calibration.rules import LayerRule, PerChannel, PerGroup
from sana_runtime.errors import InputError

RULE = LayerRule("transformer", "x", "int4", None, PerGroup(16), rounding="gptq")


def inputs_of(rows: int, width: int, seed: int) -> torch.Tensor:
    """Rows that a few directions explain for the most part, as those of a network are."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4, width, generator=generator)
    noise = torch.randn(rows, width, generator=generator)
    return torch.randn(rows, 4, generator=generator) @ directions + 0.3 * noise


def cost(error: torch.Tensor, gram: torch.Tensor) -> float:
    """What an error [O, I] of the weight does to the layer's results, summed over the inputs."""
    return float(((error.double() @ gram.double()) * error.double()).sum())


def textbook(weight: torch.Tensor, gram: torch.Tensor, size: int) -> torch.Tensor:
    """Optimal Brain Quantization in a fixed order: after every weight the inverse of what is left, made anew."""
    left = weight.double().clone()
    damped = gram.double() + DAMPING * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    out = torch.zeros_like(left)
    for i in range(left.shape[1]):
        if i % size == 0:
            scale = group_scale(left[:, i : i + size].float(), torch.float32)[:, 0].double()
        out[:, i] = (left[:, i] / scale).round().clamp(-8, 7) * scale
        inverse = torch.linalg.inv(damped[i:, i:])
        left[:, i:] -= ((left[:, i] - out[:, i]) / inverse[0, 0])[:, None] * inverse[0]
    return out


def test_rounding_is_the_textbooks() -> None:
    weight, x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)), inputs_of(200, 48, 2)
    gram = x.T @ x
    found = gptq(weight, gram, RULE, torch.float32)
    assert found.values.dtype == torch.int8
    assert int(found.values.abs().max()) <= 8
    assert found.scale.shape == (7, 3)
    torch.testing.assert_close(found.dequantized().double(), textbook(weight, gram, 16), rtol=1e-6, atol=1e-9)


def test_results_are_closer_than_with_the_nearest_numbers() -> None:
    weight, x = torch.randn(32, 128, generator=torch.Generator().manual_seed(3)), inputs_of(500, 128, 4)
    unseen = inputs_of(800, 128, 4)[500:]  # of the same directions
    for rows, gain in ((x, 4), (unseen, 2)):
        gram = rows.T @ rows
        found = gptq(weight, x.T @ x, RULE, torch.float32)
        nearest = quantize_weight(weight, RULE)
        assert cost(found.dequantized() - weight, gram) < cost(nearest.dequantized() - weight, gram) / gain


def test_independent_inputs_leave_the_nearest_numbers() -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(5))
    found, nearest = gptq(weight, torch.eye(32) * 3, RULE, torch.float32), quantize_weight(weight, RULE)
    # The same scale; nearest keeps the codes of the one before its last correction.
    torch.testing.assert_close(found.scale, nearest.scale)
    assert torch.equal(
        found.values, (weight / found.scale.repeat_interleave(16, 1)).round().clamp(-8, 7).to(torch.int8)
    )


def test_scales_have_the_dtype_of_the_graph() -> None:
    weight, x = torch.randn(4, 32, generator=torch.Generator().manual_seed(6)), inputs_of(100, 32, 7)
    scale = gptq(weight, x.T @ x, RULE, torch.bfloat16).scale
    assert torch.equal(scale, scale.to(torch.bfloat16).float())


def test_inputs_that_never_occur_are_no_obstacle() -> None:
    weight, x = torch.randn(4, 32, generator=torch.Generator().manual_seed(8)), inputs_of(100, 32, 9)
    x[:, 5:20] = 0
    weight[:, 3] = 0
    found = gptq(weight, x.T @ x, RULE, torch.float32).dequantized()
    assert found.isfinite().all()
    assert (found - weight).abs().max() < 1


@pytest.mark.parametrize("gram", [torch.zeros(16, 16), torch.full((16, 16), np.nan)], ids=["zero", "not a number"])
def test_a_gram_matrix_that_is_none_is_refused(gram: torch.Tensor) -> None:
    with pytest.raises(InputError, match="cannot be rounded for"):
        gptq(torch.randn(2, 16), gram, RULE, torch.float32)


def test_rules_say_what_can_be_rounded_so() -> None:
    assert RULE.calibrated
    with pytest.raises(InputError, match="weight_dtype int4 with gptq"):
        LayerRule("transformer", "x", "int8", None, PerChannel(), rounding="gptq")
    with pytest.raises(InputError, match="component transformer with gptq"):
        LayerRule("text_encoder", "x", "int4", None, PerGroup(16), rounding="gptq")
    with pytest.raises(InputError, match="an even size"):
        LayerRule("transformer", "x", "int4", None, PerGroup(17), rounding="gptq")
    with pytest.raises(InputError, match="nearest or gptq"):
        LayerRule("transformer", "x", "int4", None, PerGroup(16), rounding="up")  # type: ignore[arg-type]
