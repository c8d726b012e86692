"""Stages taken from other bundles: what serves another size or precision, and what is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_calibration.recipe import load_recipe
from sana_calibration.rules import Exclusion, LayerRule, PerChannel, Recipe
from sana_calibration.scales import LayerScales, Provenance, Scales
from sana_export.build_request import BuildRequest, CalibrationSettings
from sana_export.bundle import RECORD_NAME, read_build_record
from sana_export.components import ComponentPlan, plan_components
from sana_export.inductor.stage import InductorStage
from sana_export.inductor.stage import _code_digest as inductor_code_digest
from sana_export.quantize import QuantizedBuild
from sana_export.quantize import prepare as prepare_recipe
from sana_export.stages import _code_digest as exporter_code_digest
from sana_export.weights.checkpoint import Checkpoint, open_checkpoint
from sana_runtime.contract import COMPONENTS, ComponentName
from sana_runtime.errors import BuildError, BundleError
from sana_runtime.files import sha256_file
from sana_runtime.pipeline import Pipeline
from tests.export.conftest import assert_whole, run

ENCODER_FILE = "text_encoder/model.onnx.data"
Bundles = Callable[..., Path]


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(tiny_bundle: Bundles, tmp_path: Path) -> Path:
    """A finished bundle of 128 x 128 pixels of the test's own."""
    return Path(shutil.copytree(tiny_bundle(), tmp_path / "finished"))


@pytest.fixture
def encoder(checkpoint_directory: Callable[[str], Path], tmp_path: Path, finished: Path) -> BuildRequest:
    """A request for the text encoder alone, which `finished` has."""
    model, out = str(checkpoint_directory("random:tiny")), tmp_path / "out"
    return BuildRequest(model, "fp32", ("onnxruntime",), 64, 96, out, components=("text_encoder",), reuse=(finished,))


def test_another_size_takes_what_does_not_depend_on_it(encoder: BuildRequest, finished: Path) -> None:
    before = contents(finished)
    wanted = replace(encoder, components=COMPONENTS)
    recorder = run(wanted)
    assert recorder.reused == dict.fromkeys(
        ("tokenizer", "text_encoder/onnx"), f"same inputs in {finished}, files intact"
    )
    assert set(recorder.built) == {"transformer/onnx", "vae_decoder/onnx"}
    for why in recorder.built.values():
        assert why.startswith(f"not built yet; in {finished} changed: I/O ")
        assert why.endswith(", height x width 128 x 128 -> 64 x 96")
    assert_whole(wanted.output)
    assert contents(finished) == before
    assert os.path.samefile(finished / ENCODER_FILE, wanted.output / ENCODER_FILE)
    stage = "text_encoder/onnx"
    assert read_build_record(wanted.output).stages[stage] == read_build_record(finished).stages[stage]
    picture = Pipeline.load(wanted.output, report=lambda line: None).generate("a red circle", num_steps=2)
    assert picture.pixels.shape[:2] == (64, 96)
    shutil.rmtree(finished)
    assert run(replace(wanted, reuse=())).built == {}, "what was taken is this bundle's own"
    assert_whole(wanted.output)


def test_a_bundle_of_its_own_is_preferred(encoder: BuildRequest, finished: Path) -> None:
    run(replace(encoder, reuse=()))
    assert set(run(encoder).reused.values()) == {"same inputs, files intact"}
    assert not os.path.samefile(finished / ENCODER_FILE, encoder.output / ENCODER_FILE)


def test_the_output_itself_may_be_named(encoder: BuildRequest) -> None:
    run(encoder)
    again = run(replace(encoder, reuse=(encoder.output,)))
    assert again.built == {}
    os.truncate(encoder.output / ENCODER_FILE, 5)
    repaired = run(replace(encoder, reuse=(encoder.output,)))
    assert repaired.built == {"text_encoder/onnx": f"{ENCODER_FILE} was damaged"}
    assert_whole(encoder.output)


