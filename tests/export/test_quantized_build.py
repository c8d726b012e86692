"""Quantised builds end to end: reuse, the gate, and wrong use."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sana_calibration.prompts import load_prompts
from sana_calibration.recipe import load_recipe, recipe_yaml
from sana_calibration.rules import Exclusion, Gate
from sana_export.build import build
from sana_export.build_request import BuildRequest, CalibrationSettings
from sana_export.bundle import read_build_record
from sana_export.cli import app
from sana_export.components import plan_components
from sana_export.parity.judge import judge, judged_gate
from sana_export.parity.ladder import LadderResult
from sana_export.parity.metrics import Parity
from sana_export.quantize import QuantizedBuild, calibration_device, gate_entry, prepare
from sana_export.weights.checkpoint import CALIBRATION_PROMPTS, SAMPLING, open_checkpoint
from sana_runtime.errors import InputError, SanaError, TargetError
from sana_runtime.manifest import Manifest, read_manifest, verify_files
from sana_runtime.pipeline import Pipeline
from sana_runtime.scheduler import step_table
from tests.export.conftest import Recorder

SETTINGS = CalibrationSettings(num_prompts=2, num_steps=2, side=64)


def request(model: Path | str, output: Path, precision: str = "fp8") -> BuildRequest:
    return BuildRequest(
        str(model), precision, ("onnxruntime",), 64, 64, output, base_precision="fp32", calibration=SETTINGS
    )


@pytest.fixture(scope="module")
def built_fp8(tmp_path_factory: pytest.TempPathFactory, checkpoint_directory: Callable[[str], Path]) -> BuildRequest:
    wanted = request(checkpoint_directory("random:tiny"), tmp_path_factory.mktemp("quantized") / "bundle")
    build(wanted, Recorder())
    return wanted


@pytest.fixture
def fp8(built_fp8: BuildRequest, tmp_path: Path) -> BuildRequest:
    """A finished fp8 bundle of the test's own, and the request that built it."""
    shutil.copytree(built_fp8.output, tmp_path / "fp8")
    return replace(built_fp8, output=tmp_path / "fp8")


def rebuilt(wanted: BuildRequest) -> tuple[Manifest, Recorder]:
    recorder = Recorder()
    return build(wanted, recorder), recorder


def test_the_bundle_says_how_it_was_quantised(fp8: BuildRequest) -> None:
    manifest = read_manifest(fp8.output)
    verify_files(fp8.output, manifest.files, digests=True)
    entry = manifest.quantization
    assert entry is not None
    assert entry.recipe == "fp8"
    assert entry.gate is not None
    assert entry.gate.passed, entry.gate
    assert entry.gate.prompts == 2
    paths = {file.path for file in manifest.files}
    assert {entry.recipe_file, entry.calibration_file, "transformer/quantization.json"} <= paths
    assert load_recipe(fp8.output / entry.recipe_file).digest == entry.recipe_digest


@pytest.mark.parametrize(
    ("available", "free_gib", "wanted"), [(False, 0, "cpu"), (True, 13, "cpu"), (True, 14, "cuda")], ids=str
)
def test_the_gpu_calibrates_where_the_largest_component_fits(
    monkeypatch: pytest.MonkeyPatch, available: bool, free_gib: int, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_gib << 30, 80 << 30))
    gemma = QuantizedBuild(load_recipe("fp8"), (), {}, {}, largest_component=2_614_000_000)
    assert calibration_device(gemma) == wanted


def test_an_identical_build_reuses_everything(fp8: BuildRequest) -> None:
    before = read_manifest(fp8.output).digest
    manifest, recorder = rebuilt(fp8)
    assert recorder.built == {}
    assert manifest.digest == before


def test_the_engines_are_as_far_from_the_picture_as_the_gate_said(fp8: BuildRequest) -> None:
    """The gate judged fake-quantised PyTorch; ONNX Runtime runs the Q/DQ graph with the same scales."""
    pipeline = Pipeline.load(fp8.output, report=lambda _: None)
    prompt = "a red circle"
    result = judge(pipeline, open_checkpoint(fp8.model), lambda _: None, prompt=prompt, num_steps=2)
    verdict = judged_gate(pipeline.manifest, result)
    assert verdict is not None
    assert verdict.passed, verdict
    assert result.min_x0_sqnr_db < 60, "nothing was quantised"
    # x0 = latent - sigma velocity, on equal latents.
    sigmas = step_table(pipeline.manifest.scheduler, 2).sigmas[:2]
    for x0, velocity, sigma in zip(result.x0, result.velocity, sigmas, strict=True):
        assert x0.max_abs == pytest.approx(sigma * velocity.max_abs, rel=1e-3), x0.stage


