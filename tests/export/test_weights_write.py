"""Written diffusers directories load in diffusers' pipelines and in our own reader, bit for bit."""

import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from sana_export.weights.checkpoint import open_checkpoint
from sana_export.weights.lazy import LazyTensor
from sana_export.weights.safetensors_file import open_safetensors
from sana_export.weights.write import write_diffusers_directory, write_safetensors
from sana_runtime.errors import CheckpointError

VARIANTS = ["random:tiny", "random:tiny-qknorm", "random:tiny-sprint", "random:tiny-4k"]


@pytest.mark.parametrize("model", VARIANTS)
def test_diffusers_loads_and_runs_it(model: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model)
    write_diffusers_directory(checkpoint, tmp_path / "sana")
    kind = getattr(diffusers, checkpoint.pipeline_class)
    pipeline = kind.from_pretrained(tmp_path / "sana", torch_dtype=torch.float32)
    modules = {
        "text_encoder": pipeline.text_encoder,
        "transformer": pipeline.transformer,
        "vae": pipeline.vae,
    }
    for component, module in modules.items():
        loaded = module.state_dict()
        expected = checkpoint.upstream_weights(component)  # type: ignore[arg-type]
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor.load()) for name, tensor in expected.items())
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red fox", height=64, width=96, use_resolution_binning=False, num_inference_steps=2,
                     output_type="np").images  # fmt: skip
    assert image.shape == (1, 64, 96, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.05


def test_the_pipelines_tokenizer_is_ours(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("random:tiny")
    write_diffusers_directory(checkpoint, tmp_path / "sana")
    tokenizer = diffusers.SanaPipeline.from_pretrained(tmp_path / "sana").tokenizer
    assert "Gemma" in type(tokenizer).__name__
    ours = Tokenizer.from_buffer(checkpoint.tokenizer_json())
    for text in ("", "a red fox", "  two  spaces\nand a line", "Käse 猫 🦊", "User Prompt: "):
        assert tokenizer(text).input_ids == ours.encode(text).ids, text
    tokenizer.padding_side = "right"
    padded = tokenizer("fox", padding="max_length", max_length=8)
    assert padded.input_ids[-1] == 0
    assert sum(padded.attention_mask) == len(ours.encode("fox").ids)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_it_opens_again_as_the_same_checkpoint(dtype: torch.dtype | None, tmp_path: Path) -> None:
    original = open_checkpoint("random:tiny-sprint")
    write_diffusers_directory(original, tmp_path / "sana", dtype, max_shard_bytes=200_000)
    again = open_checkpoint(str(tmp_path / "sana"))
    assert again.guidance == "embedded"
    assert again.attention_clip is (dtype == torch.float16)
    assert again.transformer_config == original.transformer_config
    assert again.scheduler_config == original.scheduler_config
    assert again.tokenizer_json() == original.tokenizer_json()
    for component in ("text_encoder", "transformer", "vae_decoder", "vae_encoder"):
        expected = original.weights(component)
        weights = again.weights(component)
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            assert tensor.dtype == (dtype or torch.float32)
            assert torch.equal(tensor.load(), expected[name].load().to(tensor.dtype)), name


def test_shards_keep_to_their_limit(tmp_path: Path) -> None:
    written: list[int] = []
    checkpoint = open_checkpoint("random:tiny")
    write_diffusers_directory(checkpoint, tmp_path, max_shard_bytes=200_000, on_bytes=written.append)
    for component in ("text_encoder", "transformer", "vae"):
        index = json.loads(next((tmp_path / component).glob("*.index.json")).read_text())
        tensors = checkpoint.upstream_weights(component)
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(tensor.size for tensor in tensors.values())
        for shard in (tmp_path / component).glob("*.safetensors"):
            held = open_safetensors(shard)
            assert len(held) == 1 or sum(tensor.size for tensor in held.values()) <= 200_000
    parts = ("text_encoder", "transformer", "vae")
    assert sum(written) == sum(t.size for part in parts for t in checkpoint.upstream_weights(part).values())


def test_safetensors_itself_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(5, 3),
        "half": torch.randn(7).half(),
        "bf16": torch.randn(2, 2, 2).bfloat16(),
        "strided": torch.randn(4, 6).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        'ünïcode "name"': torch.ones(1),
    }
    lazy = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
    write_safetensors(tmp_path / "a.safetensors", lazy)
    loaded = load_file(tmp_path / "a.safetensors")
    ours = open_safetensors(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys() == ours.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(ours[name].load(), tensor)
        assert ours[name].load().dtype == tensor.dtype


def test_an_existing_directory_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="choose another path"):
        write_diffusers_directory(open_checkpoint("random:tiny"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_write_is_no_checkpoint(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_diffusers_directory(open_checkpoint("random:tiny"), tmp_path / "sana", on_bytes=interrupt)
    assert not list((tmp_path / "sana").rglob("*.safetensors"))
    assert not list((tmp_path / "sana").rglob("*.partial"))
    with pytest.raises(CheckpointError, match="not a diffusers directory"):
        open_checkpoint(str(tmp_path / "sana"))


STREAMED = """
import resource, sys, torch
from pathlib import Path
from sana_export.weights.lazy import LazyTensor
from sana_export.weights.write import write_safetensors
size = 16 << 20
ones = LazyTensor((size,), torch.bfloat16, lambda: torch.ones(size, dtype=torch.bfloat16))
tensors = {str(i): ones for i in range(12)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_safetensors(Path(sys.argv[1]), tensors)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(not hasattr(resource, "getrusage"), reason="the system does not report peak memory")
def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STREAMED, str(tmp_path / "large.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tensor_mib = 32
    assert int(done.stdout) < 4 * tensor_mib, f"peak memory rose by {done.stdout.strip()} MiB for 384 MiB written"


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_loading_ahead_keeps_order_and_bounds_memory(ahead: int, tmp_path: Path) -> None:
    """Whichever tensor is loaded first; never more than `ahead` beside the one that is written."""
    lock, alive, most = threading.Lock(), 0, 0

    def made(i: int) -> LazyTensor:
        def load() -> torch.Tensor:
            nonlocal alive, most
            with lock:
                alive += 1
                most = max(most, alive)
            time.sleep(0.002 * (i % 3))
            return torch.full((8,), float(i))

        return LazyTensor((8,), torch.float32, load)

    def written(_: int) -> None:
        nonlocal alive
        with lock:
            alive -= 1

    tensors = {f"t{i}": made(i) for i in range(12)}
    write_safetensors(tmp_path / "a.safetensors", tensors, on_bytes=written, ahead=ahead)
    assert most <= ahead + 1
    found = load_file(tmp_path / "a.safetensors")
    assert [float(found[name][0]) for name in tensors] == list(range(12))


def test_an_error_while_loading_ahead_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> torch.Tensor:
        raise CheckpointError("truncated", received="less", expected="more", action="copy it again")

    tensors = {f"t{i}": LazyTensor((1,), torch.float32, lambda: torch.ones(1)) for i in range(5)}
    tensors["t3"] = LazyTensor((1,), torch.float32, broken)
    with pytest.raises(CheckpointError, match="truncated"):
        write_safetensors(tmp_path / "a.safetensors", tensors, ahead=2)
    assert not [*tmp_path.iterdir()]
