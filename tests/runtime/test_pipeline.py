"""The pipeline: through ONNX Runtime against the paper's algorithm, and call by call on recording engines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sana_runtime.contract import TensorSpec
from sana_runtime.errors import BundleError, InputError, TargetError
from sana_runtime.manifest import SchedulerEntry
from sana_runtime.pipeline import Caption, Pipeline, Step, draw_noise, seeded_generator
from tests.runtime.conftest import MakeBundle
from tests.runtime.toys import (
    CHANNELS,
    FIXTURES,
    LATENT_SHAPE,
    RecordingBackend,
    edit_manifest,
    reseal,
    toy_manifest,
)


def load(bundle: Path, **arguments: Any) -> Pipeline:
    return Pipeline.load(bundle, report=lambda line: None, threads=1, **arguments)


def recording(guidance: str = "classifier_free", **arguments: Any) -> tuple[Pipeline, RecordingBackend]:
    backend = RecordingBackend()
    manifest = toy_manifest(guidance=guidance, **arguments)
    return Pipeline(FIXTURES, manifest, "onnxruntime", backend, report=lambda line: None), backend


# --- the picture -------------------------------------------------------------------------------------------


class Painter:
    """The toy model in float64, with the solver written as in the paper: lambdas, not coefficients."""

    def __init__(self, bundle: Path) -> None:
        self.encoder = onnxruntime.InferenceSession(str(bundle / "text_encoder.onnx"))

    def caption(self, tokens: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Run the toy text encoder alone on exactly the text's own length, padded, and keep 300 rows."""
        padded = np.zeros((1, 302), np.int64)
        mask = np.zeros((1, 302), np.int64)
        padded[0, : len(tokens)] = tokens
        mask[0, : len(tokens)] = 1
        (rows,) = self.encoder.run(None, {"caption_tokens": padded, "caption_mask": mask})
        keep = [0, *range(length - 299, length)]
        return rows[0, keep].astype(np.float64), mask[0, keep]


def flow_dpm_picture(velocity: Any, latent: np.ndarray, num_steps: int, shift: float) -> np.ndarray:
    """Flow-DPM-Solver++ 2M as in the paper; returns the final latent in float64."""
    grid = np.linspace(1, 1 / 1000, num_steps + 1)[::-1]
    sigmas = [*(shift * (1 - a) / (1 + (shift - 1) * (1 - a)) for a in grid[:-1]), 0.0]
    previous_x0 = previous_h = None
    for step in range(num_steps):
        sigma, following = sigmas[step], sigmas[step + 1]
        x0 = latent - sigma * velocity(latent, np.trunc(1000 * sigma))
        if following == 0:
            return x0
        h = np.log((1 - following) / following) - np.log((1 - sigma) / sigma)
        slope = 0.0
        if previous_x0 is not None:
            slope = 0.5 * (x0 - previous_x0) / (previous_h / h)
        latent = following / sigma * latent - (1 - following) * np.expm1(-h) * (x0 + slope)
        previous_x0, previous_h = x0, h
    raise AssertionError("the last sigma is 0")


def toy_bias(bundle: Path) -> Any:
    """The toy transformer's velocity at latent 0, read off the engine for one caption and timestep."""
    session = onnxruntime.InferenceSession(str(bundle / "transformer.onnx"))

    def bias(rows: np.ndarray, mask: np.ndarray, timestep: float) -> np.ndarray:
        feeds = {
            "latent": np.zeros(LATENT_SHAPE, np.float32),
            "previous_x0": np.zeros(LATENT_SHAPE, np.float32),
            "caption_embeds": np.stack([rows, rows]).astype(np.float32),
            "caption_mask": np.stack([mask, mask]),
            "timestep": np.array(timestep, np.float32),
            "sigma": np.array(0, np.float32),
            "step_coefficients": np.zeros(3, np.float32),
            "guidance_scale": np.array(1, np.float32),
        }
        (value,) = session.run(["velocity"], feeds)
        return value.astype(np.float64)

    return bias


