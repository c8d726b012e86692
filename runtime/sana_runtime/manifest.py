"""The bundle's manifest: its schema, its digest, and how it is read and verified.

The schema is owned by the device side; `sana_export.bundle` writes it.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from sana_runtime.contract import ComponentName, GuidanceKind, TargetName, TensorSpec
from sana_runtime.errors import BundleError
from sana_runtime.files import sha256_files

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
_MAX_MANIFEST_BYTES = 16 << 20


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the bundle. `path` is relative, with forward slashes; `size` in bytes."""

    path: str
    size: int
    sha256: str


def stays_inside(entry: FileEntry) -> bool:
    """Whether an entry's path, which nothing vouches for, is one below the folder that it is relative to."""
    pure = PurePosixPath(entry.path)
    return not pure.is_absolute() and ".." not in pure.parts


class EngineEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One component compiled for one target. `files[0]` is the one to load. `plugin`: how linear attention is compiled;
    the class form's kernels are listed behind the plan, the quick form's are inside it. `device`: the only one that can
    run it, where there is only one ("cuda sm_90", "cpu x86_64 AVX512").
    """

    target: TargetName
    files: tuple[str, ...]
    builder: str
    builder_version: str
    plugin: Literal["none", "class", "quick"] = "none"
    device: str = ""


class ComponentEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One component. `dtype` is the graph's compute dtype; `dtype_reason` says why it is not the one asked for."""

    name: ComponentName
    dtype: str
    dtype_reason: str
    weights_sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    engines: tuple[EngineEntry, ...]


class ModelEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the weights came from. `variant` is the checkpoint's file variant ("fp16", "bf16") or null."""

    source: str
    architecture: str
    variant: str | None
    guidance: GuidanceKind
    attention_clip: bool


class SchedulerEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Solver settings from the checkpoint. `sigma_data` is used by trigflow only."""

    kind: Literal["flow_dpm_solver", "flow_euler", "trigflow"]
    flow_shift: float
    num_train_timesteps: int
    default_num_steps: int
    default_guidance_scale: float
    sigma_data: float = 0.5


class TokenizerEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a prompt becomes caption_tokens.

    `instruction` is put before the prompt (never before the negative prompt); `instruction_tokens` is its token
    count with BOS; the engine's L is `padded_length` = max(300, instruction_tokens + 298).
    """

    file: str
    instruction: str
    instruction_tokens: int
    padded_length: int
    pad_token_id: int


class GateEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The quality gate: worst figures over its prompts, against the unquantised model, and the recipe's thresholds."""

    passed: bool
    x0_sqnr_db: float
    psnr_db: float
    ssim: float
    min_x0_sqnr_db: float
    min_psnr_db: float
    min_ssim: float
    prompts: int
    num_steps: int


class QuantizationEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the weights were quantised. `recipe_file` and `calibration_file` are files of the bundle; the gate's
    thresholds are kept here, so that a bundle can be judged again. `gate` is None where it was not run.
    """

    recipe: str
    recipe_file: str
    recipe_digest: str
    calibration_file: str | None
    calibration_digest: str | None
    min_x0_sqnr_db: float
    min_psnr_db: float
    min_ssim: float
    gate: GateEntry | None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The index of a bundle. `height`, `width` in pixels. `digest` covers every other field."""

    schema_version: int
    digest: str
    model: ModelEntry
    height: int
    width: int
    targets: tuple[TargetName, ...]
    components: tuple[ComponentEntry, ...]
    scheduler: SchedulerEntry
    tokenizer: TokenizerEntry
    files: tuple[FileEntry, ...]
    created_with: dict[str, str]
    notes: tuple[str, ...]
    quantization: QuantizationEntry | None = None

    def component(self, name: ComponentName) -> ComponentEntry:
        """The entry of one component."""
        for entry in self.components:
            if entry.name == name:
                return entry
        raise BundleError(
            f"the bundle has no component '{name}'",
            received=", ".join(entry.name for entry in self.components),
            expected="all of text_encoder, transformer, vae_decoder",
            action="rebuild without --components",
        )

    def sealed(self) -> "Manifest":
        """The same manifest with its digest computed."""
        return msgspec.structs.replace(self, digest=self._content_digest())

    def _content_digest(self) -> str:
        content = msgspec.json.encode(msgspec.structs.replace(self, digest=""), order="sorted")
        return hashlib.sha256(content).hexdigest()

    def to_json(self) -> bytes:
        """Readable JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


def read_manifest(bundle: Path) -> Manifest:
    """Read and check `bundle/manifest.json`.

    Raises `BundleError` for a missing or oversized file, another schema version, a wrong field, a path that
    leaves the bundle, or a digest that does not match (an edited manifest).
    """
    path = bundle / MANIFEST_NAME
    content = _manifest_content(bundle, path)
    try:
        version = msgspec.json.decode(content, type=_Versioned).schema_version
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{path}: another schema version",
                received=version,
                expected=str(SCHEMA_VERSION),
                action="rebuild the bundle with the sana-export of the same version as this runtime",
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _edited(path, str(error)) from error
    if manifest.digest != manifest._content_digest():
        raise _edited(path, f"digest {manifest.digest[:12]}… does not match the content")
    for entry in manifest.files:
        if not stays_inside(entry) or entry.size < 0:
            raise _edited(path, f"file entry {entry.path!r} of size {entry.size}")
    return manifest


class _Versioned(msgspec.Struct):
    schema_version: int


def _manifest_content(bundle: Path, path: Path) -> bytes:
    if not path.is_file():
        raise BundleError(
            f"{bundle} is not a bundle",
            received="no manifest.json" if bundle.is_dir() else "no such directory",
            expected="a directory written by `sana-export build`",
            action=f"sana-export build MODEL --output {bundle}",
        )
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise _edited(path, f"{path.stat().st_size} bytes")
    return path.read_bytes()


def _edited(path: Path, received: str) -> BundleError:
    return BundleError(
        f"{path} is damaged or was edited",
        received=received,
        expected="the manifest exactly as `sana-export build` wrote it",
        action="run the build command again: it reuses every stage whose files are intact",
    )


def verify_files(
    bundle: Path,
    entries: tuple[FileEntry, ...],
    *,
    digests: bool,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Check that files exist with the recorded sizes and, with `digests`, contents. Raises `BundleError`."""
    paths = [bundle / entry.path for entry in entries]
    for path, entry in zip(paths, entries, strict=True):
        if not path.is_file():
            raise _damaged(path, "the file is missing", "the file")
        size = path.stat().st_size
        if size != entry.size:
            raise _damaged(path, f"{size} bytes", f"{entry.size} bytes")
    found = sha256_files(paths, on_bytes) if digests else [entry.sha256 for entry in entries]
    for path, entry, digest in zip(paths, entries, found, strict=True):
        if digest != entry.sha256:
            raise _damaged(path, "another content", f"SHA-256 {entry.sha256[:12]}…")


def _damaged(path: Path, received: str, expected: str) -> BundleError:
    return BundleError(
        f"{path} is not the file the manifest records",
        received=received,
        expected=expected,
        action="copy the bundle again, or run the build command again: it rebuilds what is damaged",
    )
