"""The target `inductor` runs programs of compiled pieces: single steps, whole loops, and clear refusals.

The pieces here are Python functions in the place of compiled ones, which `tests/export/test_inductor_build.py` makes.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import sana_runtime.inductor_engine as inductor
from sana_runtime.contract import TensorSpec
from sana_runtime.engine import LoopEngine
from sana_runtime.errors import BundleError, InputError, TargetError
from sana_runtime.inductor_program import Call, Lookup, Program, ShortStep
from sana_runtime.manifest import ComponentEntry, EngineEntry
from sana_runtime.pipeline import Pipeline
from sana_runtime.targets import choose_target, examine_targets
from tests.runtime.toys import LATENT_SHAPE, toy_manifest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

F32 = "float32"
INPUTS = (
    TensorSpec("latent", F32, (1, 6)),
    TensorSpec("previous_x0", F32, (1, 6)),
    TensorSpec("caption", F32, (3,)),
    TensorSpec("timestep", F32, ()),
    TensorSpec("step_coefficients", F32, (3,)),
)
OUTPUTS = tuple(TensorSpec(name, F32, (1, 6)) for name in ("next_latent", "x0"))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def toy_pieces(prompts: list[int]) -> dict[str, Callable[..., Any]]:
    """A solver step with what such a program has: something per prompt, a table, blocks of one piece, a head."""

    def caption(words: Any, weight: Any) -> tuple[Any, ...]:
        prompts.append(1)
        return ((words * weight).sum().reshape(1, 1) * torch.ones(2, 1, device=words.device),)

    def block(x: Any, weight: Any, key: Any) -> tuple[Any]:
        return (torch.tanh(x * weight + key),)

    def head(x: Any, latent: Any, previous_x0: Any, timestep: Any, coefficients: Any) -> tuple[Any, Any]:
        x0 = x * timestep
        a, b, c = coefficients.unbind(0)
        return a * latent + b * x0 + c * previous_x0, x0

    return {"caption": caption, "block": block, "head": head}


PREPARE = (Call("caption", ("caption", "caption.weight"), ("keys",)),)
STEP = (
    Call("block", ("latent", "blocks[0]", "keys[0]"), ("x.1",)),
    Call("block", ("x.1", "blocks[1]", "keys[1]"), ("x.2",)),
    Call("head", ("x.2", "latent", "previous_x0", "timestep", "step_coefficients"), ("next_latent", "x0")),
)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pieces are Python functions; one entry per run of what depends on the prompt alone."""
    found: list[int] = []
    pieces = toy_pieces(found)
    monkeypatch.setattr(inductor, "load_piece", lambda path: pieces[path.stem])
    return found


def written_engine(folder: Path, **changes: Any) -> tuple[ComponentEntry, EngineEntry]:
    """A component's files and entries."""
    files = {name: f"{name}.pt2" for name in ("caption", "block", "head")}
    program = Program(inductor.FORMAT_VERSION, "cpu", "1", files, "weights.safetensors", PREPARE, STEP)
    program = dataclasses.replace(program, **changes)
    (folder / inductor.PROGRAM_NAME).write_bytes(msgspec.json.encode(program))
    weights = {"caption.weight": torch.tensor([1.0, -2.0, 0.5]), "blocks": torch.tensor([[0.7], [-1.3]])}
    safetensors.save_file(weights, str(folder / "weights.safetensors"))
    entry = EngineEntry("inductor", (inductor.PROGRAM_NAME, "weights.safetensors"), "AOTInductor", "1", device="cpu")
    return ComponentEntry("transformer", F32, "", "0" * 64, INPUTS, OUTPUTS, (entry,)), entry


