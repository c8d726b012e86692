"""A function replayed as a CUDA graph: one capture per shape of its arguments."""

from collections.abc import Callable
from typing import Any

import torch

_WARMUP_CALLS = 3


class GraphedCall:
    """Calls a function that returns a tensor first in its result, through a captured graph.

    Tensors among the arguments are copied into the graph's own before a replay, and the first result is copied out:
    what a caller keeps, the next call does not overwrite. Other results are dropped. Where capturing fails, `problem`
    says why and the function is called as it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.problem = ""
        self._captured: dict[object, _Capture] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.problem:
            return self.function(*args, **kwargs)
        key = (_signature(args), tuple((name, _signature((value,))) for name, value in sorted(kwargs.items())))
        if key not in self._captured:
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            random_state = generator.clone_state()
            try:
                self._captured[key] = _Capture(self.function, args, kwargs)
            except Exception as error:  # the reason is reported beside the time of the plain call
                self.problem = f"no CUDA graph: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
                torch.cuda.synchronize()
                # PyTorch leaves the state in use marked as captured, and refuses to draw from it from then on.
                generator.graphsafe_set_state(random_state)
                return self.function(*args, **kwargs)
        return (self._captured[key].replay(args, kwargs),)


class _Capture:
    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args = tuple(_owned(value) for value in args)
        self._kwargs = {name: _owned(value) for name, value in kwargs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, tunes and allocates before the capture
            for _ in range(_WARMUP_CALLS):
                function(*self._args, **self._kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._result = function(*self._args, **self._kwargs)[0]

    def replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The result for new tensors of the same shapes, owned by the caller."""
        for own, given in zip(self._args, args, strict=True):
            _refill(own, given)
        for name, own in self._kwargs.items():
            _refill(own, kwargs[name])
        self._graph.replay()
        return self._result.clone()


def _owned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _refill(own: Any, given: Any) -> None:
    if isinstance(own, torch.Tensor):
        own.copy_(given)


def _signature(values: tuple[Any, ...]) -> tuple[object, ...]:
    return tuple(
        (tuple(value.shape), value.dtype, value.device) if isinstance(value, torch.Tensor) else repr(value)
        for value in values
    )
