"""How many steps Flow-DPM-Solver and Flow-Euler need on the trained model, by flow shift and guidance scale.

Sana's paper reports that Flow-DPM-Solver's 14 to 20 steps are as good as Flow-Euler's 28 to 50. Paints the prompts of
a split in fp32, reads every picture, and writes one row per setting to benchmarks/results/nano_solvers.csv, with the
prompts that are right as a hexadecimal number, bit i for prompt i: two settings are compared prompt by prompt. What the
model is shipped with is chosen on the validation split; the test split judges it. On a GPU the reference modules paint,
in batches; elsewhere a bundle in ONNX Runtime, one process per core, which is built where it is missing.

    python scripts/measure_solvers.py --bundles build/quality --split validation --flow-shift 3 4 5 6
    python scripts/measure_solvers.py --bundles build/quality --split test --prompts 500 --flow-shift 6

Rows that are there already are not measured again.
"""

import argparse
import csv
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
from measure_quality import (
    CORES,
    DPM,
    EULER,
    ModulePainter,
    Pixels,
    Way,
    build_bundle,
    end_workers_on_sigterm,
    judged,
    paint_with_bundle,
    read_rows,
    scheduler_of,
    this_commit,
)

from sana_export.scenes.prompts import prompts
from sana_export.scenes.scoring import ATTRIBUTES, summarise
from sana_export.scenes.vocabulary import Split
from sana_export.weights.checkpoint import SHIPPED_MODEL, open_checkpoint
from sana_runtime.errors import SanaError
from sana_runtime.files import whole_file

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "nano_solvers.csv"
RUNS = ((DPM, 8), (DPM, 14), (DPM, 20), (EULER, 28), (EULER, 50))


@dataclass(frozen=True)
class Setting:
    """What the prompts of a split are painted with."""

    split: str
    flow_shift: float
    guidance_scale: float
    solver: str
    steps: int


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    """Those that are asked for."""
    scheduler = scheduler_of(DPM)
    for shift in arguments.flow_shift or [scheduler.flow_shift]:
        for scale in arguments.guidance_scale or [scheduler.default_guidance_scale]:
            for solver, steps in RUNS:
                yield Setting(arguments.split, shift, scale, solver, steps)


class Painter:
    """Paints the prompts, by whichever way is faster here."""

    def __init__(self, bundles: Path, texts: tuple[str, ...]) -> None:
        self._texts = texts
        self.on_gpu = torch.cuda.is_available()
        self.cores = CORES
        if self.on_gpu:
            torch.backends.cudnn.allow_tf32 = False
            self._modules = ModulePainter("fp32", None, texts, "cuda")
        else:
            self._bundle = build_bundle(bundles, Way("fp32", "onnxruntime", DPM, 1))

    @property
    def device(self) -> str:
        """As a row names it."""
        return torch.cuda.get_device_name() if self.on_gpu else f"{self.cores} CPU cores, {platform.machine()}"

    def paint(self, setting: Setting) -> Iterator[Pixels]:
        """The picture of every prompt."""
        scheduler = scheduler_of(setting.solver, setting.flow_shift)
        if self.on_gpu:
            return self._modules.paint(scheduler, setting.steps, setting.guidance_scale)
        scale = setting.guidance_scale
        return paint_with_bundle(self._bundle, self._texts, scheduler, setting.steps, scale, self.cores)


def measured(arguments: argparse.Namespace) -> None:
    """Measure what is missing, and write each row at once."""
    begun = time.monotonic()
    weights = open_checkpoint(SHIPPED_MODEL).digest("transformer")[:12]
    # Rows of other weights say nothing about the model that is shipped.
    rows: list[dict[str, Any]] = [row for row in read_rows(arguments.rows) if row["weights"] == weights]
    known = {(*_key(row), row["prompts"]) for row in rows}
    asked = [item for item in settings(arguments) if (*_key(asdict(item)), str(arguments.prompts)) not in known]
    if not asked:
        print("everything asked for is measured already")
        return
    found = prompts(arguments.split, arguments.prompts)
    painter = Painter(arguments.bundles, tuple(prompt.text for prompt in found))
    with ProcessPoolExecutor(painter.cores, get_context("spawn")) as pool:
        for setting in asked:
            painted = zip(painter.paint(setting), found, strict=True)
            futures = [pool.submit(judged, picture, prompt, None) for picture, prompt in painted]
            scores = [future.result().score for future in futures]
            rates = {item.name: item.rate for item in summarise(scores) if item.scope != "kind"}
            row = {
                **asdict(setting),
                "prompts": len(found),
                **{name: round(rates[name], 4) for name in ("overall", *ATTRIBUTES)},
                "right": f"{sum(item.overall << index for index, item in enumerate(scores)):x}",
                "weights": weights,
                "device": painter.device,
                "versions": f"torch {torch.__version__}, onnxruntime {version('onnxruntime')}",
                "commit": arguments.commit,
                "date": date.today().isoformat(),
            }
            rows = [other for other in rows if _key(other) != _key(row)] + [row]
            _write(arguments.rows, rows)
            print(f"[{time.monotonic() - begun:6.0f} s] {' '.join(_key(row))}: {row['overall']:.1%}", flush=True)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("split", "flow_shift", "guidance_scale", "solver", "steps"))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    ordered = sorted(rows, key=lambda row: (row["split"], float(row["flow_shift"]), float(row["guidance_scale"])))
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*ordered[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)


def main() -> int:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, required=True, help="folder of bundles, one per precision")
    parser.add_argument("--split", choices=get_args(Split), default="validation")
    parser.add_argument("--prompts", type=int, default=430, help="the validation split has 432")
    parser.add_argument("--flow-shift", type=float, nargs="+", help="default: the model's")
    parser.add_argument("--guidance-scale", type=float, nargs="+", help="default: the model's")
    parser.add_argument("--commit", default=this_commit(), help="default: git's")
    parser.add_argument("--rows", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for name in ("flow_shift", "guidance_scale"):
        for number in getattr(arguments, name) or ():
            if not number > 0:
                parser.error(f"--{name.replace('_', '-')}: {number} given, a number above 0 expected")
    end_workers_on_sigterm()
    try:
        measured(arguments)
    except SanaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
