"""The benchmarks of tiled kernels run to their end in Triton's interpreter: their logic, not their times."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COMMANDS = {
    "scaled_convolution.py": ["--side", "32", "--stages", "tiny"],
    "gemma_attention.py": [],
    "scaled_linear.py": ["--sizes", "tiny", "--sides", "64", "--products", "to_out"],
    "weight_only_linear.py": ["--sizes", "tiny", "--layers", "gate_up"],
}


@pytest.mark.parametrize(
    ("script", "sweep"), [*((script, True) for script in COMMANDS), ("scaled_convolution.py", False)]
)
def test_a_dry_run_writes_its_rows(script: str, sweep: bool, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    output = tmp_path / "rows.csv"
    command = [sys.executable, script, *COMMANDS[script], "--device", "cpu", "--output", str(output)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command + ["--sweep"] * sweep, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    with output.open(newline="") as file:
        sections = [row["section"] for row in csv.DictReader(file)]
    assert "failed" not in sections, run.stdout
    assert ("best" if sweep else "speedup") in sections
    assert sweep or "parity" in sections
