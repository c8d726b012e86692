"""Time the middle of Mix-FFN on this GPU beside its peers, and render the table of the kernel's README.

    python benchmarks/mix_ffn_depthwise.py             # check, measure, write the rows; needs a GPU
    python benchmarks/mix_ffn_depthwise.py --render    # write the README's table from the rows; needs none

Every case is compared with an fp64 oracle first; a failure ends the run and no time is written. Peers: the layer as
the model has it (SiLU, conv2d over channels-first memory and the gate in the dtype of the tensors), eager and through
torch.compile, and torch.compile of the reference, which is fp32 inside. With 8-bit outputs they quantise too.

Times are of CUDA graph replays over enough input sets that no input is still in the L2 cache. Bytes are the floor:
every input read once and every result written once. GB/s is the floor over the measured time, whatever was really
moved. The ceiling is the faster of two copies measured in the same run. `modulated_norm.py` shares the machinery.
"""

import argparse
import csv
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from linear_attention import copy_gb_per_s, describe_machine, replay_times_us
from torch.nn import functional as F

from sana_kernels.mix_ffn_depthwise import mix_ffn_depthwise
from sana_kernels.mix_ffn_depthwise.quantization import narrow
from sana_kernels.mix_ffn_depthwise.testing import Case, Inputs, make_inputs, verify, verify_codes

ROOT = Path(__file__).resolve().parents[1]
FP8, INT8 = torch.float8_e4m3fn, torch.int8
CASES = {
    "0.6B transformer, 1024 px": Case(2, 32, 32, 2880),
    "0.6B transformer, 1024 px, FP8 out": Case(2, 32, 32, 2880, out_dtype=FP8),
    "0.6B transformer, 1024 px, INT8 out": Case(2, 32, 32, 2880, out_dtype=INT8),
    "1.6B transformer, 1024 px, FP8 out": Case(2, 32, 32, 5600, out_dtype=FP8),
    "0.6B transformer, 4096 px, FP8 out": Case(2, 128, 128, 2880, out_dtype=FP8),
    "decoder stage 3, 1024 px": Case(1, 128, 128, 2048),
}
_CACHE_BYTES = 200 << 20

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. Times in microseconds per call; `floor_bytes` per call; rates in GB/s.

    `found` and `allowed`: relative RMS from the oracle and its bound, or for 8 bits the number of values that are not
    the reference's and of those next to a tie; of the Triton implementation.
    """

    case: str
    shape: str
    impl: str
    p50_us: float
    p20_us: float
    p80_us: float
    floor_bytes: int
    bandwidth_gb_per_s: float
    ceiling_gb_per_s: float
    found: float
    allowed: float
    gpu: str
    driver: str
    power_limit: str
    cuda: str
    torch: str
    triton: str
    commit: str
    date: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """One line of a table: how to check it, the calls of every implementation (one per input set), and its floor."""

    name: str
    shape: str
    floor_bytes: int
    check: Callable[[], tuple[float, float]]
    calls: Callable[[], Mapping[str, list[Call]]]


# --- Shared by the benchmarks of one-pass kernels ---


def run(doc: str | None, name: str, problems: Sequence[Problem]) -> None:
    """The command of one operator: measure its problems and render, or render alone."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write the README's table and stop")
    parser.add_argument("--commit", default="", help="what the rows call the commit, where git cannot tell")
    parser.add_argument("--output", type=Path, default=rows_path(name), help="file of rows to write (CSV)")
    arguments = parser.parse_args()
    if not arguments.render:
        _write_rows(arguments.output, [*_measure(problems, arguments.commit)])
    if arguments.output == rows_path(name):
        readme = readme_path(name)
        text = readme.read_text(encoding="utf-8")
        readme.write_text(rendered(text, name, read_rows(name)), encoding="utf-8")


def rows_path(name: str) -> Path:
    """The committed rows of an operator."""
    return ROOT / "benchmarks" / "results" / f"{name}.csv"


def readme_path(name: str) -> Path:
    """The file that shows them."""
    return ROOT / "kernels" / "sana_kernels" / name / "README.md"


