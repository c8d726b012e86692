"""Hugging Face ids: download the files that are needed, or find them in the local cache."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sana_export.weights.architecture import UpstreamComponent
from sana_export.weights.checkpoint import CALIBRATION_PROMPTS, SAMPLING
from sana_export.weights.diffusers_directory import shard_map
from sana_export.weights.variants import WeightFile, choose_variants, weight_files
from sana_runtime.errors import CheckpointError

# The base of the HTTP library's own errors, whichever library this huggingface-hub uses.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_NO_NETWORK = (OfflineModeIsEnabled, LocalEntryNotFoundError, _HTTP_ERROR, ConnectionError, TimeoutError)
_REFUSED = (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)
_SMALL_FILES = [
    "model_index.json",
    CALIBRATION_PROMPTS,
    SAMPLING,
    "*/config.json",
    "*/scheduler_config.json",
    "*/*.index*.json",
    "tokenizer/*.json",
]


def download(model: str, variant: str | None, components: Sequence[UpstreamComponent]) -> Path:
    """The local folder of a hub id ("org/name", or "org/name@revision") with the weights of one variant.

    Works from the cache where there is no network: then the folder may be incomplete, which opening it
    reports. Raises `CheckpointError`.
    """
    repository, _, revision = model.partition("@")
    try:
        folder = _snapshot(repository, revision or None, _SMALL_FILES)
        # The folder is named for its commit: what is listed and downloaded next is of the same one.
        commit = folder.name
        try:
            names = HfApi().list_repo_files(repository, revision=commit)
        except _NO_NETWORK:
            return folder
        if "model_index.json" in names:
            _snapshot(repository, commit, _wanted(folder, names, variant, components, model))
        return folder
    except _REFUSED as error:
        raise _refused(model, error) from error
    except _NO_NETWORK as error:
        raise _unreachable(model, error) from error
    except OSError as error:
        raise _not_written(model, error) from error


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def _wanted(
    folder: Path, names: list[str], variant: str | None, components: Sequence[UpstreamComponent], model: str
) -> list[str]:
    """Paths of the weight files of the chosen variants."""
    available = {component: weight_files(component, _in(component, names), model) for component in components}
    variants = choose_variants(available, variant, model)
    return [
        f"{component}/{name}"
        for component in components
        for name in _files(folder / component, available[component][variants[component]])
    ]


def _in(component: str, names: list[str]) -> list[str]:
    paths = [PurePosixPath(name) for name in names]
    return [path.name for path in paths if str(path.parent) == component]


def _files(folder: Path, file: WeightFile) -> list[str]:
    return [file.name, *sorted(set(shard_map(folder / file.name).values()))] if file.is_index else [file.name]


def _refused(model: str, error: Exception) -> CheckpointError:
    gated = isinstance(error, GatedRepoError)
    return CheckpointError(
        f"Hugging Face does not give {model}",
        received=str(error).splitlines()[0],
        expected="the id of a repository (and revision) you may read",
        action="accept its licence on its page, then `hf auth login`" if gated else "check the spelling of the id",
    )


def _not_written(model: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{model} could not be written to the Hugging Face cache",
        received=error.strerror or str(error),
        expected="a writable cache with room for the checkpoint",
        action="free space, or set HF_HOME to a folder on a larger disk; what was downloaded is kept",
    )


def _unreachable(model: str, error: Exception) -> CheckpointError:
    repository = model.partition("@")[0]
    return CheckpointError(
        f"{model} is neither a local directory, nor in the Hugging Face cache, nor can it be downloaded",
        received=str(error).splitlines()[0] if str(error) else type(error).__name__,
        expected="a local directory, a cached id, or a network connection to Hugging Face",
        action=f"where there is a network, `hf download {repository} --local-dir DIR`, copy DIR here and "
        "give its path; or copy that machine's cache and set HF_HOME to it",
    )
