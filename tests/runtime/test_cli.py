"""The command line: what it prints, how it ends, and that it checks before it works."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sana_runtime.cli import app
from sana_runtime.pipeline import Pipeline, draw_noise, seeded_generator
from tests.runtime.conftest import MakeBundle
from tests.runtime.toys import LATENT_SHAPE, edit_manifest

runner = CliRunner()


def run(*arguments: object) -> Any:
    return runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def refused(*arguments: object) -> str:
    """Run a command that must end as a user's error; returns what it said."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.output


def test_generate_writes_the_picture_with_its_settings(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "fox.png"
    result = run(
        "generate", bundle, "A red fox", "--output", output, "--num-steps", 3, "--guidance-scale", 2.5,
        "--seed", 4, "--negative-prompt", "blurry",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "target onnxruntime chosen" in result.output
    assert f"wrote {output}" in result.output
    assert "CPUExecutionProvider" in result.output
    with Image.open(output) as image:
        stored = json.loads(image.text["sana"])  # type: ignore[attr-defined]
        pixels = np.asarray(image)
    assert stored["prompt"] == "A red fox"
    assert (stored["num_steps"], stored["guidance_scale"], stored["seed"]) == (3, 2.5, 4)
    pipeline = Pipeline.load(bundle, report=lambda line: None)
    same = pipeline.generate("A red fox", "blurry", seed=4, num_steps=3, guidance_scale=2.5)
    np.testing.assert_array_equal(pixels, same.pixels)


def test_generate_from_a_latent_file(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "noise.npy", draw_noise(seeded_generator(4), LATENT_SHAPE))
    for name, source in (("a.png", ["--seed", 4]), ("b.png", ["--latent", tmp_path / "noise.npy"])):
        assert run("generate", bundle, "a fox", "-o", tmp_path / name, *source).exit_code == 0
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_an_empty_prompt_is_allowed(bundle: Path, tmp_path: Path) -> None:
    assert run("generate", bundle, "", "-o", tmp_path / "empty.png").exit_code == 0


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("fox.jpg", "ends in .png"),
        ("missing/fox.png", "there is no directory"),
        ("dir.png", "is a directory"),
    ],
)
def test_output_is_checked_before_the_bundle(tmp_path: Path, output: str, said: str) -> None:
    (tmp_path / "dir.png").mkdir()
    text = refused("generate", tmp_path / "no-bundle", "a fox", "-o", tmp_path / output)
    assert said in text
    assert not (tmp_path / "missing").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_directory(bundle: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert "no permission" in refused("generate", bundle, "a fox", "-o", closed / "fox.png")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-steps", 0], "1 to 1000"),
        (["--seed", -1], "whole number >= 0"),
        (["--guidance-scale", "nan"], "finite number"),
        (["--height", 1024], "height 64, width 96"),
        (["--target", "tensorrt-rtx"], "no target 'tensorrt-rtx'"),
    ],
    ids=str,
)
def test_wrong_flags_end_without_a_file(bundle: Path, tmp_path: Path, arguments: list[object], said: str) -> None:
    output = tmp_path / "fox.png"
    assert said in refused("generate", bundle, "a fox", "-o", output, *arguments)
    assert not output.exists()


def write_text(path: Path) -> None:
    path.write_text("not an array")


def write_pickle(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def write_archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, latent=np.zeros(LATENT_SHAPE, np.float32))


def write_cut(path: Path) -> None:
    np.save(path, np.zeros(LATENT_SHAPE, np.float32))
    path.write_bytes(path.read_bytes()[:-8])


def write_nan(path: Path) -> None:
    np.save(path, np.full(LATENT_SHAPE, np.nan, np.float32))


def write_wrong_shape(path: Path) -> None:
    np.save(path, np.zeros((1, 32, 4, 4), np.float32))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: None, "No such file"),
        (Path.touch, "cannot be read"),
        (Path.mkdir, "cannot be read"),
        (write_text, "cannot be read"),
        (write_pickle, "cannot be read"),
        (write_archive, "an .npz archive"),
        (write_cut, "cannot be read"),
        (write_nan, "192 of 192 values"),
        (write_wrong_shape, "[1, 32, 4, 4]"),
    ],
    ids=["missing", "empty", "directory", "text", "pickle", "npz", "cut", "nan", "shape"],
)
def test_wrong_latent_files(bundle: Path, tmp_path: Path, write: Any, said: str) -> None:
    path = tmp_path / "latent.npy"
    write(path)
    assert said in refused("generate", bundle, "a fox", "-o", tmp_path / "fox.png", "--latent", path)


