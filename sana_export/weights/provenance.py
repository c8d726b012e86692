"""Which released checkpoint a name points at: facts that the weights themselves do not tell."""

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import PurePath

import msgspec
import torch

_SUFFIXES = (".pth", ".safetensors", "_diffusers")


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A released checkpoint. `sample_size` is the side of its latent; `fp16_era` weights need the clip."""

    sample_size: int
    interpolation_scale: float | None
    fp16_era: bool


@cache
def releases() -> dict[str, Release]:
    """Released checkpoints by name."""
    content = (files("sana_export.weights") / "releases.json").read_bytes()
    return msgspec.json.decode(content, type=dict[str, Release])


def find_release(names: Iterable[str]) -> Release | None:
    """The release that a path, a hub id or a hub cache folder is named for."""
    known = {name.lower(): release for name, release in releases().items()}
    for name in names:
        for part in reversed(PurePath(name).parts):
            # "models--org--name" is how the hub cache spells "org/name"; "@" precedes a revision.
            base = part.partition("@")[0].rpartition("--")[2].lower()
            for suffix in _SUFFIXES:
                base = base.removesuffix(suffix)
            if base in known:
                return known[base]
    return None


def needs_attention_clip(stored: torch.dtype | None, names: Iterable[str]) -> bool:
    """Whether a transformer is of the fp16 era: stored as fp16, or named like a release that is."""
    release = find_release(names)
    return stored == torch.float16 or (release is not None and release.fp16_era)
