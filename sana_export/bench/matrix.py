"""The committed matrix: which models, sizes, precisions and peers, in which order; resumable and within a budget."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sana_export.bench import processes
from sana_export.bench.machine import Machine
from sana_export.bench.rows import OURS, Case, Row, add_rows, make_row, read_rows
from sana_export.bench.run import (
    OUR_STAGES,
    Bench,
    BudgetSpent,
    check_parity,
    done_stages,
    measure_ours,
    measure_peer,
    our_stages,
    peer_case,
    peer_label,
    peer_stages,
    replace_fields,
)
from sana_export.bench.subjects import Subject
from sana_export.parity.tolerance import ParityError
from sana_export.prompting import scheduler_entry, tokenizer_entry
from sana_export.weights.checkpoint import Checkpoint, open_checkpoint
from sana_export.weights.write import write_diffusers_directory
from sana_runtime.contract import TargetName
from sana_runtime.manifest import MANIFEST_NAME, read_manifest

MODELS = ("random:0.6b", "random:1.6b")
# Those that compile in a minute.
COMPILED = ("compile", "channels-last")
# Those that compile for minutes.
TUNED = ("max-autotune", "recipe")
# Room that a bundle with its build's intermediate files may need.
_ROOM_BYTES = 30 << 30


@dataclass(frozen=True)
class Group:
    """Cases of one picture: a model at a square size, its bundles' precisions and the peers beside them."""

    model: str
    side: int
    precisions: tuple[str, ...]
    peers: tuple[str, ...]


# The most telling first: a run that is cut short has measured what matters most. What says how time grows with the
# picture comes before what only completes the table.
MATRIX: tuple[Group, ...] = (
    *(Group(model, 1024, ("fp8", "bf16", "int8"), ("eager", *COMPILED)) for model in MODELS),
    *(Group(model, side, ("fp8",), COMPILED) for model in MODELS for side in (512, 2048, 4096)),
    *(Group(model, 1024, (), (*TUNED, "torch-tensorrt", "graph")) for model in MODELS),
    *(Group(model, side, ("bf16",), ("eager",)) for model in MODELS for side in (4096, 512, 2048)),
    *(Group(model, side, ("int8",), ()) for model in MODELS for side in (4096, 512, 2048)),
    *(Group(model, 1024, (), ("recipe-whole",)) for model in MODELS),
    *(Group(model, side, (), ("graph", *TUNED, "torch-tensorrt")) for side in (4096, 512, 2048) for model in MODELS),
)


def selected(
    matrix: Sequence[Group],
    models: Sequence[str] = (),
    sides: Sequence[int] = (),
    precisions: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
) -> Iterator[Group]:
    """The groups of the matrix that match; an empty choice of models or sizes is all of them, None all the rest."""
    for group in matrix:
        if (models and group.model not in models) or (sides and group.side not in sides):
            continue
        chosen = replace(
            group,
            precisions=tuple(name for name in group.precisions if precisions is None or name in precisions),
            peers=tuple(name for name in group.peers if peers is None or name in peers),
        )
        if chosen.precisions or chosen.peers:
            yield chosen


@dataclass(frozen=True)
class Settings:
    """Where and how the matrix runs. `work` keeps checkpoints and bundles between runs; `build_arguments` are passed
    to `sana-export build`. `device` "cuda" or "cpu". `num_steps` None: the model's. `stages` limits what is measured.
    """

    work: Path
    rows: Path
    target: TargetName
    device: str
    num_steps: int | None = None
    build_arguments: tuple[str, ...] = ()
    retry_errors: bool = False
    stages: tuple[str, ...] = OUR_STAGES


