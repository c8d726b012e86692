"""Time the decoder's convolutions by our kernels and by cuDNN, or find the best tilings.

    python benchmarks/decoder_convolutions.py                            # every stage with FP8 convolutions, 1024 px
    python benchmarks/decoder_convolutions.py --sweep --kinds upsample   # the kernel alone, every tiling
    TRITON_INTERPRET=1 python benchmarks/decoder_convolutions.py --device cpu --side 32 --stages tiny    # a dry run

Kind `residual`: the 3x3 convolutions of residual blocks over codes. The peer is what diffusers' decoder computes,
compiled: cuDNN's convolution in bf16, channels last, and for the first convolution of a block a pass for SiLU. Kind
`upsample`: the upsampling in front of them, which writes their codes. The peers are the same phases by cuDNN with a
compiled pass behind them, and the repeated image by cuDNN, as diffusers has it.

Our kernels are held to their fp64 oracles before they are timed, at every width and number of channels and a few rows;
the results of other tilings are held to theirs. Times are of CUDA graphs of many calls, as in `inductor_profile.py`,
whose rows these are. `--sweep` compiles in parallel processes first.
"""

import argparse
import dataclasses
import multiprocessing
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
from inductor_profile import OutOfTime, Session, operator_time, relative_rms
from torch.nn import functional as F

from sana_kernels.machine import ON_CPU
from sana_kernels.scaled_convolution import testing as residual_testing
from sana_kernels.scaled_convolution import triton as residual_kernels
from sana_kernels.upsample_convolution import testing as upsample_testing
from sana_kernels.upsample_convolution import triton as upsample_kernels
from sana_kernels.upsample_convolution.reference import finish

# Stage -> picture side over that of the image, its channels, those of the stage before; of dc-ae-f32c32-sana-1.1.
STAGES = {"0": (1, 128, 256), "1": (2, 256, 512), "2": (4, 512, 512), "tiny": (8, 16, 32)}
FACTORS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
# Pixels, channels, input bytes at a time, warps, loads in flight, channels finished at a time.
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

