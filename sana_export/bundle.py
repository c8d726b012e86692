"""Writing a bundle: a staging folder beside the output, stage records that make reuse and resuming possible, and
one rename that makes the bundle appear whole.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sana_runtime.errors import BuildError, BundleError
from sana_runtime.files import no_space_or, sha256_file, sync_directory, whole_file
from sana_runtime.manifest import MANIFEST_NAME, FileEntry, Manifest, stays_inside

RECORD_NAME = "build.json"
_NOT_BUILT = "not built yet"


class StageRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished stage: what it was made from, the files it wrote, and what was measured."""

    inputs: dict[str, str]
    files: tuple[FileEntry, ...]
    measured: dict[str, float | int | str]


class BuildRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of build.json: stage name -> record."""

    stages: dict[str, StageRecord] = {}


@dataclass(frozen=True)
class SourceBundle:
    """A finished bundle that a build may take stages from. `folder` is as the user named it."""

    folder: Path
    record: BuildRecord


@dataclass(frozen=True)
class Reuse:
    """Whether a stage can be kept, and the one-line reason."""

    record: StageRecord | None
    reason: str


class Staging:
    """The folder a bundle is assembled in, and the bundles it may take stages from; use through `open_staging`."""

    def __init__(self, output: Path, folder: Path, sources: Sequence[SourceBundle] = ()) -> None:
        self.output = output
        self.folder = folder
        self._record = read_build_record(folder)
        self._sources = sources
        # Stage -> what to say of it when it is asked for again: by then it is this folder's own.
        self._taken: dict[str, str] = {}

    def reuse(self, stage: str, inputs: Mapping[str, str]) -> Reuse:
        """Keep the stage if it was made from exactly `inputs` and its files are intact: this folder's own, else the
        first such of the sources, whose files are put into this folder.
        """
        own = self._keep(stage, inputs)
        if own.record is not None:
            return own
        reasons = [own.reason]
        for source in self._sources:
            found = self._take(source, stage, inputs)
            if found.record is not None:
                return found
            if found.reason not in (_NOT_BUILT, own.reason):
                reasons.append(f"in {source.folder} {found.reason}")
        return Reuse(None, "; ".join(reasons))

    def _keep(self, stage: str, inputs: Mapping[str, str]) -> Reuse:
        record = self._record.stages.get(stage)
        if record is None:
            return Reuse(None, _NOT_BUILT)
        if reason := _changed(record, inputs) or _damaged(record, self.folder):
            return Reuse(None, reason)
        return Reuse(record, self._taken.get(stage, "same inputs, files intact"))

    def _take(self, source: SourceBundle, stage: str, inputs: Mapping[str, str]) -> Reuse:
        """A source's stage. What proves to be damaged is left here without a record, as after a crash."""
        record = source.record.stages.get(stage)
        if record is None:
            return Reuse(None, _NOT_BUILT)
        if reason := _changed(record, inputs) or _take_files(record, source.folder, self.folder):
            return Reuse(None, reason)
        # Checked here and not there: another build may replace that bundle at any time.
        if reason := _damaged(record, self.folder):
            return Reuse(None, reason)
        self._remember(stage, record)
        self._taken[stage] = f"same inputs in {source.folder}, files intact"
        return Reuse(record, self._taken[stage])

    def finish(
        self,
        stage: str,
        inputs: Mapping[str, str],
        files: list[Path],
        measured: Mapping[str, float | int | str],
    ) -> StageRecord:
        """Record a finished stage. `files` lie in the staging folder."""
        record = StageRecord(dict(inputs), tuple(self._entry(path) for path in files), dict(measured))
        self._remember(stage, record)
        return record

    def keep_only(self, stages: set[str]) -> None:
        """Forget other stages and delete every file that no kept stage wrote."""
        self._record = BuildRecord({name: r for name, r in self._record.stages.items() if name in stages})
        self._write_record()
        kept = {entry.path for record in self._record.stages.values() for entry in record.files}
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.folder).as_posix() not in {*kept, RECORD_NAME}:
                path.unlink()

    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the recorded stages, and the record itself."""
        entries = {entry.path: entry for record in self._record.stages.values() for entry in record.files}
        entries[RECORD_NAME] = self._entry(self.folder / RECORD_NAME)
        return tuple(entries[path] for path in sorted(entries))

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest and put the staged bundle in the output's place."""
        with whole_file(self.folder / MANIFEST_NAME) as temporary:
            temporary.write_bytes(manifest.sealed().to_json())
        replaced = _replaced_path(self.output)
        if self.output.exists():
            os.rename(self.output, replaced)
        os.rename(self.folder, self.output)
        sync_directory(self.output.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def _remember(self, stage: str, record: StageRecord) -> None:
        self._record = BuildRecord({**self._record.stages, stage: record})
        self._write_record()

    def _entry(self, path: Path) -> FileEntry:
        return FileEntry(path.relative_to(self.folder).as_posix(), path.stat().st_size, sha256_file(path))

    def _write_record(self) -> None:
        content = msgspec.json.format(msgspec.json.encode(self._record), indent=2)
        with whole_file(self.folder / RECORD_NAME) as temporary:
            temporary.write_bytes(content + b"\n")


@contextmanager
def open_staging(output: Path, sources: Sequence[SourceBundle] = ()) -> Iterator[Staging]:
    """Lock `output` against other builds and yield its staging folder, filled with what a former build left; it may
    take stages from `sources`.

    Raises `BuildError` when another build holds the lock and `BundleError` when `output` is something else than a
    bundle. The staging folder survives failures and interrupts: the next build resumes from it.
    """
    _check_output(output)
    folder = output.with_name(f".{output.name}.building")
    with _locked(folder, output):
        _recover(output)
        _remove_partial_files(folder)
        if output.exists() and not (folder / RECORD_NAME).exists():
            _link_files(output, folder)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        yield Staging(output, folder, sources)


def open_source(folder: Path) -> SourceBundle:
    """Open a bundle to take stages from. Nothing vouches for its record: every path in it is checked.

    Raises `BundleError` for what is no bundle of ours and for a record that was edited.
    """
    path = folder / RECORD_NAME
    try:
        record = msgspec.json.decode(path.read_bytes(), type=BuildRecord)
    except OSError as error:
        raise _no_source(folder, error) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _edited(path, str(error)) from error
    for entry in (entry for stage in record.stages.values() for entry in stage.files):
        if not stays_inside(entry):
            raise _edited(path, f"file entry {entry.path!r}")
    return SourceBundle(folder, record)


def _no_source(folder: Path, error: OSError) -> BundleError:
    received = f"{RECORD_NAME}: {error.strerror}"
    if isinstance(error, FileNotFoundError):
        received = f"a directory without {RECORD_NAME}" if folder.is_dir() else "no such directory"
    elif isinstance(error, NotADirectoryError):
        received = "a file"
    return BundleError(
        f"--reuse {folder} is not a bundle of ours",
        received=received,
        expected=f"a directory with {RECORD_NAME}, written by `sana-export build`",
        action="name a finished bundle, or leave --reuse away",
    )


def _edited(path: Path, received: str) -> BundleError:
    return BundleError(
        f"{path} is not a bundle's record, or was damaged or edited",
        received=received,
        expected="the record as `sana-export build` wrote it, with paths inside of the bundle",
        action="name another bundle, or leave --reuse away",
    )


def _check_output(output: Path) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if output.is_dir() and (output / RECORD_NAME).is_file():
        return
    raise BundleError(
        f"--output {output} exists and is not a bundle of ours",
        received="a file" if output.is_file() else "a directory with other content",
        expected="a new path, an empty directory, or a bundle to rebuild",
        action="choose another --output",
    )


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Create the staging folder if need be and hold a lock on it; a crash releases the lock."""
    descriptor = _open_current(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino != _inode(folder):  # committed by another build in between
            raise BlockingIOError
        yield
    except BlockingIOError as error:
        raise BuildError(
            f"another build is writing {output}",
            received=f"{folder} is locked",
            expected="one build per output directory at a time",
            action="wait for it to end, or choose another --output",
        ) from error
    finally:
        os.close(descriptor)


def _open_current(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    return os.open(folder, os.O_RDONLY)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _recover(output: Path) -> None:
    """Undo a crash between the two renames of a commit."""
    replaced = _replaced_path(output)
    if replaced.exists():
        if output.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, output)


def _replaced_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.replaced")


def _remove_partial_files(folder: Path) -> None:
    for path in folder.rglob("*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _link_files(source: Path, target: Path) -> None:
    """Hard links to a finished bundle's files; the record last, so that a crash leaves none."""
    record = source / RECORD_NAME
    shutil.copytree(
        source,
        target,
        copy_function=_link,
        ignore=shutil.ignore_patterns(RECORD_NAME, MANIFEST_NAME),
        dirs_exist_ok=True,
    )
    if record.exists():
        _link(str(record), str(target / RECORD_NAME))


def _link(origin: str, copy: str) -> str:
    """A hard link to a file, a copy where the file system has none. Every writer here replaces files and never edits
    them.
    """
    Path(copy).unlink(missing_ok=True)
    try:
        os.link(origin, copy)
    except OSError:
        shutil.copy2(origin, copy)
    return copy


def _take_files(record: StageRecord, source: Path, target: Path) -> str:
    """Link a stage's files into `target`; what was in the way of it, empty if nothing was."""
    for entry in record.files:
        # A symbolic link may mean nothing in another folder.
        origin, copy = (source / entry.path).resolve(), target / entry.path
        try:
            if not origin.is_file():
                return f"{entry.path} is missing"
            copy.parent.mkdir(parents=True, exist_ok=True)
            _link(str(origin), str(copy))
        except OSError as error:
            if no_space_or(error, copy) is not error:
                raise
            return f"{entry.path} cannot be taken: {error.strerror}"
    return ""


def _changed(record: StageRecord, inputs: Mapping[str, str]) -> str:
    """Which inputs a stage was made from that are not `inputs`; empty for none."""
    changes = _changes(record.inputs, inputs)
    return f"changed: {', '.join(changes)}" if changes else ""


def _damaged(record: StageRecord, folder: Path) -> str:
    """Which of a stage's files in `folder` is not what was recorded; empty if all are intact."""
    for entry in record.files:
        path = folder / entry.path
        if not path.is_file():
            return f"{entry.path} is missing"
        if path.stat().st_size != entry.size or sha256_file(path) != entry.sha256:
            return f"{entry.path} was damaged"
    return ""


def _changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    names = [*new, *(name for name in old if name not in new)]
    return [
        f"{name} {_short(old.get(name))} -> {_short(new.get(name))}" for name in names if old.get(name) != new.get(name)
    ]


def _short(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= 40 else f"{value[:12]}…"


def read_build_record(bundle: Path) -> BuildRecord:
    """The record, or an empty one where it is missing or unreadable: then every stage runs again."""
    try:
        return msgspec.json.decode((bundle / RECORD_NAME).read_bytes(), type=BuildRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return BuildRecord()
