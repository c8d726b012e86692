"""One stage of the training: a step repeated until its minutes are used up, whatever the speed of the machine.

The learning rate follows the share of the time that is used, so that every stage ends cooled down. Its clock counts
training only, not compilation, and goes on where a checkpoint left it.
"""

import json
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana_runtime.files import whole_file
from scripts.train_nano.muon import Muon, is_hidden_matrix, packed_parts

_IN_FLIGHT = 16
_LOG_SECONDS = 5.0
_WARMUP_STEPS = 3
_MAX_GRADIENT = 1.0
# Power-function average: the weight of older steps falls with (step / now)^_EMA_POWER, whatever the number of steps.
_EMA_POWER = 16.0

Metrics = dict[str, torch.Tensor]


class OutOfTime(Exception):
    """This session's minutes are used up; everything is saved."""


@dataclass
class Session:
    """What one command may use and where it writes. `deadline`: of `time.monotonic`, None without one."""

    work: Path
    device: torch.device
    deadline: float | None = None
    checkpoint_seconds: float = 120.0
    compiled: bool = False
    cuda_graph: bool = False
    log: Callable[[str], None] = print

    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def autocast(self) -> Any:
        """bf16 where tensor cores are; fp32 on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def compile(self, function: Any) -> Any:
        """`function` compiled for the shapes it meets, or as it is."""
        return torch.compile(function, dynamic=False) if self.compiled else function


@dataclass(frozen=True)
class Schedule:
    """`seconds` of training; the learning rate rises during `warmup` (share of the time), stays at `peak`, and falls
    to 1 % of it during the last `cooldown`. `muon`: matrices inside the transformer's blocks are trained by Muon, with
    the learning rate times this; 0 trains everything by AdamW.
    """

    seconds: float
    peak: float
    warmup: float = 0.03
    cooldown: float = 0.4
    weight_decay: float = 0.01
    muon: float = 0.0

    def share(self, elapsed: float) -> float:
        """Of the time that is used, 0..1."""
        return min(elapsed / self.seconds, 1.0)

    def learning_rate(self, elapsed: float) -> float:
        share = self.share(elapsed)
        rising = share / self.warmup if self.warmup else 1.0
        falling = (1 - share) / self.cooldown if self.cooldown else 1.0
        return self.peak * max(min(rising, falling, 1.0), 0.01)


class Stage:
    """Trains `modules` with `step`, a function that returns the loss and metrics (0-d tensors), until time is up."""

    def __init__(
        self, name: str, session: Session, schedule: Schedule, modules: Mapping[str, nn.Module], pictures: int
    ) -> None:
        """`pictures`: per step, for the log."""
        self.name, self.session, self.schedule, self.pictures = name, session, schedule, pictures
        self.modules = dict(modules)
        named = [(f"{key}.{name}", p) for key, m in self.modules.items() for name, p in m.named_parameters()]
        self._names, self._parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self.elapsed, self.steps, self.records = 0.0, 0, []  # type: float, int, list[dict[str, float]]
        self.finished = False
        device = session.device
        self._ema = [parameter.detach().clone() for parameter in self._parameters]
        self._decay = torch.zeros((), device=device)
        self._optimizers: list[torch.optim.Optimizer] = self._build_optimizers()
        self._sums: Metrics = {}
        self._restore()

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW, one launch for many tensors, and Muon where asked for. Everything that changes is in tensors, as a
        CUDA graph needs it.
        """
        decay, on_gpu = self.schedule.weight_decay, self.session.device.type == "cuda"
        named = list(zip(self._names, self._parameters, strict=True))
        hidden = [(p, packed_parts(name)) for name, p in named if self.schedule.muon and is_hidden_matrix(name, p)]
        taken = {id(parameter) for parameter, _ in hidden}
        rest = [parameter for parameter in self._parameters if id(parameter) not in taken]
        groups = [
            {"params": [parameter for parameter in rest if parameter.ndim >= 2], "weight_decay": decay},
            {"params": [parameter for parameter in rest if parameter.ndim < 2], "weight_decay": 0.0},
        ]

        def rate() -> Any:
            return torch.zeros((), device=self.session.device) if on_gpu else 0.0

        built: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=rate(), betas=(0.9, 0.98), eps=1e-8, fused=True, capturable=on_gpu)
        ]
        return [*built, Muon(hidden, rate(), decay)] if hidden else built

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The moments of a parameter, empty before its first step. Not a copy."""
        for optimizer in self._optimizers:
            if parameter in optimizer.state:
                return optimizer.state[parameter]
        return {}

    # --- Checkpoints ---

    @property
    def path(self) -> Path:
        """The stage's checkpoint."""
        return self.session.work / f"{self.name}.pt"

    def _restore(self) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location=self.session.device, weights_only=True)
        self.elapsed, self.steps, self.finished = state["elapsed"], state["steps"], state["finished"]
        self.records = json.loads(state["records"])
        if not state["ema"]:
            return  # packed: the stage that went on from this one has weights of its own
        for name, parameter, average in zip(self._names, self._parameters, self._ema, strict=True):
            parameter.data.copy_(state["weights"][name] if state["weights"] else state["ema"][name])
            average.copy_(state["ema"][name])
        if state["optimizer"] is not None:
            self._restore_optimizer(state["optimizer"])

    def _restore_optimizer(self, moments: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """The moments, in place of none; the step count says how far their start is corrected."""
        holders = {
            parameter: optimizer
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for name, parameter in zip(self._names, self._parameters, strict=True):
            saved, holder = moments.get(name, {}), holders[parameter]
            # In the optimizer's order: AdamW reads step, then both moments. Moments of the other optimizer, which
            # trained the parameter before, are of no use.
            wanted = ("momentum",) if isinstance(holder, Muon) else ("step", "exp_avg", "exp_avg_sq")
            if all(key in saved for key in wanted):
                holder.state[parameter] = {key: self._restored(key, saved[key], parameter) for key in wanted}

    def _restored(self, key: str, saved: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        if key != "step":
            return saved.to(parameter.dtype).to(parameter.device)
        return saved.float().to(parameter.device if self.session.device.type == "cuda" else "cpu")

    def save(self) -> None:
        """Everything that is needed to go on; of a finished stage the averaged weights."""
        weights = dict(zip(self._names, (p.detach() for p in self._parameters), strict=True))
        state = {
            "elapsed": self.elapsed,
            "steps": self.steps,
            "finished": self.finished,
            "records": json.dumps(self.records),
            "ema": dict(zip(self._names, self._ema, strict=True)),
            "weights": None if self.finished else weights,
            "optimizer": None if self.finished else self._moments(),
        }
        with whole_file(self.path) as temporary:
            torch.save(state, temporary)

    def _moments(self) -> dict[str, dict[str, torch.Tensor]]:
        return {
            name: dict(self._state_of(parameter)) for name, parameter in zip(self._names, self._parameters, strict=True)
        }

    def use_average(self) -> None:
        """Put the averaged weights into the modules."""
        for parameter, average in zip(self._parameters, self._ema, strict=True):
            parameter.data.copy_(average)

    def averaged(self) -> "Averaged":
        """The modules hold the averaged weights inside `with`."""
        return Averaged(self._parameters, self._ema)

    # --- Training ---

    def run(
        self,
        step: Callable[[], tuple[torch.Tensor, Metrics]],
        between: Callable[[], None] = lambda: None,
        report: Callable[["Stage"], str] = lambda stage: "",
    ) -> None:
        """Train until the stage's time is used up; leave the averaged weights in the modules.

        `between` is called about once a second, `report` at every checkpoint: its text is logged.
        Raises `OutOfTime` after saving when the session ends first.
        """
        if self.finished:
            self.use_average()
            return
        begun = time.monotonic()
        # Other numbers than those this stage, or another command, has drawn already.
        torch.manual_seed(zlib.crc32(self.name.encode()) + self.steps)
        replay = self.prepared(step)
        self.session.log(f"{self.name}: ready after {time.monotonic() - begun:.1f} s")
        self._train(replay, between, report)
        self.finished = True
        self.use_average()
        self.save()

    def _train(
        self,
        replay: Callable[[], None],
        between: Callable[[], None],
        report: Callable[["Stage"], str],
    ) -> None:
        clock = _Clock(self.elapsed)
        logged, saved, polled = self.elapsed, self.elapsed, self.elapsed
        logged_steps, fences = self.steps, []  # type: int, list[Any]
        while self.elapsed < self.schedule.seconds:
            self._set_numbers()
            replay()
            self.steps += 1
            self._keep_pace(fences)
            self.elapsed = clock.now()
            if self.elapsed - polled > 1.0:
                between()
                polled = self.elapsed
            if self.elapsed - logged > _LOG_SECONDS or self.elapsed >= self.schedule.seconds:
                self._log(self.steps - logged_steps, self.elapsed - logged)
                logged, logged_steps = self.elapsed, self.steps
            stopping = self.session.out_of_time()
            if stopping or self.elapsed - saved > self.session.checkpoint_seconds:
                self.save()
                saved = self.elapsed
                if stopping:
                    raise OutOfTime
                with clock.stopped():
                    self.session.log(f"{self.name}: checkpoint{report(self)}")

    def _set_numbers(self) -> None:
        """Learning rate and averaging weight of the coming step, where the captured step reads them."""
        self._set_rate(self.schedule.learning_rate(self.elapsed))
        self._decay.fill_(1 - (1 - 1 / (self.steps + 1)) ** (_EMA_POWER + 1))

    def _set_rate(self, rate: float) -> None:
        for optimizer in self._optimizers:
            factor = self.schedule.muon if isinstance(optimizer, Muon) else 1.0
            for group in optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(rate * factor)
                else:
                    group["lr"] = rate * factor

    def _keep_pace(self, fences: list[Any]) -> None:
        """Let the GPU fall a few steps behind, not more: the clock must be true."""
        if self.session.device.type != "cuda" or self.steps % _IN_FLIGHT:
            return
        event = torch.cuda.Event()
        event.record()
        fences.append(event)
        if len(fences) > 1:
            fences.pop(0).synchronize()

    def prepared(self, step: Callable[[], tuple[torch.Tensor, Metrics]]) -> Callable[[], None]:
        """One whole training step, compiled and, where asked for, captured as a CUDA graph."""

        def whole() -> None:
            self._forget_gradients()
            loss, metrics = step()
            loss.backward()
            self._update({"loss": loss.detach(), **metrics})

        if self.session.compiled or self.session.cuda_graph:
            self._warm_up(whole)
        return self._captured(whole) if self.session.cuda_graph else whole

    def _warm_up(self, whole: Callable[[], None]) -> None:
        """A few steps that compile and tune what they run, with a learning rate of 0; nothing of them remains."""
        self._set_rate(0.0)
        self._decay.zero_()
        before = self._saved_moments()
        with self._side_stream():
            for _ in range(_WARMUP_STEPS):
                whole()
        if self.session.device.type == "cuda":
            torch.cuda.synchronize()
        self._put_back(before)
        for total in self._sums.values():
            total.zero_()

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _side_stream(self) -> Any:
        """Where work must run that is captured afterwards."""
        if not self.session.cuda_graph:
            return nullcontext()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(stream)

    def _captured(self, whole: Callable[[], None]) -> Callable[[], None]:
        """The step as one CUDA graph: one launch, however small the kernels."""
        self._forget_gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            whole()
        return graph.replay

    def _saved_moments(self) -> list[dict[str, torch.Tensor]]:
        return [
            {key: value.clone() for key, value in self._state_of(parameter).items()} for parameter in self._parameters
        ]

    def _put_back(self, moments: list[dict[str, torch.Tensor]]) -> None:
        """In place: the graph knows the tensors by their addresses."""
        for parameter, saved in zip(self._parameters, moments, strict=True):
            for key, value in self._state_of(parameter).items():
                value.copy_(saved[key]) if key in saved else value.zero_()

    def _update(self, metrics: Metrics) -> None:
        """Clip, step, average and add up metrics, without a word to the CPU. A step with infinite gradients is left
        out.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        scale, skipped = (norm / _MAX_GRADIENT).clamp(min=1.0), (~norm.isfinite()).float()
        for optimizer in self._optimizers:
            # The optimizer divides by the scale while it reads the gradients.
            optimizer.grad_scale, optimizer.found_inf = scale, skipped  # type: ignore[attr-defined]
            optimizer.step()
        with torch.no_grad():
            changes = torch._foreach_sub(self._parameters, self._ema)
            torch._foreach_mul_(changes, self._decay)
            torch._foreach_add_(self._ema, changes)
            metrics["gradient"] = norm
            metrics["skipped"] = skipped
            for name, value in metrics.items():
                if name not in self._sums:
                    self._sums[name] = torch.zeros((), device=value.device)
                self._sums[name].add_(value.detach().float())

    def _log(self, steps: int, seconds: float) -> None:
        means = {name: total.item() / max(steps, 1) for name, total in self._sums.items()}
        for total in self._sums.values():
            total.zero_()
        row = {
            "seconds": round(self.elapsed, 2),
            "step": self.steps,
            "rate": self.schedule.learning_rate(self.elapsed),
            "steps_per_s": steps / max(seconds, 1e-9),
            "pictures_per_s": steps * self.pictures / max(seconds, 1e-9),
            **means,
        }
        self.records.append(row)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in ("seconds", "step"))
        budget = self.schedule.seconds
        self.session.log(f"{self.name} {self.elapsed:.0f}/{budget:.0f} s  step {self.steps}  {shown}")
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"{self.name}: the loss is not finite at step {self.steps}; the last checkpoint is"
            )


class _Clock:
    """Seconds since the start, without those in which it was stopped."""

    def __init__(self, elapsed: float) -> None:
        self._origin = time.monotonic() - elapsed

    def now(self) -> float:
        return time.monotonic() - self._origin

    def stopped(self) -> "_Stopped":
        return _Stopped(self)

    def shift(self, seconds: float) -> None:
        self._origin += seconds


@dataclass
class _Stopped:
    clock: _Clock
    begun: float = field(default_factory=time.monotonic)

    def __enter__(self) -> None:
        self.begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.clock.shift(time.monotonic() - self.begun)


class Averaged:
    """Swaps the averaged weights in and out."""

    def __init__(self, parameters: Sequence[torch.Tensor], average: Sequence[torch.Tensor]) -> None:
        self._parameters, self._average = parameters, average
        self._own: list[torch.Tensor] = []

    def __enter__(self) -> None:
        self._own = [parameter.detach().clone() for parameter in self._parameters]
        for parameter, average in zip(self._parameters, self._average, strict=True):
            parameter.data.copy_(average)

    def __exit__(self, *_: object) -> None:
        for parameter, own in zip(self._parameters, self._own, strict=True):
            parameter.data.copy_(own)
