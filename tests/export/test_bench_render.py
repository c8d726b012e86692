"""The README shows what the rows say, and nothing else."""

import csv
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sana_export.bench.machine import Machine
from sana_export.bench.rows import Case, Row, make_row, write_rows

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine("NVIDIA H100", "580", "700 W", "torch 2.11", "abc", "2026-11-22T10:00:00Z")
CASE = Case("random:0.6b", "fp8", 1024, 1024, 20)
PEER = replace(CASE, precision="bf16")
OURS, EAGER, COMPILED = "sana-export inductor", "diffusers eager", "diffusers torch.compile, CUDA graph"
FRAME = "before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n"


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_results", ROOT / "scripts" / "render_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def as_read(rows: Sequence[Row]) -> list[dict[str, str]]:
    return [{key: "" if value is None else str(value) for key, value in asdict(row).items()} for row in rows]


def timed(case: Case, subject: str, stage: str, p50_ms: float, machine: Machine = MACHINE, **figures: object) -> Row:
    return make_row(machine, case, subject, stage, p50_ms=p50_ms, **figures)


ROWS = [
    timed(CASE, OURS, "step", 4.0, floor_ms=2.0, gap=2.0),
    timed(CASE, OURS, "total", 100.0, floor_ms=50.0, gap=2.0, device_mib=4321.4),
    timed(CASE, OURS, "build", 93000.0),
    timed(PEER, EAGER, "step", 50.0),
    timed(PEER, EAGER, "total", 1200.0),
    timed(PEER, COMPILED, "step", 8.0),
    make_row(MACHINE, PEER, "diffusers torch-tensorrt", "all", error="not available: a | b"),
]


def test_the_readme_is_the_rendering_of_the_rows(render: ModuleType) -> None:
    assert render.main(["--check"]) == 0, "run scripts/render_results.py"
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("!["):
            assert (ROOT / line.partition("(")[2].rstrip(")")).is_file(), line


