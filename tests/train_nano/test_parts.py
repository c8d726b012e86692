"""The parts of the training that have an oracle: captions, modules, weights, the fused Mix-FFN, the solver loop."""

import contextlib
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from sana_calibration.prompts import load_prompts
from sana_export.reference.text_encoder import TextEncoder
from sana_export.scenes.prompts import prompts
from sana_export.weights import key_map
from sana_export.weights.architecture import REFERENCES_OF, layout
from sana_export.weights.checkpoint import CALIBRATION_PROMPTS, shipped_directory
from sana_runtime.tokenizer import clean_prompt
from scripts.train_nano import captions, data, models
from scripts.train_nano.autoencoder import Latents, autoencoder_step, random_pieces
from scripts.train_nano.diffusion import (
    caption_mask,
    contrastive_step,
    diffusion_step,
    frozen_captions,
    shifted_sigmas,
    trained_captions,
)
from scripts.train_nano.export import calibration_prompts
from scripts.train_nano.objects import Objects, objects_of
from scripts.train_nano.sizes import NANO, SIZES, TINY, Size
from scripts.train_nano.stage import Session

# What the repository may grow by, and what the issue allows.
MAX_BYTES = 13_500_000
ODD = (
    "",
    "a",
    "Red 圆形 🔴, two.",
    "两个红色圆形在蓝色背景上。",
    "  three GREEN stars \n on white ",
    "ünknown wörds",
)


@pytest.fixture(scope="module")
def tokenizer_json() -> bytes:
    return data.make_tokenizer(TINY.vocabulary)


@pytest.fixture(scope="module")
def encoder(tokenizer_json: bytes) -> captions.CaptionEncoder:
    return captions.CaptionEncoder(tokenizer_json, TINY.caption_rows)


def texts(count: int) -> list[str]:
    return [text for seed in range(count) for text in data.train_captions(seed)]


def test_prefix_and_caption_are_the_tokens_of_the_joined_text(
    tokenizer_json: bytes, encoder: captions.CaptionEncoder
) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    instruction = captions.instruction(tokenizer_json)
    for text in [*texts(50), *ODD]:
        tokens, (length,) = encoder.encode([text])
        joined = tokenizer.encode(instruction + clean_prompt(text)).ids
        assert joined == [*encoder.prefix, *tokens[0, :length]] or length > tokens.shape[1], text


@pytest.mark.parametrize("size", [NANO, TINY], ids=lambda size: size.name)
def test_captions_fit_and_the_instruction_is_short(size: Size) -> None:
    encoder = captions.CaptionEncoder(data.make_tokenizer(size.vocabulary), size.caption_rows)
    _, lengths = encoder.encode(texts(1000))
    # Longer ones are cut, and never trained with.
    assert (lengths < size.caption_rows).mean() > 0.995
    _, lengths = encoder.encode([prompt.text for prompt in prompts("test", 500)])
    assert lengths.max() < size.caption_rows
    assert len(encoder.prefix) <= 220


def test_words_are_tokens_without_their_punctuation(encoder: captions.CaptionEncoder, tokenizer_json: bytes) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokens, (length,) = encoder.encode(["a red circle, a blue star"])
    pieces = [tokenizer.id_to_token(token) for token in tokens[0, :length]]
    assert pieces == ["▁a", "▁red", "▁circle", ",", "▁a", "▁blue", "▁star"]


