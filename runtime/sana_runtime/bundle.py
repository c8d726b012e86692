"""What a bundle must hold for a target to be driven: engines, files, and the io tensors of the contract."""

from sana_runtime.contract import (
    COMPONENTS,
    PIXELS_PER_LATENT,
    ComponentName,
    TargetName,
    text_encoder_io,
    transformer_io,
    vae_decoder_io,
)
from sana_runtime.errors import BundleError
from sana_runtime.manifest import EngineEntry, FileEntry, Manifest


def missing_engines(manifest: Manifest, target: TargetName) -> tuple[ComponentName, ...]:
    """The components that have no engine for `target`."""
    return tuple(name for name in COMPONENTS if _find_engine(manifest, name, target) is None)


def engine_entry(manifest: Manifest, name: ComponentName, target: TargetName) -> EngineEntry:
    """The engine of one component for `target`. Raises `BundleError` without one."""
    entry = _find_engine(manifest, name, target)
    if entry is None:
        raise _inconsistent(f"no {target} engine of {name}")
    return entry


def files_of_target(manifest: Manifest, target: TargetName) -> tuple[FileEntry, ...]:
    """Every file that running `target` reads. Raises `BundleError` if the manifest lacks one."""
    needed = [manifest.tokenizer.file]
    for name in COMPONENTS:
        needed += engine_entry(manifest, name, target).files
    known = {entry.path: entry for entry in manifest.files}
    if missing := [path for path in needed if path not in known]:
        raise _inconsistent(f"no digest of {', '.join(missing)}")
    return tuple(known[path] for path in dict.fromkeys(needed))


def check_contract(manifest: Manifest) -> None:
    """Raise `BundleError` unless the manifest's io tensors are those this runtime drives."""
    embeds = manifest.component("text_encoder").outputs[0]
    height, width = manifest.height // PIXELS_PER_LATENT, manifest.width // PIXELS_PER_LATENT
    channels = embeds.shape[-1]
    contract = {
        "text_encoder": text_encoder_io(embeds.dtype, channels, manifest.tokenizer.padded_length),
        "transformer": transformer_io(embeds.dtype, channels, height, width, manifest.model.guidance),
        "vae_decoder": vae_decoder_io(height, width),
    }
    for component in manifest.components:
        if (component.inputs, component.outputs) != contract[component.name]:
            raise _inconsistent(f"other io tensors of {component.name}")


def _find_engine(manifest: Manifest, name: ComponentName, target: TargetName) -> EngineEntry | None:
    engines = manifest.component(name).engines
    return next((entry for entry in engines if entry.target == target and entry.files), None)


def _inconsistent(received: str) -> BundleError:
    return BundleError(
        "the manifest does not describe a bundle this runtime can drive",
        received=received,
        expected="what `sana-export build` of the same version writes",
        action="rebuild the bundle with the sana-export of the same version as this runtime",
    )
