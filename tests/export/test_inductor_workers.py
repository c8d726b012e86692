"""Pieces are compiled in processes of their own, which end with the build, however it ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sana_export.inductor.workers as workers_module
from sana_export.inductor.piece import Exported, Piece, export_piece, load_exported, save_exported
from sana_export.inductor.workers import Workers, default_jobs

# Of a process that imports torch and of one that ends, on a busy machine.
PATIENCE_S = 60


def exported_piece() -> Exported:
    def double(t: dict) -> tuple[torch.Tensor, ...]:
        return (t["x"] * 2,)

    return export_piece(Piece("double", ("x",), double), [torch.zeros(4, 6).t()])


def gone(pid: int) -> bool:
    """Whether the process ends in time; one that waits to be collected has ended."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_piece_is_the_same_in_another_process(tmp_path: Path) -> None:
    exported = exported_piece()
    save_exported(exported, tmp_path / "piece.pt2")
    found = load_exported(tmp_path / "piece.pt2")
    assert found.arguments == exported.arguments
    (shape, strides, dtype, device) = found.arguments[0]
    assert (tuple(shape), strides, dtype, device.type) == ((6, 4), (1, 6), torch.float32, "cpu")
    assert torch.equal(found.program.module()(torch.ones(4, 6).t())[0], torch.full((6, 4), 2.0))


def test_what_the_compiler_says_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with Workers(2, folder) as workers:
        packaging = workers.package(exported_piece(), tmp_path / "out.pt2", {"no_such_option": 1})
        with pytest.raises(RuntimeError, match="no_such_option"):
            packaging.result()
        # The process that answered is alive and takes the next one.
        (process,) = workers._started
        again = workers.package(exported_piece(), tmp_path / "no_such_folder" / "out.txt", {})
        with pytest.raises(RuntimeError):
            again.result()
        assert workers._started == [process]
        os.kill(process.pid, 9)
        with pytest.raises(RuntimeError, match="the compiling process ended with code -9"):
            workers.package(exported_piece(), tmp_path / "out.pt2", {}).result()
    assert not folder.exists()


def test_leaving_ends_what_runs(tmp_path: Path) -> None:
    with Workers(2, tmp_path / "work") as workers:
        workers.package(exported_piece(), tmp_path / "out.pt2", {})
        while not workers._started:
            time.sleep(0.05)
        (process,) = workers._started
        assert process.poll() is None
    assert gone(process.pid)
    assert not (tmp_path / "out.pt2").exists()


PARENT = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.export.test_inductor_workers import exported_piece
from sana_export.inductor.workers import Workers
with Workers(2, Path(sys.argv[1])) as workers:
    workers.package(exported_piece(), Path(sys.argv[1]) / "out.pt2", {})
    while not workers._started:
        time.sleep(0.05)
    print(workers._started[0].pid, flush=True)
    os._exit(9)
"""


def test_workers_end_when_the_build_is_killed(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", PARENT, str(tmp_path), root]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 9, found.stderr
    assert gone(int(found.stdout))


@pytest.mark.parametrize(
    ("cpus", "gib", "jobs"), [(2, 64, 1), (1, 64, 1), (16, 64, 8), (64, 128, 8), (16, 13, 3), (16, 2, 1)]
)
def test_as_many_jobs_as_there_is_room_for(cpus: int, gib: int, jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    monkeypatch.setattr(workers_module, "system_memory", lambda: (gib << 30, 128 << 30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_jobs() == jobs
    monkeypatch.setattr(workers_module, "system_memory", lambda: None)
    assert default_jobs() == 1
    monkeypatch.setattr(workers_module, "system_memory", lambda: (gib << 30, 128 << 30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 << 30, 8 << 30))
    assert default_jobs() == min(jobs, 2)
