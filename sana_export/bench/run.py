"""One case: parity, ceilings, our engines, the peers; rows of all of it."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import msgspec

from sana_calibration.recipe import load_recipe
from sana_export.bench import processes
from sana_export.bench.ceilings import Ceilings
from sana_export.bench.floors import PictureWork, Stage, caption_stage, decoder_stage, step_stage, text_encoder_stage
from sana_export.bench.machine import Machine, describe_machine, used_memory_mib
from sana_export.bench.rows import OURS, Case, Row, floor_figures, make_row
from sana_export.bench.subjects import (
    ONE_AT_A_TIME,
    SHORT_CAPTION,
    STAGES,
    Failed,
    Finding,
    Judged,
    Measured,
    Memory,
    Noted,
    Subject,
    Timed,
)
from sana_export.bundle import read_build_record
from sana_export.calibration_run import rules_of
from sana_export.components import plan_components
from sana_export.inductor.text_encoder import prefix_length, short_end
from sana_export.parity.tolerance import ParityError
from sana_export.reference.dc_ae import AutoencoderConfig
from sana_export.reference.transformer import TransformerConfig
from sana_export.weights.checkpoint import Checkpoint
from sana_runtime.contract import DTYPE_OF_PRECISION, PIXELS_PER_LATENT, PRECISIONS
from sana_runtime.errors import BuildError
from sana_runtime.manifest import Manifest

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
OnLine = Callable[[str], None]
OUR_STAGES = (*STAGES, SHORT_CAPTION, ONE_AT_A_TIME)
_PEER_PRECISION = {"cuda": "bf16", "cpu": "fp32"}
# The peers whose first picture says something about diffusers rather than about its compilers.
_COLD_PEERS = ("eager",)


def our_stages(target: str) -> tuple[str, ...]:
    """The stages that engines of a target have rows of."""
    return tuple(stage for stage in OUR_STAGES if stage != SHORT_CAPTION or target == "inductor")


class BudgetSpent(Exception):
    """The time budget ended before or during a measurement; `findings` are those of the stages it had finished."""

    def __init__(self, what: str, findings: Sequence[Finding] = ()) -> None:
        self.findings = [*findings]
        super().__init__(what)


@dataclass
class Bench:
    """What all measurements of an invocation share. `deadline` in seconds of time.monotonic(), None for no limit; no
    peer may take longer than `peer_s` seconds.
    """

    on_line: OnLine
    runs: int = 5
    warmup: int = 1
    commit: str = ""
    deadline: float | None = None
    peer_s: float | None = None
    isolate: bool = True
    _ceilings: dict[str, Ceilings] = field(default_factory=dict)
    _machines: dict[str, Machine] = field(default_factory=dict)

    def machine(self, device: str) -> Machine:
        """This machine, described once: all rows of the invocation carry the same run."""
        if device not in self._machines:
            self._machines[device] = describe_machine(device, self.commit)
        return self._machines[device]

    def ceilings(self, device: str) -> Ceilings:
        """Measured once per invocation."""
        if device not in self._ceilings:
            findings = self.measure(Subject(kind="ceilings", device=device), "ceilings")
            found = next((item for item in findings if isinstance(item, Measured)), None)
            if found is None:
                raise BuildError(
                    "the ceilings could not be measured",
                    received="; ".join(item.error for item in findings if isinstance(item, Failed)),
                    expected=f"large products and copies on {device}",
                    action="sana-export doctor shows what the device lacks",
                )
            self._ceilings[device] = Ceilings(found.tflop_per_s, found.copy_gb_per_s)
            self.on_line(f"ceilings: {self._ceilings[device]}")
        return self._ceilings[device]

    def measure(self, subject: Subject, what: str, limit_s: float | None = None) -> list[Finding]:
        """Run one measuring process, for at most `limit_s` seconds. Raises `BudgetSpent`."""
        limits = [limit_s, None if self.deadline is None else self.deadline - time.monotonic()]
        remaining = min((limit for limit in limits if limit is not None), default=None)
        if remaining is not None and remaining <= 0:
            raise BudgetSpent(what)
        started = time.monotonic()
        try:
            findings = processes.measure(subject, timeout_s=remaining, isolate=self.isolate)
        except processes.OutOfTime as error:
            raise BudgetSpent(what, error.findings) from error
        self.on_line(f"{what}: {time.monotonic() - started:.0f} s")
        return findings

    def measure_what_fits(self, subject: Subject, what: str, limit_s: float | None = None) -> list[Finding]:
        """Like `measure`, but the end of the time leaves the stages that were finished."""
        try:
            return self.measure(subject, what, limit_s)
        except BudgetSpent as spent:
            self.on_line(f"{what}: its time ended, {len(spent.findings)} findings are kept")
            return spent.findings


def check_parity(bench: Bench, subject: Subject) -> Judged:
    """Judge a bundle. Raises `ParityError` when its engines are wrong: then no time may be printed."""
    findings = bench.measure(_of_kind(subject, "parity"), "parity")
    for finding in findings:
        if isinstance(finding, Judged):
            return finding
    failures = [finding for finding in findings if isinstance(finding, Failed)]
    raise ParityError(
        "no time is measured: parity does not hold" if any(item.red for item in failures) else "parity is not known",
        received="; ".join(item.error for item in failures) or "no answer",
        expected="engines that compute what PyTorch computes",
        action="sana-export compare shows where they differ",
    )


def measure_ours(
    bench: Bench, subject: Subject, manifest: Manifest, checkpoint: Checkpoint, case: Case, judged: Judged
) -> list[Row]:
    """Rows of a bundle's engines: its stages, build time, memory and the parity they were measured after."""
    machine = bench.machine(judged.device)
    label = f"{OURS} {judged.target}"
    ceilings = bench.ceilings(judged.device)
    tokens = manifest.tokenizer.padded_length
    kept, short = (prefix_length(tokens), short_end(tokens)) if subject.target == "inductor" else (0, 0)
    recipe = _recipe(subject, manifest)
    work = picture_work(checkpoint, case, caption_tokens=tokens, recipe=recipe, kept=kept, short=short)
    rows = [make_row(machine, case, label, "parity", note=f"{judged.verdict}; on {judged.description}")]
    seconds = _build_seconds(Path(subject.bundle))
    if seconds is not None:
        rows.append(make_row(machine, case, label, "build", p50_ms=seconds * 1e3, runs=1))
    ours = replace_fields(_of_kind(subject, "engines"), device=judged.device, target=judged.target)
    before = used_memory_mib() if judged.device == "cuda" else 0.0
    findings = bench.measure_what_fits(ours, f"{label} {case.precision}")
    rows += _rows(machine, case, label, findings, work, ceilings, before)
    if ONE_AT_A_TIME in subject.stages:
        alone = replace_fields(ours, one_at_a_time=True)
        findings = bench.measure_what_fits(alone, f"{label} {case.precision}, one engine at a time")
        # A failure as a whole is that of this stage: the other process has its own.
        own = [replace_fields(item, stage=ONE_AT_A_TIME) if isinstance(item, Failed) else item for item in findings]
        rows += _rows(machine, case, label, own, work, ceilings, before)
    return rows