def input_sets(bytes_per_call: int) -> int:
    """How many input sets push each other out of the L2 cache."""
    return max(2, -(-_CACHE_BYTES // bytes_per_call))


def _measure(problems: Sequence[Problem], commit: str) -> Iterator[Row]:
    machine = describe_machine(commit)
    ceiling = copy_gb_per_s()
    print(f"{machine['gpu']}: copies run at {ceiling:.0f} GB/s")
    for problem in problems:
        found, allowed = problem.check()
        torch._dynamo.reset()
        for impl, calls in problem.calls().items():
            times = _graph_times_us(calls)
            p50 = statistics.median(times)
            mine = impl == "triton"
            row = Row(
                case=problem.name,
                shape=problem.shape,
                impl=impl,
                p50_us=round(p50, 2),
                p20_us=round(times[len(times) // 5], 2),
                p80_us=round(times[len(times) * 4 // 5], 2),
                floor_bytes=problem.floor_bytes,
                bandwidth_gb_per_s=round(problem.floor_bytes / p50 / 1e3, 1),
                ceiling_gb_per_s=round(ceiling, 1),
                found=float(f"{found:.3g}") if mine else float("nan"),
                allowed=float(f"{allowed:.3g}") if mine else float("nan"),
                **machine,
            )
            print(f"{row.case:38} {impl:24} {row.p50_us:9.2f} us {row.bandwidth_gb_per_s:7.1f} GB/s")
            yield row


def _graph_times_us(calls: Sequence[Call]) -> list[float]:
    """Sorted times per call, in microseconds, of a CUDA graph that makes every call once."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():  # compile and allocate before the capture
        for call in [*calls[:2], *calls[:2]]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]  # kept: each call writes memory of its own
    assert len(results) == len(calls)
    return replay_times_us(graph, len(calls))


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))


def read_rows(name: str) -> list[dict[str, str]]:
    """The committed rows of an operator."""
    with rows_path(name).open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def rendered(readme: str, name: str, rows: Sequence[dict[str, str]]) -> str:
    """`readme` with the table of `rows` between its two markers."""
    begin, end = f"<!-- rendered by benchmarks/{name}.py -->", "<!-- end -->"
    head, _, rest = readme.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{_table(rows)}\n{end}{tail}"


def _table(rows: Sequence[dict[str, str]]) -> str:
    """One line per case, peers side by side."""
    groups: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["case"], {})[row["impl"]] = row
    first = rows[0]
    peers = [impl for impl in next(iter(groups.values())) if impl != "triton"]
    lines = [
        f"{first['gpu']} (power limit {first['power_limit']}), driver {first['driver']}, CUDA {first['cuda']}, "
        f"torch {first['torch']}, triton {first['triton']}, commit {first['commit']}, {first['date']}. Microseconds, "
        f"median of graph replays; copies ran at {float(first['ceiling_gb_per_s']):.0f} GB/s in the same run, and the "
        "floor is at that rate. Error: relative RMS (bound), or values that are not the reference's (next to a tie).",
        "",
        f"| case | floor | Triton | GB/s | of ceiling | {' | '.join(peers)} | error |",
        "|" + "---|" * (6 + len(peers)),
    ]
    for case, impls in groups.items():
        mine = impls["triton"]
        ceiling = float(mine["ceiling_gb_per_s"])
        found, allowed = (f"{float(mine[key]):.3g}" for key in ("found", "allowed"))
        cells = [
            case,
            f"{float(mine['floor_bytes']) / ceiling / 1e3:.1f}",
            f"{float(mine['p50_us']):.1f}",
            f"{float(mine['bandwidth_gb_per_s']):.0f}",
            f"{float(mine['bandwidth_gb_per_s']) / ceiling:.0%}",
            *(f"{float(impls[impl]['p50_us']):.1f}" for impl in peers),
            f"{found} ({allowed})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- The middle of Mix-FFN ---


def layer(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    sizes: tuple[int, int],
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """What the model does without the kernel, in the dtype of the tensors."""
    grid = F.silu(x).transpose(1, 2).unflatten(2, sizes)
    grid = F.conv2d(grid, weight, bias, padding=1, groups=grid.shape[1])
    value, gate = grid.flatten(2).transpose(1, 2).chunk(2, dim=-1)
    out = value * F.silu(gate)
    return out.contiguous() if out_dtype is None else narrow(out.float(), scale, out_dtype).contiguous()


def problem(name: str, case: Case) -> Problem:
    """One case as a line of the table."""
    out_bytes = (case.out_dtype or case.dtype).itemsize
    pixels = case.batch * case.height * case.width
    floor = pixels * case.hidden * (2 * case.dtype.itemsize + out_bytes) + 20 * case.hidden * case.dtype.itemsize
    return Problem(name, str(case), floor, lambda: check(case), lambda: calls(case, floor))


def check(case: Case) -> tuple[float, float]:
    """(found, allowed) of the Triton implementation. Raises AssertionError when it is wrong."""
    if case.out_dtype is not None:
        codes = verify_codes(case, "cuda", "triton")
        return codes.different, codes.near_ties
    out = next(finding for finding in verify(case, "cuda", "triton") if finding.name == "out")
    return out.relative_rms, out.bound


def calls(case: Case, bytes_per_call: int) -> Mapping[str, list[Call]]:
    """The kernel and its peers."""
    sets = [make_inputs(case, "cuda", seed) for seed in range(input_sets(bytes_per_call))]
    sizes = (case.height, case.width)
    scale = None if case.out_dtype is None else torch.tensor(0.05, device="cuda")
    compiled = torch.compile(layer)

    def operator(inputs: Inputs, impl: str) -> torch.Tensor:
        return mix_ffn_depthwise(
            inputs.x,
            inputs.weight,
            inputs.bias,
            *sizes,
            out_scale=scale,
            out_dtype=case.out_dtype,
            impl=impl,  # type: ignore[arg-type]
        )

    compiled_reference = torch.compile(operator)

    def peer(function: Callable[..., torch.Tensor], inputs: Inputs) -> Call:
        return lambda: function(inputs.x, inputs.weight, inputs.bias, scale, sizes, case.out_dtype)

    return {
        "triton": [lambda i=i: operator(i, "triton") for i in sets],
        "torch.compile of the layer": [peer(compiled, i) for i in sets],
        "torch.compile of the reference": [lambda i=i: compiled_reference(i, "reference") for i in sets],
        "eager layer": [peer(layer, i) for i in sets],
    }


if __name__ == "__main__":
    run(__doc__, "mix_ffn_depthwise", [problem(name, case) for name, case in CASES.items()])
