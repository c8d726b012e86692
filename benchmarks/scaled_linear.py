"""Time the linear layers of a block on this GPU by our kernel and by the libraries, or find the kernel's best tilings.

    python benchmarks/scaled_linear.py                                # every product of a block, 1024 and 4096 px
    python benchmarks/scaled_linear.py --sweep --precisions fp8       # the kernel alone, every tiling
    TRITON_INTERPRET=1 python benchmarks/scaled_linear.py --device cpu --sizes tiny --sides 64     # a dry run

Our kernel is held to its fp64 oracle at every shape before it is timed; the results of other tilings are held to its
result. The libraries compute what `sana_export.inductor.linear` asks of them; where pointwise work follows the product
(`to_out`: gate, residual and codes; INT8: scales) it goes through torch.compile, as in the block. Times are of CUDA
graphs of many calls over tensors that stay in the cache as far as they fit, as in `inductor_profile.py`, whose rows
these are. `--sweep` compiles in parallel processes first.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from inductor_profile import Session, operator_time, transformer_config
from tilings import command_parser, compile_ahead, compiles, hold_to, measure, try_tilings

from sana_export.inductor.linear import FP8, INT8, LinearForm, linear
from sana_kernels.mix_ffn_depthwise.quantization import narrow
from sana_kernels.scaled_linear import triton as kernels
from sana_kernels.scaled_linear.testing import Case, Inputs, arguments, make_inputs, verify, verify_codes

PRODUCTS = ("qkv", "to_out", "to_q", "conv_inverted", "conv_point")
FACTORS = {"fp8": FP8, "int8": INT8, "bf16": None}
# Rows, columns, bytes of depth, warps, loads in flight, columns finished at a time.
TILINGS = (
    (64, 64, 128, 4, 3, 64),
    (64, 64, 128, 4, 4, 64),
    (64, 64, 256, 4, 3, 64),
    (64, 128, 128, 4, 3, 64),
    (64, 128, 128, 4, 3, 32),
    (64, 128, 128, 4, 4, 64),
    (64, 128, 64, 4, 6, 64),
    (64, 256, 128, 4, 3, 64),
    (64, 256, 128, 8, 4, 64),
    (128, 64, 128, 4, 3, 32),
    (128, 64, 128, 4, 4, 32),
    (128, 128, 128, 8, 3, 32),
    (128, 128, 128, 8, 4, 64),
    (128, 128, 128, 4, 3, 32),
    (128, 256, 64, 8, 4, 64),
    (128, 256, 128, 8, 3, 64),
    (128, 256, 128, 8, 4, 64),
    (256, 128, 128, 8, 3, 32),
)
_FLOP_PER_GRAPH = 4e11


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of a block: its name with size and picture side, and the case."""

    name: str
    case: Case

    @property
    def flop(self) -> float:
        """Of one call."""
        return 2.0 * self.case.batch * self.case.tokens * self.case.inputs * self.case.outputs

    @property
    def calls(self) -> int:
        """How many make a graph: many short ones, few long ones."""
        return max(2, min(20, int(_FLOP_PER_GRAPH / self.flop)))


