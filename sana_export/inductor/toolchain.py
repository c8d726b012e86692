"""The C++ compiler that AOTInductor calls, chosen and tried before it is needed."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from sana_runtime.errors import BuildError

# Needs code of the C++ library, not only its headers.
_PROBE = "#include <locale>\n#include <string>\nstd::string probe() { return std::locale().name(); }\n"
_SECONDS = 120
# PyTorch calls the first unless CXX names another.
_NAMES = ("g++", "c++", "clang++")


def cxx_candidates() -> list[tuple[str, ...]]:
    """The commands to try: `$CXX` alone, else all compilers on the PATH in its order, g++ before others."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return [tuple(named)]
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    found: dict[str, tuple[str, ...]] = {}
    for name in _NAMES:
        for folder in folders:
            if path := shutil.which(name, path=folder):
                found.setdefault(os.path.realpath(path), (path,))
    return [*found.values()] or [(_NAMES[0],)]


@cache
def cxx_problem(command: tuple[str, ...]) -> str | None:
    """Why the compiler cannot make what PyTorch loads; None if it can.

    A package whose C++ library is linked statically brings a second copy of it into the process. The two mix up their
    locales, and the process crashes when the package is loaded.
    """
    if shutil.which(command[0]) is None:
        return "not found"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(_PROBE)
        try:
            arguments = [*command, "-shared", "-fPIC", "-o", str(library), str(source)]
            found = subprocess.run(arguments, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if found.returncode:
            last = found.stderr.strip().splitlines()[-1:] or [f"exit code {found.returncode}"]
            return f"cannot make a shared library: {last[0]}"
        if sys.platform == "linux" and not any(
            name in library.read_bytes() for name in (b"libstdc++.so", b"libc++.so")
        ):
            return "links the C++ library statically"
    return None


def choose_cxx() -> tuple[str, ...]:
    """The first of the candidates that can make what PyTorch loads, which PyTorch then calls too, here and in processes
    started from now on. Raises `BuildError` where none can.
    """
    problems = []
    for command in cxx_candidates():
        problem = cxx_problem(command)
        if problem is None:
            _use(command)
            return command
        problems.append(f"{shlex.join(command)}: {problem}")
    raise BuildError(
        "inductor: the C++ compiler cannot be used" if len(problems) == 1 else "inductor: no C++ compiler can be used",
        received="; ".join(problems),
        expected="a compiler whose shared libraries use the C++ library of the process",
        action="install g++ with its libstdc++.so, or name another compiler in the variable CXX",
    )


def _use(command: tuple[str, ...]) -> None:
    if os.environ.get("CXX") or command[0] == shutil.which(_NAMES[0]):
        return  # PyTorch finds it by itself
    import torch._inductor.config

    os.environ["CXX"] = command[0]
    torch._inductor.config.cpp.cxx = (None, command[0])  # it has read the variable already
