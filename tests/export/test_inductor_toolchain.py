"""The C++ compiler is looked at before anything is compiled."""

import shutil
import sys
from pathlib import Path

import pytest

from sana_export.inductor.toolchain import check_cxx, cxx_compiler, cxx_problem
from sana_runtime.errors import BuildError

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@needs_gxx
def test_an_ordinary_compiler_is_fine() -> None:
    assert cxx_problem(("g++",)) is None


@needs_gxx
@pytest.mark.skipif(sys.platform != "linux", reason="says nothing elsewhere")
def test_a_static_library_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -static-libstdc++")
    assert cxx_compiler() == ("g++", "-static-libstdc++")
    with pytest.raises(BuildError, match="cannot be used") as error:
        check_cxx()
    assert "statically" in str(error.value)


@pytest.mark.parametrize(("script", "said"), [("exit 3", "exit code 3"), ("echo no space >&2; exit 1", "no space")])
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, script: str, said: str) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    assert said in (cxx_problem((str(compiler),)) or "")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no-such-compiler: not found"):
        check_cxx()
