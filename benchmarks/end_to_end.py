"""Measure engines beside diffusers on this machine, and render the README's tables.

    python benchmarks/end_to_end.py --minutes 8                      # what is missing of the matrix, in pieces
    python benchmarks/end_to_end.py --model random:0.6b --side 1024 --precision fp8 --peer eager
    python benchmarks/end_to_end.py --target onnxruntime --model random:0.6b --side 1024 --peer none
    python benchmarks/end_to_end.py --model random:0.6b --side 4096 --stage step --stage vae_decoder
    python benchmarks/end_to_end.py --list

For every bundle of the matrix: build, parity (no time is measured on red), engines, then the peers with the same
weights, each in a process of its own. Rows go to benchmarks/results/end_to_end.csv as soon as a subject is done; a
second run skips what was measured at the same commit, on the same device, with the same versions. Checkpoints with
random weights, bundles and compilers' caches stay in --work, so that a run that was cut short goes on.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sana_export.bench.subjects import ONE_AT_A_TIME, SHORT_CAPTION, STAGES

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "results" / "end_to_end.csv"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything asked for is measured, 3 when the time budget ended first."""
    options = _parser().parse_args(arguments)
    work = options.work.resolve()
    # Compiled kernels survive this process: a peer that was cut off while compiling goes on.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "cache" / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(work / "cache" / "triton"))
    from sana_export.bench.matrix import MATRIX, Group, Matrix, Settings, say, selected
    from sana_export.bench.run import OUR_STAGES, Bench
    from sana_runtime.errors import SanaError

    peers = None if options.peer is None else [] if "none" in options.peer else options.peer
    matrix: Sequence[Group] = MATRIX
    if options.any:
        matrix = [
            Group(model, side, tuple(options.precision or ()), tuple(peers or ()))
            for model in options.model
            for side in options.side
        ]
    groups = [*selected(matrix, options.model, options.side, options.precision, peers)]
    if options.list:
        for group in groups:
            print(group.model, group.side, ",".join(group.precisions) or "-", ",".join(group.peers) or "-")
        return 0
    device = options.device or ("cuda" if _has_gpu() else "cpu")
    deadline = time.monotonic() + options.minutes * 60 if options.minutes else None
    peer_s = options.peer_minutes * 60 if options.peer_minutes else None
    bench = Bench(say, options.runs, options.warmup, options.commit, deadline, peer_s)
    build_arguments = ("--no-gate", *options.build_argument)
    settings = Settings(
        work,
        options.rows,
        options.target,
        device,
        options.num_steps,
        build_arguments,
        options.retry_errors,
        tuple(options.stage or OUR_STAGES),
    )
    try:
        finished = Matrix(bench, settings).run(iter(groups))
    except SanaError as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if finished else 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", action="append", default=[], help="only these of the matrix; may be repeated")
    add("--side", action="append", default=[], type=int, help="only these sizes, in pixels")
    add("--precision", action="append", help="only bundles of these precisions")
    add("--peer", action="append", help="only these peers, or none")
    add(
        "--stage",
        action="append",
        choices=(*STAGES, SHORT_CAPTION, ONE_AT_A_TIME),
        help="only this stage; may be repeated",
    )
    add("--any", action="store_true", help="measure what is named, whether or not the matrix has it")
    add("--target", default="inductor", help="of the bundles")
    add("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    add("--num-steps", type=int, help="default: the model's")
    add("--runs", type=int, default=10, help="measured pictures, and calls of each stage")
    add("--warmup", type=int, default=2, help="unmeasured ones before them")
    add("--minutes", type=_minutes, help="stop after so long; what runs then is ended and its finished stages are kept")
    add("--peer-minutes", type=_minutes, help="the same for every peer: what it has compiled by then is kept")
    add(
        "--build-argument",
        action="append",
        default=[],
        help="for sana-export build: =--calibration-side=256",
    )
    add("--retry-errors", action="store_true", help="measure again what failed before")
    add("--commit", default="", help="what the rows call the commit, where git cannot tell")
    add("--work", type=Path, default=ROOT / "build" / "bench", help="checkpoints, bundles and caches")
    add("--rows", type=Path, default=ROWS, help="file of rows to add to (CSV)")
    add("--list", action="store_true", help="print what would be measured, and stop")
    return parser


def _minutes(text: str) -> float:
    """An argument that is a time. Raises what argparse turns into an error."""
    minutes = float(text)
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"{text} given, more than 0 minutes expected")
    return minutes


def _has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
