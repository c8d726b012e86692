"""What is tracked would make sense on any machine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Absolute paths of somebody's machine. `\w` after them: a pattern such as this one does not match itself.
MACHINE_PATH = re.compile(rb"(?<![\w.~-])(?:/(?:work|root|home|Users)/\w|[A-Z]:\\Users\\)")
LARGEST_BYTES = 512 << 10
# Its weights have a bound of their own: tests/export/test_shipped_model.py.
SHIPPED_MODEL = ROOT / "sana_export" / "models"


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "-z"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in run.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_machine_path() -> None:
    found = []
    for path in tracked_files():
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if match := MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0].decode()}")
    assert found == []


def test_no_large_file_is_tracked() -> None:
    others = [path for path in tracked_files() if SHIPPED_MODEL not in path.parents]
    large = [path.relative_to(ROOT) for path in others if path.stat().st_size > LARGEST_BYTES]
    assert large == []
