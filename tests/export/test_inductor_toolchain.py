"""The C++ compiler is looked at before anything is compiled."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from sana_export.inductor.toolchain import choose_cxx, cxx_candidates, cxx_problem
from sana_runtime.errors import BuildError

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@needs_gxx
def test_an_ordinary_compiler_is_fine() -> None:
    assert cxx_problem(("g++",)) is None


@needs_gxx
@pytest.mark.skipif(sys.platform != "linux", reason="says nothing elsewhere")
def test_a_static_library_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -static-libstdc++")
    assert cxx_candidates() == [("g++", "-static-libstdc++")]
    with pytest.raises(BuildError, match="cannot be used") as error:
        choose_cxx()
    assert "statically" in str(error.value)


@pytest.mark.parametrize(("script", "said"), [("exit 3", "exit code 3"), ("echo no space >&2; exit 1", "no space")])
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, script: str, said: str) -> None:
    assert said in (cxx_problem((str(compiler(tmp_path, script)),)) or "")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no-such-compiler: not found"):
        choose_cxx()


def compiler(folder: Path, script: str, name: str = "g++") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@needs_gxx
def test_the_next_compiler_on_the_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And PyTorch calls it too, in this process and in those started by it."""
    import torch._inductor.config as inductor_config

    real = shutil.which("g++")
    compiler(tmp_path / "first", "exit 3")
    works = compiler(tmp_path / "second", f'exec {real} "$@"')
    compiler(tmp_path / "first", f'exec {real} "$@"', "clang++")
    monkeypatch.setattr(inductor_config.cpp, "cxx", (None, "g++"))
    # Set and taken away, so that what is set from now on is taken away at the end.
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, (tmp_path / "first", tmp_path / "second", "/usr/bin", "/bin"))))
    assert choose_cxx() == (str(works),)
    assert os.environ["CXX"] == str(works)
    assert inductor_config.cpp.cxx == (None, str(works))


def test_all_compilers_that_were_tried_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    cxx_problem.cache_clear()
    with pytest.raises(BuildError, match=r"g\+\+: not found"):
        choose_cxx()
    for name in ("clang++", "g++"):
        compiler(tmp_path, "exit 3", name)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler can be used") as error:
        choose_cxx()
    assert str(error.value.received).index("g++: ") < str(error.value.received).index("clang++: ")
