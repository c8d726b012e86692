"""Builds: reuse, what a changed input rebuilds, and every way a build can end badly."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnx.parser
import pytest
from safetensors import SafetensorError

import sana_export.build
import sana_export.stages
from sana_export.build import build
from sana_export.build_request import BuildRequest
from sana_export.bundle import RECORD_NAME, open_staging, read_build_record
from sana_export.graph.export import WEIGHTS_FILE, ExportReport
from sana_runtime.errors import BuildError, BundleError, CheckpointError, InputError, SanaError, TargetError
from sana_runtime.manifest import read_manifest
from sana_runtime.pipeline import Pipeline
from sana_runtime.plan_builder import PlanResult
from sana_runtime.tensorrt_library import TensorrtLibrary
from tests.export.conftest import Recorder, assert_whole, run

STAGES = {"tokenizer", "text_encoder/onnx", "transformer/onnx", "vae_decoder/onnx"}


def small_export(
    module: object,
    weights: object,
    prefix: str,
    inputs: object,
    outputs: object,
    path: Path,
    on_weight: object,
    quantization: object = None,
) -> ExportReport:
    """Stands in for the exporter, which other tests run: these are about stages, files and failures."""
    onnx.save(onnx.parser.parse_model(_IDENTITY), path)
    (path.parent / WEIGHTS_FILE).write_bytes(b"weights")
    return ExportReport({"linear_attention_function": 0}, 1, 7)


_IDENTITY = '<ir_version: 10, opset_import: ["": 22]> g (float[1] x) => (float[1] y) { y = Identity(x) }'


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sana_export.stages, "export_component", small_export)


@pytest.fixture
def request_64(tmp_path: Path, checkpoint_directory: Callable[[str], Path]) -> BuildRequest:
    model = str(checkpoint_directory("random:tiny"))
    return BuildRequest(model, "fp32", ("onnxruntime",), 64, 64, tmp_path / "bundle")


@pytest.fixture
def rebuild(request_64: BuildRequest) -> BuildRequest:
    """A request whose output already holds its bundle."""
    build(request_64, Recorder())
    return request_64


def assert_whole_and_alone(bundle: Path) -> None:
    """Nothing else lies in the bundle or beside it."""
    assert_whole(bundle)
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_an_identical_build_reuses_every_stage(rebuild: BuildRequest) -> None:
    before = read_manifest(rebuild.output).digest
    recorder = run(rebuild)
    assert recorder.built == {}
    assert set(recorder.reused) == STAGES
    assert read_manifest(rebuild.output).digest == before
    assert_whole_and_alone(rebuild.output)


def test_a_changed_size_rebuilds_what_depends_on_it_and_names_it(rebuild: BuildRequest) -> None:
    recorder = run(replace(rebuild, height=96))
    assert set(recorder.reused) == {"tokenizer", "text_encoder/onnx"}
    assert set(recorder.built) == {"transformer/onnx", "vae_decoder/onnx"}
    assert "height x width 64 x 64 -> 96 x 64" in recorder.built["transformer/onnx"]
    assert_whole_and_alone(rebuild.output)


def test_changed_weights_rebuild_that_component_only(
    rebuild: BuildRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import safetensors.torch

    changed = tmp_path_factory.mktemp("changed") / "model"
    shutil.copytree(rebuild.model, changed)
    file = changed / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["proj_out.bias"] = tensors["proj_out.bias"] + 1
    safetensors.torch.save_file(tensors, file)
    recorder = run(replace(rebuild, model=str(changed)))
    assert set(recorder.built) == {"transformer/onnx"}
    assert recorder.built["transformer/onnx"].startswith("changed: weights")


def test_a_damaged_file_is_rebuilt(rebuild: BuildRequest) -> None:
    data = rebuild.output / "transformer" / "model.onnx.data"
    os.truncate(data, data.stat().st_size // 2)
    recorder = run(rebuild)
    assert recorder.built == {"transformer/onnx": "transformer/model.onnx.data was damaged"}
    assert_whole_and_alone(rebuild.output)


def test_an_edited_manifest_is_refused_and_the_next_build_repairs_it(rebuild: BuildRequest) -> None:
    path = rebuild.output / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "height": 128}))
    with pytest.raises(BundleError, match="edited"):
        Pipeline.load(rebuild.output)
    run(rebuild)
    assert_whole_and_alone(rebuild.output)


def test_an_unreadable_build_record_rebuilds_everything(rebuild: BuildRequest) -> None:
    (rebuild.output / RECORD_NAME).write_text("{")
    assert set(run(rebuild).built) == STAGES
    assert_whole_and_alone(rebuild.output)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, _Stop])
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_an_interrupt_in_any_stage_leaves_the_old_bundle_and_resumes(
    rebuild: BuildRequest, monkeypatch: pytest.MonkeyPatch, stage: str, failure: type[BaseException]
) -> None:
    before = read_manifest(rebuild.output).digest
    (rebuild.output / RECORD_NAME).write_text('{"stages": {}}')  # nothing is reusable: every stage runs

    class Interrupting(Recorder):
        def stage_started(self, stage_: str, reason: str) -> None:
            super().stage_started(stage_, reason)
            if stage_ == stage:
                raise failure

    with pytest.raises(failure):
        build(rebuild, Interrupting())
    assert read_manifest(rebuild.output).digest == before, "the old bundle stays"
    recorder = run(rebuild)
    assert stage in recorder.built
    order = ["tokenizer", "text_encoder/onnx", "transformer/onnx", "vae_decoder/onnx"]
    assert set(recorder.reused) == set(order[: order.index(stage)])
    assert_whole_and_alone(rebuild.output)


def test_a_killed_build_leaves_no_bundle_and_the_next_one_resumes(request_64: BuildRequest) -> None:
    command = [sys.executable, "-m", "sana_export", "build", request_64.model, "--precision", "fp32"]
    command += ["--target", "onnxruntime", "--resolution", "64", "--output", str(request_64.output)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    staging = request_64.output.with_name(".bundle.building")
    deadline = time.monotonic() + 120
    while "text_encoder/onnx" not in read_build_record(staging).stages:
        assert child.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not request_64.output.exists()
    recorder = run(request_64)
    assert "text_encoder/onnx" in recorder.reused
    assert_whole_and_alone(request_64.output)


def test_a_crash_between_the_renames_of_a_commit_is_undone(rebuild: BuildRequest) -> None:
    os.rename(rebuild.output, rebuild.output.with_name(".bundle.replaced"))
    assert run(rebuild).built == {}
    assert_whole_and_alone(rebuild.output)


def test_two_builds_at_once(request_64: BuildRequest) -> None:
    with open_staging(request_64.output), pytest.raises(BuildError, match="another build is writing"):
        run(request_64)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError("12288 requested and 7712 written"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["ENOSPC", "NumPy's short write", "safetensors"],
)
def test_a_full_disk(rebuild: BuildRequest, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    before = read_manifest(rebuild.output).digest

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(sana_export.stages, "export_component", full)
    with pytest.raises(BuildError, match="no space left"):
        run(replace(rebuild, width=96))
    monkeypatch.setattr(sana_export.stages, "export_component", small_export)
    assert read_manifest(rebuild.output).digest == before
    run(replace(rebuild, width=96))
    assert_whole_and_alone(rebuild.output)


def test_too_little_space_is_refused_before_work(request_64: BuildRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sana_export.build.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(BuildError, match="not enough space"):
        run(request_64)
    assert not request_64.output.exists()


def test_an_output_with_other_content_is_not_touched(request_64: BuildRequest) -> None:
    request_64.output.mkdir()
    (request_64.output / "thesis.txt").write_text("precious")
    with pytest.raises(BundleError, match="not a bundle of ours"):
        run(request_64)
    assert (request_64.output / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"height": 1000}, InputError, "1000 pixels.*multiple of 32.*--height 992"),
        ({"width": 0}, InputError, "0 pixels"),
        ({"width": 8192}, InputError, "8192 pixels"),
        ({"precision": "fp7"}, InputError, "unknown precision.*fp7.*fp32 or bf16 or fp16 or fp8"),
        ({"targets": ("tensorflow",)}, InputError, "unknown target"),
        ({"components": ("unet",)}, InputError, "unknown component"),
        ({"targets": ()}, InputError, "nothing to build"),
        ({"model": "no/such/folder"}, CheckpointError, "no/such/folder"),
        ({"model": "random:huge"}, CheckpointError, "random:tiny"),
    ],
    ids=str,
)
def test_wrong_arguments(
    request_64: BuildRequest, change: dict[str, object], error: type[SanaError], message: str
) -> None:
    with pytest.raises(error, match="(?s)" + message):
        run(replace(request_64, **change))
    assert not request_64.output.exists()


def test_a_target_without_builder_is_refused_before_work(
    request_64: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(target: str) -> None:
        raise TargetError(f"target '{target}': no builder")

    monkeypatch.setattr(sana_export.build, "find_tensorrt", none)
    with pytest.raises(TargetError):
        run(replace(request_64, targets=("tensorrt-rtx",)))
    assert not request_64.output.exists()


def test_a_plan_of_the_full_tensorrt_is_rebuilt_on_another_device(
    request_64: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiler(source: Path, plan: Path, target: str, **_: object) -> PlanResult:
        plan.write_bytes(b"plan")
        return PlanResult(1.0, 1, 4, "TensorRT", "0", 1, 0)

    library = TensorrtLibrary("tensorrt", "vendor", "tensorrt", "0", "0", "a stand-in")
    monkeypatch.setattr(sana_export.build, "find_tensorrt", lambda target: library)
    monkeypatch.setattr(sana_export.stages, "build_plan", compiler)
    wanted = replace(request_64, targets=("tensorrt",), components=("text_encoder",))
    for device, built in (("cuda sm_87", 3), ("cuda sm_87", 0), ("cuda sm_90", 1)):
        monkeypatch.setattr(sana_export.stages, "machine_device", lambda device=device: device)
        found = run(wanted).built
        assert len(found) == built
    assert found == {"text_encoder/tensorrt": "changed: device cuda sm_87 -> cuda sm_90"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["random:tiny", "--resolution", "64", "--height", "64", "--width", "64"], "two ways"),
        (["random:tiny", "--height", "64"], "half of the picture's size"),
        (["random:tiny", "--precision", "fp7", "--resolution", "64"], "unknown precision"),
        (["/no/such/model.pth", "--resolution", "64"], "model.pth"),
        (["random:tiny", "--resolution", "64", "--precision", "fp8"], "add --base-precision fp32"),
    ],
    ids=["both", "half", "precision", "missing", "bf16 beside codes"],
)
def test_the_command_ends_without_traceback(tmp_path: Path, arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "sana_export", "build", *arguments, "--target", "onnxruntime"]
    done = subprocess.run([*command, "--output", str(tmp_path / "b")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "b").exists()