def _other_content(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "says"),
    [(lambda path: os.truncate(path, 5), "was damaged"), (_other_content, "was damaged"), (Path.unlink, "is missing")],
    ids=["cut off", "other content", "missing"],
)
def test_a_damaged_bundle_is_not_taken_from(
    encoder: BuildRequest, finished: Path, tiny_bundle: Bundles, damage: Callable[[Path], None], says: str
) -> None:
    damage(finished / ENCODER_FILE)
    before = contents(finished)
    recorder = run(encoder)
    assert recorder.built == {"text_encoder/onnx": f"not built yet; in {finished} {ENCODER_FILE} {says}"}
    assert set(recorder.reused) == {"tokenizer"}
    assert_whole(encoder.output)
    assert contents(finished) == before
    second = replace(encoder, output=encoder.output.with_name("second"), reuse=(finished, tiny_bundle()))
    assert run(second).reused["text_encoder/onnx"] == f"same inputs in {tiny_bundle()}, files intact"
    assert_whole(second.output)


def _no_link(*_: object, **__: object) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def test_files_are_copied_where_they_cannot_be_linked(
    encoder: BuildRequest, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", _no_link)
    assert run(encoder).built == {}
    assert_whole(encoder.output)
    assert not os.path.samefile(finished / ENCODER_FILE, encoder.output / ENCODER_FILE)


def test_a_copy_is_checked(encoder: BuildRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _no_link)
    monkeypatch.setattr(shutil, "copy2", lambda origin, copy: Path(copy).write_bytes(b"something else"))
    assert set(run(encoder).built) == {"tokenizer", "text_encoder/onnx"}
    assert_whole(encoder.output)


def test_what_cannot_be_read_is_built(encoder: BuildRequest, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "link", _no_link)
    monkeypatch.setattr(shutil, "copy2", forbidden)
    why = f"not built yet; in {finished} text_encoder/model.onnx cannot be taken: Permission denied"
    assert run(encoder).built["text_encoder/onnx"] == why
    assert_whole(encoder.output)


def test_a_full_disk_is_said(encoder: BuildRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", _no_link)
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(BuildError, match="no space left"):
        run(encoder)
    assert not encoder.output.exists()


def _no_record(folder: Path) -> None:
    (folder / RECORD_NAME).unlink()


def _unreadable_record(folder: Path) -> None:
    (folder / RECORD_NAME).write_text("{")


def _a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "not a bundle of ours.*received: no such directory.*expected: .*do: "),
        (_a_file, "not a bundle of ours.*received: a file.*expected: .*do: "),
        (_no_record, "not a bundle of ours.*received: a directory without build.json.*expected: .*do: "),
        (_unreadable_record, "not a bundle's record.*received: .*expected: .*do: "),
    ],
    ids=["missing", "a file", "no record", "unreadable record"],
)
def test_what_is_no_bundle_is_refused(
    encoder: BuildRequest, finished: Path, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(finished)
    beside = sorted(finished.parent.iterdir())
    with pytest.raises(BundleError, match="(?s)" + says):
        run(encoder)
    assert sorted(finished.parent.iterdir()) == beside


@pytest.mark.parametrize("absolute", [False, True], ids=["leaves the folder", "absolute"])
def test_a_record_with_a_path_outside_is_refused(encoder: BuildRequest, finished: Path, absolute: bool) -> None:
    """Size and digest fit, so that nothing else refuses the file."""
    outside = finished.parent / "outside"
    shutil.move(finished / "tokenizer" / "tokenizer.json", outside)
    record = json.loads((finished / RECORD_NAME).read_text())
    (entry,) = record["stages"]["tokenizer"]["files"]
    entry["path"] = str(outside) if absolute else "tokenizer/../../outside"
    (finished / RECORD_NAME).write_text(json.dumps(record))
    beside = sorted(finished.parent.iterdir())
    with pytest.raises(BundleError, match=r"(?s)damaged or edited.*outside.*inside of the bundle"):
        run(encoder)
    assert sorted(finished.parent.iterdir()) == beside


def test_the_command_takes_several_and_refuses_without_traceback(encoder: BuildRequest, finished: Path) -> None:
    command = [sys.executable, "-m", "sana_export", "build", encoder.model, "--precision", "fp32", "--resolution", "64"]
    command += ["--target", "onnxruntime", "--components", "text_encoder", "--output", str(encoder.output)]

    def call(*reuse: Path) -> subprocess.CompletedProcess[str]:
        named = [word for bundle in reuse for word in ("--reuse", str(bundle))]
        return subprocess.run([*command, *named], capture_output=True, text=True, check=False)

    missing = finished.with_name("missing")
    refused = call(finished, missing)
    assert refused.returncode == 1
    assert f"--reuse {missing} is not a bundle of ours" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not encoder.output.exists()
    (other := finished.with_name("other")).mkdir()
    (other / RECORD_NAME).write_text("{}")
    done = call(other, finished)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "text_encoder/onnx" in line)
    assert line.split() == f"reused text_encoder/onnx same inputs in {finished}, files intact".split()
    assert_whole(encoder.output)


