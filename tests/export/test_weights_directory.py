"""Diffusers directories, written by diffusers and transformers themselves, then damaged in many ways."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model, PreTrainedTokenizerFast

from sana_export.prompting import scheduler_entry
from sana_export.weights.checkpoint import SAMPLING, Checkpoint, open_checkpoint
from sana_export.weights.safetensors_file import open_safetensors
from sana_export.weights.tokenizer import tokenizer_json
from sana_export.weights.write import write_diffusers_directory
from sana_runtime.errors import CheckpointError

TRANSFORMER = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def build_pipeline(folder: Path) -> SanaPipeline:
    """A tiny Sana with diffusers' and transformers' own random initialisation."""
    torch.manual_seed(0)
    facts = open_checkpoint("random:tiny")
    tokenizer_file = folder / "tokenizer.json"
    tokenizer_file.write_bytes(tokenizer_json())
    return SanaPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), pad_token="<pad>"),
        text_encoder=Gemma2Model(Gemma2Config(**facts.text_encoder_config)),
        vae=AutoencoderDC.from_config(facts.vae_config),
        transformer=SanaTransformer2DModel.from_config(facts.transformer_config),
        scheduler=DPMSolverMultistepScheduler.from_config(facts.scheduler_config),
    )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> SanaPipeline:
    return build_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def saved(pipeline: SanaPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "sana"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A private copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "sana"))


def edit_json(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "remove"}))


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_holds(checkpoint: Checkpoint, pipeline: SanaPipeline) -> None:
    modules = {
        "text_encoder": pipeline.text_encoder,
        "transformer": pipeline.transformer,
        "vae": pipeline.vae,
    }
    for component, module in modules.items():
        stored = checkpoint.upstream_weights(component)  # type: ignore[arg-type]
        expected = module.state_dict()
        assert stored.keys() == expected.keys()
        for name, tensor in stored.items():
            assert torch.equal(tensor.load().float(), expected[name].float()), name


def refusal(folder: Path, **options: Any) -> str:
    """The one error that opening raises, with its four parts."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder), **options)
    error = caught.value
    assert error.failed
    assert error.received is not None
    assert error.expected
    assert error.action
    return str(error)


def test_a_directory_written_by_diffusers_opens(saved: Path, pipeline: SanaPipeline) -> None:
    checkpoint = open_checkpoint(str(saved))
    assert_holds(checkpoint, pipeline)
    assert checkpoint.source == str(saved)
    assert checkpoint.architecture == "custom 2x64"
    assert (checkpoint.variant, checkpoint.guidance, checkpoint.attention_clip) == (
        None,
        "classifier_free",
        False,
    )
    assert checkpoint.scheduler_config["flow_shift"] == 3.0
    assert checkpoint.tokenizer_json() == (saved / "tokenizer" / "tokenizer.json").read_bytes()


