"""What the trained model scores: pictures of prompts, read and judged."""

import csv
import io
import json
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sana_export.scenes.prompts import Prompt, prompts
from sana_export.scenes.reading import read_picture
from sana_export.scenes.scoring import Score, score, summarise
from sana_runtime.files import whole_file
from scripts.train_nano.charts import save_sheet
from scripts.train_nano.sampling import STEPS, Painter, Solver
from scripts.train_nano.sizes import GUIDANCE

# The reader of pictures needs it; training alone does not.
CAN_JUDGE = find_spec("skimage") is not None
GUIDANCES = (2.0, 3.0, 4.5, 6.0)
RUNS: tuple[tuple[Solver, int], ...] = (
    ("flow_dpm_solver", 8),
    ("flow_dpm_solver", 14),
    ("flow_dpm_solver", 20),
    ("flow_dpm_solver", 50),
    ("flow_euler", 8),
    ("flow_euler", 14),
    ("flow_euler", 20),
    ("flow_euler", 28),
    ("flow_euler", 50),
)
_READ_AT_ONCE = 16
_SHEET = 64


@dataclass(frozen=True)
class Evaluation:
    """Scores of one way of painting. `pictures` [n, side, side, 3]."""

    prompts: tuple[Prompt, ...]
    pictures: npt.NDArray[np.uint8]
    scores: tuple[Score, ...]

    @property
    def overall(self) -> float:
        """Share of the prompts of which every claim holds."""
        return sum(item.overall for item in self.scores) / len(self.scores)

    def save_sheet(self, path: Path) -> None:
        """The first pictures, wrong ones marked."""
        labels = [
            ("" if item.overall else "x ") + prompt.text for prompt, item in zip(self.prompts, self.scores, strict=True)
        ]
        save_sheet(self.pictures[:_SHEET], labels[:_SHEET], path)


def judge(pictures: npt.NDArray[np.uint8], asked: Sequence[Prompt]) -> list[Score]:
    """Scores of some pictures, for a process of the pool."""
    return [score(prompt, read_picture(picture)) for picture, prompt in zip(pictures, asked, strict=True)]


def evaluate(painter: Painter, asked: tuple[Prompt, ...], pool: Executor, **options: Any) -> Evaluation:
    """Paint and judge every prompt."""
    pictures = painter.paint([prompt.text for prompt in asked], **options)
    futures = [
        pool.submit(judge, pictures[start : start + _READ_AT_ONCE], asked[start : start + _READ_AT_ONCE])
        for start in range(0, len(asked), _READ_AT_ONCE)
    ]
    return Evaluation(asked, pictures, tuple(item for future in futures for item in future.result()))


def choose_guidance(painter: Painter, pool: Executor, count: int) -> tuple[float, dict[str, float]]:
    """The guidance scale that validation prompts are painted best with, and each one's share of right pictures.

    The size's own is kept unless another is better by more than one picture in a hundred.
    """
    asked = prompts("validation", count)
    found = {str(scale): evaluate(painter, asked, pool, guidance=scale).overall for scale in GUIDANCES}
    best = max(found, key=lambda scale: found[scale])
    return (float(best) if found[best] > found[str(GUIDANCE)] + 0.01 else GUIDANCE), found


def final_evaluation(
    painter: Painter,
    pool: Executor,
    folder: Path,
    count: int,
    validation: int,
    runs: Sequence[tuple[Solver, int]] = RUNS,
) -> dict[str, Any]:
    """Guidance from validation prompts, then every solver and number of steps on test prompts.

    Writes scores.csv (a row per way of painting and attribute), test_sheet.png and failures.png to `folder`.
    """
    guidance, tried = choose_guidance(painter, pool, validation)
    asked = prompts("test", count)
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"guidance": guidance, "validation": tried, "prompts": count}
    for solver, steps in runs:
        found = evaluate(painter, asked, pool, solver=solver, steps=steps, guidance=guidance)
        for item in summarise(found.scores):
            rows.append(
                {
                    "solver": solver,
                    "steps": steps,
                    "guidance": guidance,
                    "name": item.name,
                    "passed": item.passed,
                    "total": item.total,
                    "rate": round(item.rate, 4),
                    "low": round(item.low, 4),
                    "high": round(item.high, 4),
                }
            )
        if (solver, steps) == ("flow_dpm_solver", STEPS):
            summary["test"] = {item.name: item.rate for item in summarise(found.scores)}
            _save_sheets(found, folder)
    write_rows(rows, folder / "scores.csv")
    with whole_file(folder / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1))
    return summary


def _save_sheets(found: Evaluation, folder: Path) -> None:
    found.save_sheet(folder / "test_sheet.png")
    wrong = [index for index, item in enumerate(found.scores) if not item.overall][:_SHEET]
    labels = [f"x {found.prompts[index].text}" for index in wrong]
    save_sheet(found.pictures[wrong], labels, folder / "failures.png")


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A CSV file with the keys of the first row as columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