def test_the_gate_file_has_x0_and_velocity_of_every_step(fp8: BuildRequest) -> None:
    content = json.loads((fp8.output / "quantization" / "gate.json").read_text())
    rows = content["steps"]
    assert [row["prompt"] for row in rows] == list(load_prompts()[:2])
    assert min(min(row["x0_sqnr_db"]) for row in rows) == content["gate"]["x0_sqnr_db"]
    assert [len(row["velocity_sqnr_db"]) for row in rows] == [2, 2]


def at(tensor: str, sqnr_db: float) -> Parity:
    return Parity(tensor, tensor, 0.1, 10 ** (-sqnr_db / 20), 1.0, sqnr_db, (0,))


@pytest.mark.parametrize(
    ("x0_db", "velocity_db", "picture_db", "similarity", "passed"),
    [
        ((30, 20), (30, 0), 40, 0.99, True),
        ((30, 19), (30, 30), 40, 0.99, False),
        ((30, 20), (30, 30), 24, 0.99, False),
        ((30, 20), (30, 30), 40, 0.89, False),
    ],
    ids=["velocity is not asked", "x0", "PSNR", "SSIM"],
)
def test_the_gate_asks_for_x0_at_the_worst_step_and_for_the_picture(
    x0_db: tuple[float, ...], velocity_db: tuple[float, ...], picture_db: float, similarity: float, passed: bool
) -> None:
    picture = np.zeros((2, 2, 3), np.uint8)
    x0, velocity = (tuple(at(name, db) for db in values) for name, values in (("x0", x0_db), ("velocity", velocity_db)))
    result = LadderResult("a cat", 4.5, (), x0, velocity, (), at("image", picture_db), similarity, (picture, picture))
    perfect = replace(result, x0=(at("x0", math.inf),), picture=at("image", math.inf), ssim=1.0)
    entry = gate_entry(Gate(20, 25, 0.9), (perfect, result), 2)
    assert entry.passed is passed
    assert (entry.x0_sqnr_db, entry.psnr_db) == (min(x0_db), picture_db)


@pytest.mark.parametrize("threshold", ["min_x0_sqnr_db", "min_psnr_db"])
def test_other_thresholds_judge_again_and_can_fail(fp8: BuildRequest, tmp_path: Path, threshold: str) -> None:
    recipe = load_recipe("fp8")
    file = tmp_path / "own.yaml"
    file.write_text(recipe_yaml(replace(recipe, gate=replace(recipe.gate, **{threshold: 1000.0}))))
    manifest, recorder = rebuilt(replace(fp8, recipe=file))
    assert set(recorder.built) == {"gate", "recipe"}
    assert manifest.quantization is not None
    assert manifest.quantization.gate is not None
    assert not manifest.quantization.gate.passed


def test_another_rule_rebuilds_and_names_the_recipe(fp8: BuildRequest, tmp_path: Path) -> None:
    more = Exclusion("transformer", "blocks.0.mix_ffn.conv_point", "a test")
    file = tmp_path / "own.yaml"
    file.write_text(recipe_yaml(load_recipe("fp8").excluding((more,))))
    _, recorder = rebuilt(replace(fp8, recipe=file, components=("transformer",)))
    assert "recipe" in recorder.built["transformer/onnx"]
    assert "recipe" in recorder.built["calibration"]


