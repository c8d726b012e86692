"""The doctor names what is wrong, what to do, and exits with the worst of it."""

import sys
from collections import namedtuple
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sana_export import doctor
from sana_export.commands import doctor as command
from sana_export.doctor import Finding
from sana_runtime.contract import TargetName
from sana_runtime.tensorrt_library import Candidate, TensorrtLibrary


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int = 0) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\nprintf '%s\\n' '{answer}'\nexit {code}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    ("answer", "code", "status", "text"),
    [
        ("GPU X, 8.9, 610.1, 9000, 12000", 0, "ok", "9000 of 12000 MiB free"),
        ("GPU X, 12.0, 610.1, 9000, 12000", 0, "ok", "capability 12.0"),
        ("GPU X, 9.0, 610.1, 9000, 80000", 0, "warn", "capability 9.0"),
        ("GPU X, [N/A], 610.1, [N/A], [N/A]", 0, "warn", "[N/A]"),
        ("No devices were found", 6, "warn", "No devices were found"),
        ("", 0, "warn", "lists no GPU"),
        ("something else", 0, "warn", "something else"),
    ],
)
def test_gpu_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, status: str, text: str
) -> None:
    fake_smi(tmp_path, monkeypatch, answer, code)
    (finding,) = doctor.check_gpus()
    assert finding.status == status
    assert text in finding.detail
    assert bool(finding.remedy) == (status != "ok")


def test_no_gpu_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    (finding,) = doctor.check_gpus()
    assert (finding.status, finding.detail) == ("warn", "no nvidia-smi found")
    assert "works without" in finding.remedy


def test_a_package_that_does_not_import_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise OSError('libfoo.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = doctor.check_package("broken_package")
    assert finding == Finding(
        "broken_package",
        "FAIL",
        "OSError: libfoo.so: cannot open shared object file",
        "pip install 'broken_package'",
    )


def test_an_old_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    monkeypatch.setattr(onnx, "__version__", "1.2.3")
    finding = doctor.check_package("onnx")
    assert (finding.status, finding.detail) == ("FAIL", "1.2.3")
    assert finding.remedy.startswith("pip install 'onnx>=")


@pytest.mark.parametrize(
    ("version", "expected"), [("2.13.0+cpu", (2, 13, 0)), ("1.20rc1", (1,)), ("unknown", ()), ("", ())]
)
def test_numbers_of_a_version(version: str, expected: tuple[int, ...]) -> None:
    assert doctor.numbers(version) == expected


def test_python_outside_the_range_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    version = namedtuple("version", "major minor")
    monkeypatch.setattr(sys, "version_info", version(3, 9))
    assert doctor.check_python()[0].status == "FAIL"


def test_distributions_of_two_versions_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", {"sana-export": "0.2.0", "sana-runtime": "0.1.0"}.get)
    (finding,) = doctor.check_distributions()
    assert (finding.status, finding.detail) == ("FAIL", "sana-export 0.2.0, sana-runtime 0.1.0")


def test_builder_names_the_chosen_and_the_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    def examine(target: TargetName) -> tuple[Candidate, ...]:
        library = TensorrtLibrary(target, "vendor", "tensorrt", "1.9", "1.9", "it starts")
        return (Candidate("module a", "not installed"), Candidate("module b", "it starts", library))

    monkeypatch.setattr(doctor, "examine_tensorrt", examine)
    (finding,) = doctor.check_rtx_builder()
    assert (finding.status, finding.detail) == ("ok", "it starts; not used: module a: not installed")


def test_no_builder_is_a_warning_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = (Candidate("module a", "not installed"), Candidate("wheels", "no C compiler"))
    monkeypatch.setattr(doctor, "examine_tensorrt", lambda target: reasons)
    (finding,) = doctor.check_rtx_builder()
    assert finding.status == "warn"
    assert finding.detail == "module a: not installed; wheels: no C compiler"
    assert "rtx-builder" in finding.remedy


def test_little_disk_and_no_compiler_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10, 10, 1 << 30))
    monkeypatch.setattr(doctor, "c_compiler", lambda: None)
    assert [finding.status for finding in (*doctor.check_disk(), *doctor.check_compiler())] == ["warn"] * 2


def test_a_folder_that_is_no_bundle_fails(tmp_path: Path) -> None:
    (finding,) = doctor.check_bundle(tmp_path)
    assert finding.status == "FAIL"
    assert "is not a bundle" in finding.detail
    assert finding.remedy


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("FAIL", 1)])
def test_exit_code_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: doctor.Status, code: int) -> None:
    monkeypatch.setattr(doctor, "examine_machine", lambda: [Finding("thing", status, "it is", "do that")])
    app = typer.Typer()
    app.command()(command.run)
    result = CliRunner().invoke(app, ["--json", str(tmp_path / "report.json")])
    assert result.exit_code == code
    assert f"overall: {status}" in result.output
    assert "do that" in result.output
    assert f'"status": "{status}"' in (tmp_path / "report.json").read_text()


def test_this_machine_has_no_failure() -> None:
    findings = tuple(doctor.examine_machine())
    assert [finding for finding in findings if finding.status == "FAIL"] == []
    names = [finding.component for finding in findings]
    assert names[:3] == ["Python", "sana", "torch"]
    assert {"TensorRT-RTX builder", "TensorRT", "GPU", "system memory", "disk", "C compiler"} <= {*names}
