"""Build models and append what each stage cost to benchmarks/results/builds.csv.

    python scripts/measure_builds.py random:0.6b random:1.6b
    python scripts/measure_builds.py random:0.6b --components transformer,vae_decoder --sizes 512x512,768x1344
    python scripts/measure_builds.py random:0.6b --precision fp8 --targets tensorrt-rtx --calibration 2,4,256
    python scripts/measure_builds.py random:0.6b --precision int8 --base-precision fp32 --targets onnxruntime

Every row is a stage of a fresh build: seconds, peak resident memory, size of its files, the memory bound it is held
against (twice the largest component's 16-bit weights plus 4 GiB), and of the gate what it found.
"""

import argparse
import csv
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sana_export.build import build
from sana_export.build_request import BuildRequest, CalibrationSettings
from sana_export.bundle import read_build_record
from sana_export.commands.build import ProgressReport
from sana_export.weights.checkpoint import open_checkpoint
from sana_runtime.contract import COMPONENTS
from sana_runtime.manifest import Manifest

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "builds.csv"
COLUMNS = [
    "date",
    "commit",
    "machine",
    "model",
    "precision",
    "height",
    "width",
    "stage",
    "seconds",
    "peak_memory_mib",
    "memory_bound_mib",
    "files_mib",
    "within_bound",
    "versions",
    "gate",
]


def measure(
    model: str,
    precision: str,
    base_precision: str | None,
    height: int,
    width: int,
    components: tuple[str, ...],
    targets: tuple[str, ...],
    calibration: CalibrationSettings,
    folder: Path,
) -> list[dict[str, object]]:
    """Rows of one fresh build."""
    from rich.console import Console

    output = folder / "bundle"
    request = BuildRequest(
        model,
        precision,
        targets,
        height,
        width,
        output,
        components=components,  # type: ignore[arg-type]
        calibration=calibration,
        base_precision=base_precision,  # type: ignore[arg-type]
    )
    with ProgressReport(Console(highlight=False)) as reporter:
        manifest = build(request, reporter)
    checkpoint = open_checkpoint(model)
    largest = max(sum(t.count for t in checkpoint.weights(name).values()) for name in COMPONENTS)
    bound = (2 * largest * 2 >> 20) + 4096
    engines = {f"{e.builder} {e.builder_version}" for c in manifest.components for e in c.engines}
    shared = {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} x {_processor()}",
        "model": model,
        "precision": precision,
        "height": height,
        "width": width,
        "memory_bound_mib": bound,
        "versions": "; ".join((f"torch {manifest.created_with['torch']}", *sorted(engines))),
    }
    rows = []
    for stage, record in read_build_record(output).stages.items():
        peak = int(record.measured["peak_memory_mib"])
        rows.append(
            {
                **shared,
                "stage": stage,
                "seconds": record.measured["seconds"],
                "peak_memory_mib": peak,
                "files_mib": round(sum(entry.size for entry in record.files) / 2**20, 1),
                "within_bound": "yes" if peak <= bound else "no",
                "gate": _gate(manifest) if stage == "gate" else "",
            }
        )
    shutil.rmtree(output)
    return rows


def _gate(manifest: Manifest) -> str:
    gate = manifest.quantization.gate if manifest.quantization else None
    assert gate is not None, "a stage 'gate' leaves an entry"
    figures = f"x0 SQNR {gate.x0_sqnr_db:.1f} dB; PSNR {gate.psnr_db:.1f} dB; SSIM {gate.ssim:.3f}"
    return f"{'passed' if gate.passed else 'MISSED'}: {figures}; {gate.prompts} prompts; {gate.num_steps} steps"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parents[2]).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--base-precision", help="of what a recipe does not quantise")
    parser.add_argument("--sizes", default="1024x1024", help="comma-separated HEIGHTxWIDTH in pixels")
    parser.add_argument("--components", default=",".join(COMPONENTS))
    parser.add_argument("--targets", default="tensorrt-rtx,onnxruntime")
    parser.add_argument("--calibration", default="4,8,512", help="prompts,steps,longest side in pixels of a recipe's")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    new = not RESULTS.exists()
    for model in arguments.models:
        for size in arguments.sizes.split(","):
            height, width = (int(side) for side in size.split("x"))
            components = tuple(arguments.components.split(","))
            targets = tuple(arguments.targets.split(","))
            arguments.folder.mkdir(parents=True, exist_ok=True)
            prompts, steps, side = (int(figure) for figure in arguments.calibration.split(","))
            settings = CalibrationSettings(num_prompts=prompts, num_steps=steps, side=side)
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                rows = measure(
                    model,
                    arguments.precision,
                    arguments.base_precision,
                    height,
                    width,
                    components,
                    targets,
                    settings,
                    Path(folder),
                )
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            with RESULTS.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if new:
                    writer.writeheader()
                    new = False
                writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
