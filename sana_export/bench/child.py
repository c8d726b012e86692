"""The measuring process: `python -m sana_export.bench.child SUBJECT.json FINDINGS.jsonl`.

Imports nothing heavy before it knows what to measure: an engine's cold start is also this process's.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from sana_export.bench.subjects import Failed, Finding, Subject

Emit = Callable[[Finding], None]


def measure(subject: Subject, emit: Emit) -> None:
    """Measure one subject; whatever goes wrong as a whole becomes a `Failed` of stage "all"."""
    try:
        _MEASURES[subject.kind](subject, emit)
    except Exception as error:  # the report of any failure is this process's product
        emit(Failed("all", describe(error)))


def describe(error: BaseException) -> str:
    """An error as the text of a row: whole for ours, the type and first line of others'."""
    from sana_runtime.errors import SanaError

    if isinstance(error, SanaError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


def _ceilings(subject: Subject, emit: Emit) -> None:
    from sana_export.bench.ceilings import measure_ceilings
    from sana_export.bench.subjects import Measured

    found = measure_ceilings(subject.device)
    emit(Measured(found.tflop_per_s, found.copy_gb_per_s))


def _parity(subject: Subject, emit: Emit) -> None:
    from sana_export.bench.parity import judge_bundle

    judge_bundle(subject, emit)


def _engines(subject: Subject, emit: Emit) -> None:
    from sana_export.bench.engines import measure_engines

    measure_engines(subject, emit)


def _peer(subject: Subject, emit: Emit) -> None:
    from sana_export.bench.peers import measure_peer

    measure_peer(subject, emit)


_MEASURES: dict[str, Callable[[Subject, Emit], None]] = {
    "ceilings": _ceilings,
    "parity": _parity,
    "engines": _engines,
    "peer": _peer,
}


def main() -> None:
    """Entry of the process."""
    subject = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Subject)
    with Path(sys.argv[2]).open("ab", buffering=0) as file:
        measure(subject, lambda finding: _write(file.write, finding))


def _write(write: Callable[[bytes], object], finding: Finding) -> None:
    write(msgspec.json.encode(finding) + b"\n")


if __name__ == "__main__":
    main()
