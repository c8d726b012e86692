"""Time the text encoder's linear layers on this GPU by our kernel and by the library, or find the best tilings.

    python benchmarks/weight_only_linear.py                 # every layer of a Gemma-2-2B, a caption's 304 rows
    python benchmarks/weight_only_linear.py --sweep         # the kernel alone, every tiling
    TRITON_INTERPRET=1 python benchmarks/weight_only_linear.py --device cpu --sizes tiny    # a dry run

Our kernel is held to its fp64 oracle at every shape before it is timed. The library multiplies bf16 weights: widened
before each product in a pass that torch.compile makes, which is what the kernel replaces, and widened once, which takes
twice the memory. Weights are taken in turn from as many copies as do not fit the cache. The floor beside a time is that
of the product at this run's bf16 ceiling. gate_up is timed with the gate behind it.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from inductor_profile import Session, catalogue, ceilings, operator_time
from tilings import command_parser, compile_ahead, compiles, hold_to, measure, try_tilings

from sana_export.inductor.linear import INT8, LinearForm, gated_linear, linear
from sana_export.inductor.text_encoder import TextEncoderLayout
from sana_kernels.weight_only_linear import triton as kernels
from sana_kernels.weight_only_linear.testing import Case, Inputs, make_inputs, verify, verify_exact_sums
from sana_runtime.contract import CAPTION_LENGTH
from sana_runtime.inductor_engine import prefer_little_memory

# As many rows as the text encoder computes per prompt.
ROWS = -(-CAPTION_LENGTH // 16) * 16
# Rows, columns, depth, warps, loads in flight.
TILINGS = (
    (64, 64, 64, 4, 4),
    (64, 64, 128, 4, 3),
    (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (64, 128, 128, 4, 2),
    (64, 128, 128, 4, 3),
    (64, 128, 128, 8, 3),
    (64, 256, 64, 4, 3),
    (64, 256, 64, 8, 3),
    (128, 64, 64, 4, 3),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 128, 8, 3),
    (128, 256, 64, 8, 3),
)
PARTS = (1, 2, 3, 4, 6)
# More than the cache of any GPU.
_BYTES_IN_TURN = 3e8
_SUM_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer's name and case."""

    name: str
    case: Case

    @property
    def flop(self) -> float:
        """Of one call."""
        return 2.0 * self.case.tokens * self.case.inputs * self.case.outputs


def layers(size: str) -> Iterator[Layer]:
    """Of one layer of the text encoder."""
    table = catalogue()
    config = {**table["text_encoder_common"], **table["text_encoders"]["tiny" if size == "tiny" else "gemma-2-2b"]}
    layout = TextEncoderLayout.from_upstream(config, 512, torch.bfloat16)
    channels, hidden, queries = layout.channels, config["intermediate_size"], layout.heads * layout.head_dim
    shapes = {
        "qkv": (queries + 2 * layout.key_heads * layout.head_dim, channels),
        "o_proj": (channels, queries),
        "gate_up": (2 * hidden, channels),
        "down_proj": (channels, hidden),
    }
    rows = ROWS if size != "tiny" else 20
    for name, (outputs, inputs) in shapes.items():
        yield Layer(name, Case(1, rows, inputs, outputs, gated=name == "gate_up"))


def table(session: Session, found: Sequence[Layer]) -> None:
    """Every layer by our kernel and by the library, and what is gained."""
    ceilings(session)
    sums = dict.fromkeys(("ours", "widened", "wide"), 0.0)
    for layer in found:
        with session.part(layer.name):
            finding = verify(layer.case, session.device, "triton")[0]
            session.row("parity", layer.name, "y", finding.relative_rms, "rel rms", f"bound {finding.bound:.3g}")
            inputs = make_inputs(layer.case, session.device)
            case = layer.case
            tile = kernels.tiling(case.tokens, case.outputs, case.inputs, case.gated)
            ours = timed(session, layer, f"triton {named(tile)}", in_turn(inputs, own_product(case)))
            library = compiled_library(session, case, INT8)
            widened = timed(session, layer, "library, widened first", in_turn(inputs, library))
            library = compiled_library(session, case, None)
            wide = timed(session, layer, "library, bf16 weights", in_turn(inputs, library, torch.bfloat16))
            for name, value in zip(sums, (ours, widened, wide), strict=True):
                sums[name] += value
            session.row("speedup", layer.name, "library, widened first / triton", widened / ours, "x")
    session.row("sum", "layer", "triton", sums["ours"], "us")
    session.row("sum", "layer", "library, widened first", sums["widened"], "us")
    session.row("sum", "layer", "library, bf16 weights", sums["wide"], "us")


def own_product(case: Case) -> Callable[[Inputs], torch.Tensor]:
    """Our kernel's launch without what dispatches to it, and the sum of its parts."""
    return lambda inputs: kernels.forward(*inputs, case.gated)


