"""Muon's step is what its definition says, and a stage that uses it can be interrupted."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.train_nano import models
from scripts.train_nano.export import pack_checkpoints, unpack_checkpoints
from scripts.train_nano.muon import Muon, is_hidden_matrix, orthogonalised, packed_parts
from scripts.train_nano.sizes import TINY
from scripts.train_nano.stage import Schedule, Session, Stage


class Blocks(nn.Module):
    """Names as in the transformer: a matrix for Muon, one for AdamW, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 4)])
        self.out = nn.Linear(4, 3)


def stage(work: Path, muon: float = 2.0) -> tuple[Stage, Blocks]:
    torch.manual_seed(0)
    model = Blocks()
    session = Session(work, torch.device("cpu"), log=lambda text: None)
    return Stage("line", session, Schedule(60, 3e-2, cooldown=0.5, muon=muon), {"model": model}, 16), model


def train(running: Stage, model: Blocks, steps: int) -> None:
    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = torch.randn(16, 6)
        return (model.out(model.blocks[0](x).relu()) - x[:, :3]).square().mean(), {}

    for _ in range(steps):
        running.elapsed = 30.0
        running._set_numbers()
        running.prepared(step)()
        running.steps += 1


@pytest.mark.parametrize("shape", [(8, 8), (5, 24), (24, 5)])
def test_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    found = orthogonalised(matrices)
    values = torch.linalg.svdvals(found)
    # The polynomial's fixed band: 0.68 to 1.14. Values that are tiny beside the largest need more iterations.
    assert values[:, 0].max() < 1.2
    assert values.median() > 0.65
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    along = torch.diagonal(u.mT @ found @ v.mT, dim1=-2, dim2=-1)
    # The same singular vectors: in their bases nothing is off the diagonal.
    torch.testing.assert_close(along.square().sum(-1), found.square().sum((-2, -1)), rtol=1e-3, atol=0)


def test_muon_takes_the_steps_of_its_definition() -> None:
    torch.manual_seed(0)
    packed, single = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(4, 4))
    optimizer = Muon([(packed, 3), (single, 1)], 0.1, 0.5)
    expected = [parameter.detach().clone() for parameter in (packed, single)]
    momenta = [torch.zeros_like(parameter) for parameter in expected]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    for _ in range(3):
        for index, (parameter, parts) in enumerate(((packed, 3), (single, 1))):
            parameter.grad = torch.randn_like(parameter)
            gradient = parameter.grad / 2
            momenta[index] = 0.95 * momenta[index] + 0.05 * gradient
            ahead = 0.95 * momenta[index] + 0.05 * gradient
            direction = torch.cat([orthogonalised(part[None])[0] for part in ahead.chunk(parts)])
            expected[index] = expected[index] * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 4**0.5 * direction
        optimizer.step()
    # One batch of four matrices against one after the other: fp32 products in another order, five times.
    torch.testing.assert_close(packed, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single, expected[1], rtol=1e-4, atol=1e-5)


def test_muon_leaves_out_a_step_with_infinite_gradients() -> None:
    parameter = nn.Parameter(torch.randn(4, 4))
    optimizer = Muon([(parameter, 1)], 0.1, 0.1)
    parameter.grad = torch.randn(4, 4)
    optimizer.step()
    before, momentum = parameter.detach().clone(), optimizer.state[parameter]["momentum"].clone()
    parameter.grad = torch.full((4, 4), float("inf"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(float("inf")), torch.tensor(1.0)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state[parameter]["momentum"], momentum, rtol=0, atol=0)


def test_muon_step_waits_for_no_device() -> None:
    """What a CUDA graph may not hold; the meta device stands for the GPU."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN204
            assert "_local_scalar_dense" not in str(func)
            assert (kwargs or {}).get("device") in (None, torch.device("meta"))
            return func(*args, **(kwargs or {}))

    parameter = nn.Parameter(torch.zeros(6, 4, device="meta"))
    rate = torch.zeros((), device="meta")
    optimizer = Muon([(parameter, 1)], rate, 0.1)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.grad_scale, optimizer.found_inf = rate + 1, rate
    with Watch():
        optimizer.step()


def test_muon_trains_the_linear_layers_of_the_blocks() -> None:
    model = models.build_transformer(TINY.configs.transformer)
    names = {f"transformer.{n}" for n, p in model.named_parameters() if is_hidden_matrix(f"transformer.{n}", p)}
    per_block = {name.split(".", 3)[3] for name in names}
    assert per_block == {
        *(f"{layer}.weight" for layer in ("linear_attention.qkv", "linear_attention.to_out")),
        *(f"cross_attention.{layer}.weight" for layer in ("to_q", "to_kv", "to_out")),
        *(f"mix_ffn.{layer}.weight" for layer in ("conv_inverted", "conv_point")),
    }
    assert len(names) == 7 * len(model.blocks)
    parts = {name: packed_parts(name) for name in per_block}
    assert {name for name, count in parts.items() if count > 1} == {
        "linear_attention.qkv.weight",
        "cross_attention.to_kv.weight",
    }


def test_stage_with_muon_goes_on_bit_for_bit(tmp_path: Path) -> None:
    weights = []
    for folder, interrupted in ((tmp_path / "one", False), (tmp_path / "two", True)):
        running, model = stage(folder)
        torch.manual_seed(5)
        train(running, model, 2)
        if interrupted:
            running.save()
            state = torch.get_rng_state()
            running, model = stage(folder)
            torch.set_rng_state(state)
        train(running, model, 1)
        weights.append([parameter.detach().clone() for parameter in model.parameters()] + running._ema)
        kinds = {name: set(found) for name, found in running._moments().items()}
        assert kinds["model.blocks.0.weight"] == {"momentum"}
        assert kinds["model.blocks.0.bias"] == kinds["model.out.weight"] == {"step", "exp_avg", "exp_avg_sq"}
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_packed_momentum_is_kept_in_bf16(tmp_path: Path) -> None:
    running, model = stage(tmp_path / "a")
    train(running, model, 2)
    running.save()
    pack_checkpoints(tmp_path / "a", ["line"], tmp_path / "parts")
    unpack_checkpoints(tmp_path / "parts", tmp_path / "b")
    again, _ = stage(tmp_path / "b")
    mine, theirs = (found._moments()["model.blocks.0.weight"]["momentum"] for found in (again, running))
    torch.testing.assert_close(mine, theirs, rtol=2**-8, atol=0)
    assert again._moments()["model.out.weight"]["exp_avg"].abs().max() == 0


def test_another_optimizer_starts_without_moments(tmp_path: Path) -> None:
    running, model = stage(tmp_path, muon=0.0)
    train(running, model, 2)
    running.save()
    again, model = stage(tmp_path)
    assert again._moments()["model.blocks.0.weight"] == {}
    assert set(again._moments()["model.out.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    train(again, model, 1)
