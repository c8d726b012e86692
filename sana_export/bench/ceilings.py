"""What this device reaches on one large product per dtype and on a large copy: the ceilings of the floors."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sana_export.bench.timing import Clock

_SIDE = {"cuda": 8192, "cpu": 1024}
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
_REPEATS = 10
_PRODUCTS_PER_SAMPLE = 4


@dataclass(frozen=True)
class Ceilings:
    """`tflop_per_s` by dtype; `copy_gb_per_s` counts bytes read plus bytes written."""

    tflop_per_s: dict[str, float]
    copy_gb_per_s: float

    def flop_per_s(self, dtype: str) -> float:
        """Rate of products in a dtype. An 8-bit type this device has no product for runs at the 16-bit rate."""
        known = self.tflop_per_s
        if dtype in known:
            return known[dtype] * 1e12
        return (known["bfloat16"] if "bfloat16" in known else known["float32"]) * 1e12

    def __str__(self) -> str:
        rates = [f"{dtype} {rate:.1f} TFLOP/s" for dtype, rate in self.tflop_per_s.items()]
        return "; ".join((*rates, f"copy {self.copy_gb_per_s:.1f} GB/s"))


def measure_ceilings(device: str) -> Ceilings:
    """The medians of repeated runs. A product this device or torch does not have is left out."""
    rates = {}
    for dtype, make in _PRODUCTS.items():
        if device == "cpu" and dtype != "float32":
            continue
        try:
            rates[dtype] = _tflop_per_s(device, make)
        except (RuntimeError, NotImplementedError, AttributeError, TypeError):
            continue
    return Ceilings(rates, _copy_gb_per_s(device))


def _tflop_per_s(device: str, make: Callable[[str, int], Callable[[], object]]) -> float:
    side = _SIDE[device]
    product = make(device, side)

    def sample() -> None:
        for _ in range(_PRODUCTS_PER_SAMPLE):
            product()

    times = Clock(device).times_ms(sample, runs=_REPEATS, warmup=2)
    return _PRODUCTS_PER_SAMPLE * 2 * side**3 / statistics.median(times) / 1e9


def _copy_gb_per_s(device: str) -> float:
    """The faster of a copy and a one-pass kernel."""
    source = torch.randn(_COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    calls: tuple[Callable[[], object], ...] = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    best = min(statistics.median(clock.times_ms(call, runs=_REPEATS, warmup=2)) for call in calls)
    return 2 * _COPY_BYTES[device] / best / 1e6


def _matrix(device: str, side: int, dtype: torch.dtype) -> torch.Tensor:
    # Normal values: zeros draw less power, and the rate depends on it.
    return torch.randn(side, side, device=device).div_(math.sqrt(side)).to(dtype)


def _float32(device: str, side: int) -> Callable[[], object]:
    a, b = _matrix(device, side, torch.float32), _matrix(device, side, torch.float32)
    return lambda: torch.mm(a, b)


def _bfloat16(device: str, side: int) -> Callable[[], object]:
    a, b = _matrix(device, side, torch.bfloat16), _matrix(device, side, torch.bfloat16)
    return lambda: torch.mm(a, b)


def _float8(device: str, side: int) -> Callable[[], object]:
    a, b = (_matrix(device, side, torch.float32).mul_(16).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _int8(device: str, side: int) -> Callable[[], object]:
    a, b = (torch.randint(-127, 128, (side, side), device=device, dtype=torch.int8) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())


_PRODUCTS: dict[str, Callable[[str, int], Callable[[], object]]] = {
    "float32": _float32,
    "bfloat16": _bfloat16,
    "float8e4m3fn": _float8,
    "int8": _int8,
}
