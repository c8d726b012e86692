"""Where the time of a diffusion step goes: the most expensive kernels, and the whole step as it is trained."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from scripts.train_nano.autoencoder import Latents
from scripts.train_nano.data import CAPTIONS
from scripts.train_nano.run import Run
from scripts.train_nano.stage import Schedule, Stage

PROFILED_SCENES = 2000
_STEPS = 20
_KERNELS = 25


def profile_diffusion(run: Run) -> None:
    """Log milliseconds per step at both sides, on noise instead of latents. Nothing is trained or written."""
    run.adopt()
    device, size = run.session.device, run.plan.size
    grids = [side // 32 for side in size.sides]
    small, large = (torch.randn(PROFILED_SCENES, 32, grid, grid, device=device).bfloat16() for grid in grids)
    # In place of what the stages before would leave.
    run.latents = Latents(small, large, 1.0)  # type: ignore[misc]
    run.store.wait_for(PROFILED_SCENES)
    shares = (torch.arange(CAPTIONS, device=device) + 1).expand(PROFILED_SCENES, -1) / CAPTIONS
    for phase, name in enumerate(("diffusion-small", "diffusion-large")):
        with tempfile.TemporaryDirectory() as folder:
            session = replace(run.session, work=Path(folder), cuda_graph=False)
            count = size.batches.diffusion[phase]
            modules = run.diffusion_modules()
            step = run.diffusion_step(phase, shares)
            schedule = Schedule(60, 1e-3, muon=run.diffusion_schedule(name, last=phase == 1).muon)
            begun = time.monotonic()
            # As it is trained, then launch by launch: not all profilers see into a CUDA graph.
            graphed = Stage(name, replace(session, cuda_graph=run.session.cuda_graph), schedule, modules, count)
            replay = graphed.prepared(step)
            run.session.log(f"{name}: compiled in {time.monotonic() - begun:.1f} s")
            milliseconds = _milliseconds(replay)
            run.session.log(
                f"{name}: {milliseconds:.2f} ms a step, {1000 * count / milliseconds:.0f} pictures/s, {count} at once"
            )
            _log_kernels(run, name, Stage(name, session, schedule, modules, count).prepared(step))


def _log_kernels(run: Run, name: str, once: Callable[[], None]) -> None:
    once()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(_STEPS):
            once()
        _synchronise()
    # Operators have the time of their kernels too: only kernels are on the device.
    kernels = [event for event in found.key_averages() if event.device_type == DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in kernels) / 1000 / _STEPS
    run.session.log(f"{name}: {total:.2f} ms of kernels per step")
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:_KERNELS]:
        per_step = event.self_device_time_total / 1000 / _STEPS
        run.session.log(f"  {per_step:8.3f} ms  {event.count / _STEPS:6.1f} x  {event.key[:110]}")


def _milliseconds(once: Callable[[], None]) -> float:
    once()
    _synchronise()
    begun = time.monotonic()
    for _ in range(_STEPS):
        once()
    _synchronise()
    return 1000 * (time.monotonic() - begun) / _STEPS


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