def feeds(num_steps: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(inputs that stay, schedule)."""
    generator = np.random.default_rng(3)
    latent = generator.standard_normal((1, 6), dtype=np.float32)
    schedule = {
        "timestep": np.linspace(0.9, 0.1, num_steps, dtype=np.float32),
        "step_coefficients": generator.standard_normal((num_steps, 3), dtype=np.float32),
    }
    return {"latent": latent, "caption": np.array([0.3, 0.1, -0.2], np.float32)}, schedule


def opened(tmp_path: Path, device: str) -> tuple[inductor.InductorBackend, LoopEngine, dict, dict]:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    backend = inductor.InductorBackend(device)
    engine = backend.load(tmp_path, *written_engine(tmp_path))
    assert isinstance(engine, LoopEngine)
    memory = backend.memory
    inputs = {spec.name: memory.allocate(spec) for spec in INPUTS}
    outputs = {spec.name: memory.allocate(spec) for spec in OUTPUTS}
    return backend, engine, inputs, outputs


@pytest.mark.parametrize("device", DEVICES)
def test_an_engine_runs_after_all_others_were_dropped(tmp_path: Path, prompts: list[int], device: str) -> None:
    """PyTorch takes the graphs' memory back with the last graph."""
    backend, engine, inputs, outputs = opened(tmp_path, device)
    del engine
    found = []
    for _ in range(3):
        backend.load(tmp_path, *written_engine(tmp_path)).execute(inputs, outputs)
        found.append(outputs["x0"].numpy())
        backend.memory.release()
    np.testing.assert_array_equal(found, found[:1] * 3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", [False, True], ids=["multistep", "fresh-noise"])
def test_a_whole_loop_equals_its_steps(tmp_path: Path, prompts: list[int], device: str, noise: bool) -> None:
    backend, engine, inputs, outputs = opened(tmp_path, device)
    fixed, schedule = feeds(4)
    if noise:
        schedule["previous_x0"] = np.random.default_rng(4).standard_normal((4, 1, 6), dtype=np.float32)
    for name, array in fixed.items():
        backend.memory.upload(array, inputs[name])
    for index in range(4):
        for name, rows in schedule.items():
            backend.memory.upload(rows[index].reshape(inputs[name].spec.shape), inputs[name])
        engine.execute(inputs, outputs)
        backend.memory.copy(outputs["next_latent"], inputs["latent"])
        if not noise:
            backend.memory.copy(outputs["x0"], inputs["previous_x0"])
    expected = {name: tensor.numpy() for name, tensor in outputs.items()}

    prompts.clear()
    backend.memory.upload(fixed["latent"], inputs["latent"])
    backend.memory.upload(np.zeros((1, 6), np.float32), inputs["previous_x0"])
    uploaded = {name: backend.memory.tensor(rows, TensorSpec(name, F32, rows.shape)) for name, rows in schedule.items()}
    engine.execute_loop(inputs, outputs, uploaded, 4)
    for name, tensor in outputs.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name])
        assert np.abs(expected[name]).min() > 0
    # Once on the CPU; on a GPU once per warm-up and once for the capture.
    assert len(prompts) == (1 if device == "cpu" else inductor._WARM_UPS + 1)


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_loop_reads_new_inputs(tmp_path: Path, prompts: list[int], device: str) -> None:
    backend, engine, inputs, outputs = opened(tmp_path, device)
    fixed, schedule = feeds(3)
    uploaded = {name: backend.memory.tensor(rows, TensorSpec(name, F32, rows.shape)) for name, rows in schedule.items()}
    found = []
    for factor in (1.0, -0.5, 1.0):
        for name, array in fixed.items():
            backend.memory.upload((array * factor).astype(np.float32), inputs[name])
        engine.execute_loop(inputs, outputs, uploaded, 3)
        found.append(outputs["next_latent"].numpy())
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() > 0.01


TOKENS = tuple(TensorSpec(name, "int64", (1, 5)) for name in ("caption_tokens", "caption_mask"))
EMBEDS = (TensorSpec("caption_embeds", F32, (1, 5, 4)),)
TABLE = torch.arange(28, dtype=torch.float32).view(7, 4)


