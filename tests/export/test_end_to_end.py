"""A bundle paints the picture that diffusers paints from the same latents."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline, SanaSprintPipeline

import sana_export
from sana_runtime import Pipeline
from sana_runtime.pipeline import draw_noise, seeded_generator

# Per pixel, of 255: fp32 on both sides, 20 steps in another order of sums, and a rounding to whole levels.
PIXEL_TOLERANCE = 2
PROMPT = "A red circle, left of a Blue square 红色 🎨"


def latent_noise(height: int, width: int) -> np.ndarray:
    return draw_noise(seeded_generator(11), (1, 32, height // 32, width // 32))


def upstream(directory: Path) -> SanaPipeline:
    pipeline = SanaPipeline.from_pretrained(directory, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("negative_prompt", ["", "blurry, dark"], ids=["empty", "negative"])
@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 64)], ids=["square", "3:2"])
def test_picture_equals_diffusers(
    checkpoint_directory: Callable[[str], Path],
    tiny_bundle: Callable[..., Path],
    height: int,
    width: int,
    negative_prompt: str,
) -> None:
    latent = latent_noise(height, width)
    picture = Pipeline.load(tiny_bundle(height=height, width=width)).generate(
        PROMPT, negative_prompt, num_steps=20, guidance_scale=4.5, latent=latent
    )
    expected = upstream(checkpoint_directory("random:tiny"))(
        PROMPT,
        negative_prompt=negative_prompt,
        num_inference_steps=20,
        guidance_scale=4.5,
        height=height,
        width=width,
        latents=torch.from_numpy(latent.copy()),
        use_resolution_binning=False,
        output_type="np",
    ).images[0]
    difference = np.abs(picture.pixels.astype(int) - np.round(expected * 255).astype(int))
    assert difference.max() <= PIXEL_TOLERANCE, f"{(difference > PIXEL_TOLERANCE).mean():.2%} of pixels differ"
    assert picture.pixels.std() > 10, "a flat picture compares nothing"


def test_negative_prompt_and_seed_change_the_picture(tiny_bundle: Callable[..., Path]) -> None:
    pipeline = Pipeline.load(tiny_bundle())
    plain = pipeline.generate(PROMPT, num_steps=4).pixels
    assert np.array_equal(plain, pipeline.generate(PROMPT, num_steps=4).pixels)
    assert not np.array_equal(plain, pipeline.generate(PROMPT, "dark", num_steps=4).pixels)
    assert not np.array_equal(plain, pipeline.generate(PROMPT, num_steps=4, seed=1).pixels)


def test_without_guidance_equals_diffusers(
    checkpoint_directory: Callable[[str], Path], tiny_bundle: Callable[..., Path]
) -> None:
    latent = latent_noise(128, 128)
    pixels = Pipeline.load(tiny_bundle()).generate(PROMPT, num_steps=6, guidance_scale=1.0, latent=latent).pixels
    expected = upstream(checkpoint_directory("random:tiny"))(
        PROMPT,
        num_inference_steps=6,
        guidance_scale=1.0,
        height=128,
        width=128,
        latents=torch.from_numpy(latent.copy()),
        use_resolution_binning=False,
        output_type="np",
    ).images[0]
    assert np.abs(pixels.astype(int) - np.round(expected * 255).astype(int)).max() <= PIXEL_TOLERANCE


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_sprint_latent_equals_diffusers(
    checkpoint_directory: Callable[[str], Path],
    tiny_bundle: Callable[..., Path],
    num_steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The solver adds noise at every step: both sides are given the same draws."""
    generator = seeded_generator(5)
    draws = [draw_noise(generator, (1, 32, 4, 4)) for _ in range(num_steps + 1)]
    picture = Pipeline.load(tiny_bundle("random:tiny-sprint")).generate(
        PROMPT, num_steps=num_steps, guidance_scale=4.5, seed=5
    )
    sprint = SanaSprintPipeline.from_pretrained(checkpoint_directory("random:tiny-sprint"))
    sprint.set_progress_bar_config(disable=True)
    fresh = iter(draws[1:])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_scm.randn_tensor", lambda *_, **__: torch.from_numpy(next(fresh))
    )
    expected = sprint(
        PROMPT,
        num_inference_steps=num_steps,
        guidance_scale=4.5,
        height=128,
        width=128,
        latents=torch.from_numpy(draws[0].copy()),
        intermediate_timesteps=1.3 if num_steps == 2 else None,
        use_resolution_binning=False,
        output_type="np",
    ).images[0]
    difference = np.abs(picture.pixels.astype(int) - np.round(expected * 255).astype(int))
    assert difference.max() <= PIXEL_TOLERANCE
    assert picture.pixels.std() > 10


def test_a_bundle_names_no_path_of_our_code(tiny_bundle: Callable[..., Path]) -> None:
    for name in ("manifest.json", "build.json", "transformer/model.onnx"):
        assert str(Path(sana_export.__file__).parent).encode() not in (tiny_bundle() / name).read_bytes()
