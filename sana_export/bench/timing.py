"""Clocks: milliseconds of a call on a device, and the most memory in use during it."""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_MIB = 1 << 20
_UNKNOWN_CACHE_BYTES = 128 << 20
_SAMPLE_SECONDS = 0.002


@dataclass(frozen=True)
class Spread:
    """Percentiles of a list of times."""

    p50_ms: float
    p20_ms: float
    p80_ms: float
    runs: int

    @classmethod
    def of(cls, times_ms: list[float]) -> "Spread":
        """Of at least one time."""
        ordered = sorted(times_ms)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(last * 0.2)], ordered[round(last * 0.8)], len(ordered))


class Clock:
    """CUDA events on the current stream, or the host's clock on a CPU.

    Before each sample on a GPU twice its L2 cache is overwritten, outside the sample, so that nothing of the run
    before is still cached. What a stage itself leaves in the cache for its own later kernels stays, as in real use.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device == "cuda":
            nbytes = 2 * getattr(torch.cuda.get_device_properties(0), "L2_cache_size", _UNKNOWN_CACHE_BYTES)
            self._flush = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def times_ms(self, call: Callable[[], object], *, runs: int, warmup: int) -> list[float]:
        """Milliseconds of each of `runs` calls after `warmup` unmeasured ones."""
        sample = self._host_ms if self._flush is None else self._event_ms
        return [sample(call) for _ in range(warmup + runs)][warmup:]

    def _host_ms(self, call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3

    def _event_ms(self, call: Callable[[], object]) -> float:
        assert self._flush is not None
        torch.cuda.synchronize()
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


class DeviceMemoryPeak:
    """`mib`: the most memory in use on the whole GPU while the block ran, every process included; None on a CPU."""

    def __init__(self) -> None:
        self.mib: float | None = None

    def _look(self) -> None:
        free, total = torch.cuda.mem_get_info(0)
        self.mib = max(self.mib or 0.0, (total - free) / _MIB)


@contextmanager
def watching_memory(device: str) -> Iterator[DeviceMemoryPeak]:
    """Sample the device's memory from a thread while the block runs."""
    peak = DeviceMemoryPeak()
    if device != "cuda":
        yield peak
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            peak._look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak._look()
