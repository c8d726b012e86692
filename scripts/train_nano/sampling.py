"""Painting many prompts at once, with the solver tables of the runtime."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from sana_runtime.manifest import SchedulerEntry
from sana_runtime.scheduler import step_table
from scripts.train_nano.captions import CaptionEncoder
from scripts.train_nano.diffusion import caption_mask
from scripts.train_nano.models import TrainedModel, caption_embeds
from scripts.train_nano.sizes import FLOW_SHIFT, GUIDANCE

Solver = Literal["flow_dpm_solver", "flow_euler"]
STEPS = 20


@dataclass(frozen=True)
class Painter:
    """A model in evaluation on `device`, for pictures of `side` pixels, `batch` at once.

    `autocast`: bf16 products, for a look during training; without it everything is fp32.
    """

    model: TrainedModel
    captions: CaptionEncoder
    side: int
    batch: int
    device: torch.device
    autocast: bool = False

    @torch.no_grad()
    def paint(
        self,
        prompts: Sequence[str],
        *,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        solver: Solver = "flow_dpm_solver",
        seed: int = 0,
    ) -> npt.NDArray[np.uint8]:
        """Pictures [n, side, side, 3]; picture i starts from the noise of seed + i."""
        found = []
        for start in range(0, len(prompts), self.batch):
            some = prompts[start : start + self.batch]
            noise = torch.stack([self._noise(seed + start + i) for i in range(len(some))]).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                latent = self.solve(noise, self.embed(some), steps, guidance, solver)
                found.append(self._decode(latent))
        return np.concatenate(found)

    def _noise(self, seed: int) -> torch.Tensor:
        side = self.side // 32
        return torch.randn(32, side, side, generator=torch.Generator().manual_seed(seed))

    def embed(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """caption_embeds [n, S, C] and mask [n, S]; the empty prompt's are row 0 alone."""
        tokens = torch.from_numpy(self.captions.encode(prompts)[0]).to(self.device).long()
        prefix = torch.from_numpy(self.captions.prefix).to(self.device)
        return caption_embeds(self.model.text_encoder, prefix, tokens), caption_mask(tokens)

    def solve(
        self, noise: torch.Tensor, caption: tuple[torch.Tensor, torch.Tensor], steps: int, guidance: float, solver: str
    ) -> torch.Tensor:
        """noise [n, 32, h, w] -> latent, by classifier-free guidance."""
        table = step_table(_entry(solver), steps)
        embeds, mask = caption
        empty = mask.clone()
        empty[:, 1:] = False
        both = torch.cat([embeds, embeds]), torch.cat([empty, mask])
        latent, previous = noise, torch.zeros_like(noise)
        for sigma, timestep, (a, b, c) in zip(table.sigmas, table.timesteps, table.coefficients, strict=False):
            moments = torch.full((2 * len(noise),), float(timestep), device=noise.device)
            velocity = self.model.transformer(torch.cat([latent, latent]), *both, moments).float()
            without, with_ = velocity.chunk(2)
            x0 = latent - float(sigma) * (without + guidance * (with_ - without))
            latent, previous = float(a) * latent + float(b) * x0 + float(c) * previous, x0
        return latent

    def _decode(self, latent: torch.Tensor) -> npt.NDArray[np.uint8]:
        pieces = [self.model.autoencoder.decoder(part / self.model.scaling_factor) for part in latent.split(32)]
        pixels = torch.cat(pieces).float() * 0.5 + 0.5
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _entry(solver: str) -> SchedulerEntry:
    return SchedulerEntry(
        kind=solver,  # type: ignore[arg-type]
        flow_shift=FLOW_SHIFT,
        num_train_timesteps=1000,
        default_num_steps=STEPS,
        default_guidance_scale=GUIDANCE,
        sigma_data=0.5,
    )