Tiling = Any  # that of either kernel
Work = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Convolution(ABC):
    """One of the decoder: its name with stage and picture side, and the case of its kernel."""

    name: str
    case: Any
    kernels: ClassVar[Any]
    kernel: ClassVar[Any]
    # Of the products, in fp32 sums of their size: how many for each result.
    depth: ClassVar[int]

    @property
    def flop(self) -> float:
        """Of one call."""
        case = self.case
        results = case.batch * case.height * case.width * case.outputs * (4 if self.kind == "upsample" else 1)
        return 2.0 * results * self.depth * case.inputs

    @property
    def calls(self) -> int:
        """How many make a graph: many short ones, few long ones."""
        return max(2, min(20, int(_FLOP_PER_GRAPH / self.flop)))

    @property
    @abstractmethod
    def kind(self) -> str:
        """As the command names it."""

    @property
    @abstractmethod
    def verifiers(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Those of a result and of codes."""

    @abstractmethod
    def tensors(self, device: str, height: int | None = None) -> tuple[torch.Tensor | None, ...]:
        """x, weight and the others in the order of the forward; `height` instead of the case's."""

    @abstractmethod
    def forward(self, tensors: Sequence[torch.Tensor | None], *, codes: bool) -> torch.Tensor:
        """Our kernel's launch without what dispatches to it: the result, also where `codes` are written beside it."""

    @abstractmethod
    def peers(self, session: Session, tensors: Sequence[torch.Tensor | None]) -> Mapping[str, Work]:
        """What does the same, the one to compare with first."""

    @abstractmethod
    def launch(self, tile: Tiling, *, codes: bool) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Arguments without values and constants of the kernel, to compile it."""


class Residual(Convolution):
    """Of a residual block: conv1 has bias, SiLU and codes behind it; conv2 nothing."""

    kind = "residual"
    kernels, kernel, depth = residual_kernels, residual_kernels.scaled_convolution_kernel, 9
    verifiers = (residual_testing.verify, residual_testing.verify_codes)

    def tensors(self, device: str, height: int | None = None) -> tuple[torch.Tensor | None, ...]:
        case = dataclasses.replace(self.case, height=height or self.case.height)
        inputs = residual_testing.make_inputs(case, device)
        return *inputs.tensors, inputs.bias

    def forward(self, tensors: Sequence[torch.Tensor | None], *, codes: bool) -> torch.Tensor:
        case = self.case
        written = codes and case.out_dtype is not None
        scale = torch.tensor(0.01, device=tensors[0].device) if written else None
        return self.kernels.forward(*tensors, scale, case.silu, case.dtype, case.out_dtype if written else None)

    def peers(self, session: Session, tensors: Sequence[torch.Tensor | None]) -> Mapping[str, Work]:
        x, weight = (t.to(torch.bfloat16).permute(0, 3, 1, 2) for t in tensors[:2])

        def alone() -> torch.Tensor:
            return F.conv2d(x, weight, tensors[4], padding=1)

        activated = compiled(session, lambda: F.silu(alone())) if self.case.silu else alone
        return {"cuDNN bf16 and pass": activated, "cuDNN bf16 alone": alone}

    def launch(self, tile: Tiling, *, codes: bool) -> tuple[Sequence[Any], Mapping[str, Any]]:
        case = self.case
        x, *rest = self.tensors("cpu", height=1)
        out_dtype = case.out_dtype if codes else None
        x = virtual(x.dtype, case.batch, case.height, case.width, case.inputs)
        out = virtual(out_dtype or case.dtype, *x.shape[:-1], case.outputs)
        scale = virtual(torch.float32) if out_dtype else None
        given = (x, *(None if t is None else t.to("meta") for t in rest), scale, out)
        numbers, constants = self.kernels.launch(given, case.silu, case.dtype, tile)
        return [*(x if t is None else t for t in given), *numbers], constants


class Upsample(Convolution):
    """In front of a stage's first residual block, whose codes it writes beside its result."""

    kind = "upsample"
    kernels, kernel, depth = upsample_kernels, upsample_kernels.upsample_convolution_kernel, 4
    verifiers = (upsample_testing.verify, upsample_testing.verify_codes)

    def tensors(self, device: str, height: int | None = None) -> tuple[torch.Tensor | None, ...]:
        case = dataclasses.replace(self.case, height=height or self.case.height)
        return (*upsample_testing.make_inputs(case, device)[0],)

    def forward(self, tensors: Sequence[torch.Tensor | None], *, codes: bool) -> torch.Tensor:
        scale = torch.tensor(0.01, device=tensors[0].device) if codes else None
        return self.kernels.forward(*tensors, scale, self.case.out_dtype if codes else None)[0]

    def peers(self, session: Session, tensors: Sequence[torch.Tensor | None]) -> Mapping[str, Work]:
        x, weight, bias = (t for t in tensors if t is not None)
        case, scale = self.case, torch.tensor(0.01, device=session.device)
        shape = (case.outputs, case.inputs, 3, 3)
        whole = torch.randn(shape, device=session.device).to(case.dtype).contiguous(memory_format=torch.channels_last)

        def phases() -> object:
            found = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), padding=1)
            return finish(found.permute(0, 2, 3, 1), x, bias, scale, case.out_dtype)

        def repeated() -> object:
            pixels = x.permute(0, 3, 1, 2)
            shortcut = F.pixel_shuffle(pixels.repeat_interleave(4 * case.outputs // case.inputs, dim=1), 2)
            return F.conv2d(F.interpolate(pixels, scale_factor=2.0, mode="nearest"), whole, bias, padding=1) + shortcut

        return {
            "cuDNN bf16 phases and pass": compiled(session, phases),
            "cuDNN bf16 repeated image": compiled(session, repeated),
        }

    def launch(self, tile: Tiling, *, codes: bool) -> tuple[Sequence[Any], Mapping[str, Any]]:
        case = self.case
        x = virtual(case.dtype, case.batch, case.height, case.width, case.inputs)
        weight, bias = (t.to("meta") for t in self.tensors("cpu", height=1)[1:] if t is not None)
        out = virtual(case.dtype, case.batch, 2 * case.height, 2 * case.width, case.outputs)
        out_dtype = case.out_dtype if codes else None
        written = virtual(out_dtype, *out.shape) if out_dtype else virtual(case.dtype, 0)
        scale = virtual(torch.float32) if out_dtype else x
        pixels = case.batch * case.height * case.width
        pointers = (x, weight, bias, scale, out, written)
        constants = self.kernels.constants(x, out_dtype, tile, case.outputs)
        return (*pointers, pixels, case.height, case.width), constants


def virtual(dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    """A tensor without values."""
    return torch.empty(sizes, dtype=dtype, device="meta")


def compiled(session: Session, work: Work) -> Work:
    """By Inductor where there is a GPU."""
    torch._dynamo.reset()
    return torch.compile(work, fullgraph=True, dynamic=False) if session.on_gpu else work


def convolutions(
    stages: Sequence[str], side: int, precisions: Sequence[str], kinds: Sequence[str]
) -> Iterator[Convolution]:
    """Those of the decoder, upsampling first."""
    for stage in stages:
        share, channels, before = STAGES[stage]
        for precision in precisions:
            factors, size = FACTORS[precision], side // share
            name = f"stage {stage} {side} px {precision}"
            if "upsample" in kinds:
                upsample = upsample_testing.Case(1, size // 2, size // 2, before, channels, out_dtype=factors)
                yield Upsample(f"{name} upsample", upsample)
            if "residual" in kinds:
                case = residual_testing.Case(
                    1,
                    size,
                    size,
                    channels,
                    channels,
                    factors=factors,
                    scales="channel" if precision == "int8" else "tensor",
                    silu=True,
                    out_dtype=factors,
                )
                yield Residual(f"{name} conv1", case)
                yield Residual(f"{name} conv2", dataclasses.replace(case, bias=False, silu=False, out_dtype=None))


# --- Our kernels beside cuDNN ---


def table(session: Session, found: Sequence[Convolution]) -> None:
    """Every convolution by our kernel and by cuDNN, and what is gained."""
    for convolution in found:
        with session.part(convolution.name):
            checked(session, convolution)
            tensors = convolution.tensors(session.device)
            tile = chosen_tiling(convolution)
            ours = timed(
                session, convolution, f"triton {named(tile)}", lambda c=convolution, t=tensors: c.forward(t, codes=True)
            )
            times = {
                name: timed(session, convolution, name, work)
                for name, work in convolution.peers(session, tensors).items()
            }
            first = next(iter(times))
            session.row("speedup", convolution.name, f"{first} / triton", times[first] / ours, "x")


def chosen_tiling(convolution: Convolution) -> Tiling:
    """What the kernel itself takes."""
    case = convolution.case
    pixels = case.batch * case.height * case.width
    if convolution.kind == "upsample":
        return convolution.kernels.tiling(pixels, case.outputs, case.dtype)
    return convolution.kernels.tiling(pixels, case.outputs)


def checked(session: Session, convolution: Convolution) -> None:
    """Hold our kernel to the oracle; AssertionError when it is wrong."""
    case = dataclasses.replace(convolution.case, height=min(convolution.case.height, _CHECKED_ROWS))
    verify, verify_codes = convolution.verifiers
    with torch.enable_grad():  # that of the upsampling holds gradients to the oracle too
        finding = verify(case, session.device, "triton")[0]
    session.row("parity", convolution.name, "y", finding.relative_rms, "rel rms", f"bound {finding.bound:.3g}")
    if case.out_dtype is not None:
        codes = verify_codes(case, session.device, "triton")
        note = f"of {codes.values}, {codes.near_ties} of them next to a tie"
        session.row("parity", convolution.name, "codes that are not the result's", codes.different, "codes", note)


def timed(session: Session, convolution: Convolution, what: str, work: Work) -> float:
    """Time it and write the row; microseconds."""
    time_us = operator_time(session, work, convolution.calls)
    session.row("convolution", convolution.name, what, time_us, "us", f"{convolution.flop / time_us / 1e6:.0f} TFLOP/s")
    return time_us


# --- Tilings ---


def sweep(session: Session, found: Sequence[Convolution]) -> None:
    """Every tiling at every shape, the best last; results are held to those of the tiling that is checked."""
    jobs = [(convolution, tile) for convolution in found for tile in tilings(session, convolution)]
    if session.on_gpu:
        started = time.monotonic()
        failed = compiled_ahead(jobs)
        session.row("build", "sweep", f"{len(jobs)} kernels, {failed} failed", time.monotonic() - started, "s")
    for convolution in found:
        with session.part(convolution.name):
            checked(session, convolution)
            tensors = convolution.tensors(session.device)
            kernels, chosen = convolution.kernels, convolution.kernels.tiling
            wanted = convolution.forward(tensors, codes=False)
            times = {}
            for tile in tilings(session, convolution):
                kernels.tiling = lambda *_, tile=tile: tile
                try:
                    error = relative_rms(convolution.forward(tensors, codes=False), wanted)
                    # Two orders of sums, each rounded to bf16.
                    if not error <= 2 * 2.0**-8:
                        raise AssertionError(f"relative RMS {error:.3g} from the chosen tiling")
                    work = lambda c=convolution, t=tensors: c.forward(t, codes=True)  # noqa: E731
                    times[tile] = timed(session, convolution, named(tile), work)
                except Exception as error:
                    note = f"{type(error).__name__}: {str(error)[:120]}".replace("\n", " ")
                    session.row("failed", convolution.name, named(tile), 1, "failure", note)
                finally:
                    kernels.tiling = chosen
            if times:
                best = min(times, key=lambda tile: times[tile])
                session.row("best", convolution.name, named(best), times[best], "us")


def tilings(session: Session, convolution: Convolution) -> list[Tiling]:
    """Those to try; two in a dry run."""
    itemsize = convolution.case.dtype.itemsize if convolution.kind == "upsample" else 1
    made = convolution.kernels.Tiling
    return [
        made(pixels, channels, depth // itemsize, *rest)
        for pixels, channels, depth, *rest in (TILINGS if session.on_gpu else TILINGS[:2])
    ]


def compiled_ahead(jobs: Sequence[tuple[Convolution, Tiling]]) -> int:
    """Compile into Triton's cache, which the timing then finds; returns how many kernels could not be."""
    workers = max(1, min(16, (os.cpu_count() or 1)))
    context = multiprocessing.get_context("spawn")
    both = [(convolution, tile, codes) for convolution, tile in jobs for codes in (False, True)]
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return sum(not ok for ok in pool.map(_compile, both))


def _compile(job: tuple[Convolution, Tiling, bool]) -> bool:
    """In a process of its own: the kernel of a case, for this GPU, without running it."""
    convolution, tile, codes = job
    if codes and convolution.case.out_dtype is None:
        return True
    arguments, constants = convolution.launch(tile, codes=codes)
    try:
        convolution.kernel.warmup(*arguments, grid=(1,), **constants)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        print(f"not compiled: {convolution.name} {named(tile)}: {reason}", flush=True)
        return False
    return True


def named(tile: Tiling) -> str:
    """ "128x128x128 w4 s3 p32": pixels, channels and depth, warps, loads in flight, channels finished at a time."""
    shape = f"{tile.pixels}x{tile.channels}x{tile.depth}"
    return f"{shape} w{tile.num_warps} s{tile.num_stages} p{tile.part_channels}"


# --- The command ---


def main() -> int:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time every tiling instead of cuDNN")
    parser.add_argument("--kinds", nargs="+", default=["upsample", "residual"], choices=("upsample", "residual"))
    parser.add_argument("--stages", nargs="+", default=["0", "1", "2"], choices=tuple(STAGES))
    parser.add_argument("--side", type=int, default=1024, help="picture side in pixels")
    parser.add_argument("--precisions", nargs="+", default=["fp8"], choices=tuple(FACTORS))
    parser.add_argument(
        "--budget-s", type=float, default=540.0, help="start no further convolution after this many seconds"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--commit", default="", help="what the rows call the commit, where git cannot tell")
    parser.add_argument("--output", type=Path, default=Path("decoder_convolutions.csv"))
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: TRITON_INTERPRET=1 and --device cpu run the script's logic without one", file=sys.stderr)
        return 1
    if chosen.device == "cpu" and not ON_CPU:
        print("--device cpu runs kernels in Triton's interpreter: set TRITON_INTERPRET=1", file=sys.stderr)
        return 1
    found = [*convolutions(chosen.stages, chosen.side, chosen.precisions, chosen.kinds)]
    with chosen.output.open("w", newline="") as file, torch.no_grad():
        session = Session.begin(chosen, file)
        try:
            (sweep if chosen.sweep else table)(session, found)
        except OutOfTime as error:
            print(f"out of time before: {error}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
