"""The solvers as float64 tables: every step is `next_latent = A latent + B x0 + C previous_x0`."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sana_runtime.errors import InputError
from sana_runtime.manifest import SchedulerEntry

Table = npt.NDArray[np.float64]
MAX_STEPS = 1000
_FIRST_ANGLE = 1.57080
_SECOND_ANGLE_OF_TWO = 1.3


@dataclass(frozen=True)
class StepTable:
    """`timesteps` [N] (model input), `sigmas` [N + 1] ending in 0, `coefficients` [N, 3] = (A, B, C).

    `sigmas` are noise levels 0..1, for trigflow angles in radians. `initial_scale` multiplies the noise.
    The engine's `previous_x0` is the last step's x0, or with `fresh_noise` Gaussian noise drawn per step.
    """

    timesteps: Table
    sigmas: Table
    coefficients: Table
    initial_scale: float = 1.0
    fresh_noise: bool = False

    def __len__(self) -> int:
        return len(self.timesteps)


def step_table(scheduler: SchedulerEntry, num_steps: int) -> StepTable:
    """The table of one solver. Raises `InputError` unless 1 <= num_steps <= 1000."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= MAX_STEPS:
        raise InputError(
            "the number of steps is out of range",
            received=num_steps,
            expected=f"a whole number from 1 to {MAX_STEPS}",
            action=f"pass --num-steps {scheduler.default_num_steps}, this model's default",
        )
    return _SOLVERS[scheduler.kind](scheduler, num_steps)


def _flow_dpm_solver(scheduler: SchedulerEntry, num_steps: int) -> StepTable:
    """Second-order multistep Flow-DPM-Solver (data prediction, midpoint), first order at both ends."""
    clean = np.linspace(1, 1 / scheduler.num_train_timesteps, num_steps + 1)
    sigmas = np.append(_shifted(1.0 - clean, scheduler.flow_shift)[:0:-1], 0.0)
    # The model was trained on whole timesteps and is fed truncated ones; the solver keeps the exact sigmas.
    timesteps = np.trunc(sigmas[:-1] * scheduler.num_train_timesteps)
    return StepTable(timesteps, sigmas, _multistep_coefficients(sigmas))


def _multistep_coefficients(sigmas: Table) -> Table:
    """(A, B, C) [N, 3] for sigmas [N + 1]. A + B + C = 1: a latent equal to its own x0 is a fixed point."""
    coefficients = _first_order(sigmas)
    lambdas = np.log((1 - sigmas[:-1]) / sigmas[:-1])
    for step in range(1, len(sigmas) - 2):
        previous_to_this = (lambdas[step] - lambdas[step - 1]) / (lambdas[step + 1] - lambdas[step])
        slope = coefficients[step, 1] / (2 * previous_to_this)
        coefficients[step, 1:] += slope, -slope
    return coefficients


def _first_order(sigmas: Table) -> Table:
    """(A, B, 0): the straight line towards x0, which is a DPM step of first order and an Euler step."""
    ratio = sigmas[1:] / sigmas[:-1]
    return np.stack([ratio, 1 - ratio, np.zeros_like(ratio)], axis=1)


def _flow_euler(scheduler: SchedulerEntry, num_steps: int) -> StepTable:
    """Flow-matching Euler. As in diffusers the last sigma is shifted twice: in the range and on the grid."""
    last = _shifted(np.array(1 / scheduler.num_train_timesteps), scheduler.flow_shift)
    sigmas = np.append(_shifted(np.linspace(1, last, num_steps), scheduler.flow_shift), 0.0)
    return StepTable(sigmas[:-1] * scheduler.num_train_timesteps, sigmas, _first_order(sigmas))


def _shifted(sigmas: Table, shift: float) -> Table:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _trigflow(scheduler: SchedulerEntry, num_steps: int) -> StepTable:
    """TrigFlow (Sprint). The last step divides by sigma_data, so its next_latent is the latent to decode."""
    angles = np.linspace(_FIRST_ANGLE, 0.0, num_steps + 1)
    if num_steps == 2:
        angles[1] = _SECOND_ANGLE_OF_TWO
    sine, cosine = np.sin(angles), np.cos(angles)
    coefficients = np.stack([np.zeros(num_steps), cosine[1:], scheduler.sigma_data * sine[1:]], axis=1)
    coefficients[-1] = 0.0, 1 / scheduler.sigma_data, 0.0
    timesteps = (sine / (cosine + sine))[:-1]
    return StepTable(timesteps, angles, coefficients, initial_scale=scheduler.sigma_data, fresh_noise=True)


_SOLVERS = {"flow_dpm_solver": _flow_dpm_solver, "flow_euler": _flow_euler, "trigflow": _trigflow}
