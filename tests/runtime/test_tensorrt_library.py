"""The right TensorRT is found, and every unusable one is explained."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from sana_runtime import environment, tensorrt_library, two_wheels
from sana_runtime.errors import TargetError
from sana_runtime.tensorrt_library import Candidate, examine_tensorrt, find_tensorrt

RTX_SOURCE = """
__version__ = "1.9.0.1"
class Builder:
    def __init__(self, logger): pass
    def create_builder_config(self): return object()
class Logger:
    ERROR = 0
    def __init__(self, severity): pass
class OnnxParser: pass
class IProgressMonitor: pass
class IBuilderConfig:
    def set_compute_capability(self): pass
"""
FULL_SOURCE = RTX_SOURCE.replace("def set_compute_capability(self): pass", "pass").replace("1.9.0.1", "10.3.0")


@pytest.fixture(autouse=True)
def fresh_answers() -> Iterator[None]:
    examine_tensorrt.cache_clear()
    yield
    examine_tensorrt.cache_clear()


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path of this process and of its children."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.fixture
def no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(two_wheels.metadata, "distribution", missing)


@pytest.fixture
def fake_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both wheels at the right versions, with empty libraries; and an empty cache folder."""
    site = tmp_path / "site"
    for file in {*two_wheels._LINKS.values()}:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).touch()
    versions = dict([two_wheels.LIBRARY_WHEEL, two_wheels.BINDINGS_WHEEL])
    monkeypatch.setattr(two_wheels.metadata, "distribution", lambda name: FakeWheel(site, versions[name]))
    monkeypatch.setattr(two_wheels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(two_wheels.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return site


class FakeWheel:
    def __init__(self, site: Path, version: str) -> None:
        self.site, self.version = site, version

    def locate_file(self, file: str) -> Path:
        return self.site / file


@pytest.fixture
def compiler() -> None:
    if environment.c_compiler() is None:
        pytest.skip("no C compiler")


def reason_of(target: str, name: str) -> str:
    candidates: tuple[Candidate, ...] = examine_tensorrt(target)  # type: ignore[arg-type]
    return next(candidate.reason for candidate in candidates if candidate.name == name)


# --- Vendor modules ---


def test_vendor_module_is_preferred(modules: Path) -> None:
    (modules / "tensorrt_rtx.py").write_text(RTX_SOURCE)
    library = find_tensorrt("tensorrt-rtx")
    assert (library.kind, library.module, library.version) == ("vendor", "tensorrt_rtx", "1.9.0.1")
    assert library.builder_name == "TensorRT-RTX"
    assert library.environment == {}


def test_module_tensorrt_serves_rtx_only_if_it_is_rtx(modules: Path, no_wheels: None) -> None:
    (modules / "tensorrt.py").write_text(FULL_SOURCE)
    assert "it is the full TensorRT 10.3.0, not TensorRT-RTX" in reason_of("tensorrt-rtx", "module tensorrt")
    assert find_tensorrt("tensorrt").version == "10.3.0"


def test_module_tensorrt_that_is_rtx(modules: Path, no_wheels: None) -> None:
    (modules / "tensorrt.py").write_text(RTX_SOURCE)
    assert find_tensorrt("tensorrt-rtx").module == "tensorrt"
    with pytest.raises(TargetError, match="it is TensorRT-RTX"):
        find_tensorrt("tensorrt")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("__version__ = '0.0.1'", "placeholder"),
        (
            "raise RuntimeError('install from the vendor index')",
            "RuntimeError: install from the vendor index",
        ),
        ("import sys; sys.exit('go away')", "go away"),
        ("import os; os.abort()", "SIGABRT"),
        ("import os; os._exit(0)", "cannot be used"),
        ("print('{}')\nimport os; os._exit(0)", "cannot be used"),
        (RTX_SOURCE.replace("pass", "raise OSError('no driver')", 1), "OSError: no driver"),
    ],
    ids=["empty", "raises", "exits", "crashes", "silent", "other-output", "builder-fails"],
)
def test_a_bad_module_is_explained(modules: Path, no_wheels: None, source: str, reason: str) -> None:
    (modules / "tensorrt_rtx.py").write_text(source)
    assert reason in reason_of("tensorrt-rtx", "module tensorrt_rtx")


