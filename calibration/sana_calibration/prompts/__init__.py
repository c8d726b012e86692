"""Prompt lists for calibration: one prompt per line, lines that start with # and empty ones ignored."""

import hashlib
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

import msgspec

from sana_runtime.errors import InputError


def load_prompts(path: Path | None = None) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, in order; None means the shipped list. Raises `InputError` if there is none."""
    if path is None:
        with as_file(files("sana_calibration.prompts") / "default.txt") as shipped:
            return load_prompts(shipped)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(path, str(error)) from error
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not prompts:
        raise _unusable(path, f"{len(lines)} lines, none of them a prompt")
    return prompts


def prompts_digest(prompts: Sequence[str]) -> str:
    """Hex SHA-256 of a list of prompts; the order counts, because a prompt's place gives its seed."""
    return hashlib.sha256(msgspec.json.encode(list(prompts))).hexdigest()


def _unusable(path: Path, received: str) -> InputError:
    return InputError(
        f"{path} holds no prompts",
        received=received,
        expected="a UTF-8 text file with one prompt per line; lines that start with # are comments",
        action="write some prompts into the file, or leave it out for the shipped list",
    )
