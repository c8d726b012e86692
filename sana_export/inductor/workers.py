"""Pieces compiled several at once, in processes of their own: most of a build is one C++ or Triton compiler waiting."""

import contextlib
import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from sana_export.inductor.piece import Exported, package_exported, save_exported
from sana_export.system_memory import system_memory

# Of a process that compiles: torch, the graph, the compiler's output.
_BYTES_PER_JOB = 4 << 30
_GPU_BYTES_PER_JOB = 2 << 30
_CPUS_PER_JOB = 2
_MOST_JOBS = 8
_LAST_LINES = 5


class Packaging(Protocol):
    """One piece on its way to a package."""

    def result(self) -> object:
        """Wait until the package is written. Raises what the compiler raised."""


def default_jobs() -> int:
    """How many pieces to compile at once here: by CPUs, free memory and free memory of the GPU; at least one."""
    available, _ = system_memory() or (0, 0)
    jobs = min(_MOST_JOBS, len(os.sched_getaffinity(0)) // _CPUS_PER_JOB, available // _BYTES_PER_JOB)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        jobs = min(jobs, torch.cuda.mem_get_info()[0] // _GPU_BYTES_PER_JOB)
    return max(1, jobs)


class Workers:
    """Packages exported pieces; with one job in this process, when the result is asked for, else in `jobs` others, None
    for as many as there is room for when the first is asked for.

    A context manager: leaving it ends the processes and the compilers they started, finished or not, and removes
    `folder`, which holds what they are given and their output.
    """

    def __init__(self, jobs: int | None, folder: Path) -> None:
        self._wanted, self._folder = jobs, folder
        self._started: list[subprocess.Popen[str]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._starting, self._left = threading.Lock(), False

    @cached_property
    def jobs(self) -> int:
        """How many pieces are compiled at once."""
        return self._wanted or default_jobs()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.jobs)

    def __enter__(self) -> "Workers":
        shutil.rmtree(self._folder, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        with self._starting:
            self._left = True
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if "_threads" in vars(self):
            self._threads.shutdown(cancel_futures=True)
        for process in self._started:
            process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def package(self, exported: Exported, path: Path, options: Mapping[str, Any]) -> Packaging:
        """Begin to write the piece's package to `path`."""
        if self.jobs == 1:
            return _Deferred(lambda: package_exported(exported, path, options))
        self._folder.mkdir(parents=True, exist_ok=True)
        source = self._folder / f"{next(self._numbers)}.pt2"
        save_exported(exported, source)
        request = json.dumps({"source": str(source), "package": str(path), "options": dict(options)})
        return self._threads.submit(self._asked, request)

    def _asked(self, request: str) -> None:
        """Have a worker do it, one that is idle or a new one; in a thread."""
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the compiling process ended with code {process.wait()}: {self._last_words()}")
        self._idle.put(process)
        if problem := json.loads(answer)["problem"]:
            raise RuntimeError(problem)

    def _start(self) -> "subprocess.Popen[str]":
        # A long piece has most of the time to itself.
        threads = max(1, len(os.sched_getaffinity(0)) // 2)
        with self._starting, (self._folder / "workers.log").open("ab") as log:
            if self._left:
                raise RuntimeError("the build has ended")
            process = subprocess.Popen(
                [sys.executable, "-m", "sana_export.inductor.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Ended together with the compilers that it starts.
                start_new_session=True,
                env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(threads)},
            )
            self._started.append(process)
        return process

    def _last_words(self) -> str:
        lines = (self._folder / "workers.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(lines[-_LAST_LINES:]) or "no output"


class _Deferred:
    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def result(self) -> None:
        self._work()
