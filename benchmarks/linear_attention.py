"""Time linear attention on this GPU beside its peers, and render the table of the kernel's README.

    python benchmarks/linear_attention.py             # check, measure, write the rows; needs a GPU
    python benchmarks/linear_attention.py --render    # write the README's table from the rows; needs none
    python benchmarks/linear_attention.py --sweep     # time other tilings of the forward, print them, write nothing

Every case is compared with an fp64 oracle first (forward and all gradients); a failure ends the run and no time
is written. Peers: the eager reference, and torch.compile of it. Times are of CUDA graph replays, so that launches
from Python do not count, over enough input sets that no input is still in the L2 cache.

Bytes are the floor: qkv read once and the result written once; for forward + backward, qkv and the gradient read
and the gradient of qkv written on top. GB/s is the floor over the measured time, whatever was really moved. The
ceiling is the faster of two copies measured in the same run.

A sweep starts from the tilings in use and changes one kernel's at a time, keeping what was fastest. Every candidate is
held to the oracle before it is timed, twice: over input sets that are not in the cache, and over one that is, as in a
block, whose product has just written it. The second decides.
"""

import argparse
import csv
import dataclasses
import datetime
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sana_kernels.linear_attention import linear_attention
from sana_kernels.linear_attention.testing import (
    EPS,
    NORM_EPS,
    Case,
    Inputs,
    make_inputs,
    verify,
    verify_tilings,
)

if TYPE_CHECKING:
    from sana_kernels.linear_attention.triton import Tiling, Tilings

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "results" / "linear_attention.csv"
README = ROOT / "kernels" / "sana_kernels" / "linear_attention" / "README.md"
BEGIN, END = "<!-- rendered by benchmarks/linear_attention.py -->", "<!-- end -->"

CASES = {
    "0.6B transformer, 1024 px": Case(2, 1024, 1152),
    "0.6B transformer, 4096 px": Case(2, 16384, 1152),
    "1.6B transformer, 1024 px": Case(2, 1024, 2240),
    "Sprint 0.6B, 1024 px": Case(1, 1024, 1152, qk_norm=True),
    "decoder stage 3, 1024 px": Case(1, 16384, 512),
    "decoder stage 3, 1024 px, fp32": Case(1, 16384, 512, dtype=torch.float32),
}
TRAINED = ("0.6B transformer, 1024 px", "0.6B transformer, 4096 px", "Sprint 0.6B, 1024 px")
FP8 = torch.float8_e4m3fn
# What a sweep times: the transformers write the codes of the next product.
SWEPT = {
    "0.6B transformer, 1024 px": Case(2, 1024, 1152, out_dtype=FP8),
    "1.6B transformer, 1024 px": Case(2, 1024, 2240, out_dtype=FP8),
    "Sprint 0.6B, 1024 px": Case(1, 1024, 1152, qk_norm=True, out_dtype=FP8),
    "0.6B transformer, 4096 px": Case(2, 16384, 1152, out_dtype=FP8),
    "decoder stage 3, 1024 px": Case(1, 16384, 512),
    "decoder stage 5, 1024 px": Case(1, 1024, 1024),
}
_CACHED_CALLS = 20
_CACHE_BYTES = 200 << 20
_COPY_BYTES = 1 << 30
_REPEATS = 21

