"""Training the autoencoder, then the latents of all scenes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sana_export.scenes.rendering import SceneBatch, render
from scripts.train_nano.data import SceneStore
from scripts.train_nano.models import Autoencoder
from scripts.train_nano.sizes import Size
from scripts.train_nano.stage import Metrics, Session

# Most noise that is added to a latent in training, in units of its deviation: the decoder learns to forgive the
# transformer's errors, and details that cannot be told from noise are left out of the latent.
_LATENT_NOISE = 0.2
_SQUARED = 4.0
_CENTRING = 0.05
_STATISTICS_SCENES = 2048


def autoencoder_step(
    session: Session, model: Autoencoder, store: SceneStore, size: Size, phase: int
) -> Callable[[], tuple[torch.Tensor, Metrics]]:
    """The loss of one batch. Phase 0: the small side, half of it pieces of pictures of the large side, so that what
    is learnt holds there; phase 1: the large side.
    """
    paint = session.compile(render)
    # Not compiled: that takes longer (two minutes for each side) than all the training the autoencoder needs.
    losses = _losses(session, model)
    small, large = size.sides
    count = size.batches.autoencoder[phase]

    def pictures() -> torch.Tensor:
        if phase == 1:
            return paint(store.scenes.rows(store.draw(count)), large, session.device)
        whole = paint(store.scenes.rows(store.draw(count // 2)), small, session.device)
        pieces = paint(store.scenes.rows(store.draw(count - count // 2)), large, session.device)
        return torch.cat([whole, random_pieces(pieces, small)])

    def step() -> tuple[torch.Tensor, Metrics]:
        with torch.no_grad():
            batch = pictures().contiguous(memory_format=torch.channels_last)
            shape = (count, 32, batch.shape[2] // 32, batch.shape[3] // 32)
            noise = torch.randn(shape, device=session.device)
            noise *= _LATENT_NOISE * torch.rand(count, 1, 1, 1, device=session.device)
        loss, psnr, deviation = losses(batch, noise)
        return loss, {"psnr_db": psnr, "latent_deviation": deviation}

    return step


def random_pieces(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """One square piece of each picture [B, 3, H, W] -> [B, 3, side, side], placed on the device."""
    count, _, height, width = pictures.shape
    span = torch.arange(side, device=pictures.device)
    top, left = ((torch.rand(count, device=pictures.device) * (extent - side + 1)).long() for extent in (height, width))
    rows, columns = top[:, None] + span, left[:, None] + span
    image = torch.arange(count, device=pictures.device)[:, None, None]
    picked = pictures.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]  # [B, side, side, 3]
    return picked.permute(0, 3, 1, 2)


def _losses(session: Session, model: Autoencoder) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Reconstruction of noisy latents: mean absolute and squared errors, and latents kept near unit deviation."""

    def losses(pictures: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixels = pictures * 2 - 1
        with session.autocast():
            latent = model.encoder(pixels).float()
            deviation = latent.std()
            painted = model.decoder(latent + noise * deviation).float()
        error = painted - pixels
        squared = error.square().mean()
        # Of channel means and the whole deviation; the deviation of each channel is the encoder's choice.
        centred = latent.mean(dim=(0, 2, 3)).square().mean() + deviation.log().square()
        loss = error.abs().mean() + _SQUARED * squared + _CENTRING * centred
        return loss, psnr_db(squared.detach()), deviation.detach()

    return losses


def psnr_db(mean_squared: torch.Tensor) -> torch.Tensor:
    """Of a mean squared error of pixels in -1..1."""
    return 10 * torch.log10(4 / mean_squared)


@torch.no_grad()
def reconstruction_psnr_db(model: Autoencoder, scenes: SceneBatch, side: int, device: torch.device) -> list[float]:
    """PSNR of each picture, fp32, 8-bit output."""
    found: list[float] = []
    for start in range(0, len(scenes.present), 32):
        pictures = render(scenes.rows(slice(start, start + 32)), side, device)
        painted = model.decoder(model.encoder(pictures * 2 - 1)) * 0.5 + 0.5
        error = (painted.clamp(0, 1) * 255).round() / 255 - (pictures * 255).round() / 255
        found += (-10 * torch.log10(error.square().mean(dim=(1, 2, 3)).clamp(min=1e-12))).tolist()
    return found


@dataclass
class Latents:
    """Scaled latents of the first scenes: tensors [n, 32, h, h] bf16, of more scenes at the small side than at the
    large one. `scaling_factor` is in them.
    """

    small: torch.Tensor
    large: torch.Tensor
    scaling_factor: float

    def __len__(self) -> int:
        """Scenes, at the small side."""
        return len(self.small)

    def state(self) -> dict[str, Any]:
        """What a file holds."""
        return {"small": self.small, "large": self.large, "scaling_factor": self.scaling_factor}


@torch.no_grad()
def encode_scenes(
    session: Session, model: Autoencoder, store: SceneStore, size: Size, seconds: tuple[float, float]
) -> Latents:
    """Latents of as many scenes as `seconds`, of the small and of the large side, allow, in their order; no more of
    the large side than of the small one.
    """
    count = size.batches.encode
    encoders = [_encoder(session, model, side) for side in size.sides]
    probe = []
    for start in range(0, min(_STATISTICS_SCENES, len(store)), count):
        store.wait_for(min(start + count, len(store)))
        probe.append(encoders[1](store.scenes.rows(slice(start, start + count))))
    scaling_factor = 1 / torch.cat(probe).float().std().item()
    del probe
    found: list[torch.Tensor] = []
    for encoder, side, limit in zip(encoders, size.sides, seconds, strict=True):
        total = len(found[0]) if found else len(store) // count * count
        tensor = torch.empty(total, 32, side // 32, side // 32, dtype=torch.bfloat16, device=session.device)
        begun, done = time.monotonic(), 0
        while done < total and (time.monotonic() - begun < limit or done == 0):
            store.wait_for(done + count)
            latent = encoder(store.scenes.rows(slice(done, done + count)))
            tensor[done : done + count] = (latent * scaling_factor).to(torch.bfloat16)
            done += count
            if session.device.type == "cuda" and done % (16 * count) == 0:
                torch.cuda.synchronize()
        session.log(f"latents: {done} scenes at {side} px in {time.monotonic() - begun:.1f} s")
        # A copy: a part of a tensor would be saved with all of it.
        found.append(tensor[:done].clone())
    session.log(f"latents: scaling factor {scaling_factor:.5f}")
    return Latents(*found, scaling_factor)


def _encoder(session: Session, model: Autoencoder, side: int) -> Callable[[SceneBatch], torch.Tensor]:
    """Scenes to unscaled latents, fp32."""
    paint = session.compile(render)

    def encode(scenes: SceneBatch) -> torch.Tensor:
        pictures = paint(scenes, side, session.device)
        with session.autocast():
            return model.encoder((pictures * 2 - 1).contiguous(memory_format=torch.channels_last)).float()

    return encode