def test_shards_are_read_through_their_index(pipeline: SanaPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 3
    assert (tmp_path / "transformer" / INDEX).exists()
    assert_holds(open_checkpoint(str(tmp_path)), pipeline)


def test_shards_of_a_variant_are_read_through_their_index(pipeline: SanaPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, variant="bf16", max_shard_size="300KB")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.variant == "bf16"
    assert_holds(checkpoint, pipeline)


def test_the_only_variant_is_taken_and_recorded(pipeline: SanaPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert open_checkpoint(str(tmp_path)).variant == "fp16"
    assert "--variant bf16" in refusal(tmp_path, variant="bf16")


def test_several_variants_are_a_question(pipeline: SanaPipeline, folder: Path) -> None:
    half = build_pipeline(folder / "tokenizer").to(torch.float16)
    half.transformer.save_pretrained(folder / "transformer", variant="fp16")
    message = refusal(folder)
    assert "which one is meant?" in message
    assert "transformer: default, fp16; vae: default" in message
    assert "--variant default or --variant fp16" in message
    chosen = open_checkpoint(str(folder), variant="fp16")
    assert (chosen.variant, chosen.attention_clip) == ("fp16", True)
    assert {tensor.dtype for tensor in chosen.weights("transformer").values()} == {torch.float16}
    assert {tensor.dtype for tensor in chosen.weights("vae_decoder").values()} == {torch.float32}
    default = open_checkpoint(str(folder), variant="default")
    assert (default.variant, default.attention_clip) == (None, False)
    assert_holds(default, pipeline)
    assert chosen.digest("transformer") != default.digest("transformer")
    assert chosen.digest("vae_decoder") == default.digest("vae_decoder")


def test_one_variant_in_two_forms_is_a_question(pipeline: SanaPipeline, folder: Path) -> None:
    whole = (folder / "transformer" / TRANSFORMER).read_bytes()
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="300KB")
    (folder / "transformer" / TRANSFORMER).write_bytes(whole)
    assert f"{INDEX} and {TRANSFORMER}" in refusal(folder) or f"{TRANSFORMER} and {INDEX}" in refusal(folder)


def test_loading_touches_only_what_is_loaded(tmp_path: Path) -> None:
    # 64 GiB of a sparse file: reading it whole is impossible here.
    large, small = 64 << 30, 4
    header = json.dumps(
        {
            "large": {"dtype": "U8", "shape": [large], "data_offsets": [0, large]},
            "small": {"dtype": "F32", "shape": [1], "data_offsets": [large, large + small]},
        }
    ).encode()
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(large, os.SEEK_CUR)
        file.write(struct.pack("<f", 1.5))
    tensors = open_safetensors(path)
    assert tensors["large"].shape == (large,)
    assert tensors["small"].load().item() == 1.5


def test_unaligned_and_empty_tensors_are_read(tmp_path: Path) -> None:
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[0,3],"data_offsets":[8,8]}}'
    )
    header += b" " * (1 + -len(header) % 8)
    path = tmp_path / "unaligned.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2.5))
    tensors = open_safetensors(path)
    assert tensors["a"].load().tolist() == [1.5, -2.5]
    assert tensors["b"].load().shape == (0, 3)


def test_a_loaded_tensor_can_be_written_without_touching_the_file(folder: Path) -> None:
    path = folder / "transformer" / TRANSFORMER
    before = path.read_bytes()
    open_safetensors(path)["proj_out.bias"].load().add_(1)
    assert path.read_bytes() == before


def test_opening_reads_headers_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opening read a tensor")

    monkeypatch.setattr("sana_export.weights.safetensors_file.mmap.mmap", refuse)
    assert open_checkpoint(str(folder)).weights("vae_encoder")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_file_is_named_with_its_bytes(folder: Path, keep: int) -> None:
    path = folder / "transformer" / TRANSFORMER
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    message = refusal(folder)
    assert str(path) in message
    assert "download this file again" in message
    if keep < 0:
        assert f"received: {len(content) + keep} bytes" in message
        assert f"expected: {len(content)} bytes" in message


def test_a_truncated_shard_is_named(pipeline: SanaPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, max_shard_size="300KB")
    shard = sorted((tmp_path / "vae").glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-7])
    assert str(shard) in refusal(tmp_path)
    shard.unlink()
    assert f"{shard} is missing" in refusal(tmp_path)


def test_random_damage_is_refused_or_harmless(folder: Path, tmp_path: Path) -> None:
    content = (folder / "transformer" / TRANSFORMER).read_bytes()
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    expected = {name: tensor.shape for name, tensor in open_safetensors(folder / "transformer" / TRANSFORMER).items()}
    chance = random.Random(0)
    refused = 0
    for trial in range(300):
        damaged = bytearray(content)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(header_end)] = chance.randrange(256)
        path = tmp_path / f"{trial}.safetensors"
        path.write_bytes(damaged)
        try:
            tensors = open_safetensors(path)
        except CheckpointError:
            refused += 1
        else:
            # What got through still describes the file's bytes exactly.
            assert len(tensors) <= len(expected)
            for tensor in tensors.values():
                try:
                    assert tuple(tensor.load().shape) == tensor.shape
                except CheckpointError:
                    refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a":1}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}',
        b'{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}}',
        b"[" * 5000,
        b"\xff\xfe",
    ],
)
def test_a_false_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        open_safetensors(path)


