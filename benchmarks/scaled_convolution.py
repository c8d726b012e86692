"""Time the 3x3 convolutions of the decoder's residual blocks by our kernel and by cuDNN, or find the best tilings.

    python benchmarks/scaled_convolution.py                            # every stage with FP8 convolutions, 1024 px
    python benchmarks/scaled_convolution.py --sweep --precisions fp8   # the kernel alone, every tiling
    TRITON_INTERPRET=1 python benchmarks/scaled_convolution.py --device cpu --side 32 --stages tiny     # a dry run

Our kernel is held to its fp64 oracle before it is timed, at every width and number of channels and a few rows; the
results of other tilings are held to its result. The peer is what diffusers' decoder computes, compiled: cuDNN's
convolution in bf16, channels last, and for the first convolution of a block a pass for SiLU. Times are of CUDA graphs
of many calls, as in `inductor_profile.py`, whose rows these are. `--sweep` compiles in parallel processes first.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from inductor_profile import Session, operator_time
from tilings import command_parser, compile_ahead, compiles, hold_to, measure, try_tilings
from torch.nn import functional as F

from sana_kernels.machine import shared_bytes
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
            case, inputs = convolution.case, make_inputs(convolution.case, session.device)
            tile = kernels.tiling(inputs.x.shape[:-1].numel(), case.outputs, shared_bytes(inputs.x.device))
            ours = timed(session, convolution, f"triton {named(tile)}", work_of(case, inputs))
            theirs = timed(session, convolution, "cuDNN bf16 and pass", cudnn(session, case, inputs))
            timed(session, convolution, "cuDNN bf16 alone", cudnn(session, case, inputs, alone=True))
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
    cases = {dataclasses.replace(c.case, out_dtype=kind) for c in found for kind in (None, c.case.out_dtype)}
    compile_ahead(session, _compile, [(case, tile) for case in sorted(cases, key=str) for tile in tilings(session)])
    for convolution in found:
        with session.part(convolution.name):
            _sweep(session, convolution)


def _sweep(session: Session, convolution: Convolution) -> None:
    checked(session, convolution)
    case, inputs = convolution.case, make_inputs(convolution.case, session.device)
    plain, work = work_of(dataclasses.replace(case, out_dtype=None), inputs), work_of(case, inputs)
    wanted = plain()

    def time_us(tile: kernels.Tiling) -> float:
        hold_to(wanted, plain())
        return timed(session, convolution, named(tile), work)

    try_tilings(session, convolution.name, kernels, tilings(session), named, time_us)


def tilings(session: Session) -> list[kernels.Tiling]:
    """Those to try; two in a dry run."""
    return [kernels.Tiling(*numbers) for numbers in (TILINGS if session.on_gpu else TILINGS[:2])]


def _compile(job: tuple[Case, kernels.Tiling]) -> bool:
    """In a process of its own: the kernel of a case."""
    case, tile = job
    inputs = make_inputs(dataclasses.replace(case, height=1, width=1), "cpu")
    scale = None if case.out_dtype is None else torch.ones(())
    x, *rest = arguments(case, inputs, scale)[:6]
    x = torch.empty((case.batch, case.height, case.width, case.inputs), dtype=x.dtype, device="meta")
    out = torch.empty((*x.shape[:-1], case.outputs), dtype=case.out_dtype or case.dtype, device="meta")
    virtual = (x, *(None if t is None else t.to("meta") for t in rest), out)
    numbers, constants = kernels.launch(virtual, case.silu, case.dtype, tile)
    pointers = [x if t is None else t for t in virtual]
    return compiles(kernels.scaled_convolution_kernel, [*pointers, *numbers], constants, f"{case} {named(tile)}")


def named(tile: kernels.Tiling) -> str:
    """ "128x128x128 w4 s3 p32": pixels, channels and depth, warps, loads in flight, channels finished at a time."""
    shape = f"{tile.pixels}x{tile.channels}x{tile.depth}"
    return f"{shape} w{tile.num_warps} s{tile.num_stages} p{tile.part_channels}"


# --- The command ---


def main() -> int:
    """Measure what is asked for."""
    parser = command_parser(__doc__, "scaled_convolution", instead_of="cuDNN")
    parser.add_argument("--stages", nargs="+", default=["0", "1", "2"], choices=tuple(STAGES))
    parser.add_argument("--side", type=int, default=1024, help="picture side in pixels")
    parser.add_argument("--precisions", nargs="+", default=["fp8"], choices=tuple(FACTORS))
    chosen = parser.parse_args()
    found = [*convolutions(chosen.stages, chosen.side, chosen.precisions)]
    return measure(chosen, lambda session: (sweep if chosen.sweep else table)(session, found))


if __name__ == "__main__":
    sys.exit(main())