def test_caption_rows_are_those_of_transformers(encoder: captions.CaptionEncoder) -> None:
    torch.manual_seed(0)
    model = models.build_text_encoder(TINY.configs.text_encoder)
    tokens = torch.from_numpy(encoder.encode([*texts(2), *ODD])[0]).long()
    prefix = torch.from_numpy(encoder.prefix)
    mine = models.caption_embeds(model, prefix, tokens)
    joined = torch.cat([prefix.expand(len(tokens), -1), tokens], dim=1)
    oracle = TextEncoder(model.config)
    oracle.model = model
    theirs = oracle(joined, (joined != 0).long())
    theirs = torch.cat([theirs[:, :1], theirs[:, len(prefix) :]], dim=1)
    mask = caption_mask(tokens)
    torch.testing.assert_close(mine[mask], theirs[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SIZES)
def test_weights_under_upstream_names_assemble_to_the_same(name: str, tokenizer_json: bytes) -> None:
    size = SIZES[name]
    model = models.TrainedModel(
        models.build_text_encoder(size.configs.text_encoder),
        models.build_transformer(size.configs.transformer),
        models.Autoencoder(size.configs.vae),
        tokenizer_json,
        0.5,
    )
    checkpoint = models.TrainedCheckpoint(size, model)
    assert checkpoint.vae_config["scaling_factor"] == 0.5
    for component, references in REFERENCES_OF.items():
        upstream = checkpoint.upstream_weights(component)
        assert {name: tensor.shape for name, tensor in upstream.items()} == checkpoint.upstream_shapes(component)
        for reference in references:
            state = model.reference(reference).state_dict()
            found = key_map.assemblies(reference, layout(reference, checkpoint.config(component)))
            assert {item.reference for item in found} == set(state)
            for item in found:
                torch.testing.assert_close(item.assemble(upstream).load(), state[item.reference], rtol=0, atol=0)


def test_nano_fits_into_the_repository(tokenizer_json: bytes) -> None:
    model = models.TrainedModel(
        models.build_text_encoder(NANO.configs.text_encoder),
        models.build_transformer(NANO.configs.transformer),
        models.Autoencoder(NANO.configs.vae),
        tokenizer_json,
        1.0,
    )
    counts = models.parameter_counts(models.TrainedCheckpoint(NANO, model))
    assert 2 * sum(counts.values()) < MAX_BYTES, counts


FUSED = """
import torch
from scripts.train_nano.depthwise import depthwise_gate, depthwise_gate_reference
torch.manual_seed(0)
for batch, height, width, hidden in ((2, 3, 5, 40), (66, 1, 2, 8), (1, 9, 8, 8)):
    x = torch.randn(batch, height * width, 2 * hidden)
    inputs = [x, torch.randn(2 * hidden, 1, 3, 3), torch.randn(2 * hidden)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    expected = depthwise_gate_reference(*inputs, height, width)
    grad = torch.randn_like(expected)
    found = depthwise_gate(*inputs, height, width)
    pairs = [(found, expected)]
    pairs += zip(*(torch.autograd.grad(out, inputs, grad) for out in (found, expected)))
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
        error = ((mine - theirs).abs().max() / theirs.abs().max()).item()
        # fp32 sums of up to batch x tokens terms, in another order.
        assert error < 1e-5, error
print("compared", len(pairs))
"""


def test_fused_mix_ffn_is_the_reference_forward_and_backward() -> None:
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run([sys.executable, "-c", FUSED], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["compared", "4"]


def test_training_modules_are_the_reference_modules() -> None:
    from sana_export.reference.dc_ae import AutoencoderConfig, Decoder
    from sana_export.reference.transformer import LinearTransformer, TransformerConfig
    from sana_export.weights.architecture import completed

    torch.manual_seed(0)
    mine = models.build_transformer(TINY.configs.transformer)
    for parameter in mine.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    oracle = LinearTransformer(TransformerConfig.from_upstream(completed("transformer", TINY.configs.transformer)))
    oracle.load_state_dict(mine.state_dict())
    inputs = (torch.randn(2, 32, 3, 3), torch.randn(2, 5, 64), torch.ones(2, 5), torch.tensor([3.0, 900.0]))
    torch.testing.assert_close(mine(*inputs), oracle(*inputs), rtol=1e-4, atol=1e-4)
    autoencoder = models.Autoencoder(TINY.configs.vae)
    for parameter in autoencoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    decoder = Decoder(AutoencoderConfig.from_upstream(completed("vae", TINY.configs.vae)))
    decoder.load_state_dict(autoencoder.decoder.state_dict())
    latent = torch.randn(1, 32, 2, 3)
    torch.testing.assert_close(autoencoder.decoder(latent), decoder(latent), rtol=1e-4, atol=1e-4)


def test_noise_levels_are_a_shifted_logit_normal() -> None:
    torch.manual_seed(0)
    sigma = shifted_sigmas(100_000, torch.device("cpu"))
    assert 0 < sigma.min() < sigma.max() < 1
    # The median of a logit-normal is 1/2, which the shift of 3 moves to 3/4.
    assert abs(sigma.median().item() - 0.75) < 0.005


def test_pieces_are_squares_of_their_pictures() -> None:
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    pictures = torch.stack([rows, columns, rows * 8 + columns])[None] + 100 * torch.arange(5.0)[:, None, None, None]
    pieces = random_pieces(pictures, 4)
    corners = set()
    for index, piece in enumerate(pieces - 100 * torch.arange(5.0)[:, None, None, None]):
        top, left = (int(piece[channel, 0, 0]) for channel in (0, 1))
        corners.add((top, left))
        torch.testing.assert_close(piece, pictures[0, :, top : top + 4, left : left + 4], msg=str(index))
    assert len(corners) > 1


def test_store_has_the_scenes_of_its_seeds(encoder: captions.CaptionEncoder, tokenizer_json: bytes) -> None:
    pool = data.start_pool(0, tokenizer_json, TINY.caption_rows)
    store = data.SceneStore.start(pool, 40, torch.device("cpu"))
    store.collect(wait=True)
    expected = data.scenes_of(range(40), "train")
    for mine, theirs in zip(store.scenes, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    tokens, _ = encoder.encode(data.train_captions(17))
    np.testing.assert_array_equal(store.tokens[17].numpy(), tokens)
    assert store.fitting.float().mean() > 0.95
    drawn = store.draw(1000)
    assert drawn.min() >= 0
    assert drawn.max() < 40
    assert len(drawn.unique()) > 35


class CopyWatch(TorchDispatchMode):
    """Collects what waits for a device, or copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN204
        name, kwargs = str(func), kwargs or {}
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select")):
            self.found.append(name)
        device = kwargs.get("device")
        if "_to_copy" in name and device is not None and torch.device(device) != args[0].device:
            self.found.append(f"{name} {tuple(args[0].shape)}")
        return func(*args, **kwargs)


def test_steps_copy_nothing_between_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a CUDA graph may not hold. The meta device stands for the GPU: its tensors are none of the CPU's."""
    device = torch.device("meta")
    monkeypatch.setattr(Session, "autocast", lambda session: contextlib.nullcontext())
    session = Session(tmp_path, device)
    transformer = models.build_transformer(TINY.configs.transformer).to(device)
    text_encoder = models.build_text_encoder(TINY.configs.text_encoder).to(device)
    autoencoder = models.Autoencoder(TINY.configs.vae).to(device)
    heads = models.ContrastiveHeads(TINY, 2, 64).to(device)
    scenes = data.scenes_of(range(4), "train").to(device)
    tokens = torch.zeros(4, data.CAPTIONS, TINY.caption_rows - 1, dtype=torch.int16, device=device)
    fitting = torch.zeros(4, data.CAPTIONS, dtype=torch.bool, device=device)
    store = data.SceneStore(scenes, tokens, fitting, torch.zeros((), device=device), [])
    latents = Latents(torch.zeros(4, 32, 2, 2, device=device), torch.zeros(4, 32, 4, 4, device=device), 1.0)
    prefix = torch.zeros(9, dtype=torch.long, device=device)
    shares = torch.zeros(4, data.CAPTIONS, device=device)

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        return models.caption_embeds(text_encoder, prefix, tokens)

    live = trained_captions(embed, store)
    frozen = frozen_captions(session, embed, store, 4, 2)
    objects = objects_of(data.scenes_of(range(4), "train"))
    objects = Objects(*(tensor.to(device) for tensor in objects))
    steps = [
        contrastive_step(session, embed, heads, store, latents, objects, 8),
        diffusion_step(session, live, transformer, store, latents.small, shares, 8),
        diffusion_step(session, frozen, transformer, store, latents.large, shares, 8),
        autoencoder_step(session, autoencoder, store, TINY, 0),
        autoencoder_step(session, autoencoder, store, TINY, 1),
    ]
    for step in steps:
        # Tables are made in the first step, before a graph is captured.
        step()
        with CopyWatch() as watch:
            loss, _ = step()
            loss.backward()
        assert watch.found == []
    with CopyWatch() as watch:
        torch.zeros(2).to(device)
    assert len(watch.found) == 1


def test_calibration_prompts_speak_all_that_the_model_reads(tmp_path: Path) -> None:
    """64 English prompts of the training split, all kinds in turn; Chinese and emoji from the first few on."""
    path = tmp_path / "prompts.txt"
    path.write_text(calibration_prompts(), encoding="utf-8")
    found = load_prompts(path)
    english = [prompt for index, prompt in enumerate(found) if index % 5 != 2]
    others = [prompt for index, prompt in enumerate(found) if index % 5 == 2]
    assert english == [prompt.text for prompt in prompts("train", 64)]
    assert len(found) == len({*found}) == 80
    assert not {*found} & {prompt.text for prompt in prompts("test", 100)}
    for index, prompt in enumerate(others):
        assert ("Lo", "So")[index % 2] in map(unicodedata.category, prompt), prompt
    assert (shipped_directory() / CALIBRATION_PROMPTS).read_text(encoding="utf-8") == calibration_prompts()
