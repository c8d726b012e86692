"""`nano`, the trained model of this repository: whole, small, the picture diffusers paints, and the right picture."""

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline

from sana_export.build import build
from sana_export.build_request import BuildRequest
from sana_export.scenes.prompts import DEMO_PROMPT
from sana_export.scenes.reading import read_picture
from sana_export.scenes.scoring import score
from sana_export.weights.checkpoint import SHIPPED_MODEL, SHIPPED_SIDE, open_checkpoint, shipped_directory
from sana_runtime import Pipeline
from sana_runtime.pipeline import draw_noise, seeded_generator
from tests.export.conftest import Recorder

# As in test_end_to_end.py: fp32 on both sides, another order of sums, and a rounding to whole levels, of 255.
PIXEL_TOLERANCE = 2
MAX_BYTES = 20 << 20


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    output = tmp_path_factory.mktemp("shipped") / "bundle"
    build(BuildRequest(SHIPPED_MODEL, "fp32", ("onnxruntime",), SHIPPED_SIDE, SHIPPED_SIDE, output), Recorder())
    return Pipeline.load(output)


def test_picture_equals_diffusers(pipeline: Pipeline) -> None:
    latent = draw_noise(seeded_generator(11), pipeline.latent_shape)
    picture = pipeline.generate(DEMO_PROMPT.text, num_steps=8, guidance_scale=4.5, latent=latent)
    upstream = SanaPipeline.from_pretrained(shipped_directory(), torch_dtype=torch.float32)
    upstream.set_progress_bar_config(disable=True)
    expected = upstream(
        DEMO_PROMPT.text,
        num_inference_steps=8,
        guidance_scale=4.5,
        height=SHIPPED_SIDE,
        width=SHIPPED_SIDE,
        latents=torch.from_numpy(latent.copy()),
        use_resolution_binning=False,
        output_type="np",
    ).images[0]
    difference = np.abs(picture.pixels.astype(int) - np.round(expected * 255).astype(int))
    assert difference.max() <= PIXEL_TOLERANCE, f"{(difference > PIXEL_TOLERANCE).mean():.2%} of pixels differ"
    assert picture.pixels.std() > 10, "a flat picture compares nothing"


def test_picture_is_what_its_prompt_says(pipeline: Pipeline) -> None:
    """What `make demo` shows, in fp32."""
    reading = read_picture(pipeline.generate(DEMO_PROMPT.text, seed=0, num_steps=14).pixels)
    assert score(DEMO_PROMPT, reading).overall, reading


def test_is_complete_and_small() -> None:
    """A pickle could hold code: weights are safetensors."""
    assert open_checkpoint(SHIPPED_MODEL).source == SHIPPED_MODEL
    folder = shipped_directory()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".txt"}
    weights = {path.relative_to(folder).parts[0] for path in files if path.suffix == ".safetensors"}
    assert weights == {"text_encoder", "transformer", "vae"}


def test_has_a_model_card() -> None:
    """Under which licence, from which data and how it came to be, and what it cannot do."""
    card = (shipped_directory() / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert {"## Data", "## Training", "## Limits"} <= {*card.splitlines()}
