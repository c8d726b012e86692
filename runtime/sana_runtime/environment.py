"""Every environment variable this distribution reads or sets; no other module reads any.

`XDG_CACHE_HOME`: read; parent of the folder `sana-runtime/` (see `two_wheels`). Default: `~/.cache`.
`CC`: read; the C compiler, with arguments. Default: the first of cc, gcc, clang.
`LD_LIBRARY_PATH`: set for children that load TensorRT, never for this process. Default: the caller's value.
"""

import os
import shlex
import shutil
from pathlib import Path


def cache_folder() -> Path:
    """This user's cache folder for the runtime. It may not exist yet.

    Raises RuntimeError when neither `XDG_CACHE_HOME` nor a home directory is known.
    """
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and ignored.
    parent = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    return parent / "sana-runtime"


def c_compiler() -> tuple[str, ...] | None:
    """The command of the first C compiler found: `$CC`, then cc, gcc, clang. None when there is none."""
    configured = shlex.split(os.environ.get("CC", ""))
    for command in (configured, ["cc"], ["gcc"], ["clang"]):
        if command and (path := shutil.which(command[0])):
            return (path, *command[1:])
    return None


def prefixed_library_path(folder: Path) -> dict[str, str]:
    """The variables a child needs to find shared libraries in `folder` before all others."""
    inherited = os.environ.get("LD_LIBRARY_PATH", "")
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(folder), inherited)))}


def child_environment(extra: dict[str, str]) -> dict[str, str]:
    """This process's environment with `extra` on top, for a child that loads TensorRT."""
    return {**os.environ, **extra}
