"""A stage learns, can be interrupted, and goes on as if it had not been."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from scripts.train_nano.export import pack_checkpoints, unpack_checkpoints
from scripts.train_nano.stage import OutOfTime, Schedule, Session, Stage


def session(work: Path, seconds: float | None = None) -> Session:
    deadline = None if seconds is None else time.monotonic() + seconds
    return Session(work, torch.device("cpu"), deadline=deadline, log=lambda text: None)


def problem(work: Path, seconds: float, budget: float | None = None) -> tuple[Stage, nn.Linear, object]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    truth = torch.randn(4, 3)
    stage = Stage("line", session(work, budget), Schedule(seconds, 3e-2, cooldown=0.5), {"model": model}, 16)

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = torch.randn(16, 4)
        return (model(x) - x @ truth).square().mean(), {"x": x.mean()}

    return stage, model, step


def test_rate_rises_stays_and_falls_with_the_time_used() -> None:
    schedule = Schedule(100, 1.0, warmup=0.1, cooldown=0.5)
    rates = [schedule.learning_rate(seconds) for seconds in (0, 5, 10, 30, 50, 75, 100, 200)]
    assert rates == pytest.approx([0.01, 0.5, 1, 1, 1, 0.5, 0.01, 0.01])


def test_stage_ends_in_time_with_averaged_weights(tmp_path: Path) -> None:
    stage, model, step = problem(tmp_path, 1.5)
    stage.run(step)
    assert stage.finished
    assert 1.5 <= stage.elapsed < 4
    assert stage.records[-1]["loss"] < 1e-2 < stage.records[0]["loss"] or len(stage.records) == 1
    again, restored, _ = problem(tmp_path, 1.5)
    assert again.finished
    assert again.steps == stage.steps
    again.use_average()
    torch.testing.assert_close(restored.weight, model.weight, rtol=0, atol=0)
    again.run(lambda: pytest.fail("a finished stage does not train"))


def test_interrupted_stage_goes_on(tmp_path: Path) -> None:
    stage, model, step = problem(tmp_path, 60, budget=0.4)
    with pytest.raises(OutOfTime):
        stage.run(step)
    assert stage.steps > 3
    again, restored, _ = problem(tmp_path, 60)
    assert (again.elapsed, again.steps, again.finished) == (stage.elapsed, stage.steps, False)
    torch.testing.assert_close(restored.weight, model.weight, rtol=0, atol=0)
    for mine, theirs in zip(again._moments().values(), stage._moments().values(), strict=True):
        assert set(mine) == set(theirs) == {"step", "exp_avg", "exp_avg_sq"}
        for key in mine:
            torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=0)


def test_resumed_steps_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """Two steps, saved and restored, then a third: bit for bit three steps in one go."""
    weights = []
    for folder, interrupted in ((tmp_path / "one", False), (tmp_path / "two", True)):
        stage, model, step = problem(folder, 60)
        torch.manual_seed(5)
        for number in range(3):
            if interrupted and number == 2:
                stage.save()
                state = torch.get_rng_state()
                stage, model, step = problem(folder, 60)
                torch.set_rng_state(state)
            stage.elapsed = 30.0
            stage._set_numbers()
            stage.prepared(step)()
            stage.steps += 1
        weights.append((model.weight.detach().clone(), stage._ema[0].clone()))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_step_with_infinite_gradients_is_left_out(tmp_path: Path) -> None:
    stage, model, _ = problem(tmp_path, 60)
    stage.elapsed = 30.0

    def step(factor: float) -> None:
        stage._set_numbers()
        stage.prepared(lambda: ((model(torch.ones(1, 4)) * factor).sum(), {}))()
        stage.steps += 1

    step(1.0)
    before = model.weight.detach().clone()
    step(float("inf"))
    torch.testing.assert_close(model.weight, before, rtol=0, atol=0)
    assert stage._sums["skipped"] == 1
    step(1.0)
    assert not torch.equal(model.weight, before)
    assert model.weight.isfinite().all()
    assert stage._ema[0].isfinite().all()


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """Adam forgets the size of gradients, but not in a step after smaller ones."""
    moments = []
    for factor in (1e3, 1e6):
        stage, model, _ = problem(tmp_path / str(factor), 60)
        stage._set_numbers()
        stage.prepared(lambda model=model, factor=factor: ((model(torch.ones(1, 4)) * factor).sum(), {}))()
        moments.append(stage._moments()["model.weight"]["exp_avg"])
    torch.testing.assert_close(moments[0], moments[1])


def test_checkpoints_travel_in_parts(tmp_path: Path) -> None:
    stage, model, step = problem(tmp_path / "a", 60, budget=0.3)
    with pytest.raises(OutOfTime):
        stage.run(step)
    paths = pack_checkpoints(tmp_path / "a", ["line", "absent"], tmp_path / "parts")
    assert paths
    assert all(path.stat().st_size <= 15 << 20 for path in paths)
    assert unpack_checkpoints(tmp_path / "parts", tmp_path / "b") == ["line"]
    again, restored, step = problem(tmp_path / "b", 60)
    assert (again.elapsed, again.steps, again.finished) == (stage.elapsed, stage.steps, False)
    torch.testing.assert_close(again._ema, stage._ema, rtol=0, atol=0)
    # The difference to the average was rounded to bf16.
    torch.testing.assert_close(restored.weight, model.weight, rtol=2**-8, atol=1e-3)
    second = stage._moments()["model.weight"]["exp_avg_sq"]
    torch.testing.assert_close(again._moments()["model.weight"]["exp_avg_sq"], second, rtol=2**-8, atol=0)
    again.schedule = Schedule(again.elapsed + 0.3, 3e-2)
    again.run(step)
    assert again.finished
