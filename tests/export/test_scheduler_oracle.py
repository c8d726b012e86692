"""The runtime's solver tables against the diffusers schedulers they replace."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
from diffusers.schedulers import (
    scheduling_dpmsolver_multistep,
    scheduling_flow_match_euler_discrete,
    scheduling_scm,
)

from sana_runtime.manifest import SchedulerEntry
from sana_runtime.scheduler import StepTable, step_table

SHAPE = (1, 4, 3, 5)
FP32_EPS = float(np.finfo(np.float32).eps)


class _AtFloat64:
    """A module (torch, numpy) whose `float32` is float64: runs a diffusers scheduler in double precision."""

    def __init__(self, module: object, float64: object) -> None:
        self._module = module
        self.float32 = float64

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


@pytest.fixture
def float64_schedulers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (
        scheduling_dpmsolver_multistep,
        scheduling_flow_match_euler_discrete,
        scheduling_scm,
    ):
        monkeypatch.setattr(module, "torch", _AtFloat64(torch, torch.float64))
        monkeypatch.setattr(module, "np", _AtFloat64(np, np.float64), raising=False)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def entry(kind: str, shift: float = 3.0) -> SchedulerEntry:
    return SchedulerEntry(kind, shift, 1000, 20, 4.5)  # type: ignore[arg-type]


def velocity_field(latent: np.ndarray, timestep: float) -> np.ndarray:
    """A smooth non-linear velocity of the size of the latent."""
    return np.sin(2 * latent) + 0.5 * np.roll(latent, 1, axis=1) + timestep / 1000


def initial_noise(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE)


def flow_with_table(table: StepTable, latent: np.ndarray) -> list[np.ndarray]:
    """The engine's solver step in NumPy: all latents after each step, float64."""
    previous_x0 = np.zeros_like(latent)
    latents = []
    for step, (a, b, c) in enumerate(table.coefficients):
        x0 = latent - table.sigmas[step] * velocity_field(latent, table.timesteps[step])
        latent, previous_x0 = a * latent + b * x0 + c * previous_x0, x0
        latents.append(latent)
    return latents


def flow_with_diffusers(scheduler: object, latent: np.ndarray, dtype: torch.dtype) -> list[np.ndarray]:
    scheduler.set_begin_index(0)
    sample = torch.from_numpy(latent).to(dtype)
    latents = []
    for timestep in scheduler.timesteps:
        velocity = torch.from_numpy(velocity_field(sample.double().numpy(), float(timestep))).to(dtype)
        sample = scheduler.step(velocity, timestep, sample, return_dict=False)[0]
        latents.append(sample.double().numpy())
    return latents


