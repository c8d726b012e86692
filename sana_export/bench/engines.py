"""Our side: a bundle's engines through the runtime's own interface.

Whole pictures first, in a process that did nothing before: the first one is the cold start. `step` is the denoising
loop over its steps, everything in the loop included. `text_encoder` and `vae_decoder` are single engine calls with
inputs and outputs on the device, like the peers', on the host's clock until the device is done: launching counts. The
caption of `text_encoder` is as long as captions get, like the peers'; `text_encoder_short` is that of the pictures.
"""

import time
from pathlib import Path

import numpy as np

from sana_export.bench.child import Emit, describe
from sana_export.bench.subjects import ONE_AT_A_TIME, PROMPT, SHORT_CAPTION, Failed, Memory, Noted, Subject, Timed
from sana_runtime import bench
from sana_runtime.bundle import engine_entry
from sana_runtime.contract import COMPONENTS, ComponentName
from sana_runtime.engine import DeviceTensor
from sana_runtime.pipeline import Pipeline

_SINGLE: dict[str, ComponentName] = {
    "text_encoder": "text_encoder",
    SHORT_CAPTION: "text_encoder",
    "vae_decoder": "vae_decoder",
}
_COLD = "process start to first picture; files in the page cache as the parity check left them"


def measure_engines(subject: Subject, emit: Emit) -> None:
    """Time `subject.stages` of the bundle on `subject.target`."""
    if subject.one_at_a_time:
        _measure_one_at_a_time(subject, emit)
        return
    pipeline = Pipeline.load(subject.bundle, subject.target, report=lambda _: None)
    pipeline.generate(PROMPT, num_steps=subject.num_steps)
    if "cold_start" in subject.stages:
        cold = (time.time() - subject.started) * 1e3
        emit(Timed("cold_start", cold, cold, cold, 1, _COLD))
    result = bench.measure(
        pipeline, num_steps=subject.num_steps, runs=subject.runs, warmup=subject.warmup, on_picture=lambda: None
    )
    # What a picture takes beside its stages' own calls: its download for one.
    inside = ", ".join(f"{row.stage} {row.p50_ms:.4g}" for row in result.rows if row.stage in COMPONENTS)
    for row in result.rows:
        if row.stage in ("total", "step") and row.stage in subject.stages:
            note = f"of it, in ms: {inside}" if row.stage == "total" else ""
            emit(Timed(row.stage, row.p50_ms, row.p20_ms, row.p80_ms, result.runs, note))
    _emit_memory(pipeline, subject, emit)
    for stage, name in _SINGLE.items():
        if stage not in subject.stages or (stage == SHORT_CAPTION and pipeline.target != "inductor"):
            continue
        try:
            emit(_single_call(pipeline, Path(subject.bundle), stage, name, subject))
        except Exception as error:  # one stage's failure leaves the others their figures
            emit(Failed(stage, describe(error)))
    if pipeline.target == "onnxruntime" and subject.device == "cuda":
        from sana_export.bench.onnxruntime_copies import describe_copies

        emit(Noted("host_copies", describe_copies(Path(subject.bundle), pipeline.manifest, pipeline.backend)))


def _measure_one_at_a_time(subject: Subject, emit: Emit) -> None:
    """Pictures of a pipeline that loads each engine when it is needed and drops it for the next."""
    pipeline = Pipeline.load(subject.bundle, subject.target, one_at_a_time=True, report=lambda _: None)
    result = bench.measure(pipeline, num_steps=subject.num_steps, runs=1, warmup=1, on_picture=lambda: None)
    row = next(row for row in result.rows if row.stage == "total")
    note = "each engine loaded when needed, from the page cache"
    emit(Timed(ONE_AT_A_TIME, row.p50_ms, row.p20_ms, row.p80_ms, result.runs, note))
    _emit_memory(pipeline, subject, emit)


def _emit_memory(pipeline: Pipeline, subject: Subject, emit: Emit) -> None:
    """Watch one more picture. Torch is imported here, after the cold start, for its view of the device."""
    import torch

    from sana_export.bench.timing import watching_memory

    with watching_memory(subject.device) as peak:
        pipeline.generate(PROMPT, num_steps=subject.num_steps)
    allocated = torch.cuda.max_memory_allocated() / (1 << 20) if torch.cuda.is_initialized() else None
    emit(Memory(allocated, peak.mib))


def _single_call(pipeline: Pipeline, bundle: Path, stage: str, name: ComponentName, subject: Subject) -> Timed:
    from sana_export.bench.timing import Spread

    memory = pipeline.backend.memory
    component = pipeline.manifest.component(name)
    engine = pipeline.backend.load(bundle, component, engine_entry(pipeline.manifest, name, pipeline.target))
    inputs = {spec.name: memory.allocate(spec) for spec in component.inputs}
    outputs = {spec.name: memory.allocate(spec) for spec in component.outputs}
    if name == "text_encoder":
        _feed_caption(pipeline, inputs, whole=stage != SHORT_CAPTION)

    def once() -> float:
        memory.synchronize()
        started = time.perf_counter()
        engine.execute(inputs, outputs)
        memory.synchronize()
        return (time.perf_counter() - started) * 1e3

    times = [once() for _ in range(subject.warmup + 2 * subject.runs)][subject.warmup :]
    spread = Spread.of(times)
    return Timed(stage, spread.p50_ms, spread.p20_ms, spread.p80_ms, spread.runs)


def _feed_caption(pipeline: Pipeline, inputs: dict[str, DeviceTensor], *, whole: bool) -> None:
    """The prompt's tokens; `whole`: with all positions valid, as the peers' are."""
    tokens = pipeline.tokenize(PROMPT)
    mask = np.ones_like(tokens.caption_mask) if whole else tokens.caption_mask
    pipeline.backend.memory.upload(tokens.caption_tokens, inputs["caption_tokens"])
    pipeline.backend.memory.upload(mask, inputs["caption_mask"])
