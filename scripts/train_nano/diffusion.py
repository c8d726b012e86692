"""Which caption a picture is trained with, and the flow-matching loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from scripts.train_nano.autoencoder import Latents
from scripts.train_nano.data import CAPTIONS, SceneStore
from scripts.train_nano.models import ContrastiveHeads, TrainingTransformer
from scripts.train_nano.objects import Objects
from scripts.train_nano.sizes import TRAINING_SHIFT
from scripts.train_nano.stage import Metrics, Session

# Share of the pictures that are trained with the empty prompt: of its rows only the first token is one.
_UNCONDITIONAL = 0.1
# How much a better caption is preferred: cosine similarity over temperature.
_CAPTION_TEMPERATURE = 0.2
_PAD = 0

Step = Callable[[], tuple[torch.Tensor, Metrics]]
Embed = Callable[[torch.Tensor], torch.Tensor]
"""Tokens [B, T] behind the instruction -> caption rows [B, 1 + T, C]."""
Captions = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Which scenes [B] and which of their captions [B] -> caption rows [B, 1 + T, C]."""


def caption_mask(tokens: torch.Tensor) -> torch.Tensor:
    """[B, T] tokens behind the prefix -> [B, 1 + T] bool: the first token, and what is no padding."""
    return F.pad(tokens != _PAD, (1, 0), value=True)


def contrastive_step(
    session: Session,
    embed: Embed,
    heads: ContrastiveHeads,
    store: SceneStore,
    latents: Latents,
    objects: Objects,
    count: int,
) -> Step:
    """Each picture must find its caption among the batch's, and the other way round; and captions must name the
    scene's `objects`.
    """

    def step() -> tuple[torch.Tensor, Metrics]:
        index = _draw(len(latents.small), count, session.device)
        choice = torch.randint(CAPTIONS, (count,), device=session.device)
        tokens = store.tokens[index, choice].long()
        with session.autocast():
            embeds = embed(tokens)
            captions = heads.captions(embeds, caption_mask(tokens))
            images = heads.images(latents.small[index].float())
            named = heads.objects.loss(embeds, caption_mask(tokens), objects.rows(index))
        scores = heads.log_scale.exp().clamp(max=100) * (images @ captions.t()).float()
        target = torch.arange(count, device=session.device)
        loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2
        found = (scores.detach().argmax(1) == target).float().mean()
        return loss + named, {"found": found, "objects": named.detach()}

    return step


@torch.no_grad()
def caption_shares(
    session: Session,
    embed: Embed,
    heads: ContrastiveHeads,
    store: SceneStore,
    latents: Latents,
    count: int,
) -> torch.Tensor:
    """[n, 4]: how often each of a scene's captions is trained, cumulated: softmax(similarity / temperature). A
    caption that was cut is never taken.
    """
    total = len(latents.small)
    shares = torch.empty(total, CAPTIONS, device=session.device)
    for start in range(0, total, count):
        rows = slice(start, min(start + count, total))
        with session.autocast():
            images = heads.images(latents.small[rows].float())
            scores = [
                (images * heads.captions(embed(tokens), caption_mask(tokens))).sum(-1)
                for tokens in store.tokens[rows].long().unbind(1)
            ]
        similarity = torch.stack(scores, dim=1).float() / _CAPTION_TEMPERATURE
        # -1e4 and not infinity: a scene whose captions were all cut keeps equal shares.
        shares[rows] = similarity.masked_fill(~store.fitting[rows], -1e4).softmax(dim=1)
    return shares.cumsum(dim=1)


def trained_captions(embed: Embed, store: SceneStore) -> Captions:
    """Rows of a text encoder that is trained: made in every step."""
    return lambda index, choice: embed(store.tokens[index, choice].long())


@torch.no_grad()
def frozen_captions(session: Session, embed: Embed, store: SceneStore, scenes: int, count: int) -> Captions:
    """Rows of a text encoder that is not trained: those of the first `scenes` are made here, bf16, and kept."""
    parts = []
    for start in range(0, scenes, count):
        tokens = store.tokens[start : min(start + count, scenes)].long().flatten(0, 1)
        with session.autocast():
            parts.append(embed(tokens).to(torch.bfloat16).unflatten(0, (-1, CAPTIONS)))
    rows = torch.cat(parts)  # [n, 4, 1 + T, C]
    return lambda index, choice: rows[index, choice]


def diffusion_step(
    session: Session,
    captions: Captions,
    transformer: TrainingTransformer,
    store: SceneStore,
    latents: torch.Tensor,
    cumulated: torch.Tensor,
    count: int,
) -> Step:
    """Flow matching: the transformer's velocity against noise - x0, mean squared error."""

    def step() -> tuple[torch.Tensor, Metrics]:
        device = session.device
        index = _draw(len(latents), count, device)
        choice = _chosen(cumulated[index])
        mask = caption_mask(store.tokens[index, choice])
        mask[:, 1:] &= torch.rand(count, 1, device=device) >= _UNCONDITIONAL
        x0 = latents[index].float()
        noise = torch.randn_like(x0)
        sigma = shifted_sigmas(count, device)
        noisy = torch.lerp(x0, noise, sigma[:, None, None, None])
        with session.autocast():
            embeds: Any = captions(index, choice).float()
            velocity = transformer.velocity(noisy, embeds, mask, sigma * 1000)
        return (velocity.float() - (noise - x0)).square().mean(), {}

    return step


def shifted_sigmas(count: int, device: torch.device) -> torch.Tensor:
    """Logit-normal noise levels, shifted."""
    sigma = torch.randn(count, device=device).sigmoid()
    return TRAINING_SHIFT * sigma / (1 + (TRAINING_SHIFT - 1) * sigma)


def _chosen(cumulated: torch.Tensor) -> torch.Tensor:
    """[B, 4] cumulated shares -> [B] index of the caption taken."""
    places = torch.rand(len(cumulated), 1, device=cumulated.device)
    return (places > cumulated).sum(1).clamp(max=CAPTIONS - 1)


def _draw(total: int, count: int, device: torch.device) -> torch.Tensor:
    return torch.randint(total, (count,), device=device)
