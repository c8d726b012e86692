"""Toy bundles on disk: nothing here needs more than the runtime itself."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sana_runtime.files import sha256_file
from sana_runtime.manifest import FileEntry
from tests.runtime.toys import FIXTURES, toy_manifest

MakeBundle = Callable[..., Path]


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """`make_bundle(guidance=..., **toy_manifest arguments)` writes a toy bundle and returns its directory."""

    def make(*, guidance: str = "classifier_free", **arguments: Any) -> Path:
        bundle = tmp_path / f"bundle-{guidance}"
        bundle.mkdir()
        transformer = "transformer.onnx" if guidance == "classifier_free" else "transformer_sprint.onnx"
        for source, name in (
            ("tokenizer.json", "tokenizer.json"),
            ("text_encoder.onnx", "text_encoder.onnx"),
            (transformer, "transformer.onnx"),
            ("vae_decoder.onnx", "vae_decoder.onnx"),
        ):
            shutil.copy(FIXTURES / source, bundle / name)
        entries = tuple(
            FileEntry(path.name, path.stat().st_size, sha256_file(path)) for path in sorted(bundle.iterdir())
        )
        manifest = toy_manifest(guidance=guidance, files=entries, **arguments)
        (bundle / "manifest.json").write_bytes(manifest.to_json())
        return bundle

    return make


@pytest.fixture
def bundle(make_bundle: MakeBundle) -> Path:
    """A classifier-free toy bundle for ONNX Runtime."""
    return make_bundle()
