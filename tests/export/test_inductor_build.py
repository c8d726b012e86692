"""A build for the target `inductor` paints the picture that the ONNX engines paint; one test compiles for real."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import sana_export.inductor.compile as compiling
import sana_runtime.inductor_engine as inductor
from sana_export.build import build
from sana_export.build_request import BuildRequest, CalibrationSettings
from sana_export.inductor.piece import Piece
from sana_export.inductor.text_encoder import short_end
from sana_export.inductor.workers import Workers
from sana_export.parity.metrics import measure
from sana_export.parity.tolerance import relative_rms_bound
from sana_runtime.errors import BuildError, TargetError
from sana_runtime.manifest import read_manifest
from sana_runtime.pipeline import Pipeline
from tests.export.conftest import Recorder

# As for the ONNX engines against diffusers (test_end_to_end.py): another order of sums over the steps, and rounding.
PIXEL_TOLERANCE = 2
# Of the transformer's 30000 codes on these feeds, three may be another one.
MOVED_CODES = 1e-4
PROMPT = "A red circle, left of a Blue square"
# More tokens than a short caption has.
LONG_PROMPT = ", ".join(f"star {number}" for number in range(60))
PIECES = {
    "text_encoder": {
        *("prefix_embed", "prefix_layer", "embed", "layer", "final"),
        *("short_embed", "short_layer", "short_final"),
    },
    "transformer": {"caption", "embed", "block", "head"},
    "vae_decoder": {"stages_5_to_5", "stages_4_to_4", "stages_3_to_3", "stages_2_to_0"},
}


@dataclass(frozen=True)
class Eager:
    """A piece in the place of its graph."""

    piece: Piece
    examples: tuple[torch.Tensor, ...]

    def outputs(self) -> list[torch.Tensor]:
        return list(self.piece(*self.examples))

    def result(self) -> None:
        pass


@pytest.fixture
def eager_pieces(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Piece]:
    """Pieces run eagerly in the place of compiled ones: what is tested is everything around the compiler."""
    made: dict[tuple[str, str], Piece] = {}

    def key(path: Path) -> tuple[str, str]:
        return path.parent.parent.name, path.name.replace(".partial", "")

    def package(workers: Workers, exported: Eager, path: Path, options: Any) -> Eager:
        made[key(path)] = exported.piece
        path.write_bytes(exported.piece.name.encode())
        return exported

    monkeypatch.setattr(compiling, "export_piece", lambda piece, examples: Eager(piece, tuple(examples)))
    monkeypatch.setattr(Workers, "package", package)
    monkeypatch.setattr(compiling, "load_piece", lambda path: made[key(path)])
    monkeypatch.setattr(inductor, "load_piece", lambda path: made[key(path)])
    return made


def request_for(model: Path | str, output: Path, precision: str = "fp32", **changes: Any) -> BuildRequest:
    return BuildRequest(str(model), precision, ("inductor",), 128, 128, output, **changes)


@pytest.mark.parametrize("name", ["random:tiny", "random:tiny-qknorm", "random:tiny-sprint", "random:tiny-4k"])
def test_a_bundle_paints_what_the_onnx_bundle_paints(
    name: str,
    tmp_path: Path,
    checkpoint_directory: Callable[[str], Path],
    tiny_bundle: Callable[..., Path],
    eager_pieces: dict,
) -> None:
    build(request_for(checkpoint_directory(name), tmp_path / "bundle"), Recorder())
    assert {component: {piece for c, piece in eager_pieces if c == component} for component in PIECES} == {
        component: {f"{piece}.pt2" for piece in pieces} for component, pieces in PIECES.items()
    }
    pipeline = Pipeline.load(tmp_path / "bundle", report=lambda line: None)
    expected = Pipeline.load(tiny_bundle(name), report=lambda line: None)
    assert pipeline.tokenize(LONG_PROMPT).caption_mask[0, short_end(pipeline.manifest.tokenizer.padded_length) :].any()
    asked = [(PROMPT, ""), (LONG_PROMPT, ""), *([] if "sprint" in name else [(PROMPT, "dark")])]
    for prompt, negative in asked:
        settings = {"negative_prompt": negative, "guidance_scale": 4.5, "num_steps": 4, "seed": 3}
        picture = pipeline.generate(prompt, **settings)
        difference = np.abs(picture.pixels.astype(int) - expected.generate(prompt, **settings).pixels.astype(int))
        assert difference.max() <= PIXEL_TOLERANCE
        assert picture.pixels.std() > 10


def test_the_instruction_is_computed_once_for_all_prompts(
    tmp_path: Path, checkpoint_directory: Callable[[str], Path], eager_pieces: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(request_for(checkpoint_directory("random:tiny"), tmp_path / "bundle"), Recorder())
    calls: list[str] = []
    compute = Piece.__call__
    monkeypatch.setattr(
        Piece, "__call__", lambda piece, *inputs: (calls.append(piece.name), compute(piece, *inputs))[1]
    )

    def caption(pipeline: Pipeline, text: str, *, negative: bool = False) -> tuple[np.ndarray, int]:
        calls.clear()
        found = pipeline.encode_caption(text, negative=negative).embeds.numpy().copy()
        return found, calls.count("prefix_embed")

    pipeline = Pipeline.load(tmp_path / "bundle", report=lambda line: None)
    first, computed = caption(pipeline, PROMPT)
    assert computed == 1
    second, computed = caption(pipeline, "three green stars")
    assert computed == 0
    # A negative prompt has no instruction: other tokens stand there.
    assert caption(pipeline, "dark", negative=True)[1] == 1
    again, computed = caption(pipeline, PROMPT)
    assert computed == 1
    np.testing.assert_array_equal(again, first)
    fresh = Pipeline.load(tmp_path / "bundle", report=lambda line: None)
    np.testing.assert_array_equal(caption(fresh, "three green stars")[0], second)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("name", ["random:tiny", "random:tiny-sprint"])
def test_watching_the_steps_changes_nothing(
    name: str, tmp_path: Path, checkpoint_directory: Callable[[str], Path], eager_pieces: dict
) -> None:
    build(request_for(checkpoint_directory(name), tmp_path / "bundle"), Recorder())
    pipeline = Pipeline.load(tmp_path / "bundle", report=lambda line: None)
    indices: list[int] = []
    watched = pipeline.generate(PROMPT, num_steps=3, on_step=lambda step: indices.append(step.index))
    assert indices == [0, 1, 2]
    assert np.array_equal(watched.pixels, pipeline.generate(PROMPT, num_steps=3).pixels)


def test_the_manifest_names_device_torch_and_files(
    tmp_path: Path, checkpoint_directory: Callable[[str], Path], eager_pieces: dict
) -> None:
    build(request_for(checkpoint_directory("random:tiny"), tmp_path / "bundle"), Recorder())
    manifest = read_manifest(tmp_path / "bundle")
    for component in manifest.components:
        (entry,) = component.engines
        assert (entry.device, entry.builder_version) == (inductor.machine_device(), torch.__version__)
        assert entry.files[0] == f"{component.name}/inductor/{inductor.PROGRAM_NAME}"
        assert set(entry.files) <= {file.path for file in manifest.files}
        assert not (tmp_path / "bundle" / component.name / "model.onnx").exists()


def test_an_identical_build_reuses_and_changed_code_rebuilds(
    tmp_path: Path, checkpoint_directory: Callable[[str], Path], eager_pieces: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(checkpoint_directory("random:tiny"), tmp_path / "bundle")
    build(request, Recorder())
    again = Recorder()
    build(request, again)
    assert again.built == {}
    monkeypatch.setattr("sana_export.inductor.stage._code_digest", lambda: "other")
    changed = Recorder()
    build(request, changed)
    assert set(changed.built) == {f"{component}/inductor" for component in PIECES}
    assert "inductor code" in changed.built["transformer/inductor"]


def test_two_targets_share_a_bundle(
    tmp_path: Path, checkpoint_directory: Callable[[str], Path], eager_pieces: dict
) -> None:
    model = str(checkpoint_directory("random:tiny"))
    request = BuildRequest(model, "fp32", ("inductor", "onnxruntime"), 128, 128, tmp_path / "bundle")
    build(request, Recorder())
    pictures = [
        Pipeline.load(tmp_path / "bundle", target, report=lambda line: None).generate(PROMPT, num_steps=2).pixels
        for target in ("inductor", "onnxruntime")
    ]
    assert np.abs(pictures[0].astype(int) - pictures[1].astype(int)).max() <= PIXEL_TOLERANCE


def test_a_quantised_bundle_stores_eight_bits(
    tmp_path: Path, checkpoint_directory: Callable[[str], Path], eager_pieces: dict
) -> None:
    recorder = Recorder()
    settings = CalibrationSettings(num_prompts=1, num_steps=2)
    request = request_for(
        checkpoint_directory("random:tiny"), tmp_path / "bundle", "fp8", calibration=settings, gate=False
    )
    build(request, recorder)
    assert not any(note.startswith("vae_decoder:") for note in recorder.notes), "left in the base dtype"
    picture = Pipeline.load(tmp_path / "bundle", report=lambda line: None).generate(PROMPT, num_steps=3)
    assert picture.pixels.std() > 10
    program = inductor.read_program(tmp_path / "bundle" / "transformer" / "inductor" / inductor.PROGRAM_NAME)
    block = next(call for call in program.step if call.piece == "block")
    assert "blocks.0.mix_ffn.conv_point.activation_scale" in block.inputs
    program = inductor.read_program(tmp_path / "bundle" / "vae_decoder" / "inductor" / inductor.PROGRAM_NAME)
    assert "stages.0.blocks.0.conv1.activation_scale" in program.step[-1].inputs


@pytest.mark.parametrize("jobs", [1, 2])
def test_other_precisions_and_sizes_take_what_they_share(
    tmp_path: Path, checkpoint_directory: Callable[[str], Path], eager_pieces: dict, jobs: int
) -> None:
    """The text encoder has no picture size."""
    fp32 = request_for(checkpoint_directory("random:tiny"), tmp_path / "fp32")
    build(fp32, Recorder())
    settings = CalibrationSettings(num_prompts=1, num_steps=1, side=64)
    fp8 = replace(
        fp32,
        precision="fp8",
        base_precision="fp32",
        calibration=settings,
        gate=False,
        jobs=jobs,
        output=tmp_path / "fp8",
    )
    recorder = Recorder()
    build(replace(fp8, reuse=(fp32.output,)), recorder)
    taken = f"same inputs in {fp32.output}, files intact"
    assert recorder.reused == {"tokenizer": taken}
    eager_pieces.clear()
    recorder = Recorder()
    small = replace(fp8, height=96, output=tmp_path / "small", reuse=(fp32.output, fp8.output))
    small = replace(small, precision="int8-weight-only")
    manifest = build(small, recorder)
    assert recorder.reused["text_encoder/inductor"] == f"same inputs in {fp8.output}, files intact"
    assert {component for component, _ in eager_pieces} == {"transformer", "vae_decoder"}, "what was compiled"
    assert any(note.startswith("vae_decoder: 18 quantised layers stay in the base dtype") for note in manifest.notes)
    assert [note for note in recorder.notes if note in manifest.notes] == [*manifest.notes]


def test_a_compiler_that_fails_is_a_build_error(
    tmp_path: Path,
    checkpoint_directory: Callable[[str], Path],
    eager_pieces: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("g++ not found")

    monkeypatch.setattr(Eager, "result", broken)
    request = request_for(checkpoint_directory("random:tiny"), tmp_path / "bundle")
    with pytest.raises(BuildError, match=r"the piece 'prefix_embed' cannot be compiled or run[\s\S]*g\+\+ not found"):
        build(request, Recorder())
    assert not (tmp_path / "bundle").exists()


def test_fp16_is_refused(tmp_path: Path, checkpoint_directory: Callable[[str], Path], eager_pieces: dict) -> None:
    with pytest.raises(TargetError, match="computes in bf16 or fp32"):
        build(request_for(checkpoint_directory("random:tiny"), tmp_path / "bundle", "fp16"), Recorder())


def test_compiled_pieces_compute_what_eager_ones_do(
    tmp_path: Path, checkpoint_directory: Callable[[str], Path]
) -> None:
    """With a real compiler in two processes, and the 8-bit products of the recipe: the only slow test, one to three
    minutes.
    """
    settings = CalibrationSettings(num_prompts=1, num_steps=2)
    request = request_for(
        checkpoint_directory("random:tiny"),
        tmp_path / "bundle",
        "fp8",
        base_precision="fp32",
        calibration=settings,
        gate=False,
        jobs=2,
    )
    build(request, Recorder())
    manifest = read_manifest(tmp_path / "bundle")
    pipeline = Pipeline.load(tmp_path / "bundle", report=lambda line: None)
    length = manifest.tokenizer.padded_length
    cases = [(component, 20) for component in manifest.components]
    cases += [(component, length) for component in manifest.components if component.name == "text_encoder"]
    for component, valid in cases:
        feeds = _feeds(component, valid)
        found = pipeline.run_component(component.name, feeds)
        wanted, plain = _eager(tmp_path / "bundle", component, feeds)
        for name, value in wanted.items():
            error = measure(component.name, name, found[name], value).relative_rms
            # Other roundings move a few activations across a tie between codes. Quantising errs by step / sqrt(12) in
            # every code and such a move by a step in one, so moving a share f errs sqrt(12 f) times as much.
            effect = measure(component.name, name, value, plain[name]).relative_rms
            moved = math.sqrt(12 * MOVED_CODES) * effect if component.name == "transformer" else 0.0
            assert error <= relative_rms_bound("float32", 18, image=name == "image") + moved, (component.name, name)
            assert value.std() > 0
    whole = pipeline.generate(PROMPT, num_steps=3).pixels
    assert np.array_equal(whole, pipeline.generate(PROMPT, num_steps=3, on_step=lambda step: None).pixels)
    assert whole.std() > 10


def _feeds(component: Any, valid: int) -> dict[str, np.ndarray]:
    """Of a caption with so many valid tokens."""
    generator = np.random.default_rng(5)
    feeds = {}
    for spec in component.inputs:
        if spec.name == "caption_tokens":
            feeds[spec.name] = generator.integers(0, 700, spec.shape)
        elif spec.name == "caption_mask":
            feeds[spec.name] = (np.arange(spec.shape[1]) < valid).astype(np.int64) * np.ones(spec.shape, np.int64)
        else:
            scalar = {"timestep": 600.0, "sigma": 0.6, "guidance_scale": 4.5}.get(spec.name)
            values = generator.standard_normal(spec.shape, dtype=np.float32)
            feeds[spec.name] = values if scalar is None else np.asarray(scalar, np.float32)
    return feeds


@torch.no_grad()
def _eager(bundle: Path, component: Any, feeds: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], ...]:
    """(the stored weights through eager pieces made again from the configuration, the unquantised reference)."""
    from safetensors.torch import load_file

    from sana_export.calibration_run import sampling_of
    from sana_export.components import loaded_module, plan_components
    from sana_export.inductor.stage import InductorStage
    from sana_export.quantize import prepare as prepare_recipe
    from sana_export.quantize import recipe_of
    from sana_export.weights.checkpoint import open_checkpoint
    from sana_runtime.inductor_program import run_calls

    manifest = read_manifest(bundle)
    request = request_for(manifest.model.source, bundle, "fp8", base_precision="fp32")
    checkpoint = open_checkpoint(manifest.model.source)
    plans = plan_components(checkpoint, "fp32", 128, 128, manifest.tokenizer.padded_length)
    recipe = recipe_of(request)
    assert recipe is not None
    from sana_calibration.scales import Scales

    quantized = prepare_recipe(recipe, request, plans, ("a cat",))
    path = bundle / "quantization" / "calibration.safetensors"
    scales = Scales.load(path, weights={}, recipe=recipe.digest, sampling=sampling_of(checkpoint))
    stage = InductorStage(checkpoint, request, quantized, scales)
    plan = next(plan for plan in plans if plan.name == component.name)
    prepared = stage.prepare(plan)
    folder = bundle / component.name / "inductor"
    values: dict[str, Any] = dict(load_file(folder / compiling.WEIGHTS_NAME))
    values.update({name: torch.from_numpy(np.asarray(array)) for name, array in feeds.items()})
    tables = load_file(folder / compiling.TABLES_NAME) if prepared.lookups else {}
    for lookup in prepared.lookups:
        values[lookup.output] = tables[lookup.table][values[lookup.index][:, lookup.first : lookup.end]]
    run_calls(prepared.prepare, prepared.pieces, values, frozenset(n for c in prepared.prepare for n in c.outputs))
    outputs = frozenset(spec.name for spec in component.outputs)
    short = prepared.short_step
    is_short = short is not None and not feeds["caption_mask"][:, short.end :].any()
    run_calls(short.calls if short and is_short else prepared.step, prepared.pieces, values, outputs)
    program = msgspec.json.decode((folder / inductor.PROGRAM_NAME).read_bytes())
    assert set(program["pieces"]) == PIECES[component.name]
    reference = loaded_module(plan, checkpoint)(*[values[spec.name] for spec in plan.inputs])
    reference = reference if isinstance(reference, tuple) else (reference,)
    plain = {spec.name: output.numpy() for spec, output in zip(plan.outputs, reference, strict=True)}
    return {name: values[name].numpy() for name in outputs}, plain


def test_a_piece_whose_results_are_laid_out_otherwise_is_refused() -> None:
    """The next piece reads them as its graph says, whatever they are."""
    wanted = torch.empty(2, 3, 1, device="meta")
    look = (wanted.shape, wanted.stride(), wanted.dtype, wanted.device)
    fine = torch.zeros(2, 3, 1).as_strided((2, 3, 1), (3, 1, 7))
    assert compiling._Guarded("stage", lambda: [fine], [look])()[0] is fine
    for wrong in (torch.zeros(3, 2, 1).transpose(0, 1), torch.zeros(2, 4, 1), torch.zeros(2, 3, 1).half()):
        with pytest.raises(BuildError, match="result 0 of the piece 'stage' is not laid out as its graph says"):
            compiling._Guarded("stage", lambda wrong=wrong: [wrong], [look])()
