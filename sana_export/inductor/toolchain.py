"""The C++ compiler that AOTInductor calls, looked at before it is needed."""

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


def cxx_compiler() -> tuple[str, ...]:
    """The command that PyTorch calls: `$CXX`, else g++."""
    return tuple(shlex.split(os.environ.get("CXX", "")) or ["g++"])


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


def check_cxx() -> None:
    """Raise `BuildError` unless the compiler can make what PyTorch loads."""
    command = cxx_compiler()
    problem = cxx_problem(command)
    if problem is not None:
        raise BuildError(
            "inductor: the C++ compiler cannot be used",
            received=f"{shlex.join(command)}: {problem}",
            expected="a compiler whose shared libraries use the C++ library of the process",
            action="install g++ with its libstdc++.so, or name another compiler in the variable CXX",
        )
