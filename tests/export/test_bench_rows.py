"""Rows survive the file, are found again, and replace only themselves."""

from dataclasses import replace
from pathlib import Path

import pytest

from sana_export.bench.ceilings import Ceilings
from sana_export.bench.floors import PictureWork, Stage, Work
from sana_export.bench.machine import Machine, describe_machine
from sana_export.bench.rows import Case, add_rows, floor_figures, make_row, read_rows, write_rows
from sana_export.bench.run import done_stages
from sana_export.bench.subjects import STAGES
from sana_runtime.errors import InputError

MACHINE = Machine("GPU, 80 GB", "580.1", "700 W", "torch 2.11; CUDA 13.0", "abc1234", "2026-11-22T10:00:00Z")
CASE = Case("random:0.6b", "fp8", 1024, 1024, 20)
OURS = "sana-export inductor"


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [
        make_row(MACHINE, CASE, OURS, "step", p50_ms=4.123456, runs=10, flop=2**50, floor_ms=1.0, gap=4.123456),
        make_row(MACHINE, CASE, OURS, "total", error="out of memory\n  received: 80 GB", note='"quoted", and a comma'),
    ]
    path = tmp_path / "rows.csv"
    write_rows(path, rows)
    first, second = read_rows(path)
    assert first == rows[0]
    assert first.p50_ms == 4.1235
    assert first.flop == 2**50
    assert second == replace(rows[1], error="out of memory |   received: 80 GB")
    assert second.p50_ms is None


def test_a_second_measurement_replaces_only_its_predecessor(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    old = make_row(MACHINE, CASE, OURS, "step", p50_ms=5.0)
    others = [
        make_row(MACHINE, CASE, OURS, "total", p50_ms=5.0),
        make_row(replace(MACHINE, commit="fff0000"), CASE, OURS, "step", p50_ms=5.0),
        make_row(MACHINE, replace(CASE, precision="bf16"), OURS, "step", p50_ms=5.0),
    ]
    add_rows(path, [old, *others])
    new = make_row(replace(MACHINE, run="2026-11-23T10:00:00Z"), CASE, OURS, "step", p50_ms=4.0)
    add_rows(path, [new])
    assert read_rows(path) == [*others, new]


@pytest.mark.parametrize("content", ["a,b\n1,2\n", None], ids=["other columns", "a word for a number"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "rows.csv"
    if content is None:
        write_rows(path, [make_row(MACHINE, CASE, OURS, "step", p50_ms=1.0)])
        content = path.read_text().replace(",1.0,", ",fast,")
    path.write_text(content)
    with pytest.raises(InputError, match="not a file of benchmark rows"):
        read_rows(path)


def test_what_was_measured_is_found_again() -> None:
    rows = [make_row(MACHINE, CASE, OURS, "step", p50_ms=5.0), make_row(MACHINE, CASE, OURS, "total", error="no")]

    def done(machine: Machine = MACHINE, case: Case = CASE, label: str = OURS, *, retry: bool = False) -> set[str]:
        return done_stages(rows, machine, case, label, retry_errors=retry)

    later = replace(MACHINE, run="2026-12-01T00:00:00Z")
    assert done(later) == {"step", "total"}
    assert done(retry=True) == {"step"}
    for machine in (replace(MACHINE, commit="fff"), replace(MACHINE, versions="torch 3"), replace(MACHINE, device="x")):
        assert done(machine) == set()
    assert done(case=replace(CASE, num_steps=4)) == set()
    assert done(label="diffusers eager") == set()


def test_a_subject_that_failed_as_a_whole_is_done() -> None:
    rows = [make_row(MACHINE, CASE, OURS, "all", error="crashed")]
    assert done_stages(rows, MACHINE, CASE, OURS, retry_errors=False) >= {*STAGES}
    assert done_stages(rows, MACHINE, CASE, OURS, retry_errors=True) == set()


def test_gap_of_a_picture_is_over_the_sum_of_its_calls() -> None:
    one = Stage((Work("a", "gemm", "bfloat16", 10**12, 0, 0),), 0)  # 1 ms at 1000 TFLOP/s
    work = PictureWork(one, one, one, one)
    ceilings = Ceilings({"bfloat16": 1000.0}, 3000.0)
    figures = floor_figures("total", 46.0, work, ceilings, num_steps=20)
    assert figures["floor_ms"] == pytest.approx(23.0)  # text, caption, 20 steps, decoder
    assert figures["gap"] == pytest.approx(2.0)
    assert floor_figures("step", 2.0, work, ceilings, 20)["gap"] == pytest.approx(2.0)
    assert floor_figures("cold_start", 2.0, work, ceilings, 20) == {}


def test_the_machine_is_described_without_a_gpu() -> None:
    machine = describe_machine("cpu", commit="abc")
    assert machine.commit == "abc"
    assert machine.device
    assert "torch " in machine.versions
    assert describe_machine("cpu").commit != ""