def test_a_giant_header_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="header of 200000000 bytes"):
        open_safetensors(path)


def test_a_git_lfs_pointer_is_recognised(folder: Path) -> None:
    path = folder / "vae" / TRANSFORMER
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 624000000\n")
    assert "git lfs pull" in refusal(folder)


def test_a_file_that_changes_after_opening_is_noticed(folder: Path) -> None:
    weights = open_checkpoint(str(folder)).weights("transformer")
    with (folder / "transformer" / TRANSFORMER).open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        weights["modulation"].load()


@pytest.mark.parametrize(
    "shard",
    ["../escape.safetensors", "/etc/passwd", "a/b.safetensors", "..\\b.safetensors", "weights.bin", 7],
)
def test_an_index_cannot_leave_its_folder(pipeline: SanaPipeline, tmp_path: Path, shard: object) -> None:
    pipeline.save_pretrained(tmp_path, max_shard_size="300KB")
    index = tmp_path / "transformer" / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "proj_out.bias": shard})
    message = refusal(tmp_path)
    assert str(index) in message
    assert "proj_out.bias" in message


def test_an_index_that_promises_too_much_is_refused(pipeline: SanaPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, max_shard_size="300KB")
    index = tmp_path / "transformer" / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "extra": weight_map["proj_out.bias"]})
    assert "no extra in" in refusal(tmp_path)
    edit_json(index, weight_map="remove")
    assert "no weight_map" in refusal(tmp_path)


