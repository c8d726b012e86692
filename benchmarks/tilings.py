"""What the benchmarks of tiled kernels share: the command, trying every tiling, compiling all of them beforehand.

The rows are those of `inductor_profile.py`.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from inductor_profile import OutOfTime, Session, relative_rms

from sana_kernels.machine import ON_CPU

Tiling = Any  # of whichever kernel


def command_parser(doc: str | None, name: str, *, instead_of: str, budget_s: float = 540.0) -> argparse.ArgumentParser:
    """What every such script takes; `instead_of`: what `--sweep` leaves out."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help=f"time every tiling instead of {instead_of}")
    parser.add_argument(
        "--budget-s", type=float, default=budget_s, help="start nothing further after this many seconds"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--commit", default="", help="what the rows call the commit, where git cannot tell")
    parser.add_argument("--output", type=Path, default=Path(f"{name}.csv"))
    return parser


def measure(chosen: argparse.Namespace, work: Callable[[Session], None]) -> int:
    """Run `work` and write its rows; the exit code of the script."""
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: TRITON_INTERPRET=1 and --device cpu run the script's logic without one", file=sys.stderr)
        return 1
    if chosen.device == "cpu" and not ON_CPU:
        print("--device cpu runs kernels in Triton's interpreter: set TRITON_INTERPRET=1", file=sys.stderr)
        return 1
    with chosen.output.open("w", newline="") as file, torch.no_grad():
        session = Session.begin(chosen, file)
        try:
            work(session)
        except OutOfTime as error:
            print(f"out of time before: {error}", flush=True)
    return 0


def try_tilings(
    session: Session,
    name: str,
    kernels: Any,
    tiles: Iterable[Tiling],
    named: Callable[[Tiling], str],
    time_us: Callable[[Tiling], float],
    *,
    best: int = 1,
) -> None:
    """Call `time_us` with every tiling, which the module `kernels` then takes for its own; the `best` rows last.

    A tiling that cannot run, or whose results `time_us` refuses, is a row too.
    """
    times, chosen = {}, kernels.tiling
    for tile in tiles:
        kernels.tiling = lambda *_, tile=tile, **__: tile
        try:
            times[tile] = time_us(tile)
        except Exception as error:
            note = f"{type(error).__name__}: {str(error)[:120]}".replace("\n", " ")
            session.row("failed", name, named(tile), 1, "failure", note)
        finally:
            kernels.tiling = chosen
    for tile in sorted(times, key=lambda tile: times[tile])[:best]:
        session.row("best", name, named(tile), times[tile], "us")


def hold_to(wanted: torch.Tensor, found: torch.Tensor) -> None:
    """AssertionError unless both are the same sums in two orders, each rounded to bf16."""
    error = relative_rms(found, wanted)
    if not error <= 2 * 2.0**-8:
        raise AssertionError(f"relative RMS {error:.3g} from the chosen tiling")


def compile_ahead(session: Session, compile_one: Callable[[Any], bool], jobs: Sequence[Any]) -> None:
    """Fill Triton's cache, in which the timing then finds its kernels, from several processes; on a GPU only."""
    if not session.on_gpu:
        return
    started = time.monotonic()
    workers = max(1, min(16, (os.cpu_count() or 1)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = sum(not ok for ok in pool.map(compile_one, jobs, chunksize=4))
    session.row("build", "sweep", f"{len(jobs)} kernels, {failed} failed", time.monotonic() - started, "s")


def compiles(kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any], what: str) -> bool:
    """Compile the kernel for this GPU without running it; says why it cannot be."""
    try:
        kernel.warmup(*arguments, grid=(1,), **constants)
    except Exception as error:
        print(f"not compiled: {what}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return False
    return True
