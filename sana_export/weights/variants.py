"""Which files of a diffusers directory hold a component's weights, and which variant to take."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sana_export.weights.architecture import UpstreamComponent
from sana_export.weights.checkpoint import DEFAULT_VARIANT
from sana_runtime.errors import CheckpointError

STEM: dict[UpstreamComponent, str] = {
    "text_encoder": "model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".bin.index.json")


@dataclass(frozen=True)
class WeightFile:
    """The file to open first: the weights themselves, or the index of their shards."""

    name: str
    is_index: bool


def weight_files(component: UpstreamComponent, names: Collection[str], where: str) -> dict[str | None, WeightFile]:
    """Variant -> file to open, from the file names of a component's folder. Raises `CheckpointError`."""
    stem = re.escape(STEM[component])
    single = re.compile(rf"{stem}(?:\.(\w+))?\.safetensors")
    index = re.compile(rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json")
    found: dict[str | None, WeightFile] = {}
    for name in sorted(names):
        for pattern, is_index in ((single, False), (index, True)):
            if match := pattern.fullmatch(name):
                if match[1] in found:
                    raise _two_forms(where, found[match[1]].name, name)
                found[match[1]] = WeightFile(name, is_index)
    if not found:
        raise _no_weights(component, names, where)
    return found


def choose_variants(
    available: Mapping[UpstreamComponent, Collection[str | None]], requested: str | None, source: str
) -> dict[UpstreamComponent, str | None]:
    """The variant to read of each component: never a guess.

    Without a request every component must have one variant only. A requested variant need not exist for every
    component (publishers often provide it for some): the others take their only one, or the default.
    """
    if requested is None:
        if any(len(variants) > 1 for variants in available.values()):
            raise _ask(available, source)
        return {component: next(iter(variants)) for component, variants in available.items()}
    wanted = None if requested == DEFAULT_VARIANT else requested
    if not any(wanted in variants for variants in available.values()):
        raise _absent(available, requested, source)
    return {component: _nearest(variants, wanted, available, source) for component, variants in available.items()}


def _nearest(
    variants: Collection[str | None],
    wanted: str | None,
    available: Mapping[UpstreamComponent, Collection[str | None]],
    source: str,
) -> str | None:
    if wanted in variants:
        return wanted
    if len(variants) == 1:
        return next(iter(variants))
    if None in variants:
        return None
    raise _ask(available, source)


def label(variant: str | None) -> str:
    """What the user types for a variant."""
    return DEFAULT_VARIANT if variant is None else variant


def _listing(available: Mapping[UpstreamComponent, Collection[str | None]]) -> str:
    return "; ".join(
        f"{component}: {', '.join(sorted(map(label, variants)))}" for component, variants in available.items()
    )


def _ask(available: Mapping[UpstreamComponent, Collection[str | None]], source: str) -> CheckpointError:
    labels = sorted({label(variant) for variants in available.values() for variant in variants})
    return CheckpointError(
        f"{source} holds several variants of the weights: which one is meant?",
        received=_listing(available),
        expected="one variant",
        action=" or ".join(f"--variant {name}" for name in labels)
        + f' ("{DEFAULT_VARIANT}": the files without a variant in their names)',
    )


def _absent(
    available: Mapping[UpstreamComponent, Collection[str | None]], requested: str, source: str
) -> CheckpointError:
    return CheckpointError(
        f"{source} has no weights of the variant asked for",
        received=f"--variant {requested}",
        expected=_listing(available),
        action="choose one of these variants, or leave out --variant where there is only one",
    )


def _two_forms(where: str, first: str, second: str) -> CheckpointError:
    return CheckpointError(
        f"{where} holds the same weights in two forms: which one is meant?",
        received=f"{first} and {second}",
        expected="either one file or shards with an index",
        action="remove the one that is out of date",
    )


def _no_weights(component: UpstreamComponent, names: Collection[str], where: str) -> CheckpointError:
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        return CheckpointError(
            f"{where} holds its weights in a format that is not read, because it can run code when opened",
            received=", ".join(pickles[:4]),
            expected=f"{STEM[component]}.safetensors",
            action="download the safetensors files, or load the model with diffusers on a machine you trust "
            "the files on and call save_pretrained(..., safe_serialization=True)",
        )
    return CheckpointError(
        f"{where} holds no weights",
        received=", ".join(sorted(names)[:8]) or "an empty folder",
        expected=f"{STEM[component]}.safetensors, or its shards with an index",
        action="download the checkpoint again; an interrupted download leaves such a folder",
    )