def test_a_module_that_hangs_is_given_up(modules: Path, no_wheels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (modules / "tensorrt_rtx.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(tensorrt_library, "_PROBE_SECONDS", 1)
    assert "did not finish within 1 s" in reason_of("tensorrt-rtx", "module tensorrt_rtx")


def test_nothing_usable_lists_every_candidate(no_wheels: None) -> None:
    with pytest.raises(TargetError) as caught:
        find_tensorrt("tensorrt-rtx")
    text = str(caught.value)
    assert "module tensorrt_rtx: " in text
    assert "module tensorrt: " in text
    assert "onnxruntime-ep-nv-tensorrt-rtx-cu13 is not installed" in text
    assert "rtx-builder" in text


def test_the_answer_is_kept(modules: Path) -> None:
    (modules / "tensorrt_rtx.py").write_text(RTX_SOURCE)
    first = find_tensorrt("tensorrt-rtx")
    (modules / "tensorrt_rtx.py").unlink()
    assert find_tensorrt("tensorrt-rtx") is first


# --- The two wheels ---


@pytest.mark.parametrize(("wheel", "other"), [("LIBRARY_WHEEL", "0.4.9"), ("BINDINGS_WHEEL", "11.5.0.1")])
def test_another_version_is_not_available(
    fake_wheels: Path, monkeypatch: pytest.MonkeyPatch, wheel: str, other: str
) -> None:
    name, right = getattr(two_wheels, wheel)
    versions = {**dict([two_wheels.LIBRARY_WHEEL, two_wheels.BINDINGS_WHEEL]), name: other}
    monkeypatch.setattr(two_wheels.metadata, "distribution", lambda name: FakeWheel(fake_wheels, versions[name]))
    with pytest.raises(two_wheels.NotAvailable, match=f"{name} is version {other}, only {right} fits"):
        two_wheels.shared_library_folder()


def test_another_machine_is_not_available(fake_wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_wheels.platform, "machine", lambda: "aarch64")
    with pytest.raises(two_wheels.NotAvailable, match="Linux x86-64 only"):
        two_wheels.shared_library_folder()


def test_no_compiler_is_not_available(fake_wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(two_wheels.NotAvailable, match="no C compiler"):
        two_wheels.shared_library_folder()


def test_a_failing_compiler_is_not_available(fake_wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(two_wheels.NotAvailable, match="false failed: exit 1"):
        two_wheels.shared_library_folder()
    cache = environment.cache_folder() / "tensorrt-rtx"
    assert list(cache.iterdir()) == []


def test_damaged_wheel_is_not_available(fake_wheels: Path) -> None:
    (fake_wheels / two_wheels._PARSER).unlink()
    with pytest.raises(two_wheels.NotAvailable, match="damaged"):
        two_wheels.shared_library_folder()


def test_unwritable_cache_is_not_available(fake_wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(two_wheels.NotAvailable, match="cannot be written"):
        two_wheels.shared_library_folder()


@pytest.mark.usefixtures("compiler")
def test_shared_library_folder_is_built_once_and_repaired(fake_wheels: Path) -> None:
    folder = two_wheels.shared_library_folder()
    names = {path.name for path in folder.iterdir()}
    assert names == {*two_wheels._LINKS, two_wheels._PLUGIN_LIBRARY}
    built = (folder / two_wheels._PLUGIN_LIBRARY).stat().st_mtime_ns
    assert two_wheels.shared_library_folder() == folder
    assert (folder / two_wheels._PLUGIN_LIBRARY).stat().st_mtime_ns == built
    (folder / "libnvinfer.so.11").unlink()
    (folder / "libnvinfer.so.11").symlink_to("/nowhere")
    assert two_wheels.shared_library_folder() == folder
    assert {path.name for path in folder.iterdir()} == names
    assert os.readlink(folder / "libnvinfer.so.11") == str(fake_wheels / two_wheels._COMPILER)


@pytest.mark.usefixtures("compiler")
def test_shared_library_folder_depends_on_where_the_wheels_are(
    fake_wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = two_wheels.shared_library_folder()
    moved = fake_wheels.rename(tmp_path / "moved")
    versions = dict([two_wheels.LIBRARY_WHEEL, two_wheels.BINDINGS_WHEEL])
    monkeypatch.setattr(two_wheels.metadata, "distribution", lambda name: FakeWheel(moved, versions[name]))
    assert two_wheels.shared_library_folder() != first


@pytest.mark.usefixtures("compiler")
def test_two_processes_build_the_folder_at_once(fake_wheels: Path) -> None:
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                two_wheels.shared_library_folder()
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    cache = environment.cache_folder() / "tensorrt-rtx"
    assert [path.name for path in cache.iterdir()] == [two_wheels.shared_library_folder().name]


@pytest.mark.tensorrt
def test_real_two_wheels_start_in_a_child() -> None:
    candidate = tensorrt_library._examine_two_wheels()
    if candidate.builder is None:
        pytest.skip(f"{candidate.name}: {candidate.reason}")
    assert candidate.builder.version == "1.7.1.116"
    assert candidate.builder.bindings_version == two_wheels.BINDINGS_WHEEL[1]
    assert "tensorrt_bindings" not in sys.modules


# --- The environment ---


def test_cache_folder_ignores_a_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert environment.cache_folder() == Path.home() / ".cache" / "sana-runtime"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert environment.cache_folder() == Path("/somewhere/sana-runtime")


def test_library_path_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/inherited")
    assert environment.prefixed_library_path(Path("/ours")) == {"LD_LIBRARY_PATH": "/ours:/inherited"}
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert environment.prefixed_library_path(Path("/ours")) == {"LD_LIBRARY_PATH": "/ours"}


def test_compiler_from_cc_keeps_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "env -i cc")
    command = environment.c_compiler()
    assert command is not None
    assert Path(command[0]).name == "env"
    assert command[1:] == ("-i", "cc")


def test_a_users_file_cannot_shadow_the_childs_imports(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the file in the working directory was imported')")
    script = "import sys; sys.path.pop(0); from sana_runtime import tensorrt_library as t"
    run = subprocess.run(
        [sys.executable, "-c", f"{script}; print(t._probe('csv', {{}}))"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "csv has no Builder" in run.stdout, run.stderr
