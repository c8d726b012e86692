"""The calibration cache: equal contents have equal digests, and a cache of something else is refused."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from sana_calibration.scales import LayerScales, Provenance, Scales
from sana_runtime.errors import InputError

WEIGHTS = {"text_encoder": "a" * 64, "transformer": "b" * 64}
RECIPE = "c" * 64
SAMPLING = "flow_dpm_solver, flow shift 3, guidance 4.5"
PROVENANCE = Provenance(WEIGHTS, RECIPE, "d" * 64, 7, 20, 512, 1024, SAMPLING)


def scales(amax: float = 3.25, provenance: Provenance = PROVENANCE) -> Scales:
    factor = np.array([1, 0.5, 4], np.float32)
    layers = {
        "x.to_q": LayerScales(amax, factor, np.array([1, 3.25], np.float32)),
        "weight.only": LayerScales(None),
    }
    return Scales({"transformer": layers, "text_encoder": {}}, provenance)


def test_cache_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    written = scales()
    written.save(path)
    read = Scales.load(path, weights=WEIGHTS, recipe=RECIPE, sampling=SAMPLING)
    assert read.digest == written.digest
    assert read.provenance == PROVENANCE
    assert {name: [*found] for name, found in read.layers.items()} == {
        "transformer": ["weight.only", "x.to_q"],
        "text_encoder": [],
    }
    layer = read.component("transformer")["x.to_q"]
    assert layer.activation_amax == 3.25
    np.testing.assert_array_equal(layer.smooth_factor, [1, 0.5, 4])
    np.testing.assert_array_equal(layer.step_amax, [1, 3.25])
    assert read.component("transformer")["weight.only"].activation_amax is None
    assert read.component("vae_decoder") == {}
    assert path.stat().st_size < 4096
    assert [*tmp_path.iterdir()] == [path]


def with_codes(last: int = 7) -> Scales:
    codes = np.array([[-8, -1, 0, 7], [3, -5, 1, last]], np.int8)
    return Scales({"transformer": {"x": LayerScales(None, weight_codes=codes, weight_scale=SCALE)}}, PROVENANCE)


SCALE = np.array([[0.5, 2], [1, 0.25]], np.float32)


def test_codes_survive_the_file_and_count_in_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    with_codes().save(path)
    read = Scales.load(path, weights=WEIGHTS, recipe=RECIPE, sampling=SAMPLING)
    layer, written = read.component("transformer")["x"], with_codes().component("transformer")["x"]
    assert layer.weight_codes is not None
    assert layer.weight_codes.dtype == np.int8
    np.testing.assert_array_equal(layer.weight_codes, written.weight_codes)
    np.testing.assert_array_equal(layer.weight_scale, SCALE)
    assert layer.activation_amax is None
    assert read.digest == with_codes().digest != with_codes(6).digest
    assert with_codes().component_digest("transformer") != with_codes(6).component_digest("transformer")


def test_digest_covers_values_and_provenance_not_order() -> None:
    layers = scales().layers["transformer"]
    backwards = Scales({"text_encoder": {}, "transformer": dict(reversed(layers.items()))}, PROVENANCE)
    assert backwards.digest == scales().digest
    others = [
        scales(amax=3.5),
        scales(provenance=msgspec.structs.replace(PROVENANCE, seed=8)),
        Scales({"transformer": {**layers, "y": LayerScales(None)}, "text_encoder": {}}, PROVENANCE),
    ]
    assert len({one.digest for one in (*others, scales())}) == 4


def test_a_components_digest_covers_its_own_values_alone() -> None:
    found = scales().component_digest("transformer")
    elsewhere = msgspec.structs.replace(PROVENANCE, height=1024, seed=8)
    decoder = {"x": LayerScales(1.0)}
    others = Scales({**scales().layers, "vae_decoder": decoder}, elsewhere)
    assert others.component_digest("transformer") == found
    assert scales(amax=3.5).component_digest("transformer") != found
    assert len({others.component_digest("vae_decoder"), found, "none"}) == 3


def test_nothing_measured_has_no_digest() -> None:
    weights_only = Scales({"transformer": {"x": LayerScales(None)}}, PROVENANCE)
    assert weights_only.component_digest("transformer") == "none"
    assert weights_only.component_digest("text_encoder") == "none"


@pytest.mark.parametrize(
    ("weights", "recipe", "says"),
    [
        ({"transformer": "e" * 64}, RECIPE, "the model's transformer bbbbbbbbbbbb"),
        ({**WEIGHTS, "vae_decoder": "f" * 64}, RECIPE, "the model's vae_decoder not calibrated"),
        (WEIGHTS, "e" * 64, "the recipe cccccccccccc"),
    ],
    ids=["other weights", "component that was not calibrated", "other recipe"],
)
def test_cache_of_something_else_is_refused(weights: dict[str, str], recipe: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    scales().save(path)
    with pytest.raises(InputError, match="another model or recipe") as error:
        Scales.load(path, weights=weights, recipe=recipe, sampling=SAMPLING)
    assert says in str(error.value)


def test_cache_of_another_guidance_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    scales().save(path)
    other = "flow_dpm_solver, flow shift 3, guidance 5"
    with pytest.raises(InputError, match="another schedule or guidance") as error:
        Scales.load(path, weights=WEIGHTS, recipe=RECIPE, sampling=other)
    assert SAMPLING in str(error.value)
    assert other in str(error.value)
    assert "build without --calibration" in str(error.value)


def test_cache_that_does_not_say_how_the_model_was_asked_is_taken(tmp_path: Path) -> None:
    """It is as old as its digest, which did not cover this."""
    path = tmp_path / "scales.safetensors"
    old = scales(provenance=msgspec.structs.replace(PROVENANCE, sampling=""))
    old.save(path)
    assert Scales.load(path, weights=WEIGHTS, recipe=RECIPE, sampling=SAMPLING).digest == old.digest
    assert b"sampling" not in path.read_bytes()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [damage, lambda path: path.write_bytes(path.read_bytes()[:-5]), lambda path: path.write_bytes(b"{}"), Path.unlink],
    ids=["changed value", "cut off", "not a cache", "missing"],
)
def test_damaged_cache_is_refused(spoil: object, tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    scales().save(path)
    spoil(path)  # type: ignore[operator]
    with pytest.raises(InputError, match="not a calibration cache"):
        Scales.load(path, weights=WEIGHTS, recipe=RECIPE, sampling=SAMPLING)


def test_narrowed_scales_belong_to_the_narrower_recipe(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    narrowed = scales().narrowed({"transformer": ["x.to_q"]}, "e" * 64)
    narrowed.save(path)
    read = Scales.load(path, weights=WEIGHTS, recipe="e" * 64, sampling=SAMPLING)
    assert [*read.component("transformer")] == ["x.to_q"]
    assert read.component("transformer")["x.to_q"].activation_amax == 3.25
