"""Time the text encoder's attention on this GPU beside its reference, or find the best tilings.

    python benchmarks/gemma_attention.py             # captions of a Gemma-2-2B behind their instruction
    python benchmarks/gemma_attention.py --sweep     # the kernel alone, every tiling
    TRITON_INTERPRET=1 python benchmarks/gemma_attention.py --device cpu    # a dry run with a tiny head

The kernel is held to its fp64 oracle before it is timed, through torch.compile as in the engines, with what rotates the
keys before the launch and what puts its parts together behind it; a sweep leaves out the latter. Its peers are the
reference, eager and through torch.compile: library attention does not know capped scores. The floor beside a time is
that of the products at this run's bf16 ceiling; all that is read and written fits the cache.
"""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from inductor_profile import Session, ceilings, operator_time
from tilings import command_parser, measure, try_tilings

from sana_kernels.gemma_attention import gemma_attention
from sana_kernels.gemma_attention import triton as kernels
from sana_kernels.gemma_attention.api import Impl
from sana_kernels.gemma_attention.testing import Case, make_inputs, verify

# Captions of all positions and of those that most end within, behind the instruction's kept keys.
CASES = {"caption": Case(304, 208, 300), "short caption": Case(128, 208, 120)}
TINY = {"tiny": Case(40, 33, 37, 4, 2, 32)}
# Positions, keys, warps, loads in flight.
TILINGS = (
    (16, 32, 4, 2),
    (16, 64, 4, 2),
    (32, 32, 4, 2),
    (32, 32, 4, 3),
    (32, 64, 4, 2),
    (32, 64, 8, 2),
    (64, 32, 4, 2),
    (64, 64, 8, 2),
)
PARTS = (1, 2, 3, 4, 6, 8)


def table(session: Session, name: str, case: Case) -> None:
    """The case by our kernel and by the reference."""
    finding = verify(case, session.device, "triton")[0]
    session.row("parity", name, "out", finding.relative_rms, "rel rms", f"bound {finding.bound:.3g}")
    tile = named(kernels.tiling(case.tokens, case.heads))
    ours = timed(session, name, case, f"triton {tile}", operator("triton", compiled=session.on_gpu))
    timed(session, name, case, "eager", operator("reference"))
    compiled = timed(session, name, case, "torch.compile", operator("reference", compiled=True))
    session.row("speedup", name, "torch.compile / triton", compiled / ours, "x")


def sweep(session: Session, name: str, case: Case) -> None:
    """Every tiling, each held to the oracle, the best three last."""

    def time_us(tile: kernels.Tiling) -> float:
        verify(case, session.device, "triton")
        return timed(session, name, case, named(tile), kernels.in_parts)

    tiles = [kernels.Tiling(*shape, parts) for shape, parts in itertools.product(TILINGS, PARTS)]
    tiles = tiles if session.on_gpu else tiles[:2]
    try_tilings(session, name, kernels, tiles, named, time_us, best=3)


def operator(impl: Impl, *, compiled: bool = False) -> Callable[..., object]:
    """The op by `impl`, arguments as in `kernels.forward`."""

    def work(*arguments: Any) -> torch.Tensor:
        *tensors, heads, scale, soft_cap = arguments
        return gemma_attention(*tensors, heads=heads, scale=scale, soft_cap=soft_cap, impl=impl)

    torch._dynamo.reset()  # or it gives up after a few shapes
    return torch.compile(work, fullgraph=True, dynamic=False) if compiled else work


def timed(session: Session, name: str, case: Case, what: str, work: Callable[..., object]) -> float:
    """Time `work` and write the row; microseconds."""
    arguments = (*make_inputs(case, session.device), case.heads, case.scale, case.soft_cap)
    time_us = operator_time(session, lambda: work(*arguments))
    # Every position sees the kept keys and half of the own ones, scores and values.
    pairs = case.tokens * (case.past + case.tokens / 2)
    flop = 4.0 * case.heads * case.head_dim * pairs
    floor = f", floor {flop / session.ceilings['bf16'] / 1e6:.2f} us" if session.ceilings else ""
    session.row("attention", name, what, time_us, "us", f"{flop / time_us / 1e6:.0f} TFLOP/s{floor}")
    return time_us


def named(tile: kernels.Tiling) -> str:
    """ "32x64 w4 s2 p4": positions and keys, warps, loads in flight, parts of the keys."""
    return f"{tile.positions}x{tile.keys} w{tile.num_warps} s{tile.num_stages} p{tile.parts}"


def main() -> int:
    """Measure what is asked for."""
    parser = command_parser(__doc__, "gemma_attention", instead_of="the reference", budget_s=300.0)
    arguments = parser.parse_args()

    def work(session: Session) -> None:
        ceilings(session)
        for name, case in (CASES if session.on_gpu else TINY).items():
            with session.part(name):
                (sweep if arguments.sweep else table)(session, name, case)

    return measure(arguments, work)


if __name__ == "__main__":
    sys.exit(main())
