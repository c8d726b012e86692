"""Official `.pth` files: the key map against diffusers' own converter, and everything that can be wrong."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sana_transformer_to_diffusers

from sana_export.weights.architecture import layout
from sana_export.weights.checkpoint import CALIBRATION_PROMPTS, SAMPLING, Checkpoint, open_checkpoint
from sana_export.weights.key_map import official_parts
from sana_export.weights.write import write_diffusers_directory
from sana_runtime.errors import CheckpointError

StateDict = dict[str, Any]


def official_state_dict(checkpoint: Checkpoint) -> StateDict:
    """The official layout of a checkpoint's transformer: our key map inverted, and what conversion drops."""
    upstream = {name: tensor.load() for name, tensor in checkpoint.upstream_weights("transformer").items()}
    parts = official_parts(layout("transformer", checkpoint.transformer_config))
    state = {name: torch.cat([upstream[part] for part in names]) for name, names in parts.items()}
    state["y_embedder.y_embedding"] = torch.ones(300, 64)
    state["pos_embed"] = torch.ones(1, 256, 64)
    return state


@pytest.fixture
def state() -> StateDict:
    return official_state_dict(open_checkpoint("random:tiny"))


def refusal(path: Path, base: str | None = "random:tiny") -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path), base=base)
    error = caught.value
    assert error.failed
    assert error.received is not None
    assert error.expected
    assert error.action
    return str(error)


def saved(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def test_the_map_agrees_with_diffusers_converter(state: StateDict, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(saved(state, tmp_path / "a.pth")), base="random:tiny")
    converted = convert_sana_transformer_to_diffusers(dict(state))
    stored = checkpoint.upstream_weights("transformer")
    assert stored.keys() == converted.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor.load(), converted[name]), name


