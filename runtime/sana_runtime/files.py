"""Files that are either whole or absent, and their digests."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from sana_runtime.errors import BuildError, SanaError

_CHUNK_BYTES = 1 << 22
# Files read at once: an engine's weights are a few large files, and one core hashes slower than a disk reads.
_AT_ONCE = 4


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file's content; `on_bytes` is told the size of each chunk read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes:
                on_bytes(len(chunk))
    return digest.hexdigest()


def sha256_files(paths: Sequence[Path], on_bytes: Callable[[int], None] | None = None) -> list[str]:
    """`sha256_file` of each, several at once; `on_bytes` is called by one thread at a time. What it raises ends all."""
    ended, one = threading.Event(), threading.Lock()
    raised: list[BaseException] = []

    def told(count: int) -> None:
        with one:
            if ended.is_set():
                raise InterruptedError
            try:
                if on_bytes:
                    on_bytes(count)
            except BaseException as error:
                raised.append(error)
                ended.set()
                raise

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            return [*pool.map(lambda path: sha256_file(path, told), paths)]
        except InterruptedError as error:  # of a file before the one whose thread was told
            raise (raised or [error])[0] from None
        finally:
            ended.set()  # or an interrupt would wait for files of gigabytes


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success sync and rename it, on any failure remove it.

    A full disk becomes a `BuildError` that names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with full_disk_is_an_error(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def full_disk_is_an_error(path: Path) -> Iterator[None]:
    """A full disk or quota that is met inside becomes a `BuildError` that names `path`."""
    try:
        yield
    except Exception as error:
        problem = no_space_or(error, path)
        if problem is error:
            raise
        raise problem from error


def no_space_or(error: Exception, path: Path) -> Exception:
    """The `BuildError` for a full disk or quota; any other error unchanged, and one that is ours already."""
    number = _error_number(error)
    if isinstance(error, SanaError) or number not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return BuildError(
        f"no space left while writing {path}",
        received=os.strerror(number),
        expected=f"room for the file in {path.parent}",
        action="free space or choose another --output, then run the same command: finished stages are reused",
    )


def _error_number(error: Exception) -> int | None:
    """Which error of the system this is, also where a library has put it into words of its own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    # NumPy reports a short write, which only a full disk causes here, without a number.
    if isinstance(error, OSError) and "requested and" in text:
        return errno.ENOSPC
    # safetensors raises an error of its own and quotes the system; others may.
    return next((number for number in (errno.ENOSPC, errno.EDQUOT) if os.strerror(number) in text), None)
