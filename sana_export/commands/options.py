"""Flags that several verbs share, spelled once."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from sana_runtime.errors import InputError

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A directory written by `sana-export build`.")]
Variant = Annotated[
    str | None,
    typer.Option(metavar="V", help="File variant where a checkpoint folder holds several: fp16, bf16 or default."),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Where a .pth, which holds a transformer only, takes its text encoder, autoencoder, tokenizer and "
        "scheduler from: a diffusers directory or Hugging Face id.",
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]


def check_files(files: Mapping[str, Path | None]) -> None:
    """Raise `InputError` for a file (flag -> path) that cannot be written, before the work whose result it is to hold.
    Folders that are missing are made when it is written.
    """
    for flag, path in files.items():
        if path is None:
            continue
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir():
            reason = "it is a directory"
        elif not folder.is_dir():
            reason = f"{folder} is a file"
        elif not os.access(folder, os.W_OK):
            reason = f"no permission to write in {folder}"
        else:
            continue
        raise InputError(
            f"{flag} {path} cannot be written",
            received=reason,
            expected="the name of a file in a folder that you may write to",
            action=f"choose another {flag}",
        )


def picture_size(resolution: int | None, height: int | None, width: int | None, default: int) -> tuple[int, int]:
    """(height, width) in pixels from the three flags. Raises `InputError` when they contradict each other."""
    if resolution is not None and (height is not None or width is not None):
        raise InputError(
            "two ways of giving the picture's size",
            received="--resolution with --height or --width",
            expected="--resolution N for a square, or --height H and --width W",
            action="leave one of them out",
        )
    if (height is None) != (width is None):
        raise InputError(
            "half of the picture's size is missing",
            received=f"--height {height}" if width is None else f"--width {width}",
            expected="--height H and --width W together",
            action="give both, or --resolution N for a square",
        )
    side = resolution or default
    return (height or side, width or side)