@pytest.mark.parametrize("guidance_scale", [4.5, 1.0, 0.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_picture_is_the_paper_s_algorithm(bundle: Path, num_steps: int, guidance_scale: float) -> None:
    pipeline = load(bundle)
    latents: list[np.ndarray] = []
    picture = pipeline.generate(
        "A red fox",
        "Blurry",
        seed=7,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        on_step=lambda step: latents.append(step.next_latent),
    )
    painter, bias = Painter(bundle), toy_bias(bundle)
    positive = painter.caption([2, 4, 5, 6, 7, 8, 9], length=302)
    negative = painter.caption([2, 13], length=300)

    def velocity(latent: np.ndarray, timestep: float) -> np.ndarray:
        conditional = latent / 4 + bias(*positive, timestep)
        if guidance_scale <= 1:
            return conditional
        unconditional = latent / 4 + bias(*negative, timestep)
        return unconditional + guidance_scale * (conditional - unconditional)

    noise = np.random.Generator(np.random.PCG64(7)).standard_normal(LATENT_SHAPE, dtype=np.float32)
    final = flow_dpm_picture(velocity, noise.astype(np.float64), num_steps, shift=3.0)
    # 32 fp32 roundings per step of values up to the largest latent on the way.
    largest = max(np.abs(latent).max() for latent in (noise, *latents))
    bound = 32 * num_steps * float(np.finfo(np.float32).eps) * largest
    np.testing.assert_allclose(latents[-1], final, rtol=0, atol=bound)
    levels = np.clip(latents[-1][0, :3] * np.float32(16) + np.float32(128), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(picture.pixels, np.kron(levels, np.ones((1, 32, 32), np.uint8)).transpose(1, 2, 0))
    assert len(np.unique(picture.pixels)) > 10


def test_same_seed_same_picture_other_seed_other_picture(bundle: Path) -> None:
    pipeline = load(bundle)
    first = pipeline.generate("a fox", seed=1).pixels
    np.testing.assert_array_equal(first, pipeline.generate("a fox", seed=1).pixels)
    np.testing.assert_array_equal(first, load(bundle).generate("a fox", seed=1).pixels)
    assert (first != pipeline.generate("a fox", seed=2).pixels).any()
    assert (first != pipeline.generate("a cat", seed=1).pixels).any()


@pytest.mark.parametrize("guidance", ["classifier_free", "embedded"])
def test_the_seed_s_noise_given_as_latent_is_the_same_picture(make_bundle: MakeBundle, guidance: str) -> None:
    pipeline = load(make_bundle(guidance=guidance))
    noise = draw_noise(seeded_generator(5), LATENT_SHAPE)
    from_seed = pipeline.generate("a fox", seed=5)
    from_latent = pipeline.generate("a fox", seed=5, latent=noise.astype(np.float64))
    np.testing.assert_array_equal(from_seed.pixels, from_latent.pixels)
    assert from_seed.settings.latent_sha256 is None
    assert from_latent.settings.latent_sha256 is not None


def test_sprint_decodes_x0_over_sigma_data(make_bundle: MakeBundle) -> None:
    pipeline = load(make_bundle(guidance="embedded"))
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    pipeline.generate("a fox", seed=3, on_step=lambda step: steps.append((step.next_latent, step.x0)))
    assert len(steps) == 2
    noise = seeded_generator(3)
    draw_noise(noise, LATENT_SHAPE)
    renoised = np.cos(1.3) * steps[0][1] + 0.5 * np.sin(1.3) * draw_noise(noise, LATENT_SHAPE)
    np.testing.assert_allclose(steps[0][0], renoised, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(steps[1][0], steps[1][1] / np.float32(0.5))


# --- what the engines are fed -------------------------------------------------------------------------------


def test_nothing_but_the_image_leaves_the_device() -> None:
    pipeline, backend = recording()
    backend.memory.downloads.clear()
    pipeline.generate("a fox")
    assert [spec.name for spec in backend.memory.downloads] == ["image"]


def test_caption_rows_and_batch_order() -> None:
    pipeline, backend = recording()
    pipeline.generate("a fox", "blurry", num_steps=1)
    positive, negative = backend.engines["text_encoder"].written
    fed = backend.engines["transformer"].calls[0]
    rows = positive["caption_embeds"][0]
    np.testing.assert_array_equal(fed["caption_embeds"][1], rows[[0, *range(3, 302)]])
    rows = negative["caption_embeds"][0]
    np.testing.assert_array_equal(fed["caption_embeds"][0], rows[:300])
    # BOS + blurry; BOS kept, then one instruction token (row 3) and two words of the positive.
    assert fed["caption_mask"].sum(axis=1).tolist() == [2, 4]
    assert fed["caption_mask"][1, :4].tolist() == [1, 1, 1, 1]


def test_scalars_of_every_step_and_the_carried_tensors() -> None:
    pipeline, backend = recording()
    noise = draw_noise(seeded_generator(0), LATENT_SHAPE)
    pipeline.generate("a fox", num_steps=4, guidance_scale=3.5)
    engine = backend.engines["transformer"]
    assert [float(call["timestep"]) for call in engine.calls] == [999, 899, 749, 499]
    np.testing.assert_array_equal(engine.calls[0]["latent"], noise)
    assert not engine.calls[0]["previous_x0"].any()
    for before, after in zip(engine.written, engine.calls[1:], strict=False):
        np.testing.assert_array_equal(after["latent"], before["next_latent"])
        np.testing.assert_array_equal(after["previous_x0"], before["x0"])
    assert {float(call["guidance_scale"]) for call in engine.calls} == {3.5}
    np.testing.assert_allclose([call["step_coefficients"].sum() for call in engine.calls], 1, atol=1e-6)
    np.testing.assert_array_equal(backend.engines["vae_decoder"].calls[0]["latent"], engine.written[-1]["next_latent"])


def test_guidance_of_one_or_less_is_conditional_only() -> None:
    pipeline, backend = recording()
    pipeline.generate("a fox", "blurry", guidance_scale=0.5, num_steps=1)
    assert len(backend.engines["text_encoder"].calls) == 1
    fed = backend.engines["transformer"].calls[0]
    assert float(fed["guidance_scale"]) == 1
    np.testing.assert_array_equal(fed["caption_embeds"][0], fed["caption_embeds"][1])


def test_the_negative_caption_is_encoded_once_per_text() -> None:
    pipeline, backend = recording()
    for negative in ("", "", "blurry", "blurry", ""):
        pipeline.generate("a fox", negative, num_steps=1)
    # Five positives, and a negative whenever it differs from the last one.
    assert len(backend.engines["text_encoder"].calls) == 8


def test_sprint_feeds_fresh_noise_and_embedded_guidance() -> None:
    pipeline, backend = recording("embedded")
    pipeline.generate("a fox", seed=9, num_steps=3)
    generator = seeded_generator(9)
    calls = backend.engines["transformer"].calls
    np.testing.assert_array_equal(calls[0]["latent"], draw_noise(generator, LATENT_SHAPE) * np.float32(0.5))
    for call in calls:
        np.testing.assert_array_equal(call["previous_x0"], draw_noise(generator, LATENT_SHAPE))
        assert float(call["guidance_embeds"]) == 4.5
        assert call["caption_embeds"].shape == (1, 300, CHANNELS)
        assert "sigma" not in call


def test_on_step_sees_the_outputs_of_its_step() -> None:
    pipeline, backend = recording()
    seen: list[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]] = []

    def keep(step: Step) -> None:
        seen.append((step.index, step.num_steps, step.next_latent, step.x0, step.velocity))

    pipeline.generate("a fox", num_steps=3, on_step=keep)
    written = backend.engines["transformer"].written
    assert [entry[:2] for entry in seen] == [(0, 3), (1, 3), (2, 3)]
    for (_, _, *tensors), expected in zip(seen, written, strict=True):
        for tensor, name in zip(tensors, ("next_latent", "x0", "velocity"), strict=True):
            np.testing.assert_array_equal(tensor, expected[name])


def test_denoise_with_given_captions_and_decode_of_an_array() -> None:
    pipeline, backend = recording()
    embeds = np.random.default_rng(0).standard_normal((1, 300, CHANNELS)).astype(np.float32)
    spec = TensorSpec("caption_embeds", "float32", embeds.shape)
    caption = Caption(backend.memory.tensor(embeds, spec), np.ones((1, 300), np.int64))
    noise = np.ones(LATENT_SHAPE, np.float32)
    latent = pipeline.denoise(caption, None, noise, num_steps=2, guidance_scale=4.5)
    fed = backend.engines["transformer"].calls[0]
    np.testing.assert_array_equal(fed["caption_embeds"], np.concatenate([embeds, embeds]))
    assert float(fed["guidance_scale"]) == 1
    pixels = pipeline.decode(latent.numpy())
    assert pixels.shape == (64, 96, 3)
    np.testing.assert_array_equal(
        backend.engines["vae_decoder"].calls[0]["latent"],
        backend.engines["transformer"].written[1]["next_latent"],
    )


def test_trigflow_without_a_generator_is_refused() -> None:
    pipeline, _ = recording("embedded")
    caption = pipeline.encode_caption("a fox")
    with pytest.raises(InputError, match="seeded_generator"):
        pipeline.denoise(caption, None, np.zeros(LATENT_SHAPE), num_steps=1, guidance_scale=4.5)


def test_timings_cover_every_stage() -> None:
    pipeline, _ = recording()
    timings = pipeline.generate("a fox").timings_ms
    assert set(timings) == {"text_encoder", "transformer", "vae_decoder", "total"}
    parts = timings["text_encoder"] + timings["transformer"] + timings["vae_decoder"]
    assert 0 < parts <= timings["total"]


# --- wrong input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 1024}, "height 64, width 96"),
        ({"width": 64}, "height 64, width 96"),
        ({"num_steps": 0}, "1 to 1000"),
        ({"num_steps": 1001}, "1 to 1000"),
        ({"seed": -1}, "whole number >= 0"),
        ({"seed": 1.5}, "whole number >= 0"),
        ({"guidance_scale": float("nan")}, "finite number"),
        ({"guidance_scale": float("inf")}, "finite number"),
        ({"guidance_scale": "4.5"}, "finite number"),
        ({"latent": np.zeros((1, 32, 3, 2), np.float32)}, r"float32 \[1, 32, 3, 2\]"),
        ({"latent": np.zeros(LATENT_SHAPE[1:], np.float32)}, "wrong form"),
        ({"latent": np.zeros(LATENT_SHAPE, np.int64)}, "int64"),
        ({"latent": np.zeros(LATENT_SHAPE, np.complex64)}, "complex64"),
        ({"latent": np.zeros(LATENT_SHAPE, object)}, "object"),
        ({"latent": np.full(LATENT_SHAPE, np.nan, np.float32)}, "192 of 192 values"),
        ({"latent": np.full(LATENT_SHAPE, 1e39, np.float64)}, "NaN or infinite"),
        ({"prompt": 3}, "not text"),
        ({"negative_prompt": b"x"}, "not text"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_any_engine_runs(arguments: dict[str, Any], message: str) -> None:
    pipeline, backend = recording()
    with pytest.raises(InputError, match=message):
        pipeline.generate(**{"prompt": "a fox", **arguments})
    assert not any(engine.calls for engine in backend.engines.values())


def test_sprint_refuses_a_negative_prompt() -> None:
    pipeline, _ = recording("embedded")
    with pytest.raises(InputError, match="takes no negative prompt"):
        pipeline.generate("a fox", "blurry")


def test_bundle_s_own_size_may_be_named(bundle: Path) -> None:
    picture = load(bundle).generate("a fox", height=64, width=96)
    assert (picture.settings.height, picture.settings.width) == (64, 96)


# --- damaged bundles ----------------------------------------------------------------------------------------


def test_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such directory"):
        load(tmp_path / "nothing")


def test_edited_manifest(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest["scheduler"].update(flow_shift=6.0))
    with pytest.raises(BundleError, match="damaged or was edited"):
        load(bundle)


def test_manifest_cut_short(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BundleError, match="damaged or was edited"):
        load(bundle)


def test_truncated_engine_is_found_even_without_digests(bundle: Path) -> None:
    path = bundle / "transformer.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"transformer\.onnx is not the file"):
        load(bundle, verify=False)


def test_one_flipped_bit_is_found_by_the_digest(bundle: Path) -> None:
    path = bundle / "text_encoder.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="another content"):
        load(bundle)


def test_missing_file(bundle: Path) -> None:
    (bundle / "vae_decoder.onnx").unlink()
    with pytest.raises(BundleError, match="the file is missing"):
        load(bundle)


def test_digests_are_of_the_target_s_files_only(bundle: Path) -> None:
    hashed: list[int] = []
    load(bundle, on_bytes=hashed.append)
    total = sum(path.stat().st_size for path in bundle.iterdir() if path.name != "manifest.json")
    assert sum(hashed) == total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest["components"].pop(), "vae_decoder"),
        (
            lambda manifest: manifest["components"][1]["engines"].clear(),
            "no onnxruntime engine of transformer",
        ),
        (lambda manifest: manifest["files"].pop(), "no digest of vae_decoder.onnx"),
        (lambda manifest: manifest["components"][1]["inputs"].pop(), "other io tensors of transformer"),
        (
            lambda manifest: manifest["tokenizer"].update(padded_length=301),
            "other io tensors of text_encoder",
        ),
        (lambda manifest: manifest.update(height=96), "other io tensors of transformer"),
        (lambda manifest: manifest["targets"].clear(), "none of the bundle's targets"),
    ],
    ids=["component", "engine", "file", "io tensor", "padded length", "height", "targets"],
)
def test_an_inconsistent_manifest_is_refused(bundle: Path, change: Any, message: str) -> None:
    reseal(bundle, change)
    with pytest.raises((BundleError, TargetError), match=message):
        load(bundle)


def test_an_engine_that_is_not_the_manifest_s_is_refused(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    sprint = (FIXTURES / "transformer_sprint.onnx").read_bytes()
    (bundle / "transformer.onnx").write_bytes(sprint)

    def fit(manifest: dict[str, Any]) -> None:
        for entry in manifest["files"]:
            if entry["path"] == "transformer.onnx":
                entry["size"] = len(sprint)

    reseal(bundle, fit)
    with pytest.raises(BundleError, match="input tensors are not those of the manifest"):
        load(bundle, verify=False)


def test_settings_are_complete_enough_to_repeat_the_picture(bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    first = load(bundle).generate("A red fox", "blurry", seed=11, num_steps=3, guidance_scale=2.5)
    first.save(tmp_path / "fox.png")
    with Image.open(tmp_path / "fox.png") as image:
        stored = json.loads(image.text["sana"])  # type: ignore[attr-defined]
    names = ("prompt", "negative_prompt", "seed", "num_steps", "guidance_scale", "height", "width")
    again = load(bundle).generate(**{name: stored[name] for name in names})
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert stored["bundle_digest"] == json.loads((bundle / "manifest.json").read_bytes())["digest"]


def test_defaults_are_the_model_s() -> None:
    scheduler = SchedulerEntry("flow_euler", 3.0, 1000, 6, 2.0)
    pipeline, backend = recording(scheduler=scheduler)
    settings = pipeline.generate("a fox").settings
    assert (settings.num_steps, settings.guidance_scale) == (6, 2.0)
    assert len(backend.engines["transformer"].calls) == 6