def test_every_wrong_tensor_is_listed_in_one_error(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["proj_out.bias"]
        tensors["caption_norm.weight"] = torch.ones(63)
        tensors["surprise"] = torch.ones(2)
        tensors["proj_out.weight"] = torch.ones(32, 64, dtype=torch.int32)

    edit_weights(folder / "transformer" / TRANSFORMER, edit)
    edit_weights(folder / "vae" / TRANSFORMER, lambda tensors: tensors.pop("decoder.conv_out.bias"))
    message = refusal(folder)
    assert "5 problems" in message
    assert "transformer: missing proj_out.bias [32]" in message
    assert "transformer: caption_norm.weight has shape [63], not [64]" in message
    assert "transformer: unexpected surprise [2]" in message
    assert "transformer: proj_out.weight is stored as torch.int32" in message
    assert "vae: missing decoder.conv_out.bias [3]" in message


def test_a_long_list_of_wrong_tensors_is_cut(folder: Path) -> None:
    edit_json(folder / "transformer" / "config.json", num_layers=9)
    message = refusal(folder)
    per_block, absent_blocks, shown = 19, 7, 20
    assert f"{per_block * absent_blocks} problems" in message
    assert f"and {per_block * absent_blocks - shown} more" in message
    assert len(message.splitlines()) < 30


def test_tensors_without_a_place_are_left_out(folder: Path) -> None:
    edit_weights(
        folder / "transformer" / TRANSFORMER,
        lambda tensors: tensors.update({"patch_embed.pos_embed": torch.ones(1, 256, 64)}),
    )
    assert "patch_embed.pos_embed" not in open_checkpoint(str(folder)).upstream_weights("transformer")


def test_a_causal_language_model_serves_as_text_encoder(folder: Path, pipeline: SanaPipeline) -> None:
    shutil.rmtree(folder / "text_encoder")
    model = Gemma2ForCausalLM(pipeline.text_encoder.config)
    model.model.load_state_dict(pipeline.text_encoder.state_dict())
    model.save_pretrained(folder / "text_encoder")
    assert_holds(open_checkpoint(str(folder)), pipeline)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.ckpt"])
def test_pickles_are_refused_with_what_to_do(folder: Path, name: str) -> None:
    (folder / "vae" / TRANSFORMER).rename(folder / "vae" / name)
    message = refusal(folder)
    assert name in message
    assert "safe_serialization=True" in message


def test_a_missing_component_is_named(folder: Path) -> None:
    (folder / "vae" / TRANSFORMER).unlink()
    assert f"{folder / 'vae'} holds no weights" in refusal(folder)
    (folder / "vae" / "config.json").unlink()
    assert "no vae/config.json" in refusal(folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ("model_index.json", {"_class_name": "SanaControlNetPipeline"}, "ControlNet"),
        ("model_index.json", {"_class_name": "SanaVideoPipeline"}, "SanaVideoPipeline"),
        ("transformer/config.json", {"_class_name": "NunchakuSanaTransformer2DModel"}, "Nunchaku"),
        ("transformer/config.json", {"quantization_config": {"bits": 4}}, "quantised"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
        ("text_encoder/config.json", {"model_type": "gemma"}, "model_type"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ("vae/config.json", {"upsample_block_type": "pixel_shuffle"}, "upsample_block_type"),
        ("vae/config.json", {"decoder_qkv_multiscales": [[], [], [], [5], [5], [3]]}, "qkv_multiscales"),
        ("vae/config.json", {"decoder_layers_per_block": [0, 3, 3, 3, 3, 3]}, "layers_per_block"),
        ("vae/config.json", {"encoder_block_out_channels": [8, 16]}, "encoder stages"),
        ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, "PNDMScheduler"),
        ("transformer/config.json", {"num_layers": 10**9}, "num_layers"),
        ("transformer/config.json", {"num_layers": "remove"}, "num_layers"),
        ("transformer/config.json", {"mlp_ratio": "2.5"}, "mlp_ratio"),
        ("transformer/config.json", {"qk_norm": "layer_norm"}, "qk_norm"),
        ("transformer/config.json", {"guidance_embeds": "no"}, "guidance_embeds"),
        ("transformer/config.json", {"patch_size": 2}, "patch_size"),
        ("transformer/config.json", {"cross_attention_head_dim": 8}, "cross-attention"),
    ],
)
def test_another_model_is_refused_by_name(folder: Path, file: str, changes: dict[str, Any], expected: str) -> None:
    edit_json(folder / file, **changes)
    assert expected in refusal(folder)


@pytest.mark.parametrize("content", ["", "[1]", "{", "null", "\x00", "[" * 20000])
def test_a_damaged_config_is_refused(folder: Path, content: str) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(content)
    assert str(path) in refusal(folder)


def test_a_models_own_sampling_defaults_are_taken(folder: Path, tmp_path: Path) -> None:
    assert open_checkpoint(str(folder)).sampling_config == {}
    scheduler = scheduler_entry(open_checkpoint(str(folder)))
    assert (scheduler.default_num_steps, scheduler.default_guidance_scale) == (20, 4.5), "diffusers' defaults"
    (folder / SAMPLING).write_text('{"guidance_scale": 3, "num_inference_steps": 14.0}')
    checkpoint = open_checkpoint(str(folder))
    scheduler = scheduler_entry(checkpoint)
    assert (scheduler.default_num_steps, scheduler.default_guidance_scale) == (14, 3.0)
    write_diffusers_directory(checkpoint, tmp_path / "again")
    assert scheduler_entry(open_checkpoint(str(tmp_path / "again"))) == scheduler


@pytest.mark.parametrize(
    "content",
    [
        '{"guidance_scale": NaN}',
        '{"guidance_scale": "3"}',
        '{"guidance_scale": true}',
        '{"guidance_scale": 1' + 400 * "0" + "}",
        '{"num_inference_steps": 0}',
        '{"num_inference_steps": 2.5}',
        '{"guidence_scale": 3}',
        "[3]",
        "{",
    ],
    ids=lambda content: content[:24],
)
def test_wrong_sampling_defaults_are_refused(folder: Path, content: str) -> None:
    (folder / SAMPLING).write_text(content)
    assert SAMPLING in refusal(folder)


def test_an_oversized_config_is_refused(folder: Path) -> None:
    path = folder / "model_index.json"
    path.write_text(" " * (2 << 20) + "{}")
    assert "at most" in refusal(folder)


def test_wrong_folders_are_explained(folder: Path, tmp_path: Path) -> None:
    assert "no such file or directory" in refusal(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "an empty folder" in refusal(tmp_path / "empty")
    assert "give the folder above it" in refusal(folder / "transformer")
    assert "a file" in refusal(folder / "model_index.json")
    official = tmp_path / "official"
    (official / "checkpoints").mkdir(parents=True)
    assert "--base" in refusal(official)
    (official / "svdq-int4_r32-sana1.6b.safetensors").write_bytes(b"")
    assert "4-bit" in refusal(official)


def test_old_configurations_get_the_defaults(folder: Path) -> None:
    edit_json(
        folder / "transformer" / "config.json",
        interpolation_scale="remove",
        qk_norm="remove",
        guidance_embeds="remove",
        guidance_embeds_scale="remove",
        timestep_scale="remove",
    )
    config = open_checkpoint(str(folder)).transformer_config
    late = ("interpolation_scale", "qk_norm", "guidance_embeds", "guidance_embeds_scale", "timestep_scale")
    assert [config[field] for field in late] == [None, None, False, 0.1, 1.0]


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("Sana_1600M_1024px_diffusers", True),
        ("sana_600m_512px_diffusers", True),
        ("Sana_1600M_1024px_MultiLing_diffusers", True),
        ("models--Efficient-Large-Model--Sana_1600M_1024px_diffusers", True),
        ("Sana_1600M_1024px_BF16_diffusers", False),
        ("Sana_1600M_2Kpx_BF16_diffusers", False),
        ("my_Sana_1600M_1024px", False),
    ],
)
def test_fp16_era_releases_are_known_by_name(folder: Path, tmp_path: Path, name: str, clip: bool) -> None:
    renamed = tmp_path / name
    folder.rename(renamed)
    assert open_checkpoint(str(renamed)).attention_clip is clip