def compiled_library(
    session: Session, case: Case, weight_dtype: torch.dtype | None
) -> Callable[[Inputs], torch.Tensor]:
    """What the pieces of the target `inductor` compute without our kernel; without a weight dtype nothing is scaled."""
    torch._dynamo.reset()  # or it gives up after a few shapes
    compute = gated_linear if case.gated else linear

    def work(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        tensors = {"l.weight": weight, "l.weight_scale": scale}
        return compute(x, tensors, "l", LinearForm(False, weight_dtype), x.dtype)

    fast = torch.compile(work, fullgraph=True, dynamic=False) if session.on_gpu else work
    return lambda inputs: fast(inputs.x, inputs.weight, inputs.weight_scale)


def in_turn(
    inputs: Inputs, work: Callable[[Inputs], torch.Tensor], dtype: torch.dtype = INT8
) -> Callable[[], torch.Tensor]:
    """A call with the next copy of the weights, so that they come from memory as in the network."""
    copies = max(1, min(32, int(_BYTES_IN_TURN / inputs.weight.numel()))) if inputs.x.is_cuda else 1
    weights = itertools.cycle([inputs.weight.to(dtype, copy=True) for _ in range(copies)])
    return lambda: work(inputs._replace(weight=next(weights)))


def timed(session: Session, layer: Layer, what: str, work: Callable[[], object]) -> float:
    """Time it and write the row; microseconds."""
    time_us = operator_time(session, work)
    note = f"{layer.flop / time_us / 1e6:.0f} TFLOP/s"
    if session.ceilings:
        floor = layer.flop / session.ceilings["bf16"] / 1e6
        note += f", floor of the product {floor:.1f} us"
    session.row("layer", layer.name, what, time_us, "us", note)
    return time_us


# --- Tilings ---


def sweep(session: Session, found: Sequence[Layer]) -> None:
    """Every tiling at every shape, the best last; results are held to those of the tiling that is checked."""
    compile_ahead(session, _compile, [(layer.case, tile) for layer in found for tile in tilings(session, layer.case)])
    for layer in found:
        with session.part(layer.name):
            _sweep(session, layer)


def _sweep(session: Session, layer: Layer) -> None:
    verify(layer.case, session.device, "triton")
    inputs, product = make_inputs(layer.case, session.device), own_product(layer.case)
    wanted = product(inputs)

    def time_us(tile: kernels.Tiling) -> float:
        hold_to(wanted, product(inputs))
        verify_exact_sums(layer.case, session.device, "triton")
        return timed(session, layer, named(tile), in_turn(inputs, product))

    try_tilings(session, layer.name, kernels, tilings(session, layer.case), named, time_us, best=3)


def tilings(session: Session, case: Case) -> list[kernels.Tiling]:
    """Those to try for a case; the first few in a dry run."""
    found = []
    for (rows, columns, depth, warps, stages), parts in itertools.product(TILINGS, PARTS):
        # Parts are not worth it where their sums are more than four times as large as the weights.
        large = parts * case.tokens * _SUM_BYTES > 4 * case.inputs
        if case.inputs % (parts * depth) == 0 and (parts == 1 or not (large or case.gated)):
            found.append(kernels.Tiling(rows, columns, depth, warps, stages, parts))
    return found if session.on_gpu else found[:2]


def _compile(job: tuple[Case, kernels.Tiling]) -> bool:
    """In a process of its own: the kernel of a case, for this GPU, without running it."""
    case, tile = job
    x = torch.empty(1, case.tokens, case.inputs, dtype=case.dtype, device="meta")
    weight = torch.empty(case.outputs, case.inputs, dtype=INT8, device="meta")
    scale = torch.empty(case.outputs, device="meta")
    dtype = case.dtype if tile.parts == 1 else torch.float32
    out = torch.empty(tile.parts, case.tokens, case.outputs // (1 + case.gated), dtype=dtype, device="meta")
    tensors = (x, weight, scale, None, out)
    numbers, constants = kernels.launch(tensors, tile, case.gated)
    pointers = [x if t is None else t for t in tensors]
    return compiles(kernels.weight_only_linear_kernel, (*pointers, *numbers), constants, f"{case} {named(tile)}")


def named(tile: kernels.Tiling) -> str:
    """ "64x128x64 w4 s3 p1": rows, columns and depth, warps, loads in flight, parts of the depth."""
    return f"{tile.rows}x{tile.columns}x{tile.depth} w{tile.num_warps} s{tile.num_stages} p{tile.parts}"


# --- The command ---


def main() -> int:
    """Measure what is asked for."""
    parser = command_parser(__doc__, "weight_only_linear", instead_of="the library")
    parser.add_argument("--sizes", default="gemma-2-2b", choices=("gemma-2-2b", "tiny"))
    parser.add_argument("--layers", nargs="+", help="only these: qkv, o_proj, gate_up, down_proj")
    chosen = parser.parse_args()
    prefer_little_memory()  # as the engines run
    found = [layer for layer in layers(chosen.sizes) if layer.name in (chosen.layers or layer.name)]
    return measure(chosen, lambda session: (sweep if chosen.sweep else table)(session, found))


if __name__ == "__main__":
    sys.exit(main())