@pytest.mark.parametrize("model", ["random:tiny", "random:tiny-qknorm", "random:tiny-sprint"])
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "training-dump"])
def test_official_weights_come_back_as_they_were(model: str, bare: bool, tmp_path: Path) -> None:
    original = open_checkpoint(model)
    state = official_state_dict(original)
    if original.guidance == "embedded":
        state["logvar_linear.weight"] = torch.ones(1, 64)
    content: StateDict = state if bare else {"state_dict": state, "epoch": 3, "optimizer": {"step": 1}}
    path = saved(content, tmp_path / "model.pth")
    checkpoint = open_checkpoint(str(path), base="random:tiny-sprint" if "sprint" in model else "random:tiny")
    assert checkpoint.source == str(path)
    assert (checkpoint.architecture, checkpoint.guidance) == (original.architecture, original.guidance)
    assert checkpoint.transformer_config == original.transformer_config
    expected = original.weights("transformer")
    for name, tensor in checkpoint.weights("transformer").items():
        assert torch.equal(tensor.load(), expected[name].load()), name
    assert checkpoint.tokenizer_json() == original.tokenizer_json()
    assert checkpoint.weights("vae_decoder").keys() == original.weights("vae_decoder").keys()


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("random:0.6b", "random:1.6b"),
        ("random:1.6b", "random:0.6b"),
        ("random:1.5-4.8b", "random:1.6b"),
        ("random:sprint-1.6b", "random:sprint-0.6b"),
    ],
)
def test_released_configurations_follow_from_shapes(
    model: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = open_checkpoint(model)
    shapes = original.upstream_shapes("transformer")
    state = {}
    for name, names in official_parts(layout("transformer", original.transformer_config)).items():
        rows = sum(shapes[part][0] for part in names)
        state[name] = torch.empty(rows, *shapes[names[0]][1:], device="meta", dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "load", lambda *_, **__: state)
    checkpoint = open_checkpoint(str(tmp_path / "any.pth"), base=base)
    assert checkpoint.transformer_config == original.transformer_config
    assert (checkpoint.architecture, checkpoint.attention_clip) == (original.architecture, False)


def test_without_a_base_the_error_explains_it(state: StateDict, tmp_path: Path) -> None:
    message = refusal(saved(state, tmp_path / "a.pth"), base=None)
    assert "holds the transformer only" in message
    assert "--base Efficient-Large-Model/" in message


def test_the_base_needs_no_transformer_weights(state: StateDict, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_diffusers_directory(open_checkpoint("random:tiny"), base)
    (base / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    checkpoint = open_checkpoint(str(saved(state, tmp_path / "a.pth")), base=str(base))
    assert checkpoint.weights("transformer").keys() == open_checkpoint("random:tiny").weights("transformer").keys()
    assert checkpoint.calibration_prompts() is None
    (base / CALIBRATION_PROMPTS).write_text("a red circle\n")
    assert checkpoint.calibration_prompts() == base / CALIBRATION_PROMPTS
    assert checkpoint.sampling_config == {}
    (base / SAMPLING).write_text('{"guidance_scale": 2.5}')
    again = open_checkpoint(str(tmp_path / "a.pth"), base=str(base))
    assert again.sampling_config == {"guidance_scale": 2.5}


def test_the_base_must_have_the_same_guidance(state: StateDict, tmp_path: Path) -> None:
    path = saved(state, tmp_path / "a.pth")
    assert "expected: classifier_free guidance" in refusal(path, base="random:tiny-sprint")
    assert "not a diffusers directory" in refusal(path, base=str(path))


def test_the_file_name_tells_release_and_clip(state: StateDict, tmp_path: Path) -> None:
    assert open_checkpoint(
        str(saved(state, tmp_path / "Sana_1600M_512px_MultiLing.pth")), base="random:tiny"
    ).attention_clip
    assert not open_checkpoint(str(saved(state, tmp_path / "other.pth")), base="random:tiny").attention_clip
    message = refusal(saved(state, tmp_path / "Sana_1600M_4Kpx_BF16.pth"))
    assert "sample_size 128" in message
    assert "the base's scheduler is used" in message


def test_fp16_weights_need_the_clip(state: StateDict, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in state.items()}
    assert open_checkpoint(str(saved(half, tmp_path / "a.pth")), base="random:tiny").attention_clip


def test_every_wrong_tensor_is_listed(state: StateDict, tmp_path: Path) -> None:
    del state["final_layer.linear.bias"]
    state["attention_y_norm.weight"] = torch.ones(3)
    state["something.else"] = torch.ones(3)
    message = refusal(saved(state, tmp_path / "a.pth"))
    assert "3 problems" in message
    assert "missing final_layer.linear.bias [32]" in message
    assert "attention_y_norm.weight has shape [3], not [64]" in message
    assert "unexpected something.else [3]" in message


def test_other_contents_are_refused(state: StateDict, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    assert "no x_embedder.proj.weight" in refusal(saved({"a": torch.ones(2)}, path))
    assert "other things than tensors" in refusal(saved({"state_dict": {"a": 1}}, path))
    assert "a Tensor of other things" in refusal(saved(torch.ones(3), path))
    state["controlnet_blocks.0.weight"] = torch.ones(2)
    assert "ControlNet" in refusal(saved(state, path))


class Payload:
    """What a hostile file would hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("opened"),))


def test_a_file_that_would_run_code_is_not_opened(
    state: StateDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "could run code" in refusal(saved({**state, "x": Payload()}, tmp_path / "a.pth"))
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Payload()))
    assert str(tmp_path / "b.pth") in refusal(tmp_path / "b.pth")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, -1, -200])
def test_a_truncated_file_is_refused(state: StateDict, tmp_path: Path, keep: int) -> None:
    path = saved(state, tmp_path / "a.pth")
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refusal(path)


def test_a_file_larger_than_memory_is_named(state: StateDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 68719476736 bytes from file <a.pth>: Cannot allocate memory (12)")

    path = saved(state, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "load", refuse)
    assert "too large to be mapped" in refusal(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.pth")


def test_digests_follow_the_file_and_the_base(state: StateDict, tmp_path: Path) -> None:
    path = saved(state, tmp_path / "a.pth")
    checkpoint = open_checkpoint(str(path), base="random:tiny")
    assert checkpoint.digest("vae_decoder") == open_checkpoint("random:tiny").digest("vae_decoder")
    before = checkpoint.digest("transformer")
    assert open_checkpoint(str(path), base="random:tiny").digest("transformer") == before
    assert open_checkpoint(str(path), base="random:tiny-4k").digest("transformer") != before
    state["x_embedder.proj.bias"] += 1
    saved(state, path)
    assert open_checkpoint(str(path), base="random:tiny").digest("transformer") != before


def test_the_configuration_is_plain_json(state: StateDict, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(saved(state, tmp_path / "a.pth")), base="random:tiny")
    assert json.loads(json.dumps(checkpoint.transformer_config)) == checkpoint.transformer_config
