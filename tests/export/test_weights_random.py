"""Random models are the same everywhere, cost only what is loaded, and behave like trained ones."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sana_export.upstream import upstream_autoencoder, upstream_text_encoder, upstream_transformer
from sana_export.weights.checkpoint import open_checkpoint
from sana_export.weights.random_model import RandomCheckpoint, random_model_names
from sana_export.weights.tokenizer import VOCABULARY_SIZE, tokenizer_json
from sana_runtime.errors import CheckpointError

FINGERPRINT = """
import hashlib
from sana_export.weights.checkpoint import open_checkpoint
checkpoint = open_checkpoint("random:tiny-sprint")
digest = hashlib.sha256(checkpoint.tokenizer_json())
for component in ("text_encoder", "transformer", "vae"):
    for name, tensor in checkpoint.upstream_weights(component).items():
        digest.update(name.encode() + tensor.load().numpy().tobytes())
print(digest.hexdigest())
"""


def test_two_processes_make_the_same_model() -> None:
    prints = {
        subprocess.run([sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(prints) == 1


def test_a_tensor_does_not_depend_on_what_was_loaded_before() -> None:
    weights = open_checkpoint("random:tiny").weights("vae_decoder")
    forwards = [tensor.load() for tensor in weights.values()]
    backwards = [tensor.load() for tensor in reversed(weights.values())]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))


def test_tensors_differ_from_each_other() -> None:
    weights = open_checkpoint("random:tiny").upstream_weights("transformer")
    contents = {hashlib.sha256(tensor.load().numpy().tobytes()).digest() for tensor in weights.values()}
    assert len(contents) == len(weights)


@pytest.mark.parametrize("model", random_model_names())
def test_full_size_models_are_stored_as_bf16(model: str) -> None:
    checkpoint = open_checkpoint(model)
    dtypes = {tensor.dtype for tensor in checkpoint.weights("transformer").values()}
    assert dtypes == {torch.float32 if "tiny" in model else torch.bfloat16}
    assert (checkpoint.source, checkpoint.variant, checkpoint.attention_clip) == (model, None, False)


def test_a_small_tensor_of_a_large_model_loads_alone() -> None:
    weights = open_checkpoint("random:1.5-4.8b").weights("transformer")
    modulation = weights["blocks.59.modulation"].load()
    assert (tuple(modulation.shape), modulation.dtype) == ((6, 2240), torch.bfloat16)


def test_digests_tell_models_and_components_apart() -> None:
    digests = [
        RandomCheckpoint(model).digest(component)
        for model in ("random:tiny", "random:tiny-4k")
        for component in ("text_encoder", "transformer", "vae_decoder")
    ]
    assert len(set(digests)) == 6
    assert RandomCheckpoint("random:tiny").digest("transformer") == digests[1]


def test_resolutions_have_their_position_embedding_and_shift() -> None:
    facts = {
        model: (
            checkpoint.transformer_config["sample_size"],
            checkpoint.transformer_config["interpolation_scale"],
            checkpoint.scheduler_config.get("flow_shift"),
        )
        for model in ("random:1.6b", "random:1.6b-2k", "random:1.6b-4k", "random:sprint-1.6b")
        for checkpoint in [open_checkpoint(model)]
    }
    assert list(facts.values()) == [(32, None, 3.0), (64, 1.0, 3.0), (128, 2.0, 6.0), (32, None, None)]


@pytest.mark.parametrize("model", ["random:tiny", "random:tiny-qknorm", "random:tiny-sprint", "random:tiny-4k"])
@torch.no_grad()
def test_activations_stay_near_unit_scale(model: str) -> None:
    checkpoint = open_checkpoint(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, VOCABULARY_SIZE, (1, 40), generator=generator)
    captions = upstream_text_encoder(checkpoint)(tokens).last_hidden_state
    latent = torch.randn(1, 32, 9, 7, generator=generator)
    sprint = checkpoint.guidance == "embedded"
    velocity = upstream_transformer(checkpoint)(
        latent,
        captions,
        torch.tensor([0.5 if sprint else 500.0]),
        guidance=torch.tensor([0.45]) if sprint else None,
        encoder_attention_mask=torch.ones(1, 40),
    ).sample
    image = upstream_autoencoder(checkpoint).decode(latent / 0.41407).sample
    for name, value in (("captions", captions), ("velocity", velocity), ("image", image)):
        scale = value.square().mean().sqrt().item()
        assert 0.2 < scale < 5, f"{name} has root mean square {scale}"


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(CheckpointError, match=r"random:sprint-0\.6b"):
        open_checkpoint("random:2b")
    with pytest.raises(CheckpointError, match="--variant has no meaning"):
        open_checkpoint("random:tiny", variant="fp16")
    with pytest.raises(CheckpointError, match="--base has no meaning"):
        open_checkpoint("random:tiny", base="random:tiny")


TEXTS = ["", "a red fox", "  two  spaces\nand a line", "Käse 猫 🦊", "<eos> is text here", "User Prompt: "]


def test_the_tokenizer_keeps_gemmas_conventions() -> None:
    tokenizer = Tokenizer.from_buffer(tokenizer_json())
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "<eos>", "<bos>", "<unk>")] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE
    assert open_checkpoint("random:tiny").text_encoder_config["vocab_size"] == VOCABULARY_SIZE
    assert tokenizer.encode("").ids == [2]
    for text in TEXTS[:4]:
        ids = tokenizer.encode(text).ids
        assert ids[0] == 2
        assert 1 not in ids
        assert tokenizer.decode(ids) == text
    assert "▁fox" in tokenizer.encode("a red fox").tokens


def test_transformers_reads_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_json())
    fast = PreTrainedTokenizerFast(tokenizer_file=str(path))
    tokenizer = Tokenizer.from_buffer(tokenizer_json())
    for text in TEXTS:
        assert fast(text).input_ids == tokenizer.encode(text).ids, text


def test_the_tokenizer_is_json_of_the_tokenizers_library() -> None:
    content = json.loads(tokenizer_json())
    assert content["model"]["byte_fallback"] is True
    assert len(content["model"]["vocab"]) == VOCABULARY_SIZE