def test_a_search_for_alpha_is_printed_and_reported(
    checkpoint_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = load_recipe("int8")
    changes: dict = {"smoothing_alpha": "search", "smoothing_candidates": (0.25, 0.75)}
    rules = tuple(rule if rule.smoothing_alpha is None else replace(rule, **changes) for rule in recipe.rules)
    file = tmp_path / "searching.yaml"
    file.write_text(recipe_yaml(replace(recipe, rules=rules)))
    wanted = request(checkpoint_directory("random:tiny"), tmp_path / "bundle", "int8")
    _, recorder = rebuilt(replace(wanted, recipe=file, components=("transformer",)))
    report = json.loads((wanted.output / "transformer" / "quantization.json").read_text())
    searched = [layer for layer in report["layers"] if "relative_rms_by_alpha" in layer]
    assert {layer["layer"] for layer in searched} == {
        layer["layer"] for layer in report["layers"] if layer["activation_dtype"] is not None
    }
    for layer in searched:
        errors = layer["relative_rms_by_alpha"]
        assert [*errors] == ["none", "0.25", "0.75"]
        taken = "none" if layer["smoothing_alpha"] is None else f"{layer['smoothing_alpha']:g}"
        assert errors[taken] == min(errors.values())
        assert layer["smoothed"] == (taken != "none")
    (note,) = (note for note in recorder.notes if "searched per layer" in note)
    lines = note.splitlines()[1:]
    assert len(lines) == 6
    assert sum(int(part.split(" x ")[1]) for line in lines for part in line.partition(": ")[2].split(", ")) == 12


def test_a_calibration_of_another_model_is_refused(
    fp8: BuildRequest, tmp_path: Path, checkpoint_directory: Callable[[str], Path]
) -> None:
    cache = fp8.output / "quantization" / "calibration.safetensors"
    other = request(checkpoint_directory("random:tiny-qknorm"), tmp_path / "other")
    with pytest.raises(InputError, match=r"(?s)another model.*transformer"):
        build(replace(other, calibration=replace(SETTINGS, cache=cache)), Recorder())
    assert not other.output.exists()


def test_a_calibration_of_another_guidance_is_refused(fp8: BuildRequest, tmp_path: Path) -> None:
    """The scales are those of pictures that this model is not asked for."""
    model = tmp_path / "model"
    shutil.copytree(fp8.model, model)
    (model / SAMPLING).write_text('{"guidance_scale": 3}')
    cache = fp8.output / "quantization" / "calibration.safetensors"
    wanted = replace(fp8, model=str(model), output=tmp_path / "other", calibration=replace(SETTINGS, cache=cache))
    with pytest.raises(InputError, match=r"(?s)another schedule or guidance.*guidance 4\.5.*guidance 3\.0"):
        build(wanted, Recorder())
    assert not wanted.output.exists()


def test_a_calibration_of_the_same_model_is_taken(fp8: BuildRequest, tmp_path: Path) -> None:
    cache = fp8.output / "quantization" / "calibration.safetensors"
    taken = replace(SETTINGS, cache=cache)
    wanted = replace(fp8, output=tmp_path / "again", components=("transformer",), calibration=taken)
    manifest, _ = rebuilt(wanted)
    entry, first = manifest.quantization, read_manifest(fp8.output).quantization
    assert entry is not None
    assert first is not None
    assert entry.calibration_digest == first.calibration_digest
    assert entry.gate is None


def test_prompts_of_the_model_are_calibrated_with(fp8: BuildRequest, tmp_path: Path) -> None:
    own = with_prompts(fp8, tmp_path, "# mine\na red circle\n两个蓝色圆形\n")
    first = read_manifest(fp8.output).quantization
    manifest, recorder = rebuilt(own)
    assert any("the model's own, calibration_prompts.txt" in note for note in recorder.notes)
    assert {"prompts" in recorder.built[stage] for stage in ("calibration", "gate")} == {True}
    assert manifest.quantization is not None
    assert first is not None
    assert manifest.quantization.calibration_digest != first.calibration_digest
    judged = json.loads((own.output / "quantization" / "gate.json").read_text())["steps"]
    assert [row["prompt"] for row in judged] == ["a red circle", "两个蓝色圆形"]
    named = replace(own, model=fp8.model, calibration=replace(SETTINGS, prompts=Path(own.model, CALIBRATION_PROMPTS)))
    _, recorder = rebuilt(named)
    assert recorder.built == {}, "the same prompts, given by name"
    assert not any("the model's own" in note for note in recorder.notes)


def test_named_prompts_win_over_those_of_the_model(fp8: BuildRequest, tmp_path: Path) -> None:
    own = with_prompts(fp8, tmp_path, "# nothing\n")
    with pytest.raises(InputError, match=r"calibration_prompts\.txt holds no prompts"):
        build(own, Recorder())
    shipped = tmp_path / "shipped.txt"
    shipped.write_text("\n".join(load_prompts()), encoding="utf-8")
    _, recorder = rebuilt(replace(own, calibration=replace(SETTINGS, prompts=shipped)))
    assert recorder.built == {}


def test_a_model_is_calibrated_with_its_own_guidance_and_schedule(fp8: BuildRequest, tmp_path: Path) -> None:
    own = with_prompts(fp8, tmp_path, "\n".join(load_prompts()))
    first = read_manifest(fp8.output)
    Path(own.model, SAMPLING).write_text('{"guidance_scale": 2, "num_inference_steps": 12}')
    manifest, recorder = rebuilt(own)
    assert {"sampling" in recorder.built[stage] for stage in ("calibration", "gate")} == {True}
    assert (manifest.scheduler.default_guidance_scale, manifest.scheduler.default_num_steps) == (2.0, 12)
    assert manifest.scheduler.flow_shift == first.scheduler.flow_shift
    assert manifest.quantization is not None
    assert first.quantization is not None
    assert manifest.quantization.calibration_digest != first.quantization.calibration_digest
    Path(own.model, SAMPLING).write_text('{"guidance_scale": 2}')
    manifest, recorder = rebuilt(own)
    assert recorder.built == {}, "default steps are not calibrated with"
    assert manifest.scheduler.default_num_steps == 20


def with_prompts(wanted: BuildRequest, folder: Path, prompts: str) -> BuildRequest:
    """The same request for a copy of its model that has prompts of its own."""
    shutil.copytree(wanted.model, folder / "model")
    (folder / "model" / CALIBRATION_PROMPTS).write_text(prompts, encoding="utf-8")
    return replace(wanted, model=str(folder / "model"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"precision": "int8", "targets": ("tensorrt-rtx",)}, TargetError, "INT8 activations.*int8-weight-only"),
        ({"recipe": Path("no/such/recipe.yaml")}, InputError, "no such recipe"),
        ({"calibration": CalibrationSettings(prompts=Path("no/such/prompts.txt"))}, SanaError, "prompts"),
    ],
    ids=["int8 on rtx", "recipe", "prompts"],
)
def test_wrong_use(fp8: BuildRequest, tmp_path: Path, change: dict, error: type[SanaError], message: str) -> None:
    with pytest.raises(error, match="(?s)" + message):
        build(replace(fp8, output=tmp_path / "wrong", **change), Recorder())
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(("precision", "painted"), [("fp8", 8), ("int4-weight-only", 24)])
def test_a_weight_that_is_rounded_for_its_inputs_sees_more_pictures(precision: str, painted: int) -> None:
    request = BuildRequest("random:tiny", precision, ("onnxruntime",), 64, 64, Path("x"), base_precision="fp32")
    plans = plan_components(open_checkpoint("random:tiny"), "fp32", 64, 64, 60)
    recipe, texts = load_recipe(precision), tuple(f"{i} cats" for i in range(30))
    assert len(prepare(recipe, request, plans, texts).prompts) == painted
    asked = replace(request, calibration=CalibrationSettings(num_prompts=3))
    assert prepare(recipe, asked, plans, texts).prompts == texts[:3]


