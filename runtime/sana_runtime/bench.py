"""Time a pipeline: milliseconds per stage over whole pictures, and peak memory."""

import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sana_runtime import __version__
from sana_runtime.errors import InputError
from sana_runtime.files import whole_file
from sana_runtime.pipeline import Pipeline

_PROMPT = "a red fox in fresh snow at sunrise, detailed fur, soft light"
_MIB = 1 << 20


@dataclass(frozen=True)
class StageRow:
    """Milliseconds of one stage over all measured pictures. "step" is the transformer's time per step."""

    stage: str
    p50_ms: float
    p20_ms: float
    p80_ms: float
    min_ms: float
    max_ms: float


@dataclass(frozen=True)
class BenchResult:
    """What was measured, where, and on what. Memory in MiB; None where the system does not tell.

    `host_peak_mib` is the largest resident set of this process, mapped weights included; `device_peak_mib`
    the most memory in use on the whole GPU, other programs included.
    """

    device: str
    target: str
    model: str
    bundle_digest: str
    dtypes: dict[str, str]
    height: int
    width: int
    num_steps: int
    runs: int
    warmup: int
    rows: tuple[StageRow, ...]
    host_peak_mib: float | None
    device_peak_mib: float | None
    date: str
    versions: dict[str, str]


def measure(
    pipeline: Pipeline, *, num_steps: int | None, runs: int, warmup: int, on_picture: Callable[[], None]
) -> BenchResult:
    """Paint `warmup` + `runs` pictures with different seeds and keep the timings of the last `runs`."""
    timings: list[dict[str, float]] = []
    for index in range(warmup + runs):
        picture = pipeline.generate(_PROMPT, seed=index, num_steps=num_steps)
        per_step = picture.timings_ms["transformer"] / picture.settings.num_steps
        timings.append({**picture.timings_ms, "step": per_step})
        on_picture()
    manifest = pipeline.manifest
    return BenchResult(
        device=pipeline.backend.description,
        target=pipeline.target,
        model=manifest.model.source,
        bundle_digest=manifest.digest,
        dtypes={entry.name: entry.dtype for entry in manifest.components},
        height=manifest.height,
        width=manifest.width,
        num_steps=picture.settings.num_steps,
        runs=runs,
        warmup=warmup,
        rows=tuple(_row(stage, timings[warmup:]) for stage in timings[0]),
        host_peak_mib=host_peak_mib(),
        device_peak_mib=pipeline.backend.memory.peak_mib(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={
            "sana-runtime": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    )


def host_peak_mib() -> float | None:
    """Largest resident set of this process so far, in MiB; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak / 1024


def check_json(path: Path) -> None:
    """Raise `InputError` unless a file can be written at `path`. Writes nothing."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(
            f"--json {path} cannot be written",
            received="it is a directory" if path.is_dir() else f"there is no directory {path.parent}",
            expected="a file name in an existing directory",
        )


def write_json(result: BenchResult, path: Path) -> None:
    """Write the result as JSON; the file is whole or absent."""
    content = msgspec.json.format(msgspec.json.encode(asdict(result)), indent=2) + b"\n"
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def as_table(result: BenchResult) -> RenderableType:
    """The result for a terminal."""
    table = Table("stage", "median ms", "p20", "p80", "min", "max")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in result.rows:
        values = (row.p50_ms, row.p20_ms, row.p80_ms, row.min_ms, row.max_ms)
        table.add_row(row.stage, *(f"{value:.1f}" for value in values))
    dtypes = ", ".join(f"{name} {dtype}" for name, dtype in result.dtypes.items())
    lines = [
        f"ran on {result.device}",
        f"target {result.target}; {result.model}; {dtypes}",
        f"{result.width} x {result.height} pixels, {result.num_steps} steps, "
        f"{result.runs} runs after {result.warmup} for warm-up",
    ]
    return Group(Text("\n".join(lines)), table, Text(_memory(result)))


def _memory(result: BenchResult) -> str:
    peaks = {"host": result.host_peak_mib, "whole GPU": result.device_peak_mib}
    known = [f"{name} {value:.0f} MiB" for name, value in peaks.items() if value is not None]
    return f"peak memory: {', '.join(known) or 'not known'}"


def _row(stage: str, timings: list[dict[str, float]]) -> StageRow:
    values = np.array([timing[stage] for timing in timings])
    p20, p50, p80 = (float(value) for value in np.percentile(values, [20, 50, 80]))
    return StageRow(stage, p50, p20, p80, float(values.min()), float(values.max()))