def measure_peer(bench: Bench, subject: Subject, checkpoint: Checkpoint, case: Case, peer: str) -> list[Row]:
    """Rows of one diffusers peer on `subject.device`. `case.precision` is replaced by the peer's own."""
    case = peer_case(case, subject.device)
    machine, ceilings = bench.machine(subject.device), bench.ceilings(subject.device)
    work = picture_work(checkpoint, case, caption_tokens=subject.caption_tokens, recipe=None)
    stages = tuple(stage for stage in subject.stages if stage != "cold_start" or peer in _COLD_PEERS)
    asked = replace_fields(_of_kind(subject, "peer"), peer=peer, stages=stages)
    before = used_memory_mib() if subject.device == "cuda" else 0.0
    findings = bench.measure_what_fits(asked, peer_label(peer), bench.peer_s)
    return _rows(machine, case, peer_label(peer), findings, work, ceilings, before)


def peer_case(case: Case, device: str) -> Case:
    """The same picture in the precision that peers compute in."""
    return replace(case, precision=_PEER_PRECISION[device])


def peer_label(peer: str) -> str:
    """A peer's name in rows."""
    from sana_export.bench.peers import PEERS

    return f"diffusers {PEERS[peer].label}"


def peer_stages(peer: str) -> tuple[str, ...]:
    """The stages a peer has rows of."""
    return tuple(stage for stage in STAGES if stage != "cold_start" or peer in _COLD_PEERS)