def test_an_edited_number_is_noticed(render: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head, _, tail = text.partition(render.BEGIN)
    edited = tmp_path / "README.md"
    edited.write_text(head + render.BEGIN + tail.replace("1", "2", 1), encoding="utf-8")
    monkeypatch.setattr(render, "README", edited)
    assert render.main(["--check"]) == 1


def test_no_rows_no_sections(render: ModuleType, tmp_path: Path) -> None:
    assert render.rendered(FRAME, tmp_path) == "before\n<!-- results:begin -->\n\n<!-- results:end -->\nafter\n"


def test_a_readme_without_markers_is_refused(render: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="results:begin"):
        render.rendered("no markers", tmp_path)


def test_versions_of_several_runs_are_one_list(render: ModuleType, tmp_path: Path) -> None:
    later = replace(MACHINE, versions="torch 2.11; onnxruntime-gpu 1.31; CUDA 13.0", run="2026-11-23T10:00:00Z")
    last = replace(MACHINE, versions="torch 2.12; CUDA 13.0", run="2026-11-24T10:00:00Z")
    runs = [timed(CASE, f"{OURS} {i}", "step", 4.0, machine) for i, machine in enumerate((MACHINE, later, last))]
    write_rows(tmp_path / "end_to_end.csv", runs)
    text = render.rendered(FRAME, tmp_path)
    assert "; torch 2.11, 2.12; onnxruntime-gpu 1.31; CUDA 13.0; commit abc." in text


def test_pictures_show_ratio_to_the_best_peer_gap_and_memory(render: ModuleType, tmp_path: Path) -> None:
    write_rows(tmp_path / "end_to_end.csv", ROWS)
    text = render.rendered(FRAME, tmp_path)
    lines = text.splitlines()
    (ours,) = [line for line in lines if line.startswith(f"| {OURS}, fp8")]
    header = next(line for line in lines if "of best peer" in line and line.startswith("|"))
    cells = dict(zip(split(header), split(ours), strict=True))
    assert cells["step"] == "4"
    assert cells["gap"] == "2.0x"
    assert cells["GPU MiB"] == "4321"
    assert cells["build s"] == "93"
    assert split(ours).count("0.50") == 1, "a step of 4 ms beside the best peer's 8"
    assert split(ours).count("0.08") == 1, "a picture of 100 ms beside 1200"
    assert "decoder" not in header, "a column without figures is left out"
    assert "| diffusers torch-tensorrt, bf16 | all | not available: a / b |" in text
    assert text.index(f"| {OURS}") < text.index(f"| {EAGER}")


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_peer_of_another_run_is_marked(render: ModuleType) -> None:
    other = replace(MACHINE, run="2026-11-23T10:00:00Z")
    rows = [timed(CASE, OURS, "step", 4.0), timed(PEER, EAGER, "step", 8.0, other)]
    assert any("0.50 †" in line for line in render.end_to_end(as_read(rows)))


def test_a_ratio_is_that_of_the_newest_run_with_both(render: ModuleType) -> None:
    newer = replace(MACHINE, run="2026-11-23T10:00:00Z")
    rows = [timed(CASE, OURS, "step", 4.0), timed(PEER, EAGER, "step", 10.0), timed(CASE, OURS, "step", 5.0, newer)]
    lines = render.end_to_end(as_read(rows))
    assert [split(line)[1:3] for line in lines if line.startswith(f"| {OURS}")] == [["5", "0.40"]]


def test_the_newest_figure_is_shown(render: ModuleType) -> None:
    newer = replace(MACHINE, run="2026-11-23T10:00:00Z", commit="def")
    rows = as_read([timed(CASE, OURS, "step", 3.0, newer), timed(CASE, OURS, "step", 4.0)])
    assert [row["p50_ms"] for row in render.newest(rows)] == ["3.0"]


def test_a_straight_line_is_found(render: ModuleType) -> None:
    tokens = np.array([256.0, 1024, 4096, 16384])
    slope, start, r_squared, worst = render.line_fit(tokens, 0.002 * tokens + 0.7)
    assert (slope, start, r_squared) == pytest.approx((0.002, 0.7, 1.0))
    assert worst < 1e-9
    *_, quadratic, deviation = render.line_fit(tokens, 1e-6 * tokens**2 + 1)
    assert quadratic < 0.99
    assert deviation > 0.3


def test_linearity_needs_three_sizes(render: ModuleType) -> None:
    def rows(sides: Sequence[int]) -> list[dict[str, str]]:
        tokens = [(side // 32) ** 2 for side in sides]
        cases = [replace(CASE, height=side, width=side) for side in sides]
        return as_read([timed(case, OURS, "step", n / 1000) for case, n in zip(cases, tokens, strict=True)])

    assert not any("µs per token" in line for line in render.end_to_end(rows([512, 1024])))
    shown = render.end_to_end(rows([512, 1024, 4096]))
    (line,) = [line for line in shown if "256, 1024, 16384" in line]
    assert split(line)[3:4] == ["1"]


def test_the_plot_is_the_same_twice(render: ModuleType, tmp_path: Path) -> None:
    rows = as_read(ROWS)
    assert len(render.chart_rows(rows)) == 2
    for name in ("a.svg", "b.svg"):
        render.plot(rows, tmp_path / name)
    content = (tmp_path / "a.svg").read_bytes()
    assert content == (tmp_path / "b.svg").read_bytes()
    assert b"sana-export inductor, fp8" in content
    assert len(content) < 100_000


def test_a_line_per_setting_of_the_solvers(render: ModuleType, tmp_path: Path) -> None:
    runs = [("flow_dpm_solver", 20, 0.96), ("flow_euler", 28, 0.955)]
    with (tmp_path / "nano_solvers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "flow_shift", "guidance_scale", "solver", "steps", "prompts", "overall"])
        writer.writerows(["test", 3.0, 4.5, solver, steps, 500, share - 0.02] for solver, steps, share in runs)
        writer.writerow(["test", 6.0, 4.5, *runs[0][:2], 500, runs[0][2]])
    text = render.rendered(FRAME, tmp_path)
    assert "| flow_dpm_solver, 20 steps | flow_euler, 28 steps |" in text
    assert "| test | 500 | 3.0 | 4.5 | 94.0% | 93.5% |" in text
    assert "| test | 500 | 6.0 | 4.5 | 96.0% |  |" in text


def test_solvers_are_compared_prompt_by_prompt(render: ModuleType, tmp_path: Path) -> None:
    with (tmp_path / "nano_solvers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "flow_shift", "guidance_scale", "solver", "steps", "prompts", "overall", "right"])
        writer.writerow(["test", 8.0, 4.5, "flow_dpm_solver", 20, 8, 0.75, f"{0b00111111:x}"])
        writer.writerow(["test", 8.0, 4.5, "flow_euler", 28, 8, 0.75, f"{0b11111100:x}"])
        writer.writerow(["test", 8.0, 4.5, "flow_euler", 50, 8, 0.875, f"{0b01111111:x}"])
        writer.writerow(["test", 3.0, 4.5, "flow_euler", 50, 8, 0.875, ""])
    text = render.rendered(FRAME, tmp_path)
    assert "| guidance | 20 - 28 | 20 - 50 |" in text
    # Four of eight prompts differ, as many either way; then one does: 1.96 sqrt(4) / 8 and 1.96 sqrt(1 - 1 / 8) / 8.
    assert "| test | 8 | 8.0 | 4.5 | +0.0 ± 49.0 | -12.5 ± 22.9 |" in text


def test_quality_is_rendered(render: ModuleType, tmp_path: Path) -> None:
    scores = "overall,count,colour,shape,position,binding,compared,psnr_db,ssim,prompts"
    columns = f"flow_shift,guidance_scale,precision,target,steps,solver,{scores}"
    with (tmp_path / "nano_quality.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns.split(","))
        for shift, scale, precision, target, *figures in (
            (8.0, 3.0, "bf16", "onnxruntime", 0.953, 0, "", ""),
            (8.0, 3.0, "fp8", "inductor", 0.941, 200, 31.25, 0.98765),
            (3.0, 3.0, "int8", "inductor", 0.94, 200, 31.25, 0.98765),
            (8.0, 4.5, "fp16", "inductor", 0.94, 200, 31.25, 0.98765),
        ):
            overall, *compared = figures
            way = [shift, scale, precision, target, 20, "flow_dpm_solver"]
            writer.writerow([*way, overall, 1, 0.9, 0.9, 0.9, 0.9, *compared, 512])
    text = render.rendered(FRAME, tmp_path)
    assert "### Quality" in text
    assert "| fp8 | inductor | 20 | flow_dpm_solver | 94.1% | 100.0% |" in text
    assert "| 512 | 31.2 | 0.988 | 200 |" in text
    assert "512 px, flow shift 8, guidance 3:" in text
    assert "| int8 |" not in text, "of another flow shift than the shipped model's"
    assert "| fp16 |" not in text, "of another guidance"
