"""Time the 3x3 convolutions of the decoder's residual blocks by our kernel and by cuDNN, or find the best tilings.

    python benchmarks/scaled_convolution.py                            # every stage with FP8 convolutions, 1024 px
    python benchmarks/scaled_convolution.py --sweep --precisions fp8   # the kernel alone, every tiling
    TRITON_INTERPRET=1 python benchmarks/scaled_convolution.py --device cpu --side 32 --stages tiny     # a dry run

Our kernel is held to its fp64 oracle before it is timed, at every width and number of channels and a few rows; the
results of other tilings are held to its result. The peer is what diffusers' decoder computes, compiled: cuDNN's
convolution in bf16, channels last, and for the first convolution of a block a pass for SiLU. Times are of CUDA graphs
of many calls, as in `inductor_profile.py`, whose rows these are. `--sweep` compiles in parallel processes first.
"""

import argparse
import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from inductor_profile import OutOfTime, Session, operator_time, relative_rms
from torch.nn import functional as F

from sana_kernels.scaled_convolution import triton as kernels
from sana_kernels.scaled_convolution.testing import Case, Inputs, arguments, make_inputs, verify, verify_codes

# Stage -> picture side over that of the image, channels; those of dc-ae-f32c32-sana-1.1.
STAGES = {"0": (1, 128), "1": (2, 256), "2": (4, 512), "tiny": (8, 16)}
FACTORS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
# Pixels, channels, input channels at a time, warps, loads in flight, channels finished at a time.
TILINGS = (
    (128, 128, 128, 4, 3, 32),
    (128, 128, 128, 4, 2, 32),
    (128, 128, 64, 4, 4, 32),
    (128, 128, 128, 8, 3, 64),
    (128, 128, 128, 8, 4, 64),
    (128, 256, 128, 8, 3, 64),
    (128, 256, 128, 8, 4, 64),
    (256, 128, 128, 8, 3, 32),
    (256, 128, 128, 8, 3, 64),
    (256, 128, 128, 8, 4, 32),
    (256, 128, 64, 8, 4, 32),
    (256, 64, 128, 4, 3, 32),
    (64, 256, 128, 4, 3, 64),
    (64, 128, 128, 4, 4, 64),
)
_FLOP_PER_GRAPH = 4e12
_CHECKED_ROWS = 5


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One of a residual block: its name with stage and picture side, and the case."""

    name: str
    case: Case

    @property
    def flop(self) -> float:
        """Of one call."""
        case = self.case
        return 2.0 * case.batch * case.height * case.width * case.outputs * 9 * case.inputs

    @property
    def calls(self) -> int:
        """How many make a graph: many short ones, few long ones."""
        return max(2, min(20, int(_FLOP_PER_GRAPH / self.flop)))


def convolutions(stages: Sequence[str], side: int, precisions: Sequence[str]) -> Iterator[Convolution]:
    """conv1 has bias, SiLU and codes behind it; conv2 nothing."""
    for stage in stages:
        share, channels = STAGES[stage]
        for precision in precisions:
            factors = FACTORS[precision]
            scales = "channel" if precision == "int8" else "tensor"
            size = side // share
            case = Case(1, size, size, channels, channels, factors=factors, scales=scales, silu=True, out_dtype=factors)
            name = f"stage {stage} {side} px {precision}"
            yield Convolution(f"{name} conv1", case)
            yield Convolution(f"{name} conv2", dataclasses.replace(case, bias=False, silu=False, out_dtype=None))


# --- Our kernel beside cuDNN ---


def table(session: Session, found: Sequence[Convolution]) -> None:
    """Every convolution by our kernel and by cuDNN, and what is gained."""
    for convolution in found:
        with session.part(convolution.name):
            checked(session, convolution)
            inputs = make_inputs(convolution.case, session.device)
            tile = kernels.tiling(inputs.x.shape[:-1].numel(), convolution.case.outputs)
            ours = timed(session, convolution, f"triton {named(tile)}", work_of(convolution.case, inputs))
            theirs = timed(session, convolution, "cuDNN bf16 and pass", cudnn(session, convolution.case, inputs))
            timed(session, convolution, "cuDNN bf16 alone", cudnn(session, convolution.case, inputs, alone=True))
            session.row("speedup", convolution.name, "cuDNN and pass / triton", theirs / ours, "x")


def checked(session: Session, convolution: Convolution) -> None:
    """Hold our kernel to the oracle; AssertionError when it is wrong."""
    case = dataclasses.replace(convolution.case, height=min(convolution.case.height, _CHECKED_ROWS))
    finding = verify(case, session.device, "triton")[0]
    session.row("parity", convolution.name, "y", finding.relative_rms, "rel rms", f"bound {finding.bound:.3g}")
    if case.out_dtype is not None:
        codes = verify_codes(case, session.device, "triton")
        note = f"of {codes.values}, {codes.near_ties} of them next to a tie"
        session.row("parity", convolution.name, "codes that are not the result's", codes.different, "codes", note)


def work_of(case: Case, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Our kernel's launch without what dispatches to it."""
    scale = None if case.out_dtype is None else torch.tensor(0.01, device=inputs.x.device)
    given = arguments(case, inputs, scale)
    return lambda: kernels.forward(*given)


def cudnn(session: Session, case: Case, inputs: Inputs, *, alone: bool = False) -> Callable[[], object]:
    """The convolution in bf16 with its bias, and SiLU behind it unless it is `alone`."""
    x, weight = (t.to(torch.bfloat16).permute(0, 3, 1, 2) for t in (inputs.x, inputs.weight))

    def work() -> object:
        out = F.conv2d(x, weight, inputs.bias, padding=1)
        return F.silu(out) if case.silu and not alone else out

    torch._dynamo.reset()
    return torch.compile(work, fullgraph=True, dynamic=False) if session.on_gpu and case.silu else work


