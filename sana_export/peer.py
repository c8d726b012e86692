"""The peer of a measurement: diffusers' eager modules in fp32 on the CPU, timed stage by stage like the engines."""

import gc
import statistics
import time
from collections.abc import Callable

import torch

from sana_export.upstream import upstream_autoencoder, upstream_text_encoder, upstream_transformer
from sana_export.weights.checkpoint import Checkpoint
from sana_runtime.contract import CAPTION_LENGTH, LATENT_CHANNELS, PIXELS_PER_LATENT
from sana_runtime.manifest import Manifest

Call = Callable[[], object]


def time_stages(
    checkpoint: Checkpoint, manifest: Manifest, runs: int, warmup: int, on_run: Callable[[], None]
) -> dict[str, float]:
    """Median milliseconds of text_encoder (one prompt), step (one solver step's transformer call) and vae_decoder."""
    medians = {}
    for stage, prepare in _STAGES.items():
        call = prepare(checkpoint, manifest)
        samples = []
        for _ in range(warmup + runs):
            started = time.perf_counter()
            with torch.inference_mode():
                call()
            samples.append((time.perf_counter() - started) * 1e3)
            on_run()
        medians[stage] = statistics.median(samples[warmup:])
        del call  # frees the module before the next one is loaded
        gc.collect()
    return medians


def _text_encoder(checkpoint: Checkpoint, manifest: Manifest) -> Call:
    encoder = upstream_text_encoder(checkpoint)
    tokens = torch.full((1, manifest.tokenizer.padded_length), 5)
    return lambda: encoder(tokens, attention_mask=torch.ones_like(tokens))


def _step(checkpoint: Checkpoint, manifest: Manifest) -> Call:
    transformer = upstream_transformer(checkpoint)
    embedded = checkpoint.guidance == "embedded"
    batch = 1 if embedded else 2
    latent = torch.randn(batch, LATENT_CHANNELS, *_latent_side(manifest))
    caption = torch.randn(batch, CAPTION_LENGTH, checkpoint.transformer_config["caption_channels"])
    mask = torch.ones(batch, CAPTION_LENGTH)
    timestep = torch.full((batch,), 0.7 if embedded else 700.0)
    guidance = torch.full((batch,), 0.45) if embedded else None
    return lambda: transformer(latent, caption, timestep, guidance=guidance, encoder_attention_mask=mask)


def _vae_decoder(checkpoint: Checkpoint, manifest: Manifest) -> Call:
    autoencoder = upstream_autoencoder(checkpoint)
    latent = torch.randn(1, LATENT_CHANNELS, *_latent_side(manifest))
    return lambda: autoencoder.decode(latent)


def _latent_side(manifest: Manifest) -> tuple[int, int]:
    return manifest.height // PIXELS_PER_LATENT, manifest.width // PIXELS_PER_LATENT


_STAGES: dict[str, Callable[[Checkpoint, Manifest], Call]] = {
    "text_encoder": _text_encoder,
    "step": _step,
    "vae_decoder": _vae_decoder,
}