def test_edited_manifest_is_an_error_of_four_parts(bundle: Path, tmp_path: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(width=64))
    text = refused("generate", bundle, "a fox", "-o", tmp_path / "fox.png")
    for part in ("damaged or was edited", "received:", "expected:", "do:"):
        assert part in text


def test_inspect_shows_components_targets_and_digests(bundle: Path) -> None:
    result = run("inspect", bundle)
    assert result.exit_code == 0, result.output
    for text in ("toy/sana", "96 x 64 pixels", "text_encoder", "caption_embeds", "1 x 302 x 8", "float32"):
        assert text in result.output
    assert "ONNX Runtime runs it on the CPU" in result.output
    assert "files: 4, sizes and SHA-256 as recorded" in result.output


def test_inspect_names_a_damaged_file_and_still_shows_the_bundle(bundle: Path) -> None:
    path = bundle / "vae_decoder.onnx"
    path.write_bytes(bytes(path.stat().st_size))
    result = run("inspect", bundle)
    assert result.exit_code == 1
    assert "toy/sana" in result.output
    assert "vae_decoder.onnx is not the file the manifest records" in result.output
    assert run("inspect", bundle, "--no-verify").exit_code == 0


def test_inspect_says_why_a_target_cannot_run(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(targets=("tensorrt-rtx", "onnxruntime"), dtype="bfloat16")
    output = run("inspect", bundle).output
    assert "tensorrt_rtx is not installed" in output or "CUDA" in output
    assert "compute in bfloat16" in output or "through CUDA" in output


def test_bench_reports_stages_and_where_it_ran(make_bundle: MakeBundle, tmp_path: Path) -> None:
    json_file = tmp_path / "rows.json"
    result = run(
        "bench", make_bundle(), "--runs", 3, "--warmup", 1, "--num-steps", 2, "--json", json_file,
        "--threads", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "ran on CPU" in result.output
    assert "1 threads" in result.output
    rows = json.loads(json_file.read_bytes())
    assert [row["stage"] for row in rows["rows"]] == [
        "vae_decoder" if stage == "decode" else stage
        for stage in ("text_encoder", "transformer", "decode", "total", "step")
    ]
    for row in rows["rows"]:
        assert 0 < row["min_ms"] <= row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] <= row["max_ms"]
    assert (rows["runs"], rows["warmup"], rows["num_steps"]) == (3, 1, 2)
    assert rows["host_peak_mib"] > 10
    assert rows["device_peak_mib"] is None


def test_bench_checks_its_output_first(tmp_path: Path) -> None:
    text = refused("bench", tmp_path / "no-bundle", "--json", tmp_path / "missing" / "rows.json")
    assert "there is no directory" in text


def test_version() -> None:
    assert run("--version").output.startswith("sana-runtime 0.")


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys; sys.argv = ['sana-runtime', 'generate', '--help']\n"
        "from sana_runtime.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'numpy', 'onnxruntime', 'tokenizers', 'PIL', 'msgspec'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--guidance-scale" in done.stdout


def test_interrupt_exits_130_and_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "fox.png"
    output.parent.mkdir()
    command = [sys.executable, "-m", "sana_runtime.cli", "generate", str(bundle), "a fox", "-o", str(output)]
    slow = tmp_path / "sitecustomize.py"
    slow.write_text(
        "import sana_runtime.pipeline as pipeline, signal, time\n"
        # A test run in the background hands down an ignored interrupt.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "decode = pipeline.Pipeline.decode\n"
        "def slow(self, latent):\n"
        "    print('decoding', flush=True); time.sleep(60)\n"
        "    return decode(self, latent)\n"
        "pipeline.Pipeline.decode = slow\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "decoding\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert list(output.parent.iterdir()) == []
