"""Solver tables against published numbers and identities."""

import numpy as np
import pytest

from sana_runtime.errors import InputError
from sana_runtime.manifest import SchedulerEntry
from sana_runtime.scheduler import step_table


def entry(kind: str, shift: float = 3.0) -> SchedulerEntry:
    return SchedulerEntry(kind, shift, 1000, 20, 4.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_steps", "shift", "timesteps"),
    [
        (4, 3.0, [999, 899, 749, 499]),
        (8, 3.0, [999, 954, 899, 832, 749, 642, 499, 299]),
        (14, 3.0, [999, 974, 947, 916, 881, 843, 799, 749, 691, 624, 545, 449, 333, 187]),
        (
            20,
            6.0,
            [
                999,
                991,
                981,
                971,
                959,
                947,
                933,
                917,
                899,
                879,
                856,
                830,
                799,
                763,
                719,
                666,
                599,
                513,
                399,
                239,
            ],
        ),
    ],
    ids=["4/3", "8/3", "14/3", "20/6"],
)
def test_flow_dpm_timesteps_are_the_published_ones(num_steps: int, shift: float, timesteps: list[int]) -> None:
    table = step_table(entry("flow_dpm_solver", shift), num_steps)
    assert table.timesteps.tolist() == timesteps


def test_flow_dpm_coefficients_are_the_published_ones() -> None:
    table = step_table(entry("flow_dpm_solver"), 20)
    published = {
        0: (0.98274728, 0.01725272, 0),
        1: (0.98119093, 0.02055044, -0.00174138),
        10: (0.94734347, 0.07899007, -0.02633354),
        18: (0.54541323, 0.82172678, -0.36714000),
        19: (0, 1, 0),
    }
    # The published numbers come from an fp32 solver, whose 1 - sigma loses up to eps at the first step.
    for step, expected in published.items():
        np.testing.assert_allclose(table.coefficients[step], expected, rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(table.sigmas[[0, 1, 19, 20]], [0.99966645, 0.98241949, 0.13623966, 0], atol=1e-8)


def test_flow_euler_timesteps_are_the_published_ones() -> None:
    table = step_table(entry("flow_euler"), 20)
    np.testing.assert_allclose(table.timesteps[[0, 1, 18, 19]], [1000, 981.87, 149.79, 8.93], atol=5e-3)


@pytest.mark.parametrize("kind", ["flow_dpm_solver", "flow_euler"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_a_latent_equal_to_its_x0_is_a_fixed_point(kind: str, shift: float) -> None:
    for num_steps in (*range(1, 51), 1000):
        table = step_table(entry(kind, shift), num_steps)
        assert table.coefficients.shape == (num_steps, 3)
        np.testing.assert_allclose(table.coefficients.sum(axis=1), 1, atol=1e-12)
        # The last step returns x0 itself.
        assert table.coefficients[-1].tolist() == [0, 1, 0]
        assert table.sigmas[-1] == 0


def test_trigflow_angles() -> None:
    assert step_table(entry("trigflow"), 1).sigmas.tolist() == [1.5708, 0]
    assert step_table(entry("trigflow"), 2).sigmas.tolist() == [1.5708, 1.3, 0]
    four = step_table(entry("trigflow"), 4)
    np.testing.assert_allclose(four.sigmas, [1.5708, 1.1781, 0.7854, 0.3927, 0])
    np.testing.assert_allclose(step_table(entry("trigflow"), 2).timesteps, [1.0000037, 0.782708], atol=1e-6)


def test_trigflow_ends_in_the_latent_to_decode() -> None:
    table = step_table(SchedulerEntry("trigflow", 1.0, 1000, 2, 4.5, sigma_data=0.25), 2)
    np.testing.assert_allclose(table.coefficients[0], [0, np.cos(1.3), 0.25 * np.sin(1.3)])
    assert table.coefficients[-1].tolist() == [0, 4, 0]
    assert (table.initial_scale, table.fresh_noise) == (0.25, True)


@pytest.mark.parametrize("num_steps", [0, -1, 1001, 2.0, True, None])
@pytest.mark.parametrize("kind", ["flow_dpm_solver", "flow_euler", "trigflow"])
def test_wrong_step_counts_are_refused(kind: str, num_steps: object) -> None:
    with pytest.raises(InputError, match="a whole number from 1 to 1000"):
        step_table(entry(kind), num_steps)  # type: ignore[arg-type]
