"""How text reaches the transformer: captions that name whole objects, kept captions, the transformer in parts."""

import math
from pathlib import Path

import pytest
import torch

from sana_export.reference.transformer import LinearTransformer, TransformerConfig
from sana_export.scenes.rendering import SceneBatch, pack
from sana_export.scenes.scene import Scene, SceneObject
from sana_export.scenes.vocabulary import COLOURS, SHAPES
from sana_export.weights.architecture import completed
from scripts.train_nano import data, models
from scripts.train_nano.captions import CaptionEncoder
from scripts.train_nano.diffusion import caption_mask, frozen_captions, trained_captions
from scripts.train_nano.objects import ObjectHead, objects_of
from scripts.train_nano.sizes import TINY
from scripts.train_nano.stage import Session

CPU = torch.device("cpu")


def test_compiled_parts_compute_what_the_reference_does() -> None:
    torch.manual_seed(0)
    model = models.build_transformer(TINY.configs.transformer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    inputs = (torch.randn(2, 32, 3, 3), torch.randn(2, 5, 64), mask, torch.tensor([3.0, 900.0]))
    reference = LinearTransformer(TransformerConfig.from_upstream(completed("transformer", TINY.configs.transformer)))
    reference.load_state_dict(model.state_dict())
    expected = reference(*inputs)
    for found in (model(*inputs), model.velocity(*inputs)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def item(shape: str, colour: str, x: float, y: float, radius: float) -> SceneObject:
    return SceneObject(shape=shape, colour=colour, size="medium", texture="plain", x=x, y=y, radius=radius, angle=0.0)


def scenes(*objects: tuple[SceneObject, ...]) -> SceneBatch:
    return pack([Scene(objects=some, background_colour="purple", background_kind="horizontal") for some in objects])


RING, STAR = item("ring", "green", 0.375, 0.375, 0.26), item("star", "white", 0.875, 0.625, 0.12)


def test_objects_are_those_of_the_scenes() -> None:
    found = objects_of(scenes((RING, STAR), (STAR,)))
    names = list(COLOURS)
    assert found.present.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert found.colours[0, :2].tolist() == [names.index("green"), names.index("white")]
    assert found.shapes[0, :2].tolist() == [SHAPES.index("ring"), SHAPES.index("star")]
    assert objects_of(scenes((RING, STAR), (STAR,))).rows(torch.tensor([1])).colours[0, 0] == names.index("white")


def head_that_reads(*rows: tuple[str, str]) -> tuple[ObjectHead, torch.Tensor]:
    """A head, and caption rows [1, S, C] in which it sees colour and shape clearly, all with the same weight."""
    head = ObjectHead(1 + len(COLOURS) + len(SHAPES))
    torch.nn.init.eye_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    embeds = torch.zeros(1, len(rows), head.linear.in_features)
    for place, (colour, shape) in enumerate(rows):
        embeds[0, place, 1 + list(COLOURS).index(colour)] = 100
        embeds[0, place, 1 + len(COLOURS) + SHAPES.index(shape)] = 100
    return head, embeds


def test_rows_that_name_every_object_whole_cost_only_the_choice_between_them() -> None:
    truth = objects_of(scenes((RING, STAR)))
    whole, embeds = head_that_reads(("green", "ring"), ("white", "star"))
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert whole.loss(embeds, mask, truth).item() == pytest.approx(math.log(2), abs=1e-5)
    # One row alone explains one object only; what is masked is no row.
    assert whole.loss(embeds, torch.tensor([[True, False]]), truth).item() > 50
    swapped, embeds = head_that_reads(("white", "ring"), ("green", "star"))
    assert swapped.loss(embeds, mask, truth).item() > 50


def test_nothing_known_costs_the_logarithm_of_all_pairs() -> None:
    head = ObjectHead(8)
    torch.nn.init.zeros_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    truth, mask = objects_of(scenes((RING, STAR), (STAR,))), torch.ones(2, 5, dtype=torch.bool)
    loss = head.loss(torch.randn(2, 5, 8), mask, truth)
    assert loss.item() == pytest.approx(math.log(len(COLOURS) * len(SHAPES)), rel=1e-5)


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