def picture_work(
    checkpoint: Checkpoint, case: Case, *, caption_tokens: int, recipe: str | None, kept: int = 0, short: int = 0
) -> PictureWork:
    """Arithmetic and bytes of one picture. `recipe` is a file, or None for what quantises nothing; the first `kept`
    caption positions are not computed per prompt, and of a short caption, such as a picture's, only those before
    `short`, if it is not 0.
    """
    loaded = load_recipe(recipe) if recipe else None
    base = loaded.base_dtype if loaded else DTYPE_OF_PRECISION[case.precision]
    plans = {plan.name: plan for plan in plan_components(checkpoint, "bf16", case.height, case.width, caption_tokens)}
    rules = {name: rules_of(loaded, plan) if loaded else {} for name, plan in plans.items()}
    latent = (case.height // PIXELS_PER_LATENT, case.width // PIXELS_PER_LATENT)
    batch = 1 if checkpoint.guidance == "embedded" else 2
    transformer = TransformerConfig.from_upstream(checkpoint.transformer_config)

    def text_encoder(tokens: int) -> Stage:
        return text_encoder_stage(checkpoint.text_encoder_config, tokens, rules["text_encoder"], base, kept=kept)

    return PictureWork(
        text_encoder(caption_tokens),
        caption_stage(transformer, batch, rules["transformer"], base),
        step_stage(transformer, latent, batch, rules["transformer"], base),
        decoder_stage(AutoencoderConfig.from_upstream(checkpoint.vae_config), latent, rules["vae_decoder"], base),
        text_encoder(short) if short else None,
    )


def precision_of(manifest: Manifest) -> str:
    """The bundle's precision as a row names it: its recipe, or its transformer's dtype."""
    if manifest.quantization is not None:
        return manifest.quantization.recipe
    dtype = manifest.component("transformer").dtype
    return next((name for name in PRECISIONS if DTYPE_OF_PRECISION[name] == dtype), dtype)


def replace_fields(subject: _Struct, **fields: object) -> _Struct:
    """A copy with some fields changed."""
    return msgspec.structs.replace(subject, **fields)


def _of_kind(subject: Subject, kind: str) -> Subject:
    return replace_fields(subject, kind=kind)


def _recipe(subject: Subject, manifest: Manifest) -> str | None:
    entry = manifest.quantization
    return None if entry is None else str(Path(subject.bundle) / entry.recipe_file)


def _build_seconds(bundle: Path) -> float | None:
    """Seconds of all stages of the build, the judging of the gate not included."""
    stages = read_build_record(bundle).stages
    seconds = [float(record.measured["seconds"]) for name, record in stages.items() if name != "gate"]
    return sum(seconds) if seconds else None


def _rows(
    machine: Machine,
    case: Case,
    label: str,
    findings: Iterable[Finding],
    work: PictureWork,
    ceilings: Ceilings,
    used_before_mib: float,
) -> list[Row]:
    rows = []
    memory = next((item for item in findings if isinstance(item, Memory)), None)
    for item in findings:
        if isinstance(item, Timed):
            figures = floor_figures(item.stage, item.p50_ms, work, ceilings, case.num_steps)
            if item.stage in ("total", ONE_AT_A_TIME) and memory is not None:
                figures["allocated_mib"] = memory.allocated_mib
                figures["device_mib"] = None if memory.device_mib is None else memory.device_mib - used_before_mib
            times = {"p50_ms": item.p50_ms, "p20_ms": item.p20_ms, "p80_ms": item.p80_ms, "runs": item.runs}
            rows.append(make_row(machine, case, label, item.stage, **times, note=item.note, **figures))
        elif isinstance(item, Failed):
            rows.append(make_row(machine, case, label, item.stage, error=item.error))
        elif isinstance(item, Noted):
            rows.append(make_row(machine, case, label, item.stage, note=item.note))
    return rows


def done_stages(rows: Sequence[Row], machine: Machine, case: Case, label: str, *, retry_errors: bool) -> set[str]:
    """The stages of a case that were measured on this machine at this commit and with these versions.

    A failed stage counts as done, and one that failed as a whole ("all") as all of them, unless `retry_errors`.
    """
    wanted = make_row(machine, case, label, "").key
    found = [row for row in rows if replace(row, stage="").key == wanted and not (retry_errors and row.error)]
    stages = {row.stage for row in found}
    return {*stages, *OUR_STAGES} if stages & {"all", "skipped"} else stages
