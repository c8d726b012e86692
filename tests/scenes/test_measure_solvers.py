"""The solvers' settings are walked through once, and what is measured stays."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with empty pictures for painted ones; `painted` are the settings they were asked for."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module: Any = importlib.import_module("measure_solvers")
    module.painted = []

    class Painter:
        cores, device = 1, "no device"

        def __init__(self, bundles: Path, texts: tuple[str, ...]) -> None:
            self._count = len(texts)

        def paint(self, setting: Any) -> Iterator[np.ndarray]:
            module.painted.append((setting.split, setting.flow_shift, setting.solver, setting.steps))
            return iter([np.zeros((512, 512, 3), np.uint8)] * self._count)

    monkeypatch.setattr(module, "Painter", Painter)
    return module


def call(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["measure_solvers.py", *map(str, arguments)])
    code: int = script.main()
    return code


def test_every_setting_is_measured_once(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    common = ("--bundles", tmp_path, "--rows", rows, "--prompts", 2)
    assert call(script, monkeypatch, *common, "--flow-shift", 3) == 0
    runs = [*(("flow_dpm_solver", steps) for steps in (8, 14, 20)), ("flow_euler", 28), ("flow_euler", 50)]
    assert script.painted == [("validation", 3.0, *run) for run in runs]
    assert call(script, monkeypatch, *common, "--flow-shift", 3, 6) == 0
    assert script.painted[5:] == [("validation", 6.0, *run) for run in runs]
    found = script.read_rows(rows)
    assert len(found) == 10
    assert {(row["prompts"], row["overall"], row["device"]) for row in found} == {("2", "0.0", "no device")}
    # More prompts are another measurement of the same setting.
    assert call(script, monkeypatch, *common[:-1], 3, "--flow-shift", 3) == 0
    assert sorted(row["prompts"] for row in script.read_rows(rows)) == ["2"] * 5 + ["3"] * 5


def test_wrong_arguments_are_refused(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        call(script, monkeypatch, "--bundles", tmp_path, "--flow-shift", 0)
    assert caught.value.code == 2
    assert "--flow-shift: 0.0 given" in capsys.readouterr().err
    rows = tmp_path / "rows.csv"
    assert call(script, monkeypatch, "--bundles", tmp_path, "--rows", rows, "--prompts", 5000) == 1
    assert "at most 432" in capsys.readouterr().err
    assert not rows.exists()
