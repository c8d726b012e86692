"""Reference modules equal diffusers' and transformers' in fp32, on random weights of every variant.

Tolerance: both sides compute the same sums in fp32 in another order. Two fp32 orders differ by about
sqrt(terms) * 2^-24 per sum, relative to the tensor's size, and the depth of the network adds up: the longest sums
here have a few hundred terms over some thirty layers in a row, so 16 * 2^-24 * 30 = 3e-5 relative RMS bounds it.
"""

import pytest
import torch

from sana_export.components import loaded_module, plan_components
from sana_export.reference.dc_ae import AutoencoderConfig, Decoder, Encoder, stage_windows
from sana_export.reference.transformer import LinearTransformer, TransformerConfig, position_embedding
from sana_export.upstream import upstream_autoencoder, upstream_text_encoder, upstream_transformer
from sana_export.weights.checkpoint import Checkpoint, open_checkpoint

RELATIVE_RMS = 3e-5
VARIANTS = ["random:tiny", "random:tiny-qknorm", "random:tiny-sprint", "random:tiny-4k"]


def assert_close(name: str, candidate: torch.Tensor, reference: torch.Tensor) -> None:
    assert candidate.shape == reference.shape, name
    assert candidate.dtype == reference.dtype, name
    error = (candidate - reference).double()
    relative = (error.square().mean() / reference.double().square().mean()).sqrt().item()
    worst = error.abs().argmax().item()
    assert relative <= RELATIVE_RMS, f"{name}: relative RMS {relative:.2e}, max abs {error.abs().max():.2e} at {worst}"
    assert reference.abs().max() > 1e-3, f"{name}: the reference is zero, nothing was compared"


def reference_transformer(checkpoint: Checkpoint) -> LinearTransformer:
    config = TransformerConfig.from_upstream(checkpoint.transformer_config)
    module = LinearTransformer(config).eval().requires_grad_(False)
    module.load_state_dict({name: tensor.load() for name, tensor in checkpoint.weights("transformer").items()})
    return module


@pytest.mark.parametrize("model", VARIANTS)
@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (12, 8)], ids=["square", "odd", "2:3"])
def test_transformer_equals_diffusers(model: str, grid: tuple[int, int]) -> None:
    checkpoint = open_checkpoint(model)
    generator = torch.Generator().manual_seed(7)
    latent = torch.randn(3, 32, *grid, generator=generator)
    caption = torch.randn(3, 300, checkpoint.transformer_config["caption_channels"], generator=generator)
    mask = torch.zeros(3, 300, dtype=torch.int64)
    mask[0, :300], mask[1, :1], mask[2, :47] = 1, 1, 1
    embedded = checkpoint.guidance == "embedded"
    timestep = torch.tensor([0.999, 0.51, 0.02] if embedded else [999.0, 428.0, 1.0])
    guidance = torch.tensor([4.5, 1.0, 7.0])
    scale = checkpoint.transformer_config["guidance_embeds_scale"]
    expected = upstream_transformer(checkpoint)(
        latent,
        encoder_hidden_states=caption,
        timestep=timestep,
        encoder_attention_mask=mask,
        guidance=guidance * scale if embedded else None,
    ).sample
    velocity = reference_transformer(checkpoint)(latent, caption, mask, timestep, guidance if embedded else None)
    assert_close("velocity", velocity, expected)


def test_masked_caption_positions_change_nothing() -> None:
    checkpoint = open_checkpoint("random:tiny")
    model = reference_transformer(checkpoint)
    latent, caption = torch.randn(1, 32, 4, 4), torch.randn(1, 300, 64)
    mask = torch.zeros(1, 300, dtype=torch.int64)
    mask[:, :20] = 1
    other = caption.clone()
    other[:, 20:] = 1e3
    timestep = torch.tensor([500.0])
    assert torch.equal(model(latent, caption, mask, timestep), model(latent, other, mask, timestep))


