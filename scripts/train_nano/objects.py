"""What the contrastive model's text encoder learns besides: which colour belongs to which shape.

To find a picture among others, the mean of a caption's rows need only say which words there are. The rows of "a cyan
star and a yellow circle" then do not say which one is cyan, and a transformer that reads them mixes the two up. So some
row has to name each object whole. The head is not shipped.
"""

from typing import NamedTuple

import torch
from torch import nn

from sana_export.scenes.rendering import SceneBatch
from sana_export.scenes.vocabulary import COLOURS, SHAPES


class Objects(NamedTuple):
    """`colours`, `shapes` [B, 4] int64: places in `COLOURS` and `SHAPES`. `present` [B, 4] fp32: 0 for padding."""

    colours: torch.Tensor
    shapes: torch.Tensor
    present: torch.Tensor

    def rows(self, index: torch.Tensor) -> "Objects":
        """Those of some scenes."""
        return Objects._make(tensor[index] for tensor in self)


def objects_of(scenes: SceneBatch) -> Objects:
    """On the scenes' device."""
    rgb = scenes.tones[:, :, 0]
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=rgb.device) / 255
    colours = (rgb[..., None, :] - palette).square().sum(-1).argmin(-1)
    return Objects(colours, scenes.shapes, scenes.present)


class ObjectHead(nn.Module):
    """Every caption row proposes one object, with a weight: a mixture that the scene's objects are drawn from."""

    def __init__(self, text_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(text_channels, 1 + len(COLOURS) + len(SHAPES))

    def loss(self, embeds: torch.Tensor, mask: torch.Tensor, truth: Objects) -> torch.Tensor:
        """Mean negative log-likelihood of an object, nats: log 120 and more where nothing is known, log n at best for
        n different objects. `embeds` [B, S, C], `mask` [B, S] bool. Colour and shape are independent within a row, so
        a pair that is never seen is no less likely.
        """
        weight, colour, shape = self.linear(embeds).float().split((1, len(COLOURS), len(SHAPES)), dim=-1)
        rows = weight[..., 0].masked_fill(~mask, -1e4).log_softmax(-1)
        named = _of(colour, truth.colours) + _of(shape, truth.shapes)  # [B, 4, S]
        likelihood = (rows[:, None] + named).logsumexp(-1)
        return -((likelihood * truth.present).sum(1) / truth.present.sum(1)).mean()


def _of(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Scores [B, S, K] of labels [B, 4] as logarithms of probabilities [B, 4, S]."""
    found = scores.log_softmax(-1).transpose(1, 2)
    return found.gather(1, labels[..., None].expand(-1, -1, found.shape[2]))