def dpm_solver(num_steps: int, shift: float) -> DPMSolverMultistepScheduler:
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def flow_euler(num_steps: int, shift: float) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0, 4.5, 6.0])
@pytest.mark.usefixtures("float64_schedulers")
def test_flow_dpm_solver_is_diffusers_in_float64(shift: float) -> None:
    for num_steps in range(1, 51):
        oracle = dpm_solver(num_steps, shift)
        assert oracle.sigmas.dtype == torch.float64
        table = step_table(entry("flow_dpm_solver", shift), num_steps)
        np.testing.assert_array_equal(table.timesteps, oracle.timesteps.numpy())
        np.testing.assert_allclose(table.sigmas, oracle.sigmas.numpy(), rtol=1e-15)
        compare_trajectories(table, oracle, atol=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.usefixtures("float64_schedulers")
def test_flow_euler_is_diffusers_in_float64(shift: float) -> None:
    for num_steps in range(1, 51):
        oracle = flow_euler(num_steps, shift)
        table = step_table(entry("flow_euler", shift), num_steps)
        np.testing.assert_allclose(table.timesteps, oracle.timesteps.numpy(), rtol=1e-12)
        compare_trajectories(table, oracle, atol=1e-9)


def compare_trajectories(table: StepTable, oracle: object, atol: float) -> None:
    ours = flow_with_table(table, initial_noise())
    theirs = flow_with_diffusers(oracle, initial_noise(), torch.float64)
    assert len(ours) == len(theirs) == len(table)
    for step, (candidate, reference) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(candidate, reference, rtol=0, atol=atol, err_msg=f"step {step}")


@pytest.mark.parametrize("num_steps", [1, 2, 3, 14, 15, 20, 50])
@pytest.mark.parametrize(("kind", "make"), [("flow_dpm_solver", dpm_solver), ("flow_euler", flow_euler)])
def test_one_fp32_step_of_diffusers_is_within_rounding(
    kind: str, make: Callable[[int, float], object], num_steps: int
) -> None:
    """Each fp32 step from the same state.

    Bound: 16 fp32 roundings of terms as large as the largest one. diffusers also rounds sigma to fp32 before
    log((1-s)/s), which costs eps/(1-s) in lambda (up to 2998 eps at the first step) and enters through C.
    """
    table = step_table(entry(kind), num_steps)
    oracle = make(num_steps, 3.0)
    # Flow-Euler timesteps are an fp32 sigma times 1000: two roundings. The others are whole numbers.
    timestep_rtol = 0.0 if kind == "flow_dpm_solver" else 2 * FP32_EPS
    np.testing.assert_allclose(table.timesteps, oracle.timesteps.numpy(), rtol=timestep_rtol)
    np.testing.assert_allclose(table.sigmas, oracle.sigmas.numpy(), rtol=FP32_EPS)
    latents = flow_with_diffusers(oracle, initial_noise(), torch.float32)
    state = initial_noise().astype(np.float32).astype(np.float64)
    previous_x0 = np.zeros_like(state)
    for step, (a, b, c) in enumerate(table.coefficients):
        sigma = table.sigmas[step]
        x0 = state - sigma * velocity_field(state, float(oracle.timesteps[step]))
        expected = a * state + b * x0 + c * previous_x0
        terms = max(np.abs(state).max(), np.abs(x0).max(), np.abs(previous_x0).max())
        lambda_error = abs(c) / max(1e-3, 1 - sigma) * FP32_EPS if kind == "flow_dpm_solver" else 0.0
        bound = (16 * FP32_EPS + 4 * lambda_error) * terms
        np.testing.assert_allclose(latents[step], expected, rtol=0, atol=bound, err_msg=f"step {step}")
        state, previous_x0 = latents[step], x0


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
@pytest.mark.usefixtures("float64_schedulers")
def test_trigflow_is_diffusers_in_float64(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCMScheduler inside the arithmetic of SanaSprintPipeline; both get the same noise per step."""
    table = step_table(entry("trigflow"), num_steps)
    noises = np.random.default_rng(5).standard_normal((num_steps, *SHAPE))
    drawn = iter(torch.from_numpy(noises))
    monkeypatch.setattr(scheduling_scm, "randn_tensor", lambda *args, **kwargs: next(drawn))
    np.testing.assert_allclose(
        trigflow_with_table(table, noises), trigflow_with_diffusers(num_steps), rtol=0, atol=1e-12
    )
    assert next(drawn, None) is None


def trigflow_with_table(table: StepTable, noises: np.ndarray) -> np.ndarray:
    """The engine's Sprint step in NumPy, everything from `timestep`. Returns the latent to decode."""
    latent = initial_noise() * table.initial_scale
    for t, (a, b, c), noise in zip(table.timesteps, table.coefficients, noises, strict=True):
        norm = np.hypot(t, 1 - t)
        model_input = latent / 0.5 * norm
        velocity = velocity_field(model_input, t)
        direction = 0.5 * ((1 - 2 * t) * model_input + (1 - 2 * t + 2 * t * t) * velocity) / norm
        x0 = (1 - t) / norm * latent - t / norm * direction
        latent = a * latent + b * x0 + c * noise
    return latent


def trigflow_with_diffusers(num_steps: int) -> np.ndarray:
    scheduler = SCMScheduler(sigma_data=0.5)
    scheduler.set_timesteps(num_steps, intermediate_timesteps=1.3 if num_steps == 2 else None)
    scheduler.set_begin_index(0)
    latents = torch.from_numpy(initial_noise()) * 0.5
    denoised = latents
    for timestep in scheduler.timesteps[:-1]:
        scm = torch.sin(timestep) / (torch.cos(timestep) + torch.sin(timestep))
        model_input = latents / 0.5 * torch.sqrt(scm**2 + (1 - scm) ** 2)
        velocity = torch.from_numpy(velocity_field(model_input.numpy(), float(scm)))
        output = ((1 - 2 * scm) * model_input + (1 - 2 * scm + 2 * scm**2) * velocity) / torch.sqrt(
            scm**2 + (1 - scm) ** 2
        )
        latents, denoised = scheduler.step(output * 0.5, timestep, latents, return_dict=False)
    return (denoised / 0.5).numpy()
