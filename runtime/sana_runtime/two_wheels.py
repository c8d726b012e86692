"""TensorRT-RTX put together from two ordinary wheels, for machines without NVIDIA's package index.

One wheel carries the compiler's shared libraries, the other the Python bindings; both were built in the same
week from one source tree, so exactly these two versions fit together. A folder of links gives the libraries
the names that the bindings ask the loader for. The bindings also ask for a plugin library, of which they use
one function: it is compiled here.

The fit is not perfect: two entries of the bindings lead elsewhere in this library's tables of functions.
`INetworkDefinition.get_flag` crashes and is not used; `Builder.build_serialized_network_to_stream` is off by
one and replaced by `build_to_stream`.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from sana_runtime.environment import c_compiler, cache_folder

LIBRARY_WHEEL = ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "0.5.0")
BINDINGS_WHEEL = ("tensorrt-cu13-bindings", "11.4.0.106")
BINDINGS_MODULE = "tensorrt_bindings"

_COMPILER = "onnxruntime_ep_nv_tensorrt_rtx/libtensorrt_rtx.so.1.7.1"
_PARSER = "onnxruntime_ep_nv_tensorrt_rtx/libtensorrt_onnxparser_rtx.so.1.7.1"
_LINKS = {
    "libnvinfer.so.11": _COMPILER,
    "libtensorrt_rtx.so.1": _COMPILER,
    "libtensorrt_rtx.so": _COMPILER,
    "libnvonnxparser.so.11": _PARSER,
    "libtensorrt_onnxparser_rtx.so.1": _PARSER,
}
_PLUGIN_LIBRARY = "libnvinfer_plugin.so.11"
_PLUGIN_SOURCE = """#include <stdbool.h>
bool initLibNvInferPlugins(void* logger, const char* space) { (void)logger; (void)space; return true; }
"""
_COMPILE_SECONDS = 60

# Bytes of a CPython object before its payload; another layout (free-threaded) is not supported.
_OBJECT_HEADER = 16
_POINTER = 8
_STREAM_ENTRY = 17


class NotAvailable(Exception):
    """Why this builder cannot be used here, in one line."""


def shared_library_folder() -> Path:
    """The folder to put on a child's `LD_LIBRARY_PATH`, built on first use and kept in the user's cache.

    Raises `NotAvailable` with the reason: another platform, a wheel missing or of another version, no C
    compiler, a cache folder that cannot be written.
    """
    links = _link_targets()
    digest = hashlib.sha256(repr((sorted(links.items()), LIBRARY_WHEEL, BINDINGS_WHEEL)).encode())
    try:
        folder = cache_folder() / "tensorrt-rtx" / digest.hexdigest()[:16]
        if not _is_whole(folder, links):
            _build(folder, links)
    except (OSError, RuntimeError) as error:
        raise NotAvailable(f"its library folder cannot be written: {error}") from error
    return folder


def _link_targets() -> dict[str, str]:
    """Link name -> absolute path of the library it points to."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise NotAvailable(f"its wheels exist for Linux x86-64 only, this is {sys.platform} {platform.machine()}")
    library = _installed(LIBRARY_WHEEL)
    _installed(BINDINGS_WHEEL)
    targets = {name: str(library.locate_file(file)) for name, file in _LINKS.items()}
    for target in targets.values():
        if not os.path.isfile(target):
            raise NotAvailable(f"{LIBRARY_WHEEL[0]} is damaged: {os.path.basename(target)} is missing")
    return targets


def _installed(wheel: tuple[str, str]) -> metadata.Distribution:
    name, version = wheel
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise NotAvailable(f"{name} is not installed (pip install {name}=={version})") from None
    if distribution.version != version:
        raise NotAvailable(f"{name} is version {distribution.version}, only {version} fits")
    return distribution


def _is_whole(folder: Path, links: dict[str, str]) -> bool:
    return (folder / _PLUGIN_LIBRARY).is_file() and all(
        (folder / name).is_symlink() and os.readlink(folder / name) == target for name, target in links.items()
    )


def _build(folder: Path, links: dict[str, str]) -> None:
    """Build beside `folder`, then rename: another process sees the whole folder or none."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, target in links.items():
            (temporary / name).symlink_to(target)
        _compile_plugin_library(temporary / _PLUGIN_LIBRARY)
        _move_into_place(temporary, folder, links)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, folder: Path, links: dict[str, str]) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        # Another process was faster, or a damaged folder is in the way.
        if _is_whole(folder, links):
            return
        shutil.rmtree(folder)
        os.rename(temporary, folder)


def _compile_plugin_library(output: Path) -> None:
    compiler = c_compiler()
    if compiler is None:
        raise NotAvailable("no C compiler found (install gcc or clang, or set CC)")
    command = [*compiler, "-shared", "-fPIC", "-x", "c", "-o", str(output), "-"]
    try:
        run = subprocess.run(
            command,
            input=_PLUGIN_SOURCE,
            capture_output=True,
            text=True,
            timeout=_COMPILE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotAvailable(f"{compiler[0]} did not finish within {_COMPILE_SECONDS} s") from None
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or [f"exit {run.returncode}"]
        raise NotAvailable(f"{compiler[0]} failed: {lines[-1]}")


def can_stream() -> bool:
    """Whether `build_to_stream` knows this Python's object layout."""
    return object.__basicsize__ == _OBJECT_HEADER


def build_to_stream(builder: Any, network: Any, config: Any, writer: Any) -> bool:
    """`Builder.build_serialized_network_to_stream` for exactly these two wheels.

    The library has the function one entry earlier in its table than the bindings of the other wheel expect:
    call it there. Saves holding the whole plan in memory beside the weights.
    """
    implementation = _word(_native(builder) + _POINTER)
    address = _word(_word(implementation) + _STREAM_ENTRY * _POINTER)
    build = ctypes.CFUNCTYPE(ctypes.c_bool, *[ctypes.c_void_p] * 4)(address)
    return build(implementation, _native(network), _native(config), _native(writer))


def _native(wrapper: Any) -> int:
    """The address of the C++ object that a pybind11 object wraps: its first payload word."""
    return _word(id(wrapper) + _OBJECT_HEADER)


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value
