"""A tiny bundle measured beside its peers on the CPU: parity first, every subject on its own, nothing lost."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sana_export.bench import parity, peers, processes
from sana_export.bench.cuda_graphs import GraphedCall
from sana_export.bench.matrix import MATRIX, Group, Matrix, Settings, selected
from sana_export.bench.onnxruntime_copies import count_operators, describe_copies
from sana_export.bench.rows import Case, read_rows
from sana_export.bench.run import Bench, check_parity
from sana_export.bench.subjects import Failed, Finding, Judged, Subject, Timed
from sana_export.cli import app
from sana_export.commands.bench import Peer
from sana_export.parity.ladder import EngineCandidate
from sana_export.parity.tolerance import ParityError
from sana_export.prompting import tokenizer_entry
from sana_export.reference import dc_ae, transformer
from sana_export.weights.checkpoint import open_checkpoint
from sana_runtime.engine import HostMemory
from sana_runtime.manifest import read_manifest
from sana_runtime.onnxruntime_engine import OnnxRuntimeBackend

SIDE = 64


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("random:tiny", SIDE, SIDE)


def subject_of(bundle: Path, **fields: Any) -> Subject:
    manifest = read_manifest(bundle)
    common: dict[str, Any] = {
        "kind": "parity",
        "source": manifest.model.source,
        "bundle": str(bundle),
        "height": SIDE,
        "width": SIDE,
        "caption_tokens": manifest.tokenizer.padded_length,
        "num_steps": 1,
        "runs": 2,
    }
    return Subject(**{**common, **fields})


def peer_subject(name: str, stages: tuple[str, ...], **fields: Any) -> Subject:
    checkpoint = open_checkpoint(fields.get("source", "random:tiny"))
    tokens = tokenizer_entry(checkpoint.tokenizer_json(), "tokenizer.json", checkpoint.pipeline_class).padded_length
    common: dict[str, Any] = {"source": "random:tiny", "height": SIDE, "width": SIDE, "num_steps": 2, "runs": 2}
    return Subject(kind="peer", peer=name, stages=stages, caption_tokens=tokens, **{**common, **fields})


def here(subject: Subject) -> list[Finding]:
    """Measured in this process, where monkeypatching reaches it."""
    return processes.measure(subject, isolate=False)


# --- The command ---


def test_bench_measures_engines_and_peer(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    arguments = ["bench", str(bundle), "--num-steps", "2", "--runs", "2", "--peer", "eager", "--json", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_bytes())["rows"]
    found = {(row["subject"], row["stage"]): row for row in rows}
    for subject in ("sana-export onnxruntime", "diffusers eager"):
        for stage in ("text_encoder", "step", "vae_decoder", "total", "cold_start"):
            row = found[subject, stage]
            assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"], row
            assert row["error"] == ""
            if stage != "cold_start":
                assert row["gap"] == pytest.approx(row["p50_ms"] / row["floor_ms"], rel=1e-3)
        assert found[subject, "cold_start"]["p50_ms"] > found[subject, "total"]["p50_ms"]
        assert found[subject, "total"]["p50_ms"] > 2 * found[subject, "step"]["p50_ms"]
    assert "relative RMS" in found["sana-export onnxruntime", "parity"]["note"]
    assert re.search(r"transformer \d.*, vae_decoder \d", found["sana-export onnxruntime", "total"]["note"])
    assert found["sana-export onnxruntime", "build"]["p50_ms"] > 0
    assert len({row["run"] for row in rows}) == 1


def test_no_time_of_a_bundle_of_other_weights(bundle: Path) -> None:
    arguments = ["bench", str(bundle), "--checkpoint", "random:tiny-4k", "--peer", "none"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "parity does not hold" in result.output
    assert "median ms" not in result.output


# --- Parity ---


def test_parity_holds_and_says_where(bundle: Path) -> None:
    judged = check_parity(Bench(lambda _: None, isolate=False), subject_of(bundle))
    assert judged.device == "cpu"
    assert judged.target == "onnxruntime"
    assert "CPU" in judged.description


def test_a_wrong_engine_is_red(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = EngineCandidate.decode
    monkeypatch.setattr(EngineCandidate, "decode", lambda self, latent: np.flip(decode(self, latent), axis=1))
    findings = here(subject_of(bundle))
    assert [type(finding) for finding in findings] == [Failed]
    assert findings[0].red
    with pytest.raises(ParityError, match="no time is measured"):
        check_parity(Bench(lambda _: None, isolate=False), subject_of(bundle))


@pytest.mark.parametrize(("change", "right"), [(0, True), (3, True), (60, False)], ids=["same", "rounding", "wrong"])
def test_a_loop_that_paints_something_else_is_red(change: int, right: bool) -> None:
    """What is timed is the loop as a whole; the ladder saw single steps."""
    watched = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    whole = np.clip(watched.astype(int) + change, 0, 255).astype(np.uint8)
    pipeline = SimpleNamespace(
        generate=lambda prompt, seed, num_steps, on_step: SimpleNamespace(pixels=watched if on_step else whole),
        manifest=SimpleNamespace(component=lambda name: SimpleNamespace(dtype="bfloat16")),
    )
    check = partial(parity._check_loop, pipeline, SimpleNamespace(seed=0), open_checkpoint("random:0.6b"))  # type: ignore[arg-type]
    if right:
        check()
    else:
        with pytest.raises(ParityError, match="whole loop"):
            check()


@pytest.mark.parametrize(
    ("memory", "device"),
    [
        (HostMemory(), "cpu"),
        (SimpleNamespace(device=torch.device("cpu")), "cpu"),
        (SimpleNamespace(device=torch.device("cuda")), "cuda"),
        (SimpleNamespace(stream=7), "cuda"),
    ],
    ids=["host", "torch on the cpu", "torch on a gpu", "cuda-python"],
)
def test_where_a_backend_computes(memory: object, device: str) -> None:
    assert parity._device(SimpleNamespace(memory=memory)) == device  # type: ignore[arg-type]


def test_the_reference_is_the_specification_while_it_judges() -> None:
    before = dc_ae.linear_attention
    with parity._specified_attention():
        assert transformer.linear_attention.keywords == {"impl": "reference"}
        assert dc_ae.linear_attention is transformer.linear_attention
    assert dc_ae.linear_attention is before


# --- Processes ---


def test_an_error_is_a_finding_not_a_crash() -> None:
    (finding,) = here(Subject(kind="parity", bundle="nowhere"))
    assert isinstance(finding, Failed)
    assert "is not a bundle" in finding.error


def test_a_crash_is_a_finding_with_its_last_words() -> None:
    (finding,) = processes.measure(Subject(kind="nonsense"))  # type: ignore[arg-type]
    assert isinstance(finding, Failed)
    assert finding.stage == "all"
    assert "code 1" in finding.error
    assert "nonsense" in finding.error


def test_a_time_limit_keeps_what_was_found() -> None:
    started = time.monotonic()
    with pytest.raises(processes.OutOfTime) as caught:
        processes.measure(Subject(kind="ceilings"), timeout_s=0.05)
    assert caught.value.findings == []
    assert time.monotonic() - started < 20


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "findings.jsonl"
    path.write_bytes(b'{"type":"Failed","stage":"step","error":"no"}\n{"type":"Timed","stage":"to')
    assert processes._read(path) == [Failed("step", "no")]


# --- Peers ---


def test_fused_projections_compute_the_same() -> None:
    subject = peer_subject("eager", ("step",), source="random:tiny-qknorm")
    peer = peers.DiffusersPeer(open_checkpoint(subject.source), subject, peers.PEERS["eager"])
    call = peer.stage_call("step")
    with torch.no_grad():
        expected = call()[0]
        peers.fuse_qkv(peer.pipeline.transformer)
        # Equal sums in another blocking: fp32 roundings of a dot product of 64, through two blocks.
        torch.testing.assert_close(call()[0], expected, rtol=1e-4, atol=1e-5)
    assert not hasattr(peer.pipeline.transformer.transformer_blocks[0].attn1, "to_q")


@pytest.mark.parametrize(
    ("by_block", "stages"),
    [pytest.param(False, ("step",), id="whole"), pytest.param(True, ("step", "vae_decoder", "total"), id="by-block")],
)
def test_a_compiled_peer_is_measured(by_block: bool, stages: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The wiring, with a backend that does not call a C++ compiler for minutes."""
    recipe = peers.Recipe("compiled", {"backend": "aot_eager", "dynamic": False}, by_block, True, True, True)
    monkeypatch.setitem(peers.PEERS, "compile", recipe)
    findings = here(peer_subject("compile", stages))
    assert tuple(finding.stage for finding in findings if isinstance(finding, Timed)) == stages
    assert not [finding for finding in findings if isinstance(finding, Failed)]


