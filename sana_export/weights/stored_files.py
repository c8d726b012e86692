"""Reading the small and large files of a checkpoint, none of which is trusted."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sana_runtime.errors import CheckpointError
from sana_runtime.files import sha256_file

MIB = 1 << 20
MAX_CONFIG_BYTES = 1 * MIB
MAX_INDEX_BYTES = 64 * MIB
MAX_TOKENIZER_BYTES = 256 * MIB

_digests: dict[tuple[str, int, int, int], str] = {}


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises `CheckpointError`."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise damaged(path, f"{size} bytes", f"at most {limit} bytes")
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError`."""
    try:
        content = json.loads(read_bytes(path, limit))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"no JSON: {error}", "a JSON object") from error
    if not isinstance(content, dict):
        raise damaged(path, f"a JSON {type(content).__name__}", "a JSON object")
    return content


def content_digest(paths: list[Path], on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 over the names and contents of files, in order of name.

    A file that this process hashed before is not read again unless its size or times changed.
    """
    ordered = sorted(paths, key=lambda path: path.name)
    lines = [f"{path.name} {_file_digest(path, on_bytes)}\n" for path in ordered]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(path: Path, on_bytes: Callable[[int], None] | None) -> str:
    try:
        real = path.resolve()
        status = real.stat()
        key = (str(real), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key not in _digests:
            _digests[key] = sha256_file(real, on_bytes)
    except OSError as error:
        raise unreadable(path, error) from error
    return _digests[key]


def damaged(path: Path, received: str, expected: str) -> CheckpointError:
    """The error for a file that cannot be what the publisher wrote."""
    return CheckpointError(
        f"{path} is damaged or incomplete",
        received=received,
        expected=expected,
        action="download this file again",
    )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the operating system does not give us."""
    return CheckpointError(
        f"{path} cannot be read",
        received=error.strerror or str(error),
        expected="a readable file",
        action="check the path and its permissions; if it belongs to a download, download it again",
    )