def products(sizes: Sequence[str], sides: Sequence[int], precisions: Sequence[str]) -> Iterator[Product]:
    """Of a block at every size, side and precision; `to_out` is the one that the residual follows."""
    for side in sides:
        for size in sizes:
            config = transformer_config(size)
            channels, hidden = config.channels, int(config.mlp_ratio * config.channels)
            for precision in precisions:
                factors = FACTORS[precision]
                case = Case(2, (side // 32) ** 2, channels, channels, factors=factors)
                case = dataclasses.replace(case, scales="row" if factors == INT8 else "tensor")
                changes: tuple[dict[str, Any], ...] = (
                    {"outputs": 3 * channels},
                    {"epilogue": "gate", "out_dtype": factors},
                    {"epilogue": "bias"},
                    {"outputs": 2 * hidden, "epilogue": "bias"},
                    {"inputs": hidden},
                )
                for name, change in zip(PRODUCTS, changes, strict=True):
                    yield Product(f"{size} {side} px {precision} {name}", dataclasses.replace(case, **change))


# --- Our kernel beside the libraries ---


def table(session: Session, found: Sequence[Product]) -> None:
    """Every product by our kernel and by the libraries, and what is gained."""
    for product in found:
        with session.part(product.name):
            checked(session, product)
            inputs = make_inputs(product.case, session.device)
            residual = inputs.residual is not None
            tile = kernels.tiling(*shape_of(product.case), itemsize(product.case), residual=residual)
            ours = timed(session, product, f"triton {named(tile)}", lambda p=product, i=inputs: forward(p.case, i))
            theirs = timed(session, product, "library and pass", separate(session, product.case, inputs))
            if product.case.out_dtype is not None or product.case.epilogue == "gate":
                alone = dataclasses.replace(product.case, epilogue="bias", out_dtype=None)
                timed(session, product, "library, product alone", separate(session, alone, inputs))
            session.row("speedup", product.name, "library and pass / triton", theirs / ours, "x")


def checked(session: Session, product: Product) -> None:
    """Hold our kernel to the oracle; AssertionError when it is wrong."""
    finding = verify(product.case, session.device, "triton")[0]
    session.row("parity", product.name, "y", finding.relative_rms, "rel rms", f"bound {finding.bound:.3g}")
    if product.case.out_dtype is not None:
        codes = verify_codes(product.case, session.device, "triton")
        note = f"of {codes.values}, {codes.near_ties} of them next to a tie"
        session.row("parity", product.name, "codes that are not the reference's", codes.different, "codes", note)


def forward(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Our kernel's launch without what dispatches to it."""
    return kernels.forward(*arguments(case, inputs, out_scale(inputs, case)))


@functools.cache
def _scale(device: torch.device) -> torch.Tensor:
    return torch.tensor(0.01, device=device)


def out_scale(inputs: Inputs, case: Case) -> torch.Tensor | None:
    """A static scale for the codes, where there are any."""
    return None if case.out_dtype is None else _scale(inputs.x.device)


def separate(session: Session, case: Case, inputs: Inputs) -> Callable[[], object]:
    """The library's product, with a compiled pass behind where one is needed."""
    form = LinearForm(inputs.bias is not None and case.epilogue != "plain", case.factors, case.factors)
    named_tensors = ("weight", "bias", "activation_scale", "weight_scale")
    tensors = {f"l.{name}": t for name in named_tensors if (t := getattr(inputs, name)) is not None}
    scale = out_scale(inputs, case)

    def work() -> object:
        branch = linear(inputs.x, tensors, "l", form, case.dtype)
        if case.epilogue != "gate":
            return branch
        assert inputs.residual is not None
        assert inputs.gate is not None
        y = (inputs.residual.float() + inputs.gate * branch.float()).to(case.dtype)
        if case.out_dtype is None:
            return y
        smooth = 1.0 if inputs.inverse_smooth is None else inputs.inverse_smooth
        return y, narrow(y.float() * smooth, scale, case.out_dtype)

    passes = case.epilogue == "gate" or case.factors == INT8
    torch._dynamo.reset()  # or it gives up after a few products
    return torch.compile(work, fullgraph=True, dynamic=False) if passes and session.on_gpu else work


def timed(session: Session, product: Product, what: str, work: Callable[[], object]) -> float:
    """Time it and write the row; microseconds."""
    time_us = operator_time(session, work, product.calls)
    session.row("product", product.name, what, time_us, "us", f"{product.flop / time_us / 1e6:.0f} TFLOP/s")
    return time_us


# --- Tilings ---


def sweep(session: Session, found: Sequence[Product]) -> None:
    """Every tiling at every shape, the best last; results are held to those of the tiling that is checked."""
    # The side of the picture changes no kernel.
    kinds = {
        (dataclasses.replace(product.case, tokens=1024), tile)
        for product in found
        for tile in tilings(session, product.case)
    }
    compile_ahead(session, _compile, sorted(kinds, key=str))
    for product in found:
        with session.part(product.name):
            _sweep(session, product)


def _sweep(session: Session, product: Product) -> None:
    checked(session, product)
    inputs = make_inputs(product.case, session.device)
    wanted = forward(product.case, inputs)[0]

    def time_us(tile: kernels.Tiling) -> float:
        hold_to(wanted, forward(product.case, inputs)[0])
        return timed(session, product, named(tile), lambda: forward(product.case, inputs))

    try_tilings(session, product.name, kernels, tilings(session, product.case), named, time_us)


def tilings(session: Session, case: Case) -> list[kernels.Tiling]:
    """Those to try for a case; the first few in a dry run."""
    wanted = TILINGS if session.on_gpu else TILINGS[3:5]
    return [kernels.Tiling(m, n, depth // itemsize(case), *rest) for m, n, depth, *rest in wanted]


def _compile(job: tuple[Case, kernels.Tiling]) -> bool:
    """In a process of its own: the kernel of a case, for this GPU, without running it."""
    case, tile = job
    inputs = make_inputs(dataclasses.replace(case, batch=1, tokens=1), "cpu")
    shape = (case.batch, case.tokens, case.outputs)
    out = torch.empty(shape, dtype=case.dtype, device="meta")
    codes = torch.empty(shape if case.out_dtype else 0, dtype=case.out_dtype or case.dtype, device="meta")
    tensors = (*arguments(case, inputs, out_scale(inputs, case))[:9], out, codes)
    virtual = tuple(None if t is None else t.to("meta") for t in tensors)
    numbers, constants = kernels.launch(virtual, case.limit, tile)
    pointers = [virtual[0] if t is None else t for t in virtual]
    return compiles(kernels.scaled_linear_kernel, (*pointers, *numbers), constants, f"{case} {named(tile)}")


def named(tile: kernels.Tiling) -> str:
    """ "64x128x128 w4 s3 p64": rows, columns and depth, warps, loads in flight, columns finished at a time."""
    shape = f"{tile.rows}x{tile.columns}x{tile.depth}"
    return f"{shape} w{tile.num_warps} s{tile.num_stages} p{tile.part_columns}"


def shape_of(case: Case) -> tuple[int, int, int]:
    """Rows, columns and depth of a product."""
    return case.batch * case.tokens, case.outputs, case.inputs


def itemsize(case: Case) -> int:
    """Bytes of one factor."""
    return (case.factors or case.dtype).itemsize


# --- The command ---


def main() -> int:
    """Measure what is asked for."""
    parser = command_parser(__doc__, "scaled_linear", instead_of="the libraries")
    parser.add_argument("--sizes", nargs="+", default=["0.6b", "1.6b"], choices=("0.6b", "1.6b", "tiny"))
    parser.add_argument("--sides", nargs="+", type=int, default=[1024, 4096], help="picture sides in pixels")
    parser.add_argument("--precisions", nargs="+", default=["fp8"], choices=tuple(FACTORS))
    parser.add_argument("--products", nargs="+", default=list(PRODUCTS), choices=PRODUCTS)
    chosen = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    found = [*products(chosen.sizes, chosen.sides, chosen.precisions)]
    found = [product for product in found if product.name.split()[-1] in chosen.products]
    return measure(chosen, lambda session: (sweep if chosen.sweep else table)(session, found))


if __name__ == "__main__":
    sys.exit(main())
