"""Hugging Face ids: what is asked for, what works from the cache, and what is said without either."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from sana_export.weights import hub
from sana_export.weights.checkpoint import CALIBRATION_PROMPTS, SAMPLING, open_checkpoint
from sana_export.weights.write import write_diffusers_directory
from sana_runtime.errors import CheckpointError

MODEL = "example/Sana_1600M_1024px_BF16_diffusers"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the publisher uploaded: shards, two variants, and files nobody needs."""
    path = tmp_path_factory.mktemp("published") / "sana"
    write_diffusers_directory(open_checkpoint("random:tiny"), path, max_shard_bytes=300_000)
    half = path.parent / "half"
    write_diffusers_directory(open_checkpoint("random:tiny"), half)
    shutil.copy(half / "transformer" / WEIGHTS, path / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    (path / CALIBRATION_PROMPTS).write_text("a red circle\n")
    (path / SAMPLING).write_text('{"guidance_scale": 2.5}')
    (path / "README.md").write_text("unneeded")
    (path / "asset.png").write_bytes(b"unneeded")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(published: Path, cache: Path) -> Path:
    """The layout that huggingface_hub leaves: files are links to blobs."""
    repository = cache / ("models--" + MODEL.replace("/", "--"))
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(path for path in published.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(published)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / str(number)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    return snapshot


def test_a_cached_id_opens_without_a_network(published: Path, cache: Path) -> None:
    put_in_cache(published, cache)
    checkpoint = open_checkpoint(MODEL, variant="default")
    assert checkpoint.source == MODEL
    assert not checkpoint.attention_clip
    local = open_checkpoint(str(published), variant="default")
    assert checkpoint.digest("transformer") == local.digest("transformer")
    assert open_checkpoint(f"{MODEL}@main", variant="default").source == f"{MODEL}@main"
    with pytest.raises(CheckpointError, match="which one is meant"):
        open_checkpoint(MODEL)


def test_an_incomplete_cache_is_named(published: Path, cache: Path) -> None:
    snapshot = put_in_cache(published, cache)
    for file in (snapshot / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        open_checkpoint(MODEL, variant="default")


def test_without_network_and_cache_one_error_says_what_to_do(cache: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(MODEL)
    message = str(caught.value)
    for words in (MODEL, "hf download", "HF_HOME", "neither a local directory"):
        assert words in message
    assert len(message.splitlines()) == 4


def test_a_path_that_exists_is_never_looked_up(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("looked up"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(published, tmp_path / "example" / "sana")
    assert open_checkpoint("example/sana", variant="default").source == "example/sana"


class FakeHub:
    """Serves `published` file by file, as the two calls we make of huggingface_hub would."""

    def __init__(self, published: Path, folder: Path) -> None:
        self.published, self.folder = published, folder
        self.revisions: list[str | None] = []
        self.served: set[str] = set()

    def snapshot_download(self, repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.revisions.append(revision)
        names = self.list_repo_files(repository)
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.published / name, self.folder / name)
            self.served.add(name)
        return str(self.folder)

    def list_repo_files(self, repository: str, *, revision: str | None = None) -> list[str]:
        assert repository == MODEL
        return [str(path.relative_to(self.published)) for path in self.published.rglob("*") if path.is_file()]


@pytest.fixture
def fake_hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(published, tmp_path / COMMIT)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    return fake


@pytest.mark.parametrize("variant", ["default", "fp16"])
def test_only_the_chosen_files_are_downloaded(fake_hub: FakeHub, variant: str) -> None:
    checkpoint = open_checkpoint(MODEL, variant=variant)
    assert checkpoint.variant == (None if variant == "default" else variant)
    transformer = {name for name in fake_hub.served if name.startswith("transformer/") and name.endswith("ors")}
    if variant == "fp16":
        assert transformer == {"transformer/diffusion_pytorch_model.fp16.safetensors"}
    else:
        index = json.loads((fake_hub.published / "transformer" / f"{WEIGHTS}.index.json").read_text())
        assert transformer == {f"transformer/{shard}" for shard in index["weight_map"].values()}
    prompts = checkpoint.calibration_prompts()
    assert prompts is not None
    assert prompts.read_text() == "a red circle\n"
    assert checkpoint.sampling_config == {"guidance_scale": 2.5}
    assert not fake_hub.served & {"README.md", "asset.png"}
    assert fake_hub.revisions == [None, COMMIT]


def test_a_question_about_variants_is_asked_before_the_download(fake_hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="which one is meant"):
        open_checkpoint(MODEL)
    assert not any(name.endswith(".safetensors") for name in fake_hub.served)


def test_a_base_is_downloaded_without_its_transformer(fake_hub: FakeHub) -> None:
    hub.download(MODEL, None, ("text_encoder", "vae"))
    assert not any(name.startswith("transformer/") and name.endswith(".safetensors") for name in fake_hub.served)
    assert any(name.startswith("vae/") and name.endswith(".safetensors") for name in fake_hub.served)


def test_a_lost_connection_after_the_small_files_uses_what_is_there(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object, **__: object) -> Callable[..., None]:
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr(fake_hub, "list_repo_files", lost)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(fake_hub.published))
    assert open_checkpoint(MODEL, variant="default").source == MODEL


def test_a_full_disk_during_the_download_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(CheckpointError, match="HF_HOME"):
        open_checkpoint(MODEL)


def test_an_official_repository_points_at_the_other_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / COMMIT
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "Sana.pth").write_bytes(b"")
    fake = FakeHub(folder, folder)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    with pytest.raises(CheckpointError, match="_diffusers"):
        open_checkpoint(MODEL)