def test_wrong_settings() -> None:
    with pytest.raises(InputError, match="num_steps is out of range"):
        CalibrationSettings(num_steps=0)
    with pytest.raises(InputError, match="quantises nothing"):
        BuildRequest("random:tiny", "bf16", ("onnxruntime",), 64, 64, Path("x"), base_precision="fp32")


def test_sensitivity_proposes_a_recipe_that_builds_on(fp8: BuildRequest, tmp_path: Path) -> None:
    written = tmp_path / "gentler.yaml"
    model = with_prompts(fp8, tmp_path, "a red circle\n").model
    arguments = ["sensitivity", str(fp8.output), "--max-drop", "4", "--write-recipe", str(written), "--num-steps", "2"]
    done = CliRunner().invoke(app, [*arguments, "--checkpoint", model])
    assert done.exit_code == 0, done.output
    assert "calibration prompts: the model's own" in done.output
    assert "blocks.*.mix_ffn.conv_inverted" in done.output
    more = set(load_recipe(written).exclusions) - set(load_recipe("fp8").exclusions)
    assert more, "tiny fp8 is further than 4 dB below bf16"
    assert all("sensitive" in exclusion.reason for exclusion in more)


def test_sensitivity_of_a_bundle_that_quantises_nothing(tiny_bundle: Callable[..., Path]) -> None:
    done = CliRunner().invoke(app, ["sensitivity", str(tiny_bundle())])
    assert done.exit_code == 1
    assert "quantises nothing" in done.output


@pytest.mark.tensorrt
def test_the_plugin_travels_in_the_bundle(tmp_path: Path) -> None:
    wanted = BuildRequest("random:tiny", "bf16", ("tensorrt-rtx",), 64, 64, tmp_path / "bundle", plugin=True)
    manifest, _ = rebuilt(wanted)
    files = {name: manifest.component(name).engines[0].files for name in ("text_encoder", "transformer", "vae_decoder")}
    assert files["transformer"][:2] == ("transformer/tensorrt-rtx.plan", "plugins/kernels.json")
    assert files["text_encoder"] == ("text_encoder/tensorrt-rtx.plan",)
    assert {path for found in files.values() for path in found} <= {entry.path for entry in manifest.files}
    stages = read_build_record(wanted.output).stages
    nodes = {name: stages[f"{name}/onnx"].measured["linear_attention"] for name in ("transformer", "vae_decoder")}
    assert nodes == {"transformer": 2, "vae_decoder": 18}
    for name, count in nodes.items():
        assert stages[f"{name}/tensorrt-rtx"].measured["plugin_layers"] == count
    assert rebuilt(wanted)[1].built == {}
    without = rebuilt(replace(wanted, plugin=False))[1]
    assert set(without.built) == {"transformer/tensorrt-rtx", "vae_decoder/tensorrt-rtx"}