@pytest.mark.parametrize(
    ("grid", "tolerance"),
    [
        # Coordinates exact in fp32: both sides compute in float64 from there and round once, 2^-24 each.
        ((16, 16), 1.2e-7),
        ((128, 128), 1.2e-7),
        # Upstream divides twice in fp32: up to two roundings of coordinates below 64 reach the sines.
        ((96, 160), 64 * 2 * 2**-24 + 1.2e-7),
    ],
    ids=str,
)
def test_position_embedding_equals_diffusers(grid: tuple[int, int], tolerance: float) -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    checkpoint = open_checkpoint("random:1.6b-4k")
    config = TransformerConfig.from_upstream(checkpoint.transformer_config)
    expected = get_2d_sincos_pos_embed(
        config.channels, grid, interpolation_scale=2.0, base_size=config.sample_size, output_type="pt"
    )
    torch.testing.assert_close(position_embedding(config, *grid)[0], expected.float(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("grid", [(8, 8), (3, 5)], ids=["square", "odd"])
def test_decoder_equals_diffusers(grid: tuple[int, int]) -> None:
    checkpoint = open_checkpoint("random:tiny")
    latent = torch.randn(1, 32, *grid, generator=torch.Generator().manual_seed(3))
    plan = plan_components(checkpoint, "fp32", grid[0] * 32, grid[1] * 32, 320)[2]
    module = loaded_module(plan, checkpoint)
    expected = upstream_autoencoder(checkpoint).decode(latent, return_dict=False)[0]
    assert_close("pixels", module.decoder(latent), expected)
    image = module(latent * checkpoint.vae_config["scaling_factor"])
    levels = ((expected / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)
    # A value within the fp32 error of a rounding boundary may fall on either side.
    assert (image.float() - levels).abs().max() <= 0.5 + 1e-3
    assert image.float().std() > 1, "a flat picture compares nothing"


@pytest.mark.parametrize("size", [(256, 256), (96, 160)], ids=["square", "odd"])
def test_encoder_equals_diffusers(size: tuple[int, int]) -> None:
    checkpoint = open_checkpoint("random:tiny")
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(4)) * 2 - 1
    module = Encoder(AutoencoderConfig.from_upstream(checkpoint.vae_config)).eval().requires_grad_(False)
    module.load_state_dict({name: tensor.load() for name, tensor in checkpoint.weights("vae_encoder").items()})
    assert_close("latent", module(pixels), upstream_autoencoder(checkpoint).encode(pixels, return_dict=False)[0])


@pytest.mark.parametrize("valid", [1, 40, 333])
def test_text_encoder_equals_transformers(valid: int) -> None:
    checkpoint = open_checkpoint("random:tiny")
    tokens = torch.randint(4, 200, (1, 333), generator=torch.Generator().manual_seed(5))
    tokens[:, 0], tokens[:, valid:] = 2, 0
    mask = (torch.arange(333) < valid).long()[None]
    module = loaded_module(plan_components(checkpoint, "fp32", 256, 256, 333)[0], checkpoint)
    expected = upstream_text_encoder(checkpoint)(tokens, attention_mask=mask).last_hidden_state
    assert_close("caption_embeds", module(tokens, mask), expected)


def test_attention_clip_limits_the_attention_output() -> None:
    checkpoint = open_checkpoint("random:tiny")
    config = TransformerConfig.from_upstream(checkpoint.transformer_config, attention_clip=True)
    attention = LinearTransformer(config).blocks[0].linear_attention
    torch.nn.init.zeros_(attention.to_out.weight)
    torch.nn.init.constant_(attention.to_out.bias, 1e6)
    assert attention(torch.randn(1, 4, config.channels)).max() == 65504.0


def test_another_autoencoder_flavour_is_refused() -> None:
    config = dict(open_checkpoint("random:tiny").vae_config)
    with pytest.raises(ValueError, match=r"upsample_block_type is 'pixel_shuffle'.*'interpolate'"):
        AutoencoderConfig.from_upstream({**config, "upsample_block_type": "pixel_shuffle"})


@pytest.mark.parametrize("rows", [17, 40, 90])
def test_a_decoder_in_windows_is_the_decoder(rows: int) -> None:
    """Of about so many rows of the last stage, which is 160 rows high; where they meet must not be seen."""
    checkpoint = open_checkpoint("random:tiny")
    config = AutoencoderConfig.from_upstream(checkpoint.vae_config)
    latent = torch.randn(1, 32, 5, 3, generator=torch.Generator().manual_seed(4))
    state = {name: tensor.load() for name, tensor in checkpoint.weights("vae_decoder").items()}
    pictures = []
    for most_elements in (None, rows * 96 * config.decoder_channels[0]):
        module = Decoder(config, most_elements).eval().requires_grad_(False)
        module.load_state_dict(state)
        pictures.append(module(latent))
    windows = module._windows(0, 5, 3)
    assert len(windows) > 1
    assert max(window.good.stop - window.good.start for window in windows) <= rows
    assert_close("windows", pictures[1], pictures[0])


def test_windows_of_the_released_decoder() -> None:
    """512 MiB of a picture in 16 bits: two windows of the last stage at 2048 px."""
    config = AutoencoderConfig.from_upstream(open_checkpoint("random:0.6b").vae_config)

    def counts(side: int) -> list[int]:
        return [len(stage_windows(config, stage, side // 32, side // 32, 256 << 20)) for stage in range(6)]

    assert counts(1024) == [0] * 6
    assert counts(2048) == [2, 0, 0, 0, 0, 0]
    assert counts(4096) == [8, 4, 2, 0, 0, 0]