def test_sprint_is_measured_with_its_own_pipeline() -> None:
    findings = here(peer_subject("eager", ("step", "total"), source="random:tiny-sprint"))
    assert [finding.stage for finding in findings if isinstance(finding, Timed)] == ["step", "total"], findings


def test_one_stages_failure_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(peers.DiffusersPeer, "_vae", fail)
    findings = here(peer_subject("eager", ("step", "vae_decoder", "text_encoder")))
    assert [finding.stage for finding in findings if isinstance(finding, Timed)] == ["step", "text_encoder"]
    assert Failed("vae_decoder", "RuntimeError: out of memory") in findings


def test_the_command_offers_every_peer() -> None:
    assert {peer.value for peer in Peer} - {"all", "none"} == peers.PEERS.keys()


def test_a_peer_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    (finding,) = here(peer_subject("torch-tensorrt", ("step",)))
    assert isinstance(finding, Failed)
    assert "not available: torch_tensorrt cannot be imported" in finding.error


@pytest.mark.gpu
def test_a_graphed_call_follows_its_arguments() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    graphed = GraphedCall(lambda x, *, factor, scale=1.0: (x * factor + scale, "dropped"))
    kept = []
    for seed in range(3):
        torch.manual_seed(seed)
        x, factor = torch.randn(5, 7, device="cuda"), torch.randn(7, device="cuda")
        kept.append((graphed(x, factor=factor, scale=2.0)[0], x * factor + 2.0))
    assert graphed.problem == ""
    for found, expected in kept:  # also the earlier results, after later replays
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    wide = torch.ones(2, 7, device="cuda")
    torch.testing.assert_close(graphed(wide, factor=wide[0])[0], wide + 1)


