"""How text reaches the transformer: labels of what is where, kept captions, the three ways of cross-attention."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sana_export.scenes.rendering import pack
from sana_export.scenes.scene import Scene, SceneObject
from sana_export.scenes.vocabulary import COLOURS, SHAPES
from scripts.train_nano import data, models
from scripts.train_nano.captions import CaptionEncoder
from scripts.train_nano.cross_attention import cross_attention_reference, cross_attention_sdpa
from scripts.train_nano.diffusion import caption_mask, frozen_captions, trained_captions
from scripts.train_nano.layout import Layout, LayoutHead, layout
from scripts.train_nano.sizes import TINY
from scripts.train_nano.stage import Session

CPU = torch.device("cpu")
FUSED = """
import torch
from scripts.train_nano.cross_attention import cross_attention, cross_attention_reference
torch.manual_seed(0)
compared = 0
for batch, tokens, rows, heads, head in ((3, 100, 19, 2, 64), (2, 64, 32, 3, 32), (1, 9, 6, 1, 16)):
    query = torch.randn(batch, tokens, heads * head, requires_grad=True)
    packed = torch.randn(batch, rows, 2 * heads * head, requires_grad=True)
    bias = torch.where(torch.rand(batch, rows) < 0.4, -10000.0, 0.0)
    bias[:, 0] = 0
    grad = torch.randn_like(query)
    results = []
    for way in (cross_attention_reference, cross_attention):
        out = way(query, packed, bias, heads)
        results.append((out, *torch.autograd.grad(out, (query, packed), grad)))
    for mine, theirs in zip(*results):
        # fp32 sums of up to 100 terms, in another order.
        error = ((mine - theirs).abs().max() / theirs.abs().max()).item()
        assert error < 1e-5, error
        compared += 1
print("compared", compared)
"""


def test_fused_cross_attention_is_the_reference_forward_and_backward() -> None:
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run([sys.executable, "-c", FUSED], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["compared", "9"]


def test_pytorch_attention_is_the_reference() -> None:
    torch.manual_seed(0)
    query, packed = torch.randn(2, 9, 64), torch.randn(2, 5, 128)
    bias = torch.tensor([[0.0, 0, 0, -10000, -10000], [0, -10000, -10000, -10000, -10000]])
    found, expected = (way(query, packed, bias, 2) for way in (cross_attention_sdpa, cross_attention_reference))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cross", ["explicit", "sdpa"])
def test_features_come_with_the_velocity_of_the_reference(cross: str) -> None:
    torch.manual_seed(0)
    model = models.build_transformer(TINY.configs.transformer, cross=cross)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    inputs = (torch.randn(2, 32, 3, 3), torch.randn(2, 5, 64), mask, torch.tensor([3.0, 900.0]))
    velocity, features = model.with_features(*inputs)
    torch.testing.assert_close(velocity, model(*inputs), rtol=1e-4, atol=1e-4)
    assert features.shape == (2, 9, model.config.channels)
    last = model.blocks[-1].register_forward_hook(lambda module, inputs, output: output * 0)
    changed, same = model.with_features(*inputs)
    last.remove()
    assert not torch.allclose(changed, velocity)
    torch.testing.assert_close(same, features, rtol=0, atol=0)


def item(shape: str, colour: str, x: float, y: float, radius: float) -> SceneObject:
    return SceneObject(shape=shape, colour=colour, size="medium", texture="plain", x=x, y=y, radius=radius, angle=0.0)


def test_labels_say_what_is_around_a_cell() -> None:
    """Four cells of a quarter: centres at 1/8, 3/8, 5/8, 7/8."""
    ring, star = item("ring", "green", 0.375, 0.375, 0.26), item("star", "white", 0.875, 0.625, 0.12)
    scene = Scene(objects=(ring, star), background_colour="purple", background_kind="horizontal")
    found = layout(pack([scene]), 4)
    assert isinstance(found, Layout)
    none = len(SHAPES)
    expected = torch.full((4, 4), none)
    # The ring's own cell, in its hole, and its four neighbours: 0.25 away, but not those at a corner, 0.35 away.
    for row, column in ((1, 1), (0, 1), (1, 0), (2, 1), (1, 2)):
        expected[row, column] = SHAPES.index("ring")
    expected[2, 3] = SHAPES.index("star")
    assert found.shapes.reshape(4, 4).tolist() == expected.tolist()
    names = list(COLOURS)
    colours = {SHAPES.index("ring"): names.index("green"), SHAPES.index("star"): names.index("white"), none: len(names)}
    assert found.colours[0].tolist() == [colours[shape] for shape in found.shapes[0].tolist()]
    assert found.background.tolist() == [names.index("purple")]
    assert {tensor.dtype for tensor in found} == {torch.uint8}


def test_head_learns_to_name_the_cells() -> None:
    torch.manual_seed(0)
    truth = layout(data.scenes_of(range(6), "train"), 4)
    features = torch.randn(6, 16, 160)
    head = LayoutHead(160)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-2)
    first = head.loss(features, truth).item()
    # Nothing is known: each of the three questions costs the logarithm of its classes.
    assert first == pytest.approx(sum(torch.tensor([11.0, 13, 12]).log().tolist()), rel=1e-5)
    for _ in range(60):
        optimizer.zero_grad()
        loss = head.loss(features, truth)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first


def test_kept_rows_are_those_of_the_text_encoder(tmp_path: Path) -> None:
    tokenizer = data.make_tokenizer(TINY.vocabulary)
    encoder = CaptionEncoder(tokenizer, TINY.caption_rows)
    store = data.SceneStore.start(data.start_pool(0, tokenizer, TINY.caption_rows), 7, CPU)
    torch.manual_seed(0)
    text_encoder, prefix = models.build_text_encoder(TINY.configs.text_encoder), torch.from_numpy(encoder.prefix)

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        return models.caption_embeds(text_encoder, prefix, tokens)

    session = Session(tmp_path, CPU)
    index, choice = torch.tensor([6, 0, 3]), torch.tensor([1, 3, 0])
    kept = frozen_captions(session, embed, store, 7, 3)(index, choice)
    made = trained_captions(embed, store)(index, choice)
    assert made.requires_grad
    assert not kept.requires_grad
    mask = caption_mask(store.tokens[index, choice])
    # bf16 keeps 8 bits.
    torch.testing.assert_close(kept[mask].float(), made[mask].detach(), rtol=2**-8, atol=1e-3)