def timed(session: Session, convolution: Convolution, what: str, work: Callable[[], object]) -> float:
    """Time it and write the row; microseconds."""
    time_us = operator_time(session, work, convolution.calls)
    session.row("convolution", convolution.name, what, time_us, "us", f"{convolution.flop / time_us / 1e6:.0f} TFLOP/s")
    return time_us


# --- Tilings ---


def sweep(session: Session, found: Sequence[Convolution]) -> None:
    """Every tiling at every shape, the best last; results are held to those of the tiling that is checked."""
    jobs = [(convolution.case, tile) for convolution in found for tile in tilings(session)]
    if session.on_gpu:
        started = time.monotonic()
        failed = compiled_ahead(jobs)
        session.row("build", "sweep", f"{len(jobs)} kernels, {failed} failed", time.monotonic() - started, "s")
    for convolution in found:
        with session.part(convolution.name):
            checked(session, convolution)
            case = convolution.case
            inputs = make_inputs(case, session.device)
            plain = work_of(dataclasses.replace(case, out_dtype=None), inputs)
            wanted, chosen = plain(), kernels.tiling
            times = {}
            for tile in tilings(session):
                kernels.tiling = lambda *_, tile=tile: tile
                try:
                    error = relative_rms(plain(), wanted)
                    # Two orders of sums, each rounded to bf16.
                    if not error <= 2 * 2.0**-8:
                        raise AssertionError(f"relative RMS {error:.3g} from the chosen tiling")
                    times[tile] = timed(session, convolution, named(tile), work_of(case, inputs))
                except Exception as error:
                    note = f"{type(error).__name__}: {str(error)[:120]}".replace("\n", " ")
                    session.row("failed", convolution.name, named(tile), 1, "failure", note)
                finally:
                    kernels.tiling = chosen
            if times:
                best = min(times, key=lambda tile: times[tile])
                session.row("best", convolution.name, named(best), times[best], "us")


def tilings(session: Session) -> list[kernels.Tiling]:
    """Those to try; two in a dry run."""
    return [kernels.Tiling(*numbers) for numbers in (TILINGS if session.on_gpu else TILINGS[:2])]


def compiled_ahead(jobs: Sequence[tuple[Case, kernels.Tiling]]) -> int:
    """Compile into Triton's cache, which the timing then finds; returns how many kernels could not be."""
    workers = max(1, min(16, (os.cpu_count() or 1)))
    context = multiprocessing.get_context("spawn")
    both = {(dataclasses.replace(case, out_dtype=kind), tile) for case, tile in jobs for kind in (None, case.out_dtype)}
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return sum(not ok for ok in pool.map(_compile, sorted(both, key=str)))


def _compile(job: tuple[Case, kernels.Tiling]) -> bool:
    """In a process of its own: the kernel of a case, for this GPU, without running it."""
    case, tile = job
    inputs = make_inputs(dataclasses.replace(case, height=1, width=1), "cpu")
    scale = None if case.out_dtype is None else torch.ones(())
    x, *rest = arguments(case, inputs, scale)[:6]
    x = torch.empty((case.batch, case.height, case.width, case.inputs), dtype=x.dtype, device="meta")
    out = torch.empty((*x.shape[:-1], case.outputs), dtype=case.out_dtype or case.dtype, device="meta")
    virtual = (x, *(None if t is None else t.to("meta") for t in rest), out)
    numbers, constants = kernels.launch(virtual, case.silu, case.dtype, tile)
    pointers = [x if t is None else t for t in virtual]
    try:
        kernels.scaled_convolution_kernel.warmup(*pointers, *numbers, grid=(1,), **constants)
    except Exception as error:
        print(f"not compiled: {case} {named(tile)}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return False
    return True


def named(tile: kernels.Tiling) -> str:
    """ "128x128x128 w4 s3 p32": pixels, channels and depth, warps, loads in flight, channels finished at a time."""
    shape = f"{tile.pixels}x{tile.channels}x{tile.depth}"
    return f"{shape} w{tile.num_warps} s{tile.num_stages} p{tile.part_channels}"


# --- The command ---


def main() -> int:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time every tiling instead of cuDNN")
    parser.add_argument("--stages", nargs="+", default=["0", "1", "2"], choices=tuple(STAGES))
    parser.add_argument("--side", type=int, default=1024, help="picture side in pixels")
    parser.add_argument("--precisions", nargs="+", default=["fp8"], choices=tuple(FACTORS))
    parser.add_argument(
        "--budget-s", type=float, default=540.0, help="start no further convolution after this many seconds"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--commit", default="", help="what the rows call the commit, where git cannot tell")
    parser.add_argument("--output", type=Path, default=Path("scaled_convolution.csv"))
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: TRITON_INTERPRET=1 and --device cpu run the script's logic without one", file=sys.stderr)
        return 1
    if chosen.device == "cpu" and not kernels.ON_CPU:
        print("--device cpu runs kernels in Triton's interpreter: set TRITON_INTERPRET=1", file=sys.stderr)
        return 1
    found = [*convolutions(chosen.stages, chosen.side, chosen.precisions)]
    with chosen.output.open("w", newline="") as file, torch.no_grad():
        session = Session.begin(chosen, file)
        try:
            (sweep if chosen.sweep else table)(session, found)
        except OutOfTime as error:
            print(f"out of time before: {error}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