def test_fp16_era_releases_are_known_by_their_recorded_origin(folder: Path) -> None:
    origin = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
    edit_json(folder / "transformer" / "config.json", _name_or_path=origin)
    assert open_checkpoint(str(folder)).attention_clip


def test_the_source_is_what_the_user_wrote(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert open_checkpoint(f"./{folder.name}/").source == folder.name


def test_digests_follow_content_and_are_computed_once(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    sizes: list[int] = []
    before = checkpoint.digest("transformer", sizes.append)
    assert sum(sizes) == sum((folder / "transformer" / name).stat().st_size for name in ("config.json", TRANSFORMER))
    sizes.clear()
    assert checkpoint.digest("transformer", sizes.append) == before
    assert not sizes
    assert checkpoint.digest("vae_decoder") == checkpoint.digest("vae_encoder") != before
    edit_weights(folder / "transformer" / TRANSFORMER, lambda tensors: tensors["proj_out.bias"].add_(1))
    assert open_checkpoint(str(folder)).digest("transformer") != before


def test_a_digest_does_not_depend_on_where_the_folder_is(saved: Path, folder: Path) -> None:
    for component in ("text_encoder", "transformer", "vae_decoder"):
        assert open_checkpoint(str(saved)).digest(component) == open_checkpoint(str(folder)).digest(component)


def test_a_missing_or_damaged_tokenizer_is_named(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    checkpoint = open_checkpoint(str(folder))
    path.write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="a tokenizer of the tokenizers library"):
        checkpoint.tokenizer_json()
    path.unlink()
    with pytest.raises(CheckpointError, match="save_pretrained"):
        checkpoint.tokenizer_json()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder: Path) -> None:
    edit_json(folder / "text_encoder" / "config.json", vocab_size=700)
    edit_weights(
        folder / "text_encoder" / "model.safetensors",
        lambda tensors: tensors.update({"embed_tokens.weight": torch.zeros(700, 64)}),
    )
    with pytest.raises(CheckpointError, match="768 tokens"):
        open_checkpoint(str(folder)).tokenizer_json()
