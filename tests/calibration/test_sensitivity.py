"""The ranking finds the layer that hurts, and a proposal keeps its budget."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sana_calibration.recipe import LayerRule, PerChannel, load_recipe, resolve
from sana_calibration.scales import LayerScales, Scales
from sana_calibration.sensitivity import Sensitivity, block_groups, layer_groups, sqnr_db
from sana_export.calibration_run import calibrate
from sana_export.sensitivity_run import measure_sensitivity
from sana_export.weights.checkpoint import open_checkpoint
from sana_runtime.errors import InputError

RULE = LayerRule("transformer", "*", "int8", "int8", PerChannel())


def test_sqnr() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert sqnr_db(exact * 1.1, exact) == pytest.approx(20, abs=1e-4)  # noise power is a hundredth
    assert sqnr_db(exact, exact) == math.inf
    assert sqnr_db(torch.tensor([math.nan, 4.0]), exact) == -math.inf
    assert sqnr_db(exact, torch.zeros(2)) == -math.inf


def test_groups() -> None:
    names = ["blocks.0.mix_ffn.conv_point", "blocks.11.mix_ffn.conv_point", "blocks.0.cross_attention.to_q"]
    assert block_groups(names) == {
        "blocks.*.mix_ffn.conv_point": (names[0], names[1]),
        "blocks.*.cross_attention.to_q": (names[2],),
    }
    assert [*layer_groups(names)] == names


class Chain(nn.Module):
    """Three linear layers; each feed is {"x": [rows, 16]}."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


def chain() -> Sensitivity:
    """Layer b's amax is 40 times too large: its activations get some 5 steps instead of 127."""
    feeds = [{"x": torch.randn(32, 16, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    scales = {"a": LayerScales(4.0), "b": LayerScales(80.0), "c": LayerScales(2.0)}
    return Sensitivity(Chain().requires_grad_(False), "", dict.fromkeys("abc", RULE), scales, feeds, lambda y: y)


def test_ranking_starts_with_the_layer_that_hurts() -> None:
    sensitivity = chain()
    ranking = sensitivity.ranking(layer_groups("abc"))
    assert ranking[0].group == "b"
    assert ranking[0].sqnr_db < 20 < ranking[1].sqnr_db <= ranking[2].sqnr_db
    assert sensitivity.sqnr_db("abc") <= ranking[0].sqnr_db + 1
    assert sensitivity.sqnr_db(()) == math.inf


def test_proposal_excludes_what_is_needed_and_no_more() -> None:
    sensitivity = chain()
    ranking = sensitivity.ranking(layer_groups("abc"))
    proposal = sensitivity.propose("transformer", ranking, wanted_db=25.0)
    assert [exclusion.pattern for exclusion in proposal.exclusions] == ["b"]
    assert proposal.sqnr_db == sensitivity.sqnr_db("ac") >= 25.0
    assert "25.0 dB" in proposal.exclusions[0].reason
    assert sensitivity.propose("transformer", ranking, wanted_db=1.0).exclusions == ()
    with pytest.raises(InputError, match="within the fidelity budget"):
        sensitivity.propose("transformer", ranking, wanted_db=90.0)


@pytest.fixture(scope="module")
def scales(tmp_path_factory: pytest.TempPathFactory) -> Scales:
    folder = tmp_path_factory.mktemp("calibration")
    return calibrate(
        open_checkpoint("random:tiny"),
        load_recipe("fp8"),
        ["a red circle"],
        seed=0,
        num_steps=2,
        height=96,
        width=160,
        work_folder=folder,
        on_progress=lambda fraction, text: None,
    )


def measure(scales: Scales, folder: Path, max_drop_db: float | None):  # noqa: ANN201  # what the call returns
    return measure_sensitivity(
        open_checkpoint("random:tiny"),
        load_recipe("fp8"),
        scales,
        ["a red circle"],
        seed=0,
        num_steps=2,
        height=96,
        width=160,
        work_folder=folder,
        on_progress=lambda fraction, text: None,
        max_drop_db=max_drop_db,
    )


def test_proposal_for_a_real_model_is_a_recipe(scales: Scales, tmp_path: Path) -> None:
    plain = measure(scales, tmp_path, None)
    assert plain.proposal is None
    assert plain.whole_db < min(row.sqnr_db for row in plain.ranking) < plain.base_db
    # A budget between what the whole recipe loses and what its best group loses.
    drop = plain.base_db - plain.ranking[-2].sqnr_db + 1
    proposal = measure(scales, tmp_path, drop).proposal
    assert proposal is not None
    assert proposal.exclusions
    assert proposal.sqnr_db >= plain.base_db - drop
    recipe = load_recipe("fp8").excluding(proposal.exclusions)
    names = {f"blocks.{block}.{part}" for block in range(2) for part in _linears()}
    layers = {name: nn.Linear(64, 64) for name in names}
    transformer_only = replace(
        recipe, exclusions=tuple(one for one in proposal.exclusions if one.component == "transformer")
    )
    kept = resolve(transformer_only, "transformer", layers)
    assert {*kept} == names - {exclusion.pattern for exclusion in proposal.exclusions}


def _linears() -> tuple[str, ...]:
    parts = ("linear_attention.qkv", "linear_attention.to_out", "mix_ffn.conv_inverted", "mix_ffn.conv_point")
    return (*parts, "cross_attention.to_q", "cross_attention.to_kv", "cross_attention.to_out")
