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

import dataclasses
import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from inductor_profile import Session, operator_time
from tilings import Tiling, Work, command_parser, compile_ahead, compiled, compiles, hold_to, measure, try_tilings
from torch.nn import functional as F

from sana_kernels.machine import shared_bytes
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
    (128, 256, 64, 8, 4, 64),
    (128, 256, 128, 8, 3, 64),
    (128, 256, 128, 8, 4, 64),
    (256, 128, 128, 8, 3, 32),
    (256, 128, 128, 8, 3, 64),
    (256, 128, 128, 8, 4, 32),
    (256, 128, 64, 8, 4, 32),
    (256, 128, 64, 8, 4, 64),
    (256, 64, 128, 4, 3, 32),
    (64, 256, 128, 4, 3, 64),
    (64, 128, 128, 4, 4, 64),
)
_FLOP_PER_GRAPH = 4e12
_CHECKED_ROWS = 5


@dataclasses.dataclass(frozen=True)
class Convolution(ABC):
    """One of the decoder: its name with stage and picture side, and the case of its kernel."""

    name: str
    case: Any
    kernels: ClassVar[Any]
    kernel: ClassVar[Any]
    # Products for each result and input channel.
    taps: ClassVar[int]

    @property
    def flop(self) -> float:
        """Of one call."""
        case = self.case
        results = case.batch * case.height * case.width * case.outputs * (4 if self.kind == "upsample" else 1)
        return 2.0 * results * self.taps * case.inputs

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
    kernels, kernel, taps = residual_kernels, residual_kernels.scaled_convolution_kernel, 9
    verifiers = (residual_testing.verify, residual_testing.verify_codes)

    def tensors(self, device: str, height: int | None = None) -> tuple[torch.Tensor | None, ...]:
        case = dataclasses.replace(self.case, height=height or self.case.height)
        inputs = residual_testing.make_inputs(case, device)
        return *inputs.tensors, inputs.bias

    def forward(self, tensors: Sequence[torch.Tensor | None], *, codes: bool) -> torch.Tensor:
        case = self.case
        written = codes and case.out_dtype is not None
        scale = scale_on(tensors[0].device) if written else None
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
    kernels, kernel, taps = upsample_kernels, upsample_kernels.upsample_convolution_kernel, 4
    verifiers = (upsample_testing.verify, upsample_testing.verify_codes)

    def tensors(self, device: str, height: int | None = None) -> tuple[torch.Tensor | None, ...]:
        case = dataclasses.replace(self.case, height=height or self.case.height)
        return (*upsample_testing.make_inputs(case, device)[0],)

    def forward(self, tensors: Sequence[torch.Tensor | None], *, codes: bool) -> torch.Tensor:
        scale = scale_on(tensors[0].device) if codes else None
        return self.kernels.forward(*tensors, scale, self.case.out_dtype if codes else None)[0]

    def peers(self, session: Session, tensors: Sequence[torch.Tensor | None]) -> Mapping[str, Work]:
        x, weight, bias = (t for t in tensors if t is not None)
        case, scale = self.case, scale_on(x.device)
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


@functools.cache
def scale_on(device: torch.device) -> torch.Tensor:
    """That of the codes; made once, as a copy to the device cannot be part of a graph."""
    return torch.tensor(0.01, device=device)


def virtual(dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    """A tensor without values."""
    return torch.empty(sizes, dtype=dtype, device="meta")


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
            _compare(session, convolution)


def _compare(session: Session, convolution: Convolution) -> None:
    checked(session, convolution)
    tensors = convolution.tensors(session.device)
    name = f"triton {named(chosen_tiling(convolution, tensors[0].device))}"
    ours = timed(session, convolution, name, lambda: convolution.forward(tensors, codes=True))
    peers = convolution.peers(session, tensors)
    times = {name: timed(session, convolution, name, work) for name, work in peers.items()}
    first = next(iter(times))
    session.row("speedup", convolution.name, f"{first} / triton", times[first] / ours, "x")


def chosen_tiling(convolution: Convolution, device: torch.device) -> Tiling:
    """What the kernel itself takes."""
    case = convolution.case
    pixels = case.batch * case.height * case.width
    arguments = (pixels, case.outputs, case.dtype) if convolution.kind == "upsample" else (pixels, case.outputs)
    return convolution.kernels.tiling(*arguments, shared_bytes(device))


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
    jobs = [
        (convolution, tile, codes)
        for convolution in found
        for tile in tilings(session, convolution)
        for codes in (False, True)
        if not codes or convolution.case.out_dtype is not None
    ]
    compile_ahead(session, _compile, jobs)
    for convolution in found:
        with session.part(convolution.name):
            _sweep(session, convolution)


def _sweep(session: Session, convolution: Convolution) -> None:
    checked(session, convolution)
    tensors = convolution.tensors(session.device)
    wanted = convolution.forward(tensors, codes=False)

    def time_us(tile: Tiling) -> float:
        hold_to(wanted, convolution.forward(tensors, codes=False))
        return timed(session, convolution, named(tile), lambda: convolution.forward(tensors, codes=True))

    try_tilings(session, convolution.name, convolution.kernels, tilings(session, convolution), named, time_us)


def tilings(session: Session, convolution: Convolution) -> list[Tiling]:
    """Those to try; two in a dry run."""
    itemsize = convolution.case.dtype.itemsize if convolution.kind == "upsample" else 1
    made = convolution.kernels.Tiling
    return [
        made(pixels, channels, depth // itemsize, *rest)
        for pixels, channels, depth, *rest in (TILINGS if session.on_gpu else TILINGS[:2])
    ]


def _compile(job: tuple[Convolution, Tiling, bool]) -> bool:
    """In a process of its own: the kernel of a case."""
    convolution, tile, codes = job
    arguments, constants = convolution.launch(tile, codes=codes)
    return compiles(convolution.kernel, arguments, constants, f"{convolution.name} {named(tile)}")


def named(tile: Tiling) -> str:
    """ "128x128x128 w4 s3 p32": pixels, channels and depth, warps, loads in flight, channels finished at a time."""
    shape = f"{tile.pixels}x{tile.channels}x{tile.depth}"
    return f"{shape} w{tile.num_warps} s{tile.num_stages} p{tile.part_channels}"


# --- The command ---


def main() -> int:
    """Measure what is asked for."""
    parser = command_parser(__doc__, "decoder_convolutions", instead_of="cuDNN")
    parser.add_argument("--kinds", nargs="+", default=["upsample", "residual"], choices=("upsample", "residual"))
    parser.add_argument("--stages", nargs="+", default=["0", "1", "2"], choices=tuple(STAGES))
    parser.add_argument("--side", type=int, default=1024, help="picture side in pixels")
    parser.add_argument("--precisions", nargs="+", default=["fp8"], choices=tuple(FACTORS))
    chosen = parser.parse_args()
    found = [*convolutions(chosen.stages, chosen.side, chosen.precisions, chosen.kinds)]
    return measure(chosen, lambda session: (sweep if chosen.sweep else table)(session, found))


if __name__ == "__main__":
    sys.exit(main())