class Matrix:
    """Runs groups one after the other and writes rows as soon as a subject is done."""

    def __init__(self, bench: Bench, settings: Settings) -> None:
        self._bench, self._settings = bench, settings
        self._say = bench.on_line

    def run(self, groups: Iterator[Group]) -> bool:
        """Measure what is missing. False when the time budget ended first: run again to go on."""
        try:
            for group in groups:
                self._group(group)
        except BudgetSpent as spent:
            self._say(f"time budget spent at: {spent}; run again to go on")
            return False
        return True

    def _group(self, group: Group) -> None:
        checkpoint = open_checkpoint(group.model)
        steps = self._settings.num_steps or scheduler_entry(checkpoint).default_num_steps
        for precision in group.precisions:
            self._engines(Case(group.model, precision, group.side, group.side, steps), checkpoint)
        for peer in group.peers:
            self._peer(Case(group.model, "", group.side, group.side, steps), checkpoint, peer)

    # --- Our engines ---

    def _engines(self, case: Case, checkpoint: Checkpoint) -> None:
        label = f"{OURS} {self._settings.target}"
        missing = self._missing(case, label, our_stages(self._settings.target))
        if not missing:
            return
        self._say(f"--- {_described(case)}, {label}: {', '.join(missing)}")
        if reason := _cannot_run(self._settings):
            self._add([make_row(self._machine, case, label, "skipped", error=f"skipped: {reason}")])
            return
        name = f"{_file_name(case.model)}-{case.precision}-{case.width}x{case.height}-{self._settings.target}"
        bundle = self._settings.work / "bundles" / name
        if problem := self._build(case, bundle):
            self._add([make_row(self._machine, case, label, "build", error=problem)])
            return
        manifest = read_manifest(bundle)
        tokens = manifest.tokenizer.padded_length
        subject = replace_fields(self._subject(case, tokens), stages=missing, bundle=str(bundle))
        try:
            judged = check_parity(self._bench, subject)
        except ParityError as error:
            self._say(str(error))
            self._add([make_row(self._machine, case, label, "all", error=str(error))])
            return
        self._say(f"parity {judged.verdict}")
        self._add(measure_ours(self._bench, subject, manifest, checkpoint, case, judged))

    def _build(self, case: Case, bundle: Path) -> str:
        """Build the bundle in a process of its own; why that failed, or nothing. Raises `BudgetSpent`."""
        model = self._checkpoint_folder(case.model)
        bundle.parent.mkdir(parents=True, exist_ok=True)
        self._make_room(bundle)
        log = bundle.with_name(f"{bundle.name}.log")
        remaining = None if self._bench.deadline is None else max(self._bench.deadline - time.monotonic(), 0)
        started = time.monotonic()
        command = ["sana_export", "build", str(model), "--precision", case.precision, "--target", self._settings.target]
        command += ["--height", str(case.height), "--width", str(case.width), "--output", str(bundle)]
        # The text encoder is the same at every size.
        others = bundle.parent.glob(f"{_file_name(case.model)}-*-{self._settings.target}/{MANIFEST_NAME}")
        command += [f"--reuse={path.parent}" for path in sorted(others) if path.parent != bundle]
        try:
            code = processes.run([*command, *self._settings.build_arguments], log, remaining)
        except subprocess.TimeoutExpired as error:
            raise BudgetSpent(f"build of {_described(case)}") from error
        self._say(f"build: {time.monotonic() - started:.0f} s")
        return "" if code == 0 else f"the build ended with code {code}: {processes.last_words(log)}"

    def _checkpoint_folder(self, model: str) -> Path:
        """The model's weights as a diffusers directory, made once: random weights take a minute to draw."""
        folder = self._settings.work / "checkpoints" / _file_name(model)
        if not (folder / "model_index.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            self._say(f"writing {model}")
            write_diffusers_directory(open_checkpoint(model), folder)
        return folder

    def _make_room(self, bundle: Path) -> None:
        """Remove other bundles, the oldest first, while the disk is nearly full."""
        others = [path for path in bundle.parent.iterdir() if path.is_dir() and bundle.name not in path.name]
        for other in sorted(others, key=lambda path: path.stat().st_mtime):
            if shutil.disk_usage(bundle.parent).free >= _ROOM_BYTES:
                return
            shutil.rmtree(other)

    # --- Peers ---

    def _peer(self, case: Case, checkpoint: Checkpoint, peer: str) -> None:
        case = peer_case(case, self._settings.device)
        missing = self._missing(case, peer_label(peer), peer_stages(peer))
        if not missing:
            return
        self._say(f"--- {_described(case)}, {peer_label(peer)}: {', '.join(missing)}")
        content = checkpoint.tokenizer_json()
        tokens = tokenizer_entry(content, "tokenizer.json", checkpoint.pipeline_class).padded_length
        subject = replace_fields(self._subject(case, tokens), stages=missing)
        self._add(measure_peer(self._bench, subject, checkpoint, case, peer))

    # --- Both ---

    @property
    def _machine(self) -> Machine:
        return self._bench.machine(self._settings.device)

    def _subject(self, case: Case, caption_tokens: int) -> Subject:
        return Subject(
            kind="parity",
            device=self._settings.device,
            source=str(self._checkpoint_folder(case.model)),
            target=self._settings.target,
            height=case.height,
            width=case.width,
            caption_tokens=caption_tokens,
            num_steps=case.num_steps,
            runs=self._bench.runs,
            warmup=self._bench.warmup,
        )

    def _missing(self, case: Case, label: str, stages: Sequence[str]) -> tuple[str, ...]:
        rows = read_rows(self._settings.rows)
        done = done_stages(rows, self._machine, case, label, retry_errors=self._settings.retry_errors)
        wanted = [stage for stage in stages if stage in self._settings.stages]
        missing = tuple(stage for stage in wanted if stage not in done)
        if wanted and not missing:
            self._say(f"{_described(case)}, {label}: skipped, measured at this commit, on this device and versions")
        return missing

    def _add(self, rows: list[Row]) -> None:
        add_rows(self._settings.rows, rows)
        for row in rows:
            figure = row.error or (row.note if row.p50_ms is None else f"{row.p50_ms:.2f} ms")
            self._say(f"{row.subject} {row.precision} {row.stage}: {figure}")


def _cannot_run(settings: Settings) -> str:
    """Why engines of the target cannot be measured on the device, so far as it can be told without a bundle."""
    if settings.target != "onnxruntime" or settings.device != "cuda":
        return ""
    try:
        import onnxruntime
    except ImportError as error:
        return f"onnxruntime cannot be imported ({error})"
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return ""
    return "this onnxruntime has no CUDA provider: onnxruntime-gpu is not installed"


def _described(case: Case) -> str:
    return f"{case.model}, {case.width} x {case.height} px" + (f", {case.precision}" if case.precision else "")


def _file_name(model: str) -> str:
    return "".join(character if character.isalnum() or character in ".-" else "-" for character in model)


def say(line: str) -> None:
    """Print at once: a run may be cut off."""
    print(line, flush=True)
    sys.stdout.flush()
