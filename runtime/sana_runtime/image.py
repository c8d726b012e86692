"""A generated picture, and the PNG file that remembers how it was made."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sana_runtime.errors import InputError
from sana_runtime.files import whole_file


@dataclass(frozen=True)
class Settings:
    """All that decides a picture. `height`, `width` in pixels; `latent_sha256` if the noise was given."""

    prompt: str
    negative_prompt: str
    seed: int
    num_steps: int
    guidance_scale: float
    height: int
    width: int
    latent_sha256: str | None
    model: str
    bundle_digest: str
    target: str
    sana_runtime: str

    def as_text(self) -> str:
        """The settings for a human reader, in the form image viewers show as "parameters"."""
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        lines.append(
            f"Steps: {self.num_steps}, CFG scale: {self.guidance_scale:g}, Seed: {self.seed}, "
            f"Size: {self.width}x{self.height}, Model: {self.model}, "
            f"Version: sana-runtime {self.sana_runtime} ({self.target})"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Picture:
    """`pixels` [H, W, 3] uint8 RGB. `timings_ms` has one entry per component, and "total"."""

    pixels: npt.NDArray[np.uint8]
    settings: Settings
    timings_ms: dict[str, float]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG with the settings in its text chunks "sana" (JSON) and "parameters" (for people).

        The file is whole or absent. Raises `InputError` if it cannot be written there.
        """
        target = Path(path)
        check_output(target)
        text = PngInfo()
        text.add_text("sana", json.dumps(asdict(self.settings), sort_keys=True))
        text.add_itxt("parameters", self.settings.as_text())
        try:
            with whole_file(target) as temporary:
                Image.fromarray(self.pixels).save(temporary, format="PNG", pnginfo=text)
        except OSError as error:
            raise _unwritable(target, error.strerror or str(error)) from error


def check_output(path: Path) -> None:
    """Raise `InputError` unless `path` ends in .png and can be created or replaced. Writes nothing."""
    if path.suffix.lower() != ".png":
        raise InputError(
            "the output is not a PNG file",
            received=path,
            expected="a file name that ends in .png",
            action=f"--output {path.with_suffix('.png')}",
        )
    if path.is_dir():
        raise _unwritable(path, "it is a directory")
    if not path.parent.is_dir():
        raise _unwritable(path, f"there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise _unwritable(path, f"no permission to write in {path.parent}")


def _unwritable(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} cannot be written",
        received=reason,
        expected="an existing directory that you may write to",
        action="create the directory, or choose another --output",
    )
