"""Child process of `tensorrt_library`: import one TensorRT module, start its builder, print one JSON line.

Run as `python -m sana_runtime.tensorrt_probe MODULE`. Any failure is an ordinary traceback, whose last line
the parent shows.
"""

import ctypes
import importlib
import json
import sys
from typing import Any

_LIBRARY_NAMES = ("libtensorrt_rtx.so", "libnvinfer.so")


def main() -> None:
    """Print {"version", "bindings_version", "is_rtx"} of the module named on the command line."""
    trt = importlib.import_module(sys.argv[1])
    for needed in ("Builder", "OnnxParser", "IProgressMonitor", "Logger"):
        if not hasattr(trt, needed):
            raise ImportError(f"{sys.argv[1]} has no {needed}: a placeholder, or a runtime without builder")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    builder.create_builder_config()
    library = loaded_library()
    found = {
        "version": _version_of(library) or trt.__version__,
        "bindings_version": trt.__version__,
        "is_rtx": _is_rtx(trt, library),
    }
    print(json.dumps(found), flush=True)


def loaded_library() -> str | None:
    """Path of the TensorRT library mapped into this process; None where the system does not tell."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    except OSError:
        return None
    for name in _LIBRARY_NAMES:
        for path in sorted(paths):
            if path.rpartition("/")[2].startswith(name):
                return path
    return None


def _version_of(library: str | None) -> str | None:
    """The version the library itself reports; the bindings may be of another one."""
    if library is None:
        return None
    handle = ctypes.CDLL(library)
    try:
        parts = [getattr(handle, f"getInferLib{part}Version")() for part in ("Major", "Minor", "Patch", "Build")]
    except AttributeError:  # before TensorRT 10 had them
        return None
    return ".".join(map(str, parts))


def _is_rtx(trt: Any, library: str | None) -> bool:
    if library is not None:
        return library.rpartition("/")[2].startswith("libtensorrt_rtx")
    return hasattr(trt.IBuilderConfig, "set_compute_capability")


if __name__ == "__main__":
    main()