def test_another_calibration_leaves_the_text_encoder_alone(
    checkpoint_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its weights alone are stored in 8 bits; the size is that of what is painted to calibrate, too."""
    first = BuildRequest(
        str(checkpoint_directory("random:tiny")),
        "fp8",
        ("onnxruntime",),
        64,
        64,
        tmp_path / "first",
        components=("text_encoder", "transformer"),
        base_precision="fp32",
        calibration=CalibrationSettings(num_prompts=1, num_steps=1, side=64),
    )
    run(first)
    recorder = run(replace(first, height=32, output=tmp_path / "second", reuse=(first.output,)))
    assert set(recorder.reused) == {"tokenizer", "recipe", "text_encoder/onnx"}
    assert set(recorder.built) == {"calibration", "transformer/onnx"}
    changed = recorder.built["transformer/onnx"]
    assert "height x width 64 x 64 -> 32 x 64, calibration " in changed
    # Digests are cut to what a person compares.
    assert len(changed) < 200 + len(str(first.output))
    assert_whole(tmp_path / "second")


# --- What decides an Inductor stage ---

TOKENS = 60


@cache
def checkpoint() -> Checkpoint:
    return open_checkpoint("random:tiny")


def plan_of(component: ComponentName, side: int) -> ComponentPlan:
    plans = plan_components(checkpoint(), "bf16", side, side, TOKENS)
    return next(plan for plan in plans if plan.name == component)


def stage_of(recipe: Recipe | str | None, side: int = 64, amax: float = 1.0) -> InductorStage:
    """A stage whose calibration found `amax` at every layer."""
    request = BuildRequest("random:tiny", "bf16", ("inductor",), side, side, Path("bundle"))
    if recipe is None:
        return InductorStage(checkpoint(), request, None, None)
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    plans = tuple(plan_of(name, side) for name in COMPONENTS)
    quantized = prepare_recipe(recipe, request, plans, ("a cat",))
    return InductorStage(checkpoint(), request, quantized, scales_of(quantized, recipe, side, amax))


def scales_of(quantized: QuantizedBuild, recipe: Recipe, side: int, amax: float) -> Scales:
    layers = {
        name: {layer: LayerScales(amax if rule.activation_dtype else None) for layer, rule in rules.items()}
        for name, rules in quantized.rules.items()
    }
    return Scales(layers, Provenance({}, recipe.digest, "", 0, 1, side, side))


def inputs_of(component: ComponentName, recipe: Recipe | str | None, side: int = 64, amax: float = 1.0) -> dict:
    return stage_of(recipe, side, amax).inputs(plan_of(component, side), "weights")


def with_activations(recipe: Recipe) -> Recipe:
    """The recipe with 8-bit activations in the text encoder."""
    rules = tuple(
        replace(rule, activation_dtype="int8")
        if rule.component == "text_encoder" and "layers" in rule.pattern
        else rule
        for rule in recipe.rules
    )
    return replace(recipe, rules=rules)


def test_a_text_encoder_serves_other_sizes_and_recipes_with_the_same_rules() -> None:
    found = inputs_of("text_encoder", "fp8")
    assert inputs_of("text_encoder", "fp8", side=128, amax=2.0) == found
    assert inputs_of("text_encoder", "int8", side=96) == found
    # The same rules, found by other patterns.
    by_layer = [LayerRule("text_encoder", f"layers.{i}.*", "int8", None, PerChannel()) for i in (0, 1)]
    fp8 = load_recipe("fp8")
    kept = [rule for rule in fp8.rules if (rule.component, rule.pattern) != ("text_encoder", "layers.*")]
    assert inputs_of("text_encoder", replace(fp8, rules=(*by_layer, *kept))) == found
    activations = with_activations(fp8)
    assert inputs_of("text_encoder", activations, amax=1.0) == inputs_of("text_encoder", activations, amax=2.0)
    others = [None, "int4-weight-only", activations, fp8.excluding((Exclusion("text_encoder", "layers.0.*", "x"),))]
    digests = {inputs_of("text_encoder", recipe)["recipe"] for recipe in others}
    assert len(digests | {found["recipe"]}) == 5


def test_a_transformer_is_of_its_size_rules_and_scales() -> None:
    fp8 = load_recipe("fp8")
    found = inputs_of("transformer", fp8)
    differing = [
        inputs_of("transformer", fp8, side=128),
        inputs_of("transformer", "int8"),
        inputs_of("transformer", None),
        inputs_of("transformer", fp8, amax=2.0),
    ]
    changed = [{name for name in found if found[name] != other[name]} for other in differing]
    assert changed[0] >= {"height x width"}
    assert changed[1:] == [{"recipe"}, {"recipe", "calibration"}, {"calibration"}]
    elsewhere = fp8.excluding(
        (Exclusion("vae_decoder", "stages.0.*", "x"), Exclusion("text_encoder", "layers.0.*", "x"))
    )
    assert inputs_of("transformer", elsewhere) == found


def test_a_decoder_is_of_its_size_and_of_the_convolutions_with_8_bit_activations() -> None:
    found = inputs_of("vae_decoder", None)
    assert [inputs_of("vae_decoder", name) for name in ("int8-weight-only", "int4-weight-only")] == [found, found]
    assert inputs_of("vae_decoder", None, side=128)["height x width"] != found["height x width"]
    fp8 = inputs_of("vae_decoder", "fp8")
    differing = [found, inputs_of("vae_decoder", "int8"), inputs_of("vae_decoder", "fp8", amax=2.0)]
    changed = [{name for name in fp8 if fp8[name] != other[name]} for other in differing]
    assert changed == [{"recipe", "calibration"}, {"recipe"}, {"calibration"}]
    elsewhere = load_recipe("fp8").excluding((Exclusion("transformer", "blocks.0.*", "x"),))
    assert inputs_of("vae_decoder", elsewhere) == fp8


@pytest.mark.parametrize(
    ("component", "one", "other"),
    [
        ("vae_decoder", (None, 64, 1.0), ("int8-weight-only", 64, 2.0)),
        ("text_encoder", ("fp8", 64, 1.0), ("int8", 128, 1.0)),
        ("text_encoder", ("activations", 64, 1.0), ("activations", 128, 2.0)),
    ],
    ids=["decoder", "text encoder", "text encoder with activations"],
)
def test_equal_inputs_give_equal_components(
    component: ComponentName, one: tuple[Any, ...], other: tuple[Any, ...]
) -> None:
    """What the inputs leave out is not read: the claim behind the tests above."""
    prepared, inputs = [], []
    for recipe, side, amax in (one, other):
        recipe = with_activations(load_recipe("int8")) if recipe == "activations" else recipe
        prepared.append(stage_of(recipe, side, amax).prepare(plan_of(component, side)))
        inputs.append(inputs_of(component, recipe, side, amax))
    assert inputs[0] == inputs[1]
    first, second = prepared
    assert (first.prepare, first.step, first.lookups) == (second.prepare, second.step, second.lookups)
    assert {name: piece.inputs for name, piece in first.pieces.items()} == {
        name: piece.inputs for name, piece in second.pieces.items()
    }
    stored = [{**found.weights, **found.tables} for found in prepared]
    assert stored[0].keys() == stored[1].keys()
    assert stored[0]
    for name, tensor in stored[0].items():
        values = tensor.load(), stored[1][name].load()
        assert values[0].dtype == values[1].dtype, name
        assert torch.equal(values[0].float(), values[1].float()), name


@pytest.mark.parametrize(
    ("digest", "files"),
    [
        (inductor_code_digest, {"components.py", "quantize.py", "inductor_program.py", "decoder.py"}),
        (lambda: exporter_code_digest("reference", "graph"), {"components.py", "quantize.py", "export.py"}),
    ],
    ids=["inductor", "graph"],
)
def test_code_that_decides_what_is_written_is_an_input(
    digest: Callable[[], str], files: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a changed program would take what an older one has built."""
    found = digest()
    read = Path.read_bytes
    for file in files:
        monkeypatch.setattr(Path, "read_bytes", lambda path, file=file: read(path) + b"#" * (path.name == file))
        assert digest() != found, file
