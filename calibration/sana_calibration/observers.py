"""Watching what goes into the layers whose activations will be quantised."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from sana_calibration.histogram import Histogram
from sana_calibration.layers import weight_of
from sana_calibration.rules import LayerRule
from sana_runtime.errors import InputError

# Kept of a layer's input at every solver step of every prompt to search for alpha with.
ROWS_PER_PASS = 8


@dataclass(frozen=True, eq=False)
class Observation:
    """What went into one layer: `step_amax` [num_steps] fp32 (0 where the layer did not run); `channel_amax` [I] fp32
    where the rule smooths; `histogram` where it needs a distribution; `rows` [R, I] fp32, a few inputs of every pass,
    where it searches for alpha.
    """

    step_amax: np.ndarray
    channel_amax: np.ndarray | None = None
    histogram: Histogram | None = None
    rows: np.ndarray | None = None

    @property
    def amax(self) -> float:
        """The largest absolute value of all steps."""
        return float(self.step_amax.max())

    def merged(self, other: "Observation") -> "Observation":
        """What both saw. Maxima and counts, whose order does not matter; of the rows, those of `self` come first."""
        channel, histogram, rows = self.channel_amax, self.histogram, self.rows
        if channel is not None and other.channel_amax is not None:
            channel = np.maximum(channel, other.channel_amax)
        if histogram is not None and other.histogram is not None:
            histogram = histogram.merged(other.histogram)
        if rows is not None and other.rows is not None:
            rows = np.concatenate([rows, other.rows])
        return Observation(np.maximum(self.step_amax, other.step_amax), channel, histogram, rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """The observation as named arrays, for a file."""
        found = {"step_amax": self.step_amax}
        if self.channel_amax is not None:
            found["channel_amax"] = self.channel_amax
        if self.histogram is not None:
            found["counts"] = self.histogram.counts
            found["exponent"] = np.array([self.histogram.exponent], np.int64)
        if self.rows is not None:
            found["rows"] = self.rows
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Observation":
        """The inverse of `arrays`."""
        histogram = Histogram(int(arrays["exponent"][0]), arrays["counts"]) if "counts" in arrays else None
        return cls(arrays["step_amax"], arrays.get("channel_amax"), histogram, arrays.get("rows"))


class AmaxObserver:
    """Watches one layer's input [..., I] (a convolution's [B, I, H, W]) as a forward pre-hook."""

    def __init__(self, name: str, rule: LayerRule, channel_axis: int, num_steps: int) -> None:
        self._name = name
        self._channel_axis = channel_axis if rule.smoothing_alpha is not None else None
        self._wants_histogram = rule.amax != "max"
        self._wants_rows = rule.smoothing_alpha == "search"
        self._num_steps = num_steps
        self.step = 0
        self.where = ""
        self._observed: Observation | None = None

    def __call__(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found = self._observe(inputs[0].detach().abs().float())
        if self._wants_rows:
            found = replace(found, rows=_spread_rows(inputs[0].detach()))
        self._observed = found if self._observed is None else self._observed.merged(found)

    def take(self) -> Observation:
        """What was seen since the last call. Raises `InputError` if the layer has not run."""
        observed, self._observed = self._observed, None
        if observed is None:
            raise InputError(
                f"calibration: layer '{self._name}' did not run",
                received=f"no input seen during {self.where}",
                expected="an input at every forward pass",
                action="exclude the layer in the recipe",
            )
        return observed

    def _observe(self, magnitude: torch.Tensor) -> Observation:
        amax = float(magnitude.amax())
        if not np.isfinite(amax):
            raise InputError(
                f"calibration: the input of layer '{self._name}' is not finite",
                received=f"{int((~magnitude.isfinite()).sum())} of {magnitude.numel()} values are NaN or infinite, "
                f"{self.where}, step {self.step + 1} of {self._num_steps}",
                expected="finite activations",
                action="check the checkpoint, or calibrate in fp32",
            )
        step_amax = np.zeros(self._num_steps, np.float32)
        step_amax[self.step] = amax
        channels = None
        if self._channel_axis is not None:
            axis = self._channel_axis % magnitude.ndim
            others = tuple(index for index in range(magnitude.ndim) if index != axis)
            channels = magnitude.amax(dim=others).cpu().numpy()
        return Observation(step_amax, channels, Histogram.of(magnitude, amax) if self._wants_histogram else None)


def _spread_rows(x: torch.Tensor) -> np.ndarray:
    """A few rows [R, I] of an input [..., I], evenly spread over it, so that both guidance halves are among them."""
    rows = x.flatten(0, -2)
    chosen = np.unique(np.linspace(0, len(rows) - 1, ROWS_PER_PASS).round().astype(np.int64))
    return rows[torch.from_numpy(chosen).to(rows.device)].float().cpu().numpy()


class Observers:
    """The observers of one module. The driver says where it is before each forward pass."""

    def __init__(self, observers: Mapping[str, AmaxObserver]) -> None:
        self._observers = observers

    def at(self, step: int, where: str) -> None:
        """The next forward pass is solver step `step`, counted from 0; `where` names the prompt for messages."""
        for observer in self._observers.values():
            observer.step, observer.where = step, where

    def take(self) -> dict[str, Observation]:
        """What every layer has seen since the last call."""
        return {name: observer.take() for name, observer in self._observers.items()}


@contextmanager
def gathering(module: nn.Module, prefix: str, rules: Mapping[str, LayerRule]) -> Iterator[Mapping[str, torch.Tensor]]:
    """The Gram matrices [I, I], fp32, of the inputs of the layers below `prefix` whose rounding is calibrated: sums
    over all rows that pass until they are cleared.
    """
    grams: dict[str, torch.Tensor] = {}
    handles = []
    for name, rule in rules.items():
        if rule.rounding == "gptq":
            layer = module.get_submodule(prefix + name)
            weight = weight_of(layer)
            grams[name] = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
            handles.append(layer.register_forward_pre_hook(_Gatherer(grams[name])))
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()


class _Gatherer:
    """Adds x^T x of a layer's input."""

    def __init__(self, gram: torch.Tensor) -> None:
        self._gram = gram

    def __call__(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].detach().flatten(0, -2).float()
        self._gram.addmm_(rows.T, rows)


@contextmanager
def observing(module: nn.Module, prefix: str, rules: Mapping[str, LayerRule], num_steps: int) -> Iterator[Observers]:
    """Watch the inputs of the layers below `prefix` whose rule quantises activations."""
    observers, handles = {}, []
    for name, rule in rules.items():
        if rule.activation_dtype is None:
            continue
        layer = module.get_submodule(prefix + name)
        axis = 1 if isinstance(layer, nn.Conv2d) else -1
        observers[name] = AmaxObserver(name, rule, axis, num_steps)
        handles.append(layer.register_forward_pre_hook(observers[name]))
    try:
        yield Observers(observers)
    finally:
        for handle in handles:
            handle.remove()
