"""The rows of benchmarks/results/end_to_end.csv."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from sana_export.bench.ceilings import Ceilings
from sana_export.bench.floors import PictureWork
from sana_export.bench.machine import Machine
from sana_runtime.errors import InputError
from sana_runtime.files import whole_file

OURS = "sana-export"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is painted. `precision` is the bundle's, or what a peer computes in."""

    model: str
    precision: str
    height: int
    width: int
    num_steps: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure, or why there is none (`error`). Times in milliseconds, memory in MiB.

    `subject`: "sana-export TARGET" or "diffusers PEER". `stage`: text_encoder, step, vae_decoder (one call each),
    total (prompt to picture), total_one_at_a_time (one engine in memory), cold_start, build, parity. `floor_ms` is the
    stage's floor at the ceilings of the same run, `gap` is p50 over floor. Memory stands in the rows of the totals:
    torch's own allocations, and what the device had in use on top of what it had before the process started. `run`
    names the invocation: equal in rows measured side by side.
    """

    run: str
    date: str
    commit: str
    device: str
    driver: str
    power_limit: str
    versions: str
    model: str
    precision: str
    height: int
    width: int
    num_steps: int
    subject: str
    stage: str
    p50_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    runs: int | None = None
    flop: int | None = None
    floor_bytes: int | None = None
    floor_ms: float | None = None
    gap: float | None = None
    ceilings: str = ""
    allocated_mib: float | None = None
    device_mib: float | None = None
    error: str = ""
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What makes a second measurement of the same thing superfluous."""
        names = ("commit", "device", "driver", "versions", "model", "precision", "height", "width", "num_steps")
        return tuple(str(getattr(self, name)) for name in (*names, "subject", "stage"))


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
_INTEGERS = ("height", "width", "num_steps", "runs", "flop", "floor_bytes")
_FIGURES = ("p50_ms", "p20_ms", "p80_ms", "floor_ms", "gap", "allocated_mib", "device_mib")


def make_row(machine: Machine, case: Case, subject: str, stage: str, **figures: object) -> Row:
    """A row of this machine, rounded to what a measurement can tell."""
    rounded = {name: _rounded(value) if name in _FIGURES else value for name, value in figures.items()}
    return Row(
        **dataclasses.asdict(machine),
        date=machine.date,
        **dataclasses.asdict(case),
        subject=subject,
        stage=stage,
        **rounded,  # type: ignore[arg-type]
    )


def floor_figures(
    stage: str, p50_ms: float, work: PictureWork, ceilings: Ceilings, num_steps: int
) -> dict[str, object]:
    """The columns of a row that say how far a time is from its floor; none for rows without one."""
    if stage == "total":
        calls = [*work.calls(num_steps)]
        floor = sum(call.floor_ms(ceilings) for call in calls)
        flop, nbytes = sum(call.flop for call in calls), sum(call.floor_bytes for call in calls)
    else:
        found = work.stage(stage)
        if found is None:
            return {}
        floor, flop, nbytes = found.floor_ms(ceilings), found.flop, found.floor_bytes
    return {"flop": flop, "floor_bytes": nbytes, "floor_ms": floor, "gap": p50_ms / floor, "ceilings": str(ceilings)}


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, none if it does not exist. Raises `InputError` for a file of other columns or values."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise _wrong(path, f"columns {', '.join(reader.fieldnames or ())}")
        try:
            return [_parsed(row) for row in reader]
        except (ValueError, TypeError) as error:
            raise _wrong(path, str(error)) from error


def newest_rows(rows: Iterable[Row]) -> list[Row]:
    """The last measured row of each figure of a device, at whichever commit and with whichever versions."""
    last: dict[tuple[object, ...], Row] = {}
    for row in rows:
        figure = (row.device, row.model, row.precision, row.height, row.width, row.num_steps, row.subject, row.stage)
        if figure not in last or row.run >= last[figure].run:
            last[figure] = row
    return [*last.values()]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file by these rows, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _text(value) for name, value in dataclasses.asdict(row).items()} for row in rows)
    with whole_file(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def add_rows(path: Path, new: Sequence[Row]) -> None:
    """Add rows; a row measured again replaces its predecessor."""
    replaced = {row.key for row in new}
    write_rows(path, [*(row for row in read_rows(path) if row.key not in replaced), *new])


def _rounded(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _text(value: object) -> object:
    if value is None:
        return ""
    return " | ".join(value.splitlines()) if isinstance(value, str) else value


def _parsed(row: dict[str, str]) -> Row:
    values: dict[str, object] = {}
    for name in COLUMNS:
        text = row[name]
        if name in _INTEGERS:
            values[name] = int(text) if text else None
        elif name in _FIGURES:
            values[name] = float(text) if text else None
        else:
            values[name] = text
    return Row(**values)  # type: ignore[arg-type]


def _wrong(path: Path, received: str) -> InputError:
    return InputError(
        f"{path} is not a file of benchmark rows",
        received=received,
        expected=f"columns {', '.join(COLUMNS)}",
        action="restore the file, or move it away: a new one is begun",
    )