Op = Callable[[Inputs], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. Times in microseconds per call; `floor_bytes` per call; rates in GB/s."""

    case: str
    shape: str
    measured: str
    impl: str
    p50_us: float
    p20_us: float
    p80_us: float
    floor_bytes: int
    bandwidth_gb_per_s: float
    ceiling_gb_per_s: float
    relative_rms: float
    relative_rms_bound: float
    gpu: str
    driver: str
    power_limit: str
    cuda: str
    torch: str
    triton: str
    commit: str
    date: str


def main() -> None:
    """Measure, or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write the README's table and stop")
    parser.add_argument("--sweep", action="store_true", help="time tilings of the forward and stop")
    parser.add_argument("--commit", default="", help="what the rows call the commit, where git cannot tell")
    parser.add_argument("--output", type=Path, default=ROWS, help="file of rows to write (CSV)")
    arguments = parser.parse_args()
    if arguments.sweep:
        sys.exit(1 if sweep() else 0)
    if not arguments.render:
        write_rows(arguments.output, [*measure(arguments.commit)])
    if arguments.output == ROWS:
        README.write_text(rendered(README.read_text(encoding="utf-8"), read_rows()), encoding="utf-8")


# --- Measuring ---


def measure(commit: str) -> Iterator[Row]:
    """Every case, one implementation after the other. Raises AssertionError when a case is not right."""
    environment = describe_machine(commit)
    ceiling = copy_gb_per_s()
    print(f"{environment['gpu']}: copies run at {ceiling:.0f} GB/s")
    for name, case in CASES.items():
        findings = verify(case, "cuda", "triton")
        forward = next(finding for finding in findings if finding.name == "out")
        worst = max(findings, key=lambda finding: finding.relative_rms / finding.bound)
        for measured, finding in (("forward", forward), ("forward+backward", worst)):
            if measured != "forward" and name not in TRAINED:
                continue
            floor = floor_bytes(case, measured)
            for impl, op in implementations(case).items():
                times = graph_times_us(case, op, backward=measured != "forward")
                p50 = statistics.median(times)
                row = Row(
                    case=name,
                    shape=str(case),
                    measured=measured,
                    impl=impl,
                    p50_us=round(p50, 2),
                    p20_us=round(times[len(times) // 5], 2),
                    p80_us=round(times[len(times) * 4 // 5], 2),
                    floor_bytes=floor,
                    bandwidth_gb_per_s=round(floor / p50 / 1e3, 1),
                    ceiling_gb_per_s=round(ceiling, 1),
                    relative_rms=float(f"{finding.relative_rms:.3g}") if impl == "triton" else float("nan"),
                    relative_rms_bound=float(f"{finding.bound:.3g}"),
                    **environment,
                )
                print(f"{name:32} {measured:17} {impl:14} {row.p50_us:9.2f} us {row.bandwidth_gb_per_s:7.1f} GB/s")
                yield row


def implementations(case: Case) -> dict[str, Op]:
    """The kernels and their peers."""

    def with_impl(impl: str) -> Op:
        def run(inputs: Inputs) -> torch.Tensor:
            return linear_attention(
                inputs.qkv,
                inputs.norm_q_weight,
                inputs.norm_k_weight,
                head_dim=case.head_dim,
                eps=EPS,
                norm_eps=NORM_EPS,
                impl=impl,  # type: ignore[arg-type]
            )

        return run

    eager = with_impl("reference")
    torch._dynamo.reset()
    return {"triton": with_impl("triton"), "torch.compile": torch.compile(eager), "eager": eager}


def floor_bytes(case: Case, measured: str) -> int:
    """Bytes that must move: 4 arrays [B, N, C] forward; 7 more backward."""
    arrays = 4 if measured == "forward" else 11
    return arrays * case.batch * case.tokens * case.channels * case.dtype.itemsize


def graph_times_us(case: Case, op: Op, *, backward: bool, cached: bool = False) -> list[float]:
    """Sorted times per call, in microseconds, of a CUDA graph that calls `op` once per input set; `cached`: several
    times on one.
    """
    sets = max(2, -(-_CACHE_BYTES // (3 * case.batch * case.tokens * case.channels * case.dtype.itemsize)))
    inputs = [make_inputs(case, "cuda", seed) for seed in range(1 if cached else sets)]
    calls = [_call(op, one, backward) for one in inputs] * (_CACHED_CALLS if cached else 1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile and allocate before the capture
        for call in calls[:2] * 2:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]  # kept: each call writes memory of its own
    assert len(results) == len(calls)
    return replay_times_us(graph, len(calls))


def _call(op: Op, inputs: Inputs, backward: bool) -> Callable[[], object]:
    if not backward:
        return lambda: op(inputs)
    tensors = (inputs.qkv, inputs.norm_q_weight, inputs.norm_k_weight)
    leaves = [x.requires_grad_() for x in tensors if x is not None]
    return lambda: torch.autograd.grad(op(inputs), leaves, inputs.grad)


def replay_times_us(graph: torch.cuda.CUDAGraph, calls: int) -> list[float]:
    """Sorted times of `_REPEATS` replays after three unmeasured ones, per call."""
    times = []
    for _ in range(_REPEATS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return sorted(times[3:])


def copy_gb_per_s() -> float:
    """Bytes read plus bytes written per second of the faster of two large copies."""
    source = torch.randn(_COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    rates = []
    for copy in (lambda: target.copy_(source), lambda: torch.neg(source, out=target)):
        copy()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            copy()
        rates.append(2 * _COPY_BYTES / statistics.median(replay_times_us(graph, 1)) / 1e3)
    return max(rates)


def describe_machine(commit: str) -> dict[str, str]:
    """What the times depend on."""
    import triton

    query = "--query-gpu=driver_version,power.limit"
    smi = _first_line(["nvidia-smi", query, "--format=csv,noheader", "--id=0"]).split(", ")
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": smi[0],
        "power_limit": smi[1] if len(smi) > 1 else "",
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or _first_line(["git", "describe", "--always", "--dirty"]),
        "date": datetime.date.today().isoformat(),
    }


def _first_line(command: list[str]) -> str:
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip().partition("\n")[0] or "unknown"


# --- Other tilings ---


def sweep() -> int:
    """Print the times of every candidate and the fastest of each case; return how many candidates were wrong."""
    from sana_kernels.linear_attention import triton as kernels

    environment = describe_machine("")
    print(f"{environment['gpu']}, torch {environment['torch']}, triton {environment['triton']}; microseconds")
    wrong = 0
    for name, case in SWEPT.items():
        best = kernels.tilings(case.dtype.itemsize, case.head_dim)
        for kernel in ("state", "apply"):
            times: dict[Tilings, float] = {}
            for tiling in candidates(kernel, best):
                tiles = dataclasses.replace(best, **{kernel: tiling})
                print(f"{name:26} {kernel:6} {_spelled(tiling):26}", end=" ", flush=True)
                try:
                    verify_tilings(case, "cuda", tiles)
                except AssertionError as error:
                    wrong += 1
                    print(f"WRONG {error}")
                    continue
                except Exception as error:  # the compiler raises whatever it likes; the GPU may be too small
                    print("cannot run:", (str(error) or type(error).__name__).splitlines()[0][:100])
                    continue
                cold, times[tiles] = (tiled_time_us(case, tiles, cached=cached) for cached in (False, True))
                print(f"{cold:8.2f} {times[tiles]:8.2f} cached", flush=True)
            best = min(times, key=times.__getitem__, default=best)
            print(f"{name:26} {kernel:6} fastest: {_spelled(getattr(best, kernel))}", flush=True)
    return wrong


def candidates(kernel: str, tiles: "Tilings") -> Iterator["Tiling"]:
    """Tilings to try for one kernel, first the one in use."""
    from sana_kernels.linear_attention.triton import Tiling

    table = {
        "state": ((64, 128, 256), (144, 288, 576), ((4, 2), (4, 3), (4, 4), (8, 3))),
        "apply": ((64, 128), (288, 576, 1152), ((4, 1), (4, 2), (4, 3), (8, 2))),
    }
    used: Tiling = getattr(tiles, kernel)
    yield used
    rows, programs, warps_and_stages = table[kernel]
    for block_rows in rows:
        for warps, stages in warps_and_stages:
            # A warp works on 16 rows or more, and a thread holds no more than 64 of a block's numbers.
            if not 16 * warps <= block_rows <= 64 * warps:
                continue
            for count in programs:
                tiling = Tiling(block_rows, count, num_warps=warps, num_stages=stages)
                if tiling != used:
                    yield tiling


def tiled_time_us(case: Case, tiles: "Tilings", *, cached: bool) -> float:
    """Median microseconds of the forward with these tilings."""
    from sana_kernels.linear_attention import triton as kernels

    scale = None if case.out_dtype is None else torch.tensor(0.01, device="cuda")

    def op(inputs: Inputs) -> torch.Tensor:
        tensors = (inputs.qkv, inputs.norm_q_weight, inputs.norm_k_weight)
        return kernels.forward(*tensors, case.head_dim, EPS, NORM_EPS, scale, case.out_dtype, tiles=tiles)

    return statistics.median(graph_times_us(case, op, backward=False, cached=cached))


def _spelled(tiling: "Tiling") -> str:
    return f"{tiling.block_rows} rows {tiling.programs}p {tiling.num_warps}w {tiling.num_stages}s"


# --- Rows and their table ---


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Replace the rows in `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))


def read_rows() -> list[dict[str, str]]:
    """The committed rows."""
    with ROWS.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def rendered(readme: str, rows: Sequence[dict[str, str]]) -> str:
    """`readme` with the table of `rows` between its two markers."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}"


def table(rows: Sequence[dict[str, str]]) -> str:
    """One line per case and pass, peers side by side."""
    groups: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["measured"]), {})[row["impl"]] = row
    first = rows[0]
    lines = [
        f"{first['gpu']} (power limit {first['power_limit']}), driver {first['driver']}, CUDA {first['cuda']}, "
        f"torch {first['torch']}, triton {first['triton']}, commit {first['commit']}, {first['date']}. Microseconds, "
        f"median of {_REPEATS} graph replays; copies ran at {float(first['ceiling_gb_per_s']):.0f} GB/s in the same "
        "run, and the floor is at that rate.",
        "",
        "| case | pass | floor | Triton | GB/s | of ceiling | torch.compile | eager | relative RMS (bound) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (case, measured), peers in groups.items():
        mine = peers["triton"]
        floor = float(mine["floor_bytes"]) / float(mine["ceiling_gb_per_s"]) / 1e3
        share = float(mine["bandwidth_gb_per_s"]) / float(mine["ceiling_gb_per_s"])
        lines.append(
            f"| {case} | {measured} | {floor:.1f} | {float(mine['p50_us']):.1f} | "
            f"{float(mine['bandwidth_gb_per_s']):.0f} | {share:.0%} | {float(peers['torch.compile']['p50_us']):.1f} | "
            f"{float(peers['eager']['p50_us']):.1f} | {mine['relative_rms']} ({mine['relative_rms_bound']}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
