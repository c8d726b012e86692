"""Render benchmarks/results/*.csv into the README, between its markers, and into docs/images/end_to_end.svg.

    python scripts/render_results.py            # write both
    python scripts/render_results.py --check    # exit code 1 if the README is not what would be written

No number there is typed by hand: a test holds the README equal to this rendering. A file of rows that does not exist
leaves its section out.
"""

import argparse
import csv
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sana_export.scenes.scoring import paired_difference

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
IMAGE = ROOT / "docs" / "images" / "end_to_end.svg"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
OURS = "sana-export"
_STAGES = ("text_encoder", "step", "vae_decoder", "total")
_SHORT = "text_encoder_short"
_SHORT_CAPTIONS = (
    "A *short caption* has up to about 120 tokens, as that of the pictures has; the text encoder's other figure is "
    "that of 300, as the peers'. "
)
_PLOTTED_SIDE = "1024"
# A line through two points fits whatever the points are.
_FEWEST_SIZES = 3

RowDict = dict[str, str]
Section = Callable[[Sequence[RowDict]], list[str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """1 with --check when the README is not up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    text = README.read_text(encoding="utf-8")
    wanted = rendered(text, RESULTS)
    if check:
        return int(text != wanted)
    README.write_text(wanted, encoding="utf-8")
    rows = read("end_to_end.csv", RESULTS)
    if chart_rows(rows):
        plot(rows, IMAGE)
    return 0


def rendered(readme: str, results: Path) -> str:
    """`readme` with everything between the markers replaced by the tables of the rows in `results`."""
    head, found, rest = readme.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    sections = [section(rows) for name, section in SECTIONS.items() if (rows := read(name, results))]
    body = "\n\n".join("\n".join(lines) for lines in sections if lines)
    return f"{head}{BEGIN}\n{body}\n{END}{tail}"


def read(name: str, results: Path) -> list[RowDict]:
    """The rows of a file; none if it does not exist."""
    path = results / name
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


# --- End to end ---


def end_to_end(rows: Sequence[RowDict]) -> list[str]:
    """Per picture: stages of the engines and their peers, ratios, gaps, memory; then linearity and what failed."""
    measured, rows = rows, newest(rows)
    timed = [row for row in rows if row["p50_ms"]]
    if not timed:
        return []
    lines = ["### Pictures", ""]
    if chart_rows(rows):
        lines += [f"![Times at {_PLOTTED_SIDE} px]({IMAGE.relative_to(ROOT).as_posix()})", ""]
    for device, group in grouped(timed, "device").items():
        first = group[0]
        limit = f", power limit {first['power_limit']}" if first["power_limit"] else ""
        driver = f", driver {first['driver']}" if first["driver"] else ""
        commits = ", ".join(sorted({row["commit"] for row in group}))
        versions = _versions(row["versions"] for row in group)
        lines += [
            f"{device}{limit}{driver}; {versions}; commit {commits}. Random weights of the real sizes, milliseconds, "
            "medians. Engines: `step` is the denoising loop over its steps; single calls are timed on the host's clock "
            "until the device is done. Peers are diffusers with the same weights: one module call, CUDA events; "
            "their step attends to all 300 positions of the caption, as diffusers does, the engines' to the prompt's. "
            f"{_SHORT_CAPTIONS if any(row['stage'] == _SHORT for row in group) else ''}"
            "*of best peer* divides by the fastest peer's same stage, in the newest run that measured both; † marks "
            "what no run measured both of. *floor* is the least time for the stage's arithmetic and weights at rates "
            "measured in the same run, *gap* the measured time over it. Memory is what the whole process added to the "
            "GPU.",
            "",
        ]
        pictures = grouped(group, "model", "height", "width")
        for key in sorted(pictures, key=lambda key: (key[0], *map(int, key[1:]))):
            lines += _picture(pictures[key], measured)
    return lines + _linearity(timed) + _failures(rows)


def _versions(found: Iterable[str]) -> str:
    """Every package once with all its versions: "torch 2.11.0; triton 3.6.0, 3.7.0", in the order of the rows."""
    numbers: dict[str, dict[str, None]] = {}
    for versions in dict.fromkeys(found):
        for entry in versions.split("; "):
            package, _, number = entry.partition(" ")
            numbers.setdefault(package, {})[number] = None
    return "; ".join(f"{package} {', '.join(kept)}" for package, kept in numbers.items())


def newest(rows: Sequence[RowDict]) -> list[RowDict]:
    """The last measured row of each figure, in the order of the file."""
    last: dict[tuple[str, ...], RowDict] = {}
    for row in rows:
        key = _figure_of(row)
        if key not in last or row["run"] >= last[key]["run"]:
            last[key] = row
    return [*last.values()]


def _figure_of(row: RowDict) -> tuple[str, ...]:
    """What a row is a measurement of."""
    names = ("device", "model", "precision", "height", "width", "num_steps", "subject", "stage")
    return tuple(row[name] for name in names)


def _picture(rows: Sequence[RowDict], measured: Sequence[RowDict]) -> list[str]:
    """The table of `rows`, the newest of a picture's figures; `measured` are all there are."""
    first = rows[0]
    title = f"**{first['model']}, {first['width']} x {first['height']} px, {first['num_steps']} steps**"
    header = ["", "text encoder", "short caption"]
    for stage in ("step", "decoder"):
        header += [stage, "of best peer", "floor", "gap"]
    header += ["picture", "of best peer", "GPU MiB", "one engine at a time, MiB", "cold start s", "build s"]
    best = {stage: _best_peer(rows, stage) for stage in _STAGES}
    subjects = sorted(grouped(rows, "subject", "precision").items(), key=lambda item: not item[0][0].startswith(OURS))
    table = []
    for (subject, precision), found in subjects:
        by_stage = {row["stage"]: row for row in found}
        ours = subject.startswith(OURS)
        cells = [f"{subject}, {precision}", _ms(by_stage, "text_encoder"), _ms(by_stage, _SHORT)]
        for stage in ("step", "vae_decoder"):
            cells += [_ms(by_stage, stage), _ratio(by_stage.get(stage), best[stage], measured) if ours else ""]
            cells += [_figure(by_stage, stage, "floor_ms"), _gap(by_stage, stage)]
        cells += [_ms(by_stage, "total"), _ratio(by_stage.get("total"), best["total"], measured) if ours else ""]
        cells += [
            *(_whole(by_stage, stage, "device_mib") for stage in ("total", "total_one_at_a_time")),
            _seconds(by_stage, "cold_start"),
            _seconds(by_stage, "build"),
        ]
        table.append(cells)
    return [title, "", *markdown(header, table), ""]


def _best_peer(rows: Sequence[RowDict], stage: str) -> RowDict | None:
    peers = [row for row in rows if row["stage"] == stage and not row["subject"].startswith(OURS)]
    return min(peers, key=lambda row: float(row["p50_ms"]), default=None)


def _ratio(row: RowDict | None, peer: RowDict | None, measured: Sequence[RowDict]) -> str:
    """Of both figures in the newest run that has both; else of the newest of each, marked."""
    if row is None or peer is None:
        return ""
    figure = {item["run"]: float(item["p50_ms"]) for item in measured if _figure_of(item) == _figure_of(row)}
    peers = {item["run"]: float(item["p50_ms"]) for item in measured if _figure_of(item) == _figure_of(peer)}
    if both := figure.keys() & peers.keys():
        return f"{figure[max(both)] / peers[max(both)]:.2f}"
    return f"{float(row['p50_ms']) / float(peer['p50_ms']):.2f} †"


def _ms(rows: dict[str, RowDict], stage: str) -> str:
    return _figure(rows, stage, "p50_ms")


def _figure(rows: dict[str, RowDict], stage: str, column: str) -> str:
    return digits(float(rows[stage][column])) if stage in rows and rows[stage][column] else ""


def _gap(rows: dict[str, RowDict], stage: str) -> str:
    return f"{float(rows[stage]['gap']):.1f}x" if stage in rows and rows[stage]["gap"] else ""


def _whole(rows: dict[str, RowDict], stage: str, column: str) -> str:
    return f"{float(rows[stage][column]):.0f}" if stage in rows and rows[stage][column] else ""


def _seconds(rows: dict[str, RowDict], stage: str) -> str:
    return digits(float(rows[stage]["p50_ms"]) / 1e3) if stage in rows else ""


def _linearity(rows: Sequence[RowDict]) -> list[str]:
    """Straight lines through step times over tokens, where at least three sizes were measured."""
    table = []
    steps = [row for row in rows if row["stage"] == "step"]
    for (device, model, subject, precision), group in grouped(steps, "device", "model", "subject", "precision").items():
        by_tokens = {(int(row["height"]) // 32) * (int(row["width"]) // 32): float(row["p50_ms"]) for row in group}
        if len(by_tokens) < _FEWEST_SIZES:
            continue
        tokens, times = np.array([*by_tokens], float), np.array([*by_tokens.values()])
        slope, start, r_squared, worst = line_fit(tokens, times)
        sizes = ", ".join(str(int(count)) for count in sorted(tokens))
        table.append(
            [
                *(device, f"{model}, {subject}, {precision}", sizes),
                *(digits(slope * 1e3), digits(start), f"{r_squared:.5f}", f"{worst:.0%}"),
            ]
        )
    if not table:
        return []
    header = ["device", "engine", "tokens", "µs per token", "ms at 0 tokens", "R²", "largest deviation"]
    note = "A step's time against the number of image tokens, least squares of relative errors:"
    return [note, "", *markdown(header, table), ""]


def line_fit(tokens: np.ndarray, times: np.ndarray) -> tuple[float, float, float, float]:
    """(slope, value at 0, R², largest relative deviation) of the line that minimises relative errors."""
    design = np.stack([tokens, np.ones_like(tokens)], axis=1)
    slope, start = np.linalg.lstsq(design / times[:, None], np.ones_like(times), rcond=None)[0]
    predicted = slope * tokens + start
    spread = np.square(times - times.mean()).sum()
    r_squared = 1 - np.square(times - predicted).sum() / spread if spread else 1.0
    return float(slope), float(start), float(r_squared), float(np.abs(predicted / times - 1).max())


def _failures(rows: Sequence[RowDict]) -> list[str]:
    failed = [row for row in rows if row["error"]]
    if not failed:
        return []
    table = [
        [
            *(
                row["device"],
                f"{row['model']}, {row['width']} px",
                f"{row['subject']}, {row['precision']}",
                row["stage"],
            ),
            row["error"].replace("|", "/")[:200],
        ]
        for row in failed
    ]
    return ["No figure:", "", *markdown(["device", "picture", "subject", "stage", "reason"], table), ""]


# --- The plot ---


def chart_rows(rows: Sequence[RowDict]) -> list[RowDict]:
    """What the plot shows: whole pictures at its size."""
    return [row for row in newest(rows) if row["stage"] == "total" and row["p50_ms"] and row["height"] == _PLOTTED_SIDE]


def plot(rows: Sequence[RowDict], path: Path) -> None:
    """Bars of the picture's time, one panel per device, floors as ticks."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "sana-export", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    devices = grouped(chart_rows(rows), "device")
    counts = [len(found) for found in devices.values()]
    figure, panels = pyplot.subplots(
        len(devices),
        squeeze=False,
        sharex=True,
        figsize=(9, 0.5 * (1 + len(devices)) + 0.32 * sum(counts)),
        height_ratios=counts,
        layout="constrained",
    )
    for axes, (device, found) in zip(panels.flat, devices.items(), strict=True):
        _bars(axes, sorted(found, key=lambda row: (row["model"], float(row["p50_ms"]))))
        axes.set_title(device, loc="left", fontsize=9)
    panels.flat[-1].set_xlabel(f"milliseconds per picture, {_PLOTTED_SIDE} px (red: floor)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _bars(axes: Any, shown: Sequence[RowDict]) -> None:
    """One device's."""
    labels = [f"{row['model']}  {row['subject']}, {row['precision']}" for row in shown]
    colours = ["#4878a8" if row["subject"].startswith(OURS) else "#b8b8b8" for row in shown]
    positions = range(len(shown))
    axes.barh(positions, [float(row["p50_ms"]) for row in shown], color=colours)
    for position, row in enumerate(shown):
        if row["floor_ms"]:
            axes.plot([float(row["floor_ms"])] * 2, [position - 0.4, position + 0.4], color="#c04040", linewidth=1.5)
        axes.text(float(row["p50_ms"]), position, f" {float(row['p50_ms']):.0f}", va="center")
    axes.set_yticks(positions, labels)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


# --- Quality ---


def quality(rows: Sequence[RowDict]) -> list[str]:
    """What each precision does to the small trained model's pictures."""
    # The shipped model's stand first; those of other sampling settings are kept in the file.
    shift, scale = (rows[0][name] for name in ("flow_shift", "guidance_scale"))
    scores = ("overall", "count", "colour", "shape", "position", "binding")
    header = ["precision", "target", "steps", "solver", *scores, "prompts", "PSNR dB", "SSIM", "pictures compared"]
    table = [
        [row["precision"], row["target"], row["steps"], row["solver"]]
        + [f"{float(row[name]):.1%}" if row[name] else "" for name in scores]
        + [row["prompts"]]
        + [f"{float(row['psnr_db']):.1f}" if row["psnr_db"] else "", f"{float(row['ssim']):.3f}" if row["ssim"] else ""]
        + [row["compared"] if row["psnr_db"] else ""]
        for row in rows
        if (row["flow_shift"], row["guidance_scale"]) == (shift, scale)
    ]
    note = (
        f"`nano` at 512 px, flow shift {float(shift):g}, guidance {float(scale):g}: shares of unseen prompts whose "
        "claims can be read off the picture (`scripts/measure_quality.py`); mean PSNR and SSIM to the bf16 picture of "
        "the same seed, solver and steps. Target pytorch: for a recipe the fake-quantised modules, whose rounding is "
        "that of the bundle's graphs. 500 prompts know a share to about 3 points."
    )
    return ["### Quality", "", note, "", *markdown(header, table)]


def solvers(rows: Sequence[RowDict]) -> list[str]:
    """How many steps each solver needs, by what the model can be asked with."""
    runs = sorted({(row["solver"], row["steps"]) for row in rows}, key=lambda run: (run[0], int(run[1])))
    header = ["split", "prompts", "flow shift", "guidance", *(f"{solver}, {steps} steps" for solver, steps in runs)]
    table = []
    for key, group in grouped(rows, "split", "prompts", "flow_shift", "guidance_scale").items():
        found = {(row["solver"], row["steps"]): f"{float(row['overall']):.1%}" for row in group}
        table.append([*key, *(found.get(run, "") for run in runs)])
    note = "Prompts of `nano` that are right in fp32, by solver and steps (`scripts/measure_solvers.py`)."
    return ["### Solvers", "", note, "", *markdown(header, table), *_solver_differences(rows)]


def _solver_differences(rows: Sequence[RowDict]) -> list[str]:
    """What a run of Flow-DPM-Solver gains over one of Flow-Euler, prompt by prompt, where both say which are right."""
    table, pairs = [], set()
    for key, group in grouped(rows, "split", "prompts", "flow_shift", "guidance_scale").items():
        right = {(row["solver"], row["steps"]): _bits(row) for row in group if row.get("right")}
        cells = {}
        for ours, other in itertools.product(right, right):
            if ours[0] == "flow_dpm_solver" and other[0] == "flow_euler":
                gain, half = paired_difference(right[ours], right[other])
                cells[f"{ours[1]} - {other[1]}"] = f"{100 * gain:+.1f} ± {100 * half:.1f}"
        if cells:
            pairs.update(cells)
            table.append((key, cells))
    if not table:
        return []
    note = (
        "Points that so many steps of Flow-DPM-Solver score more than so many of Flow-Euler, with the 95 % interval of "
        "the same prompts painted both ways:"
    )
    ordered = sorted(pairs, key=lambda pair: [int(steps) for steps in pair.split(" - ")])
    header = ["split", "prompts", "flow shift", "guidance", *ordered]
    lines = markdown(header, [[*key, *(cells.get(pair, "") for pair in ordered)] for key, cells in table])
    return ["", note, "", *lines]


def _bits(row: RowDict) -> list[bool]:
    right = int(row["right"], 16)
    return [bool(right >> index & 1) for index in range(int(row["prompts"]))]


# --- Kernels ---


def linear_attention(rows: Sequence[RowDict]) -> list[str]:
    """Forward times of the linear-attention kernels."""
    forward = [row for row in rows if row["measured"] == "forward"]
    return _kernel("Linear attention", "linear_attention", forward)


def mix_ffn_depthwise(rows: Sequence[RowDict]) -> list[str]:
    """Times of the depthwise kernel."""
    return _kernel("Depthwise 3x3, SiLU and gate", "mix_ffn_depthwise", rows)


def modulated_norm(rows: Sequence[RowDict]) -> list[str]:
    """Times of the norm kernels."""
    return _kernel("Norms", "modulated_norm", rows)


def _kernel(title: str, folder: str, rows: Sequence[RowDict]) -> list[str]:
    table = []
    for case, group in grouped(rows, "case").items():
        times = {row["impl"]: float(row["p50_us"]) for row in group}
        if "triton" not in times:
            continue
        ours = next(row for row in group if row["impl"] == "triton")
        floor = float(ours["floor_bytes"]) / float(ours["ceiling_gb_per_s"]) / 1e3
        name, best = min(((impl, time) for impl, time in times.items() if impl != "triton"), key=lambda item: item[1])
        share = f"{floor / times['triton']:.0%}"
        table.append([case, digits(times["triton"]), digits(floor), share, f"{digits(best)} ({name})"])
        table[-1].append(f"{best / times['triton']:.1f}x")
    if not table:
        return []
    first = rows[0]
    header = ["case", "kernel µs", "floor µs", "of ceiling", "best peer µs", "peer ÷ kernel"]
    note = f"{first['gpu']}; [all figures](kernels/sana_kernels/{folder}/README.md)."
    return [f"### {title}", "", note, "", *markdown(header, table)]


# --- Builds and outliers ---


def builds(rows: Sequence[RowDict]) -> list[str]:
    """Seconds of each part of a build without a GPU, and its peak memory."""
    table = []
    for key, group in grouped(rows, "model", "precision", "height", "width").items():
        seconds: dict[str, float] = defaultdict(float)
        # A stage that was measured again counts once.
        group = list({row["stage"]: row for row in group}.values())
        for row in group:
            part = row["stage"].partition("/")[2] or row["stage"]
            seconds[part] += float(row["seconds"])
        parts = sorted(
            {row["stage"].partition("/")[0] for row in group} & {"text_encoder", "transformer", "vae_decoder"}
        )
        peak = max(float(row["peak_memory_mib"]) for row in group)
        cells = [f"{key[0]}, {key[1]}, {key[3]} x {key[2]} px", ", ".join(parts)]
        cells += [digits(seconds[name]) if name in seconds else "" for name in _BUILD_PARTS]
        table.append([*cells, f"{peak:.0f}", next((row["gate"] for row in group if row["gate"]), "")])
    header = ["bundle", "components", "calibration s", "ONNX s", "TensorRT-RTX plans s", "gate s", "peak MiB", "gate"]
    machines = ", ".join(dict.fromkeys(row["machine"] for row in rows))
    return ["### Builds without a GPU", "", f"{machines}.", "", *markdown(header, table)]


_BUILD_PARTS = ("calibration", "onnx", "tensorrt-rtx", "gate")


def outliers(rows: Sequence[RowDict]) -> list[str]:
    """What growing outlier channels cost, and what regains it."""
    factors = list(dict.fromkeys(row["outlier_factor"] for row in rows))
    table = []
    for (dtype, calibration), group in grouped(rows, "weight_dtype", "calibration").items():
        found = {row["outlier_factor"]: f"{float(row['velocity_sqnr_db']):.1f}" for row in group}
        table.append([dtype, calibration, *(found.get(factor, "") for factor in factors)])
    header = ["dtype", "calibration", *(f"outliers x{factor}" for factor in factors)]
    note = f"Velocity SQNR in dB of {rows[0]['model']}, a few of its channels scaled up before quantisation."
    return ["### Outlier channels", "", note, "", *markdown(header, table)]


# --- Shared ---

SECTIONS: dict[str, Section] = {
    "end_to_end.csv": end_to_end,
    "nano_quality.csv": quality,
    "nano_solvers.csv": solvers,
    "linear_attention.csv": linear_attention,
    "mix_ffn_depthwise.csv": mix_ffn_depthwise,
    "modulated_norm.csv": modulated_norm,
    "builds.csv": builds,
    "outliers.csv": outliers,
}


def grouped(rows: Iterable[RowDict], *names: str) -> dict:
    """Rows by the values of columns (one column: the value itself), in the order of first appearance."""
    groups: dict = {}
    for row in rows:
        key = row[names[0]] if len(names) == 1 else tuple(row[name] for name in names)
        groups.setdefault(key, []).append(row)
    return groups


def markdown(header: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
    """A table; columns that are empty in every line are left out."""
    kept = [index for index in range(len(header)) if any(line[index] for line in table)]
    lines = [
        [header[index] for index in kept],
        ["---"] * len(kept),
        *([line[index] for index in kept] for line in table),
    ]
    return ["| " + " | ".join(line) + " |" for line in lines]


def digits(value: float) -> str:
    """Three significant digits; whole above 100."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
