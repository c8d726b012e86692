"""Estimates for other GPUs: the fit finds known efficiencies, never beats the bound, and says what it is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sana_export.bench.estimate import (
    CLASSES,
    FITTED_STAGES,
    Sample,
    bounds,
    estimate,
    fit,
    gpu_named,
    published_gpus,
    samples_of,
    work_of,
)
from sana_export.bench.floors import Stage, Work
from sana_export.bench.machine import Machine
from sana_export.bench.rows import Case, Row, make_row, write_rows
from sana_export.cli import app
from sana_runtime.errors import InputError

H100 = "NVIDIA H100 80GB HBM3"
MACHINE = Machine(H100, "580", "700 W", "torch 2.11", "abc", "2026-11-22T10:00:00Z")
TRUE = (1.8, 2.4, 3.0, 1.5, 2.0)
CASES = [
    Case(model, precision, side, side, 20)
    for model in ("random:0.6b", "random:1.6b")
    for precision in ("bf16", "fp8")
    for side in (512, 1024)
]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """What an H100 whose kernels had the TRUE efficiencies would have measured."""
    made = []
    for case in CASES:
        work = work_of(case)
        for name in FITTED_STAGES:
            stage = work.stage(name)
            assert stage is not None
            time = float(np.dot(TRUE, bounds(stage, gpu_named("h100"))))
            made.append(make_row(MACHINE, case, "sana-export inductor", name, p50_ms=time))
    return made


def test_the_fit_finds_the_efficiencies(rows: list[Row]) -> None:
    found = fit(samples_of(rows, "inductor"))
    assert len(found.samples) == len(CASES) * 3
    # Rows carry five digits.
    np.testing.assert_allclose(found.factors, TRUE, rtol=0.02)
    assert max(map(abs, found.errors)) < 0.01


def test_other_rows_are_not_fitted(rows: list[Row]) -> None:
    assert samples_of(rows, "onnxruntime") == []
    assert samples_of([replace(row, device="NVIDIA L4") for row in rows], "inductor") == []


def test_what_was_measured_again_counts_once(rows: list[Row]) -> None:
    """A stage as it was before it was made faster says nothing of it now."""
    slower = [replace(row, commit="older", run="2000-01-01T00:00:00Z", p50_ms=2 * (row.p50_ms or 0)) for row in rows]
    assert [(s.label, s.p50_ms) for s in samples_of([*slower, *rows], "inductor")] == [
        (s.label, s.p50_ms) for s in samples_of(rows, "inductor")
    ]


def test_rows_of_two_gpus_are_fitted_together(rows: list[Row]) -> None:
    """Each with the bounds of its own GPU: an H200 whose bandwidth tells needs less time with the same efficiencies."""
    other = []
    for case in CASES:
        for name in FITTED_STAGES:
            stage = work_of(case).stage(name)
            assert stage is not None
            time = float(np.dot(TRUE, bounds(stage, gpu_named("h200"))))
            machine = replace(MACHINE, device="NVIDIA H200")
            other.append(make_row(machine, case, "sana-export inductor", name, p50_ms=time))
    assert (other[0].p50_ms or 0) < (rows[0].p50_ms or 0)
    found = fit(samples_of([*rows, *other], "inductor"))
    assert len(found.samples) == len(CASES) * 6
    np.testing.assert_allclose(found.factors, TRUE, rtol=0.02)


def test_factors_never_beat_the_bound() -> None:
    """Two stages, one measured faster than its bound: the factor stops at 1."""
    samples = [Sample("a", (10.0, 0, 0, 0, 0), 5.0), Sample("b", (0, 0, 0, 10.0, 0), 20.0)]
    found = fit(samples)
    assert found.factors[0] == 1.0
    assert found.factors[3] == pytest.approx(2.0)
    # Left out, "a" is predicted at its bound, and nothing is known of "b"'s class.
    assert found.errors == pytest.approx((1.0, -0.5))


def test_without_rows_it_is_a_bound_and_says_so() -> None:
    found = fit([])
    assert "lower bounds" in found.description
    stage = Stage((Work("a", "gemm", "bfloat16", 989_400_000_000, 0, 0),), 0)
    assert found.predict_ms(stage, gpu_named("h100")) == pytest.approx(1.0)


def test_a_bound_is_the_slower_of_arithmetic_and_bytes() -> None:
    gpu = gpu_named("orin")
    works = (
        Work("a", "gemm", "bfloat16", 42_500_000_000, 0, 10),
        Work("b", "gemm", "int8", 10, 204_800_000, 0),
        Work("c", "pointwise", "bfloat16", 10**15, 0, 409_600_000),
    )
    # 1 ms of arithmetic; 1 ms of bytes; a pass is bound by its bytes whatever it computes.
    assert bounds(Stage(works, 0), gpu) == pytest.approx((1.0, 1.0, 0.0, 2.0, 3e-3))
    assert len(CLASSES) == 5


def test_a_dtype_the_gpu_lacks_is_refused() -> None:
    work = work_of(Case("random:0.6b", "fp8", 512, 512, 20))
    with pytest.raises(InputError, match="Orin 64GB has no products in float8e4m3fn"):
        estimate(work, 20, gpu_named("orin"), fit([]))


def test_every_gpu_names_its_source_and_plausible_rates() -> None:
    for name, gpu in published_gpus().items():
        assert gpu.source.strip(), name
        assert gpu.tflop_per_s["float32"] < gpu.tflop_per_s["bfloat16"] < gpu.tflop_per_s["int8"], name
        assert 100 < gpu.gb_per_s < 10_000, name


def test_a_picture_is_the_sum_of_its_calls(rows: list[Row]) -> None:
    found = fit(samples_of(rows, "inductor"))
    work = work_of(CASES[0])
    times = estimate(work, 20, gpu_named("rtx-5090"), found)
    known = times["text_encoder"] + 20 * times["step"] + times["vae_decoder"]
    assert times["total"] == pytest.approx(known + found.predict_ms(work.caption, gpu_named("rtx-5090")))


@pytest.mark.parametrize("measured", [True, False])
def test_the_command_says_what_its_figures_are(measured: bool, rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    if measured:
        write_rows(path, rows)
    arguments = ["estimate", "--gpu", "thor", "--gpu", "orin", "--precision", "fp8", "--rows", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert ("ESTIMATED" in result.output) == measured
    assert ("LOWER BOUNDS" in result.output) != measured
    assert ("left out in turn" in result.output) == measured
    assert "has no products" in " ".join(result.output.split())


def test_an_unknown_gpu_is_refused() -> None:
    result = CliRunner().invoke(app, ["estimate", "--gpu", "voodoo2"])
    assert result.exit_code == 1
    assert "no published rates of this GPU" in result.output
