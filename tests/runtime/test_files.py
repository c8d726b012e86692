"""Digests of several files at once; files that are whole or absent, also when the disk is full."""

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest

from sana_runtime import files
from sana_runtime.errors import BuildError
from sana_runtime.files import sha256_file, sha256_files, whole_file

CHUNK = 1 << 12


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files of 0 to 60 chunks and a bit."""
    monkeypatch.setattr(files, "_CHUNK_BYTES", CHUNK)
    found = []
    for index in range(7):
        path = tmp_path / f"{index}"
        path.write_bytes(bytes([index]) * (index * 10 * CHUNK + index))
        found.append(path)
    return found


def test_digests_come_in_the_order_of_the_files(paths: list[Path]) -> None:
    told: list[int] = []
    wanted = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert sha256_files(paths, told.append) == wanted == [sha256_file(path) for path in paths]
    assert sum(told) == sum(path.stat().st_size for path in paths)
    assert sha256_files([]) == []


def test_one_thread_at_a_time_is_told(paths: list[Path]) -> None:
    inside = threading.Lock()

    def told(_: int) -> None:
        assert inside.acquire(blocking=False)
        inside.release()

    sha256_files(paths, told)


def test_an_interrupt_does_not_wait_for_the_other_files(paths: list[Path]) -> None:
    told: list[int] = []

    def interrupted(count: int) -> None:
        told.append(count)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sha256_files(paths, interrupted)
    assert len(told) == 3


def test_a_missing_file_is_an_error(paths: list[Path]) -> None:
    paths[3].unlink()
    with pytest.raises(FileNotFoundError):
        sha256_files(paths)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "as the system says"),
        OSError(errno.EDQUOT, "as the system says"),
        OSError("12288 requested and 7712 written"),
        RuntimeError(f"a library's own words: {os.strerror(errno.ENOSPC)} (os error 28)"),
    ],
    ids=["ENOSPC", "EDQUOT", "NumPy's short write", "a library"],
)
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(BuildError, match=r"no space left while writing \S+/file\n") as raised:
        fail_while_writing(tmp_path / "file", error)
    assert raised.value.__cause__ is error
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EACCES, "no"), ValueError("no"), BuildError(f"ours: {os.strerror(errno.ENOSPC)}")],
    ids=["OSError", "ValueError", "BuildError"],
)
def test_another_error_stays_what_it_is(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        fail_while_writing(tmp_path / "file", error)
    assert raised.value is error
    assert raised.value.__cause__ is None
    assert not [*tmp_path.iterdir()]


def fail_while_writing(path: Path, error: Exception) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