@pytest.mark.gpu
def test_what_cannot_be_captured_is_called_as_it_is() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    graphed = GraphedCall(lambda x: (x + x.sum().item(),))
    ones = torch.ones(3, device="cuda")
    torch.testing.assert_close(graphed(ones)[0], ones + 3)
    assert graphed.problem.startswith("no CUDA graph")
    torch.testing.assert_close(graphed(2 * ones)[0], 2 * ones + 6)


@pytest.mark.gpu
def test_random_numbers_go_on_after_a_capture_that_failed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(3)
    expected = [torch.randn(5, device="cuda") for _ in range(2)]
    torch.manual_seed(3)
    found = [torch.randn(5, device="cuda")]
    graphed = GraphedCall(lambda x: (x + x.sum().item(),))
    graphed(torch.ones(3, device="cuda"))
    assert graphed.problem
    found.append(torch.randn(5, device="cuda"))
    assert torch.equal(torch.stack(found), torch.stack(expected))


# --- ONNX Runtime ---


def test_operators_are_counted_where_they_ran(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    backend = OnnxRuntimeBackend(threads=1)
    counted = count_operators(bundle, manifest, "transformer", backend)
    assert {provider for _, provider in counted} == {"CPUExecutionProvider"}
    assert counted["Conv", "CPUExecutionProvider"] == 2, counted
    assert "transformer: 0 copies" in describe_copies(bundle, manifest, backend)


# --- The matrix ---


def test_the_matrix_holds_every_case_of_the_issue() -> None:
    ours = {(group.model, group.side, precision) for group in MATRIX for precision in group.precisions}
    models, sides, precisions = ("random:0.6b", "random:1.6b"), (512, 1024, 2048, 4096), ("bf16", "fp8", "int8")
    assert ours == {(m, s, p) for m in models for s in sides for p in precisions}
    peers_of = {(group.model, group.side, peer) for group in MATRIX for peer in group.peers}
    rivals = ("eager", "max-autotune", "recipe", "torch-tensorrt")
    assert {(m, s, p) for m in models for s in sides for p in rivals} <= peers_of
    assert len(peers_of) == sum(len(group.peers) for group in MATRIX)
    assert MATRIX[0] == Group("random:0.6b", 1024, ("fp8", "bf16", "int8"), ("eager", "compile", "channels-last"))


def test_a_choice_of_the_matrix() -> None:
    chosen = [*selected(MATRIX, ["random:1.6b"], [1024], ["fp8"], ["eager"])]
    assert chosen == [Group("random:1.6b", 1024, ("fp8",), ("eager",))]
    assert [*selected(MATRIX, ["random:0.6b"], [512], ["int8"], [])] == [Group("random:0.6b", 512, ("int8",), ())]


@pytest.fixture
def tiny_matrix(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Matrix]:
    """A matrix whose builds are the tiny bundle, measured in this process; `said` are its lines."""

    def build(self: Matrix, case: Case, target: Path) -> str:
        if not target.exists():
            target.symlink_to(bundle)
        return ""

    monkeypatch.setattr(Matrix, "_build", build)
    (tmp_path / "work" / "bundles").mkdir(parents=True)

    def make(said: list[str], **fields: Any) -> Matrix:
        limits = {name: fields.pop(name, None) for name in ("deadline", "peer_s")}
        bench = Bench(said.append, runs=2, warmup=0, commit="abc", isolate=False, **limits)
        settings = Settings(tmp_path / "work", tmp_path / "rows.csv", "onnxruntime", "cpu", num_steps=1, **fields)
        return Matrix(bench, settings)

    return make


TINY = Group("random:tiny", SIDE, ("fp32",), ("eager", "torch-tensorrt"))


def test_a_peer_that_takes_too_long_is_left(tiny_matrix: Callable[..., Matrix], tmp_path: Path) -> None:
    said: list[str] = []
    assert tiny_matrix(said, peer_s=0).run(iter([Group("random:tiny", SIDE, (), ("eager",)), TINY]))
    assert "diffusers eager: its time ended, 0 findings are kept" in said
    assert {row.subject for row in read_rows(tmp_path / "rows.csv")} == {"sana-export onnxruntime"}


def test_a_second_run_measures_nothing(tiny_matrix: Callable[..., Matrix], tmp_path: Path) -> None:
    first: list[str] = []
    assert tiny_matrix(first).run(iter([TINY]))
    rows = read_rows(tmp_path / "rows.csv")
    stages = {(row.subject, row.stage) for row in rows if not row.error}
    for stage in ("text_encoder", "step", "vae_decoder", "total", "cold_start"):
        assert {("sana-export onnxruntime", stage), ("diffusers eager", stage)} <= stages
    (failed,) = [row for row in rows if row.error]
    assert (failed.subject, failed.stage) == ("diffusers torch-tensorrt", "all")
    assert {row.model for row in rows} == {"random:tiny"}

    second: list[str] = []
    assert tiny_matrix(second).run(iter([TINY]))
    assert read_rows(tmp_path / "rows.csv") == rows
    assert [line.endswith("on this device and versions") for line in second] == [True] * 3

    third: list[str] = []
    assert tiny_matrix(third, retry_errors=True).run(iter([TINY]))
    assert sum(line.startswith("---") for line in third) == 1


def test_a_spent_budget_stops_before_the_next_subject(tiny_matrix: Callable[..., Matrix], tmp_path: Path) -> None:
    said: list[str] = []
    assert not tiny_matrix(said, deadline=time.monotonic() - 1).run(iter([TINY]))
    assert "run again to go on" in said[-1]
    assert read_rows(tmp_path / "rows.csv") == []


def test_red_parity_is_a_row_without_a_time(
    tiny_matrix: Callable[..., Matrix], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = EngineCandidate.decode
    monkeypatch.setattr(EngineCandidate, "decode", lambda self, latent: np.flip(decode(self, latent), axis=1))
    assert tiny_matrix([]).run(iter([Group("random:tiny", SIDE, ("fp32",), ())]))
    (row,) = read_rows(tmp_path / "rows.csv")
    assert row.stage == "all"
    assert row.p50_ms is None
    assert "parity does not hold" in row.error


def test_a_target_that_cannot_run_is_recorded_as_skipped(tmp_path: Path) -> None:
    """ONNX Runtime without its CUDA provider, asked for on a GPU: a row, and no build."""
    bench = Bench(lambda _: None, commit="abc", isolate=False)
    settings = Settings(tmp_path / "work", tmp_path / "rows.csv", "onnxruntime", "cuda", num_steps=1)
    assert Matrix(bench, settings).run(iter([Group("random:tiny", SIDE, ("bf16",), ())]))
    (row,) = read_rows(tmp_path / "rows.csv")
    assert row.stage == "skipped"
    assert "onnxruntime-gpu is not installed" in row.error


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--minutes", "0", "0 given, more than 0 minutes expected"),
        ("--peer-minutes", "-1", "-1 given, more than 0"),
        ("--minutes", "x", "invalid"),
    ],
)
def test_a_time_that_is_none_is_refused(option: str, value: str, said: str) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "benchmarks/end_to_end.py", f"{option}={value}", "--list"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert said in run.stderr
    assert not run.stdout


def test_the_script_lists_what_it_would_measure() -> None:
    command = [sys.executable, "benchmarks/end_to_end.py", "--list", "--model", "random:0.6b", "--side", "1024"]
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([*command, "--peer", "eager"], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["random:0.6b 1024 fp8,bf16,int8 eager"]


def test_a_judged_finding_survives_the_wire() -> None:
    judged = Judged("cuda", "GPU", "inductor", "passed")
    encoded = processes.msgspec.json.encode(judged)
    assert processes.finding_decoder.decode(encoded) == judged
