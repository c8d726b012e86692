"""What is where in a scene, per latent cell: the labels of an auxiliary loss on the transformer's middle features.

Flow matching alone tells a transformer only through pixels what a word means. A linear head that must name the object
in each cell gives text a direct gradient (as REPA does with features of another model; here the truth is known). The
head is not shipped.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from sana_export.scenes.rendering import SceneBatch
from sana_export.scenes.vocabulary import COLOURS, SHAPES

_NO_SHAPE, _NO_COLOUR = len(SHAPES), len(COLOURS)
_CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(COLOURS))


class Layout(NamedTuple):
    """`shapes`, `colours` [B, N] uint8: of the object around each cell's centre, one more than the last for none;
    `background` [B] uint8: its colour. Cells are row by row.
    """

    shapes: torch.Tensor
    colours: torch.Tensor
    background: torch.Tensor

    def rows(self, index: torch.Tensor | slice) -> "Layout":
        """Those of some scenes."""
        return Layout._make(tensor[index] for tensor in self)


def layout(scenes: SceneBatch, cells: int) -> Layout:
    """Labels on a grid of `cells` x `cells`, on the scenes' device.

    A cell belongs to the object in whose circle (centre, radius) its centre lies, the hole of a ring included, and
    to that whose centre is nearest in radii where there are several.
    """
    device = scenes.geometry.device
    centres = (torch.arange(cells, device=device, dtype=torch.float32) + 0.5) / cells
    x, y, radius, _ = (value[:, None, :] for value in scenes.geometry.unbind(-1))  # [B, 1, 4]
    cell_y, cell_x = (axis.reshape(1, -1, 1) for axis in torch.meshgrid(centres, centres, indexing="ij"))
    distance = torch.hypot(cell_x - x, cell_y - y) / radius  # [B, N, 4]
    distance = distance.masked_fill(scenes.present[:, None, :] == 0, torch.inf)
    nearest, index = distance.min(dim=-1)
    empty = nearest > 1
    shapes = scenes.shapes.gather(1, index).masked_fill(empty, _NO_SHAPE)
    colours = _named(scenes.tones[:, :, 0]).gather(1, index).masked_fill(empty, _NO_COLOUR)
    return Layout(*(labels.to(torch.uint8) for labels in (shapes, colours, _named(scenes.background))))


def _named(rgb: torch.Tensor) -> torch.Tensor:
    """Colours [..., 3] in 0..1 -> their index in `COLOURS`."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=rgb.device) / 255
    return (rgb[..., None, :] - palette).square().sum(-1).argmin(-1)


class LayoutHead(nn.Module):
    """Features [B, N, C] -> scores of shape, colour and background for each cell."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, sum(_CLASSES))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def loss(self, features: torch.Tensor, truth: Layout) -> torch.Tensor:
        """Mean cross-entropy, the sum over the three questions."""
        normed = F.layer_norm(features.float(), features.shape[-1:])
        answers = self.linear(normed).float().split(_CLASSES, dim=-1)
        background = truth.background[:, None].expand_as(truth.shapes)
        asked = zip(answers, (truth.shapes, truth.colours, background), strict=True)
        losses = [F.cross_entropy(scores.flatten(0, 1), labels.flatten().long()) for scores, labels in asked]
        return torch.stack(losses).sum()