def text_encoder(
    folder: Path, device: str, monkeypatch: pytest.MonkeyPatch, short: ShortStep | None = None
) -> tuple[Any, Any, list[str]]:
    """A text encoder that gives the rows of its table, times a weight; the backend, the engine, and what was called."""
    called: list[str] = []

    def prefix(rows: Any) -> tuple[Any]:
        called.append("prefix")
        return (rows * 1,)

    def final(kept: Any, rows: Any, weight: Any) -> tuple[Any]:
        called.append("final")
        return (torch.cat([kept, rows], dim=1) * weight,)

    def of_short(kept: Any, rows: Any, weight: Any) -> tuple[Any]:
        found = torch.cat([kept, rows], dim=1) * weight
        return (torch.nn.functional.pad(found, (0, 0, 0, 5 - found.shape[1])),)

    pieces = {"prefix": prefix, "final": final, "short": of_short}
    monkeypatch.setattr(inductor, "load_piece", lambda path: pieces[path.stem])
    program = Program(
        inductor.FORMAT_VERSION,
        device,
        "1",
        {name: f"{name}.pt2" for name in pieces},
        "weights.safetensors",
        (Call("prefix", ("prefix_rows",), ("kept",)),),
        (Call("final", ("kept", "rows", "weight"), ("caption_embeds",)),),
        "tables.safetensors",
        (
            Lookup("table", "caption_tokens", 0, 2, "prefix_rows"),
            Lookup("table", "caption_tokens", 2, 5, "rows"),
            Lookup("table", "caption_tokens", 2, 4, "short_rows"),
        ),
        short,
    )
    (folder / inductor.PROGRAM_NAME).write_bytes(msgspec.json.encode(program))
    safetensors.save_file({"weight": torch.tensor([2.0])}, str(folder / "weights.safetensors"))
    safetensors.save_file({"table": TABLE}, str(folder / "tables.safetensors"))
    entry = EngineEntry("inductor", (inductor.PROGRAM_NAME,), "AOTInductor", "1", device=device)
    component = ComponentEntry("text_encoder", F32, "", "0" * 64, TOKENS, EMBEDS, (entry,))
    backend = inductor.InductorBackend(device)
    return backend, backend.load(folder, component, entry), called


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_table_are_read_on_the_host(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    backend, engine, called = text_encoder(tmp_path, device, monkeypatch)
    memory = backend.memory
    inputs = {spec.name: memory.allocate(spec) for spec in TOKENS}
    outputs = {spec.name: memory.allocate(spec) for spec in EMBEDS}
    per_prompt = 1 if device == "cpu" else inductor._WARM_UPS + 1
    for tokens, prefixes in (([6, 0, 3, 3, 1], 1), ([6, 0, 5, 4, 0], 0), ([1, 0, 5, 4, 0], 1)):
        called.clear()
        memory.upload(np.array([tokens]), inputs["caption_tokens"])
        engine.execute(inputs, outputs)
        np.testing.assert_array_equal(outputs["caption_embeds"].numpy()[0], 2 * TABLE[tokens].numpy())
        assert called.count("prefix") == prefixes
    assert called.count("final") in (0, per_prompt)
    assert all(tensor.device.type == device for tensor in engine._work.tables.values.values())
    assert engine._work.tables._tables["table"].flags.owndata is False


@pytest.mark.parametrize("device", DEVICES)
def test_short_captions_have_calls_of_their_own(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    short = ShortStep(4, (Call("short", ("kept", "short_rows", "weight"), ("caption_embeds",)),))
    backend, engine, _ = text_encoder(tmp_path, device, monkeypatch, short)
    memory = backend.memory
    inputs = {spec.name: memory.allocate(spec) for spec in TOKENS}
    outputs = {spec.name: memory.allocate(spec) for spec in EMBEDS}
    tokens = [6, 0, 5, 4, 3]
    memory.upload(np.array([tokens]), inputs["caption_tokens"])
    for mask, computed in (
        ([1, 1, 1, 1, 0], 4),
        ([1, 1, 1, 1, 1], 5),
        ([1, 0, 0, 0, 0], 4),
        ([0, 0, 0, 0, 0], 4),
        ([1, 1, 0, 0, 1], 5),
    ):
        memory.upload(np.array([mask]), inputs["caption_mask"])
        engine.execute(inputs, outputs)
        found = outputs["caption_embeds"].numpy()[0]
        np.testing.assert_array_equal(found[:computed], 2 * TABLE[tokens[:computed]].numpy())
        assert not found[computed:].any()


@pytest.mark.parametrize("token", [-1, 7])
def test_a_token_that_the_table_lacks_is_refused(token: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, engine, _ = text_encoder(tmp_path, "cpu", monkeypatch)
    inputs = {spec.name: backend.memory.allocate(spec) for spec in TOKENS}
    outputs = {spec.name: backend.memory.allocate(spec) for spec in EMBEDS}
    backend.memory.upload(np.array([[0, 1, 2, token, 3]]), inputs["caption_tokens"])
    with pytest.raises(InputError, match=r"no row of 'table' has this number[\s\S]*0 to 6"):
        engine.execute(inputs, outputs)


def test_a_missing_file_of_tables_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_encoder(tmp_path, "cpu", monkeypatch)
    (tmp_path / "tables.safetensors").unlink()
    entry = EngineEntry("inductor", (inductor.PROGRAM_NAME,), "AOTInductor", "1", device="cpu")
    component = ComponentEntry("text_encoder", F32, "", "0" * 64, TOKENS, EMBEDS, (entry,))
    with pytest.raises(BundleError, match=r"tables\.safetensors cannot be loaded"):
        inductor.InductorBackend("cpu").load(tmp_path, component, entry)


def test_a_loop_checks_its_tensors(tmp_path: Path, prompts: list[int]) -> None:
    _, engine, inputs, outputs = opened(tmp_path, "cpu")
    with pytest.raises(InputError, match="wrong input tensors"):
        engine.execute_loop({"latent": inputs["latent"]}, outputs, {}, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "uint8"])
def test_memory_holds_what_was_uploaded(dtype: str, device: str) -> None:
    memory = inductor.TorchMemory(device)
    host = inductor.host_dtype(dtype)
    content = np.arange(1, 13).astype(host).reshape(3, 4)
    tensor = memory.tensor(content, TensorSpec("t", dtype, (3, 4)))
    np.testing.assert_array_equal(tensor.numpy(), content)
    other = memory.allocate(TensorSpec("o", dtype, (6,)))
    memory.copy(tensor, other, count=4, source_start=5, target_start=1)
    np.testing.assert_array_equal(other.numpy(), np.array([0, 6, 7, 8, 9, 0], host))
    with pytest.raises(ValueError, match="leaves"):
        memory.copy(tensor, other, count=7)


def test_a_copy_on_the_host_does_not_change_the_tensor() -> None:
    memory = inductor.TorchMemory("cpu")
    tensor = memory.tensor(np.ones(3, np.float32), TensorSpec("t", F32, (3,)))
    copy = tensor.numpy()
    copy[:] = 7
    np.testing.assert_array_equal(tensor.numpy(), np.ones(3, np.float32))


@pytest.mark.parametrize("device", DEVICES)
def test_pictures_larger_than_the_staging_memory_arrive_whole(device: str) -> None:
    """In parts, the last one shorter: 9.2 MB of which no two rows are the same; and a single number."""
    memory = inductor.TorchMemory(device)
    content = np.random.default_rng(0).integers(0, 256, (1, 1600, 1920, 3)).astype(np.uint8)
    assert content.nbytes > 2 * inductor._STAGING_BYTES
    image = memory.tensor(content, TensorSpec("image", "uint8", content.shape))
    np.testing.assert_array_equal(image.numpy(), content)
    assert memory.tensor(2.5, TensorSpec("guidance_scale", F32, ())).numpy() == 2.5


@pytest.mark.parametrize("device", DEVICES)
def test_staging_memory_that_an_engine_asked_for_first_serves_whoever_comes_after(device: str) -> None:
    memory = inductor.TorchMemory(device)
    with torch.inference_mode():
        staging = memory._staging
    part = torch.arange(5, dtype=torch.uint8, device=device)
    target = torch.empty(5, dtype=torch.uint8)
    inductor.copy_in_parts(part, target, staging[:3], memory.synchronize)
    assert torch.equal(target, part.cpu())
    assert memory._staging is staging


@pytest.mark.parametrize("size", [1, 4, 5, 12, 13])
def test_copies_in_parts_wait_for_each(size: int) -> None:
    source = torch.arange(size, dtype=torch.uint8)
    target, staging = torch.zeros_like(source), torch.empty(4, dtype=torch.uint8)
    waits: list[int] = []
    inductor.copy_in_parts(source, target, staging, lambda: waits.append(int(target.count_nonzero())))
    assert torch.equal(target, source)
    assert waits == [max(start - 1, 0) for start in range(0, size, 4)]


def test_what_was_uploaded_is_known_until_something_else_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = inductor.TorchMemory("cpu")
    downloads: list[str] = []
    download = memory.download
    monkeypatch.setattr(memory, "download", lambda tensor: (downloads.append(tensor.spec.name), download(tensor))[1])
    host = np.arange(3, dtype=np.int32)
    first = memory.tensor(host, TensorSpec("first", "int32", (3,)))
    host[:] = 9  # the caller's to use again
    second = memory.allocate(TensorSpec("second", "int32", (3,)))
    np.testing.assert_array_equal(memory.content(first), [0, 1, 2])
    assert downloads == []
    np.testing.assert_array_equal(memory.content(second), [0, 0, 0])
    memory.upload([7, 8, 9], second)
    np.testing.assert_array_equal(memory.content(second), [7, 8, 9])
    assert downloads == ["second"]
    memory.copy(second, first, count=1)
    np.testing.assert_array_equal(memory.content(first), [7, 1, 2])
    large = memory.tensor(np.ones(1 << 15, np.float32), TensorSpec("large", F32, (1 << 15,)))
    np.testing.assert_array_equal(memory.content(large), 1)
    assert downloads == ["second", "first", "large"]


def test_an_output_is_not_what_was_uploaded_to_it(tmp_path: Path, prompts: list[int]) -> None:
    backend, engine, inputs, outputs = opened(tmp_path, "cpu")
    name, tensor = next(iter(outputs.items()))
    backend.memory.upload(np.full(tensor.spec.shape, 5), tensor)
    engine.execute(inputs, outputs)
    np.testing.assert_array_equal(backend.memory.content(outputs[name]), tensor.numpy())


def test_damaged_files_are_refused(tmp_path: Path, prompts: list[int]) -> None:
    backend = inductor.InductorBackend("cpu")
    component, entry = written_engine(tmp_path, version=99)
    with pytest.raises(BundleError, match="format 99"):
        backend.load(tmp_path, component, entry)
    written_engine(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(BundleError, match=r"weights\.safetensors cannot be loaded"):
        backend.load(tmp_path, component, entry)
    (tmp_path / inductor.PROGRAM_NAME).write_bytes(b"{")
    with pytest.raises(BundleError, match=r"inductor\.json cannot be loaded"):
        backend.load(tmp_path, component, entry)


def test_a_file_that_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "block.pt2").write_bytes(b"no package")
    with pytest.raises(BundleError, match=r"block\.pt2 cannot be loaded"):
        inductor.load_piece(tmp_path / "block.pt2")


def manifest_for(device: str, version: str) -> Any:
    """A toy manifest of the target, compiled for a device with a torch."""
    manifest = toy_manifest(targets=("inductor",))
    engine = EngineEntry("inductor", ("inductor.json",), "AOTInductor", version, device=device)
    components = tuple(msgspec.structs.replace(c, engines=(engine,)) for c in manifest.components)
    return msgspec.structs.replace(manifest, components=components)


def test_the_target_runs_where_it_was_compiled() -> None:
    (verdict,) = examine_targets(manifest_for(inductor.cpu_device(), torch.__version__))
    assert verdict.usable, verdict.reason
    assert torch.__version__ in verdict.reason


@pytest.mark.parametrize(
    ("device", "version", "reason"),
    [
        ("cpu x86_64 AVX512", "0.1", "compiled with torch 0.1"),
        ("cpu vax none", torch.__version__, "compiled for cpu vax none, this is"),
        ("cuda sm_10", torch.__version__, "compiled for cuda sm_10, this is"),
    ],
)
def test_the_target_is_refused_elsewhere(device: str, version: str, reason: str) -> None:
    manifest = manifest_for(device, version)
    (verdict,) = examine_targets(manifest)
    assert not verdict.usable
    assert reason in verdict.reason
    with pytest.raises(TargetError, match="cannot run on this machine"):
        choose_target(manifest, "inductor")


def test_without_torch_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    (verdict,) = examine_targets(manifest_for("cuda sm_90", "2.11"))
    assert verdict.reason == "torch is not installed: it takes torch 2.11"


def test_a_broken_torch_is_a_target_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(TargetError, match="needs PyTorch"):
        inductor.torch_module()
    assert "libcudart" in str(inductor.inductor_problem("cpu x86_64 AVX512", "2.11"))


def test_a_manifest_keeps_the_device(tmp_path: Path) -> None:
    manifest = manifest_for("cuda sm_90", "2.11").sealed()
    (tmp_path / "manifest.json").write_bytes(manifest.to_json())
    from sana_runtime.manifest import read_manifest

    assert read_manifest(tmp_path).components[0].engines[0].device == "cuda sm_90"
    # Entries without a device are written as before there were any.
    assert b"device" not in toy_manifest().to_json()


def test_one_engine_at_a_time(bundle: Path) -> None:
    from tests.runtime.toys import RecordingBackend

    class Counting(RecordingBackend):
        def __init__(self) -> None:
            super().__init__()
            self.loads: list[str] = []

        def load(self, bundle: Path, component: ComponentEntry, entry: EngineEntry) -> Any:
            self.loads.append(component.name)
            return super().load(bundle, component, entry)

    backend = Counting()
    pipeline = Pipeline(bundle, toy_manifest(), "onnxruntime", backend, print, one_at_a_time=True)
    assert backend.loads == []
    pipeline.generate("fox", num_steps=2)
    assert backend.loads == ["text_encoder", "transformer", "vae_decoder"]
    assert list(pipeline._engines) == ["vae_decoder"]
    assert pipeline.latent_shape == LATENT_SHAPE
