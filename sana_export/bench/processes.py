"""Starting measuring processes and reading what they found, also when they crash or run out of time."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sana_export.bench import child
from sana_export.bench.subjects import Failed, Finding, Subject, finding_decoder

_LAST_LINES = 3


class OutOfTime(Exception):
    """The time limit ended the process; `findings` are those it had reported."""

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings
        super().__init__("time limit")


def measure(subject: Subject, *, timeout_s: float | None = None, isolate: bool = True) -> list[Finding]:
    """Everything the subject's process reported. A crash is a `Failed` of stage "all" with its last words.

    Without `isolate` the work is done in this process, which is for tests: no time limit, no fresh memory.
    Raises `OutOfTime`.
    """
    subject = msgspec.structs.replace(subject, started=time.time())
    if not isolate:
        findings: list[Finding] = []
        child.measure(subject, findings.append)
        return findings
    with tempfile.TemporaryDirectory() as folder:
        return _in_process(subject, Path(folder), timeout_s)


def _in_process(subject: Subject, folder: Path, timeout_s: float | None) -> list[Finding]:
    request, answers, log = folder / "subject.json", folder / "findings.jsonl", folder / "log.txt"
    request.write_bytes(msgspec.json.encode(subject))
    answers.touch()
    try:
        code = run(["sana_export.bench.child", str(request), str(answers)], log, timeout_s)
    except subprocess.TimeoutExpired as error:
        raise OutOfTime(_read(answers)) from error
    findings = _read(answers)
    if code != 0:
        findings.append(Failed("all", f"the process ended with code {code}: {last_words(log)}"))
    return findings


def run(arguments: Sequence[str], log: Path, timeout_s: float | None) -> int:
    """Run a module of ours with `python -m`, its output in `log`; its exit code. Raises subprocess.TimeoutExpired."""
    with log.open("wb") as output:
        # A session of its own: compilers that it starts are ended with it.
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=output, stderr=output, start_new_session=True
        )
        try:
            return process.wait(timeout_s)
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and everything it started, if anything is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: Path) -> list[Finding]:
    lines = path.read_bytes().split(b"\n")
    # The last piece is empty, or a line that was being written when the process ended.
    return [finding_decoder.decode(line) for line in lines[:-1]]


def last_words(log: Path) -> str:
    """The last lines of a process's output."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " | ".join(lines[-_LAST_LINES:]) or "no output"
