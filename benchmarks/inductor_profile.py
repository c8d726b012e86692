"""Where the time of the target `inductor` goes on this GPU, and which of several ways to compute a part is fastest.

    python benchmarks/inductor_profile.py                                    # every section, within --budget-s
    python benchmarks/inductor_profile.py --sections steps --sizes 0.6b --precisions fp8
    python benchmarks/inductor_profile.py --device cpu --sizes tiny --side 64   # a dry run of the script itself

Random weights at real size; needs torch, triton, numpy and our packages. Every result is held to the same pieces in
fp32 before it is timed. Times are of replayed CUDA graphs; kernels are those that the profiler sees in one replay.
A section that fails is reported and the next one runs. Rows are written as they are found.
"""

import argparse
import csv
import dataclasses
import json
import math
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import torch
import torch._inductor.config
from torch.nn import functional as F

from sana_export.bench.machine import describe_machine
from sana_export.inductor import decoder as vae
from sana_export.inductor import text_encoder as gemma
from sana_export.inductor import transformer as dit
from sana_export.inductor.linear import FP8, INT8, LinearForm
from sana_export.inductor.piece import Piece, export_piece, package_exported
from sana_export.reference.dc_ae import AutoencoderConfig, Decoder
from sana_export.reference.transformer import LinearTransformer, TransformerConfig, position_embedding
from sana_kernels.cross_attention import cross_attention
from sana_kernels.cross_attention.testing import Case as CrossCase
from sana_kernels.cross_attention.testing import make_inputs as cross_inputs
from sana_kernels.linear_attention import linear_attention
from sana_kernels.mix_ffn_depthwise import mix_ffn_depthwise
from sana_kernels.modulated_norm import residual_modulated_norm
from sana_runtime.inductor_engine import load_piece, prefer_little_memory
from sana_runtime.inductor_program import Call, run_calls

Values = dict[str, torch.Tensor]
CAPTION_LENGTH = 300
PROMPT_TOKENS = 512
PARITY_DEPTH = 2
# bf16 rounds about ten times per block (parity/tolerance.py); 8-bit pieces are held to the same pieces in fp32 with the
# same codes, which bf16 roundings move across ties: as much again as the quantisation itself.
BF16_ROUNDOFF, ROUNDINGS_PER_BLOCK = 2.0**-8, 10
EIGHT_BIT_ERROR = 0.10
AMAX = {FP8: 448.0, INT8: 127.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "library": {},
    "autotuned": {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"},
    "triton": {"max_autotune_gemm": True, "max_autotune_gemm_backends": "TRITON"},
}


# --- Reporting and timing ---


@dataclasses.dataclass
class Session:
    """The arguments, the rows written so far, which all end with what describes the run, and the clock."""

    arguments: argparse.Namespace
    rows: Any
    file: Any
    run: tuple[str, ...]
    started: float = dataclasses.field(default_factory=time.monotonic)
    ceilings: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def begin(cls, arguments: argparse.Namespace, file: Any) -> "Session":
        """Describe this machine and write the names of the columns."""
        machine = describe_machine(arguments.device, arguments.commit)
        rows = csv.writer(file, lineterminator="\n")
        columns = (
            "section",
            "subject",
            "what",
            "value",
            "unit",
            "note",
            "device",
            "driver",
            "versions",
            "commit",
            "run",
        )
        rows.writerow(columns)
        print(f"{machine.device}, driver {machine.driver}, {machine.versions}, commit {machine.commit}", flush=True)
        run = (machine.device, machine.driver, machine.versions, machine.commit, machine.run)
        return cls(arguments, rows, file, run)

    @property
    def device(self) -> str:
        return str(self.arguments.device)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def row(self, section: str, subject: str, what: str, value: float, unit: str, note: str = "") -> None:
        """One result: printed and written at once."""
        self.rows.writerow([section, subject, what, f"{value:.6g}", unit, note, *self.run])
        self.file.flush()
        print(f"{section:10} {subject:28} {what:52} {value:11.5g} {unit:8} {note}", flush=True)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A piece of a section whose failure is reported and does not hide the rest; skipped when out of time."""
        seconds = time.monotonic() - self.started
        if seconds > self.arguments.budget_s:
            raise OutOfTime(name)
        print(f"--- {name} (at {seconds:.0f} s)", flush=True)
        try:
            yield
        except OutOfTime:
            raise
        except Exception as error:
            self.row("failed", name, f"{type(error).__name__}: {str(error)[:300]}".replace("\n", " "), 1, "failure")
            traceback.print_exc(limit=12)
        finally:
            if self.on_gpu:
                torch.cuda.empty_cache()


class OutOfTime(Exception):
    """The budget is spent."""


def capture(session: Session, work: Callable[[], object]) -> Callable[[], None]:
    """A replay of what `work` queues; on the CPU `work` itself."""
    if not session.on_gpu:
        return lambda: (work(), None)[1]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def microseconds(session: Session, replay: Callable[[], None], repeats: int = 20) -> float:
    """Median time of one replay."""
    if not session.on_gpu:
        start = time.perf_counter()
        replay()
        return (time.perf_counter() - start) * 1e6
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for _ in range(3):
        replay()
    for start_event, stop_event in events:
        start_event.record()
        replay()
        stop_event.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) * 1e3 for a, b in events)[repeats // 2]


def operator_time(session: Session, work: Callable[[], object], calls: int = 20) -> float:
    """Microseconds of one call among `calls` in a graph: launches overlap as they do in the network."""
    calls = calls if session.on_gpu else 1

    def many() -> None:
        for _ in range(calls):
            work()

    return microseconds(session, capture(session, many), 10) / calls


def kernel_table(session: Session, subject: str, replay: Callable[[], None], blocks: int) -> None:
    """What the GPU ran in one replay, by kernel name, most time first."""
    if not session.on_gpu:
        return
    from torch.profiler import ProfilerActivity, profile

    replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        replay()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in found.events():
        if str(event.device_type).endswith("CUDA"):
            entry = totals[event.name]
            entry[0] += getattr(event, "device_time_total", 0.0) or event.time_range.elapsed_us()
            entry[1] += 1
    whole = sum(total for total, _ in totals.values())
    for name, (total, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:22]:
        note = (
            f"{int(count)} calls, {total / count:.2f} us each, {total / whole:.1%}, per block {total / blocks:.2f} us"
        )
        session.row("kernels", subject, name[:52], total, "us", f"{note}; {name[52:150]}")
    session.row("kernels", subject, "sum of kernels", whole, "us", f"per block {whole / blocks:.2f} us")


def relative_rms(candidate: torch.Tensor, exact: torch.Tensor) -> float:
    """RMS of the difference over RMS of `exact`; NaN in the candidate gives NaN."""
    return float((candidate.double() - exact.double()).norm() / exact.double().norm())


def compiled(piece: Piece, options: Mapping[str, Any]) -> Callable[..., Sequence[torch.Tensor]]:
    """The piece through torch.compile with Inductor's options: the code that its package would hold."""

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return piece(*tensors)

    return torch.compile(call, fullgraph=True, dynamic=False, options={**options, **piece.options})


# --- Random models ---


def catalogue() -> dict[str, Any]:
    """The shapes of the named random models."""
    return json.loads((files("sana_export.weights") / "random_models.json").read_bytes())


def transformer_config(size: str, depth: int | None = None) -> TransformerConfig:
    """Of the 0.6b, the 1.6b or the tiny transformer."""
    table = catalogue()
    config = {**table["transformer_common"], **table["transformers"][size]}
    return TransformerConfig.from_upstream({**config, "num_layers": depth or config["num_layers"]})


def random_state(module: Callable[[], torch.nn.Module], device: str, dtype: torch.dtype) -> Values:
    """Random weights of a module by name, of a scale that keeps activations near one."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in module().named_parameters()}
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        vector = len(shape) == 1
        spread = 0.02 if name.endswith("bias") else 0.1 if vector else 1 / math.sqrt(math.prod(shape[1:]))
        mean = 1.0 if vector and not name.endswith("bias") else 0.0
        values = torch.randn(shape, generator=generator, device=device) * spread + mean
        state[name] = values.to(dtype)
    return state


def loaded(module: torch.nn.Module, state: Values) -> torch.nn.Module:
    """The module, whose parameters are virtual, with these weights."""
    module.load_state_dict(state, assign=True, strict=True)
    return module.eval().requires_grad_(False)


def observed_amax(model: LinearTransformer, feeds: Values) -> dict[str, float]:
    """The largest input of every linear layer of the blocks in one run."""
    found: dict[str, float] = {}
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith("blocks."):

            def hook(_: object, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                found[name] = float(inputs[0].abs().max())

            handles.append(layer.register_forward_pre_hook(hook))
    model(*feeds.values())
    for handle in handles:
        handle.remove()
    return found


# --- The transformer ---


@dataclasses.dataclass
class Step:
    """One solver step of a size and precision, ready to be called."""

    layout: dit.TransformerLayout
    pieces: dict[str, Piece]
    calls: tuple
    values: Values

    def prepared(self, pieces: Mapping[str, Any] | None = None) -> None:
        """Compute what a prompt gives."""
        run_calls(self.calls[0], pieces or self.pieces, self.values, KEPT)

    def run(self, pieces: Mapping[str, Any]) -> Values:
        """One step; its outputs."""
        values = dict(self.values)
        run_calls(self.calls[1], pieces, values, OUTPUTS)
        return {name: values[name] for name in OUTPUTS}


KEPT = frozenset({"key_values", "key_bias", "key_counts"})
OUTPUTS = frozenset({"next_latent", "x0", "velocity"})


def make_step(
    session: Session, config: TransformerConfig, state: Values, precision: str, amax: Mapping[str, float]
) -> Step:
    """Pieces and tensors of a precision from the reference's weights; activations are quantised by their amax."""
    side = session.arguments.side // 32
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    impl = "triton" if session.on_gpu else "reference"
    fused = session.arguments.fused_products
    layout = dit.TransformerLayout(config, dtype, side, side, 2, impl, fused_products=fused)
    codes = {"fp8": FP8, "int8": INT8}.get(precision)
    values: Values = {}
    forms = {}
    for layer, bias in dit.BLOCK_LINEARS.items():
        forms[layer] = LinearForm(bias, codes, codes)
    for name, tensor in state.items():
        if name.startswith("blocks."):
            layer, _, part = name.rpartition(".")
            kind = layer.split(".", 2)[2] if layer.count(".") > 1 else ""
            if part == "weight" and kind in forms and codes is not None:
                values |= quantized(layer, tensor, codes, amax_of(layer, amax))
                continue
            if kind == "cross_attention.to_kv" or name.endswith(".modulation"):
                continue
            if name.endswith("conv_depth.weight"):
                tensor = dit.stored_taps(tensor)
        values[name] = tensor.to(dtype)
    depth = range(config.depth)
    for part in ("weight", "bias"):
        stacked = torch.stack([state[f"blocks.{i}.cross_attention.to_kv.{part}"] for i in depth])
        values[f"to_kv.{part}"] = stacked.to(dtype)
    values["modulations"] = torch.stack([state[f"blocks.{i}.modulation"] for i in depth]).float()
    if config.interpolation_scale is not None:
        values["position_embedding"] = position_embedding(config, side, side).to(session.device)
    pieces, blocks = dit.transformer_pieces(layout, (forms,) * config.depth)
    return Step(layout, pieces, dit.transformer_calls(pieces, blocks), values | step_inputs(session, config, dtype))


def quantized(layer: str, weight: torch.Tensor, codes: torch.dtype, amax: float) -> Values:
    """A layer's 8-bit weight and scales: one scale per tensor for FP8, one per row for INT8."""
    wide = weight.float()
    largest = wide.abs().amax() if codes == FP8 else wide.abs().amax(dim=1)
    scale = largest / AMAX[codes]
    scaled = wide / (scale if codes == FP8 else scale[:, None])
    stored = scaled.clamp(-448, 448).to(FP8) if codes == FP8 else scaled.round().to(INT8)
    step = torch.tensor(amax / AMAX[codes], device=weight.device)
    return {f"{layer}.weight": stored, f"{layer}.weight_scale": scale, f"{layer}.activation_scale": step}


def amax_of(layer: str, amax: Mapping[str, float]) -> float:
    """Of a block that was not observed, that of the observed block in the same place."""
    _, index, kind = layer.split(".", 2)
    return amax.get(layer) or amax[f"blocks.{int(index) % PARITY_DEPTH}.{kind}"]


def step_inputs(session: Session, config: TransformerConfig, dtype: torch.dtype) -> Values:
    """Inputs of one solver step with full captions."""
    generator = torch.Generator(session.device).manual_seed(1)
    side = session.arguments.side // 32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=session.device)

    mask = torch.ones(2, CAPTION_LENGTH, dtype=torch.int64, device=session.device)
    mask[:, session.arguments.prompt_tokens :] = 0
    scalars = {"timestep": 731.0, "sigma": 0.7, "guidance_scale": 4.5}
    return {
        "latent": normal(1, 32, side, side),
        "previous_x0": normal(1, 32, side, side),
        "caption_embeds": normal(2, CAPTION_LENGTH, config.caption_channels).to(dtype),
        "caption_mask": mask,
        "step_coefficients": torch.tensor([0.9, 0.2, -0.1], device=session.device),
        **{name: torch.tensor(value, device=session.device) for name, value in scalars.items()},
    }


def transformer_steps(session: Session, size: str, precisions: Sequence[str]) -> None:
    """Parity on two blocks, then the step of the whole depth with each variant of compilation."""
    config = transformer_config(size, PARITY_DEPTH)
    with torch.device("meta"):
        module = LinearTransformer(config)
    small = random_state(lambda: LinearTransformer(config), session.device, torch.float32)
    model = loaded(module, dict(small))
    exact = make_step(session, config, small, "fp32", {})
    inputs = exact.values
    feeds = {
        "latent": inputs["latent"].expand(2, -1, -1, -1),
        "embeds": inputs["caption_embeds"],
        "mask": inputs["caption_mask"],
        "timestep": inputs["timestep"].expand(2),
    }
    amax = observed_amax(model, feeds)
    negative, positive = model(*feeds.values()).split(1)
    wanted = negative + inputs["guidance_scale"] * (positive - negative)
    exact.prepared()
    found = relative_rms(exact.run(exact.pieces)["velocity"], wanted)
    held(session, f"{size} fp32", "pieces against the reference", found, 1e-4)
    del model, module
    full = transformer_config(size)
    state = random_state(lambda: LinearTransformer(full), session.device, torch.bfloat16)
    for precision in precisions:
        with session.part(f"{size} {precision}"):
            bound = math.sqrt(ROUNDINGS_PER_BLOCK * PARITY_DEPTH) * BF16_ROUNDOFF * 4.5
            step = make_step(session, config, small, precision, amax)
            step.prepared()
            error = relative_rms(step.run(step.pieces)["velocity"], wanted)
            # Guidance multiplies independent errors of both halves by its scale.
            bound = bound if precision == "bf16" else bound + EIGHT_BIT_ERROR * 4.5
            held(session, f"{size} {precision}", "eager pieces against the fp32 reference", error, bound)
            variants = list(session.arguments.variants)
            for variant in variants:
                with session.part(f"{size} {precision} {variant}"):
                    one_variant(session, size, precision, variant, full, state, amax, step, error)


def held(session: Session, subject: str, what: str, error: float, bound: float) -> None:
    """Report an error and refuse to go on beyond its bound."""
    session.row("parity", subject, what, error, "rel rms", f"bound {bound:.3g}")
    if not error <= bound:
        raise AssertionError(f"{subject}: {what}: relative RMS {error:.3g}, bound {bound:.3g}")


def one_variant(
    session: Session,
    size: str,
    precision: str,
    variant: str,
    config: TransformerConfig,
    state: Values,
    amax: Mapping[str, float],
    small: Step,
    eager_error: float,
) -> None:
    """Compile the pieces once, check them on two blocks, time the whole step."""
    subject = f"{size} {precision} {variant}"
    started = time.monotonic()
    pieces = {
        name: compiled(piece, VARIANTS[variant] if name.startswith("block") else {})
        for name, piece in small.pieces.items()
    }
    got = small.run(pieces)["velocity"]
    session.row("build", subject, "torch.compile of the step's pieces", time.monotonic() - started, "s")
    eager = small.run(small.pieces)["velocity"]
    # Two roundings of the same codes: each is as far from exact as the eager pieces are.
    held(session, subject, "compiled against eager pieces", relative_rms(got, eager), 2 * eager_error + 1e-3)
    step = make_step(session, config, state, precision, amax)
    prompt = microseconds(session, capture(session, step.prepared), 5)
    session.row("step", subject, "captions: keys and values of all blocks (eager)", prompt, "us")
    step.prepared()
    replay = capture(session, lambda: step.run(pieces))
    time_us = microseconds(session, replay)
    floor = step_floor(session, config, precision)
    session.row("step", subject, "one solver step, CUDA graph", time_us, "us", f"floor {floor:.0f} us of products")
    session.row("step", subject, "per block", time_us / config.depth, "us")
    kernel_table(session, subject, replay, config.depth)


def step_floor(session: Session, config: TransformerConfig, precision: str) -> float:
    """Microseconds of the blocks' linear products at this run's ceiling."""
    rows, channels = 2 * (session.arguments.side // 32) ** 2, config.channels
    hidden = int(config.mlp_ratio * channels)
    flop = 2 * rows * channels * (3 * channels + 3 * channels + 3 * hidden) * config.depth
    ceiling = session.ceilings.get("bf16" if precision == "bf16" else "fp8", float("nan"))
    return flop / ceiling / 1e6 if ceiling else float("nan")


def aoti(session: Session, size: str) -> None:
    """The FP8 block as a package: compiled, loaded and captured as the runtime does it."""
    config = transformer_config(size, PARITY_DEPTH)
    state = random_state(lambda: LinearTransformer(config), session.device, torch.float32)
    layers = [f"blocks.{i}.{layer}" for i in range(PARITY_DEPTH) for layer in dit.BLOCK_LINEARS]
    step = make_step(session, config, state, "fp8", dict.fromkeys(layers, 8.0))
    step.prepared()
    eager = step.run(step.pieces)["velocity"]
    loaded_pieces: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        values = dict(step.values)
        for call in step.calls[1]:
            if call.piece not in loaded_pieces:
                path = Path(folder) / f"{call.piece}.pt2"
                started = time.monotonic()
                arguments = [value_of(values, name) for name in call.inputs]
                options = {} if not session.on_gpu else VARIANTS["library"]
                piece = step.pieces[call.piece]
                package_exported(export_piece(piece, arguments), path, {**options, **piece.options})
                loaded_pieces[call.piece] = load_piece(path)
                session.row("build", f"{size} fp8 package", call.piece, time.monotonic() - started, "s")
            run_calls((call,), loaded_pieces, values, frozenset(call.outputs))
        got = step.run(loaded_pieces)["velocity"]
        held(session, f"{size} fp8", "packages against eager pieces", relative_rms(got, eager), EIGHT_BIT_ERROR * 4.5)
        replay = capture(session, lambda: step.run(loaded_pieces))
        session.row("aoti", size, f"step of {PARITY_DEPTH} blocks, CUDA graph", microseconds(session, replay), "us")


def value_of(values: Values, name: str) -> torch.Tensor:
    """A value, or the row of one that "name[3]" asks for."""
    name, _, row = name.partition("[")
    return values[name][int(row[:-1])] if row else values[name]


# --- Ceilings and single operators ---


def ceilings(session: Session) -> None:
    """What large products and copies reach here."""
    side = 8192 if session.on_gpu else 64
    a, b = (torch.randn(side, side, device=session.device).bfloat16() for _ in "ab")
    flop = 2 * side**3
    with session.part("bf16 ceiling"):
        session.ceilings["bf16"] = flop / operator_time(session, lambda: a @ b.t(), 5) / 1e6
        session.row("ceiling", "bf16", f"product of {side}", session.ceilings["bf16"], "TFLOP/s")
    with session.part("fp8 ceiling"):
        a8, b8, one = a.to(FP8), b.to(FP8), torch.ones((), device=session.device)
        product = lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
        session.ceilings["fp8"] = flop / operator_time(session, product, 5) / 1e6
        session.row("ceiling", "fp8", f"product of {side}", session.ceilings["fp8"], "TFLOP/s")
    with session.part("copy ceiling"):
        large = torch.empty(side * side * 8, device=session.device, dtype=torch.bfloat16)
        rate = 2 * large.nbytes / operator_time(session, large.clone, 5) / 1e3
        session.row("ceiling", "copy", "1 GiB", rate, "GB/s")


def operators(session: Session, size: str) -> None:
    """Every product, and the kernels, alone, with inputs that stay in the cache as in the network."""
    config = transformer_config(size)
    channels, hidden = config.channels, int(config.mlp_ratio * config.channels)
    rows = 2 * (session.arguments.side // 32) ** 2
    shapes = {
        "qkv": (3 * channels, channels),
        "C x C": (channels, channels),
        "conv_inverted": (2 * hidden, channels),
        "conv_point": (channels, hidden),
    }
    for name, (outputs, inputs) in shapes.items():
        with session.part(f"{size} product {name}"):
            products(session, f"{size} {name}", rows, outputs, inputs)
    with session.part(f"{size} cross-attention"):
        cross_attentions(session, size, config)
    with session.part(f"{size} kernels"):
        own_kernels(session, size, config)


def products(session: Session, subject: str, rows: int, outputs: int, inputs: int) -> None:
    """One product in bf16, FP8 and INT8 by the libraries."""
    device = session.device
    x, w = torch.randn(rows, inputs, device=device).bfloat16(), torch.randn(outputs, inputs, device=device).bfloat16()
    bias, one = torch.randn(outputs, device=device).bfloat16(), torch.ones((), device=device)
    x8, w8, xi, wi = x.to(FP8), w.to(FP8), x.to(INT8), w.to(INT8)
    ones_m, ones_n = torch.ones(rows, 1, device=device), torch.ones(1, outputs, device=device)
    work: dict[str, Callable[[], object]] = {
        "bf16 with bias": lambda: F.linear(x, w, bias),
        "bf16": lambda: F.linear(x, w),
        "fp8 per tensor with bias": lambda: torch._scaled_mm(
            x8, w8.t(), one, one, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        "fp8 per tensor": lambda: torch._scaled_mm(x8, w8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
        "fp8 per tensor, exact accumulation": lambda: torch._scaled_mm(
            x8, w8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=False
        ),
        "fp8 per row and column": lambda: torch._scaled_mm(
            x8, w8.t(), ones_m, ones_n, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        "int8, int32 out": lambda: torch._int_mm(xi, wi.t()),
    }
    for what, call in work.items():
        try:
            time_us = operator_time(session, call)
        except Exception as error:
            session.row("failed", subject, f"{what}: {str(error)[:200]}".replace("\n", " "), 1, "failure")
            continue
        session.row("product", subject, what, time_us, "us", f"{2e-6 * rows * outputs * inputs / time_us:.0f} TFLOP/s")


def cross_attentions(session: Session, size: str, config: TransformerConfig) -> None:
    """Our kernel against PyTorch's, with all keys and with few."""
    tokens, heads = (session.arguments.side // 32) ** 2, config.cross_heads
    head_dim = config.channels // heads
    case = CrossCase(2, tokens, CAPTION_LENGTH, CAPTION_LENGTH, heads, head_dim)
    inputs = cross_inputs(case, session.device)
    scale = torch.tensor(0.01, device=session.device)
    impl = "triton" if session.on_gpu else "reference"
    for valid in (CAPTION_LENGTH, 77, 20):
        counts = torch.full_like(inputs.counts, valid)
        tensors = (inputs.query, inputs.key_value, inputs.bias, counts)
        for what, out in (("bf16", {}), ("fp8", {"out_scale": scale, "out_dtype": FP8})):
            call = lambda t=tensors, o=out: cross_attention(*t, heads=heads, impl=impl, **o)  # noqa: E731
            session.row(
                "operator", size, f"cross-attention, {what} out, {valid} keys", operator_time(session, call), "us"
            )
    if session.on_gpu:
        cross_attention_tilings(session, size, inputs, heads)
    q = inputs.query.unflatten(-1, (heads, head_dim)).transpose(1, 2)
    k, v = (t.unflatten(-1, (heads, head_dim)).transpose(1, 2) for t in inputs.key_value.chunk(2, -1))
    mask = inputs.bias[:, None, None, :].to(q.dtype).expand(-1, heads, tokens, -1)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
    for backend in backends:
        for masked in (True, False):
            what = f"SDPA {backend.name.lower()}{' masked' if masked else ''}"
            try:
                with sdpa_kernel(backend):
                    bias = mask if masked else None
                    call = lambda b=bias: F.scaled_dot_product_attention(q, k, v, attn_mask=b)  # noqa: E731
                    session.row("operator", size, what, operator_time(session, call), "us")
            except Exception as error:
                reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
                session.row("operator", size, what, float("nan"), "us", reason)


def cross_attention_tilings(session: Session, size: str, inputs: Any, heads: int) -> None:
    """Our kernel with other tilings."""
    from sana_kernels.cross_attention import triton as kernels

    chosen = kernels.tiling
    tilings = [
        kernels.Tiling(tokens, keys, warps, stages)
        for tokens, keys, warps in ((128, 64, 8), (64, 64, 4), (64, 128, 4), (64, 32, 4), (128, 32, 8), (128, 32, 4))
        for stages in (2, 3, 4)
    ]
    tensors = (inputs.query, inputs.key_value, inputs.bias, torch.full_like(inputs.counts, CAPTION_LENGTH))
    try:
        for tile in tilings:
            kernels.tiling = lambda itemsize, tile=tile: tile
            try:
                time_us = operator_time(session, lambda: kernels.forward(*tensors, None, heads, None))
            except Exception as error:
                session.row("failed", size, f"{tile}: {str(error)[:100]}".replace("\n", " "), 1, "failure")
                continue
            what = f"cross-attention {tile.tokens}x{tile.keys} w{tile.num_warps} s{tile.num_stages}"
            session.row("operator", size, what, time_us, "us")
    finally:
        kernels.tiling = chosen


def own_kernels(session: Session, size: str, config: TransformerConfig) -> None:
    """The other kernels of a block."""
    side = session.arguments.side // 32
    channels, hidden, device = config.channels, int(config.mlp_ratio * config.channels), session.device
    impl: Any = "triton" if session.on_gpu else "reference"

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).bfloat16()

    x, branch = normal(2, side * side, channels), normal(2, side * side, channels)
    row = torch.randn(1, channels, device=device).expand(2, -1)
    qkv, wide = normal(2, side * side, 3 * channels), normal(2, side * side, 2 * hidden)
    taps, bias = dit.taps_view(normal(9, 2 * hidden)), normal(2 * hidden)
    scale = torch.tensor(0.05, device=device)
    out: dict[str, Any] = {"out_scale": scale, "out_dtype": FP8, "impl": impl}
    work: dict[str, Callable[[], object]] = {
        "modulated norm with gated branch, fp8 out": lambda: residual_modulated_norm(x, branch, row, row, row, **out),
        "linear attention": lambda: linear_attention(qkv, head_dim=config.head_dim, impl=impl),
        "linear attention, fp8 out": lambda: linear_attention(qkv, head_dim=config.head_dim, **out),
        "depthwise, fp8 out": lambda: mix_ffn_depthwise(wide, taps, bias, side, side, x_bias=bias, **out),
        "depthwise, bf16 out": lambda: mix_ffn_depthwise(wide, taps, bias, side, side, x_bias=bias, impl=impl),
    }
    for what, call in work.items():
        session.row("operator", size, what, operator_time(session, call), "us")


# --- The decoder ---


def autoencoder_config(size: str) -> AutoencoderConfig:
    """Of the released decoder, or the tiny one."""
    table = catalogue()
    return AutoencoderConfig.from_upstream(
        {**table["vae_common"], **table["vaes"]["tiny" if size == "tiny" else "dc-ae-f32c32"]}
    )


def decoder(session: Session, size: str) -> None:
    """Single layers in several ways, then the whole decoder with its kernels."""
    config = autoencoder_config(size)
    torch.backends.cudnn.benchmark = True
    with session.part("decoder convolutions"):
        decoder_convolutions(session, config)
    with session.part("decoder mixing"):
        decoder_mixing(session, config)
    state = random_state(lambda: Decoder(config), session.device, torch.float32)
    side = session.arguments.side // 32
    latent = torch.randn(1, 32, side, side, device=session.device)
    with torch.device("meta"):
        module = Decoder(config)
    exact = loaded(module, dict(state))(latent / config.scaling_factor) * 0.5 + 0.5
    exact = (exact.clamp(0, 1) * 255).permute(0, 2, 3, 1)
    del module
    impl: Any = "triton" if session.on_gpu else "reference"
    layout = vae.DecoderLayout(config, torch.bfloat16, side, side, impl)
    variants = {
        "phases, shifted, batched": layout,
        "phases, library, library": dataclasses.replace(layout, depthwise="library", grouped="library"),
        "interpolate, shifted, batched": dataclasses.replace(layout, upsampling="interpolate"),
    }
    for name, chosen in variants.items():
        for options in ("library", "autotuned")[: 2 if name.startswith("phases, shifted") else 1]:
            subject = f"{name}, {options}"
            with session.part(f"decoder {subject}"):
                pieces = vae.decoder_pieces(chosen)
                names = vae.decoder_weights(chosen)
                values = {n: vae.stored_weight(n, state[n].bfloat16(), chosen.upsampling) for n in names}
                started = time.monotonic()
                fast = {piece.name: compiled(piece, VARIANTS[options]) for piece in pieces}

                calls = vae.decoder_calls(chosen)

                def decode(calls: Any = calls, fast: Any = fast, values: Values = values) -> torch.Tensor:
                    found = {**values, "latent": latent}
                    run_calls(calls, fast, found, frozenset({"image"}))
                    return found["image"]

                image = decode().float()
                session.row("build", "decoder", subject, time.monotonic() - started, "s")
                bound = math.sqrt(ROUNDINGS_PER_BLOCK * sum(config.decoder_layers)) * BF16_ROUNDOFF + 0.5 / 128
                held(session, "decoder", subject, relative_rms(image, exact), bound)
                replay = capture(session, decode)
                session.row("decoder", "whole", subject, microseconds(session, replay), "us")
                kernel_table(session, f"decoder {subject[:20]}", replay, 1)


def decoder_convolutions(session: Session, config: AutoencoderConfig) -> None:
    """The 3x3 convolutions of the stages, and three ways to upsample, eager, channels last."""
    for stage in range(len(config.decoder_channels) - 1):
        stage_convolutions(session, config, stage)


def stage_convolutions(session: Session, config: AutoencoderConfig, stage: int) -> None:
    """Those of one stage, at its picture size."""
    inputs, outputs = config.decoder_channels[stage + 1], config.decoder_channels[stage]
    small = session.arguments.side >> (stage + 1)

    def last(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=session.device).bfloat16().to(memory_format=torch.channels_last)

    x, large, weight = (
        last(1, inputs, small, small),
        last(1, inputs, 2 * small, 2 * small),
        last(outputs, inputs, 3, 3),
    )
    phases = last(4 * outputs, inputs, 2, 2)
    transposed = last(inputs, outputs, 4, 4)
    same, square = last(1, outputs, 2 * small, 2 * small), last(outputs, outputs, 3, 3)
    work: dict[str, Callable[[], object]] = {
        "3x3 on the upsampled image": lambda: F.conv2d(large, weight, padding=1),
        "nearest upsampling": lambda: F.interpolate(x, scale_factor=2.0, mode="nearest"),
        "2x2, four phases": lambda: F.conv2d(x, phases, padding=1),
        "transposed 4x4": lambda: F.conv_transpose2d(x, transposed, stride=2, padding=1),
    }
    if config.decoder_blocks[stage] == "ResBlock":
        work["3x3 of a ResBlock"] = lambda: F.conv2d(same, square, padding=1)
    for what, call in work.items():
        time_us = operator_time(session, call, 5)
        flop = 18 * outputs * (outputs if "ResBlock" in what else inputs) * (2 * small) ** 2
        note = "" if "nearest" in what else f"{flop / time_us / 1e6:.0f} TFLOP/s of the 3x3"
        session.row("decoder", f"stage {stage}", what, time_us, "us", note)


def decoder_mixing(session: Session, config: AutoencoderConfig) -> None:
    """Depthwise 5x5 and grouped 1x1 of the attention stages, by the library and as we write them."""
    for stage, kind in enumerate(config.decoder_blocks):
        if kind != "ResBlock" and config.decoder_multiscales[stage]:
            stage_mixing(session, config, stage)


def stage_mixing(session: Session, config: AutoencoderConfig, stage: int) -> None:
    """Those of one stage, at its picture size."""
    channels, side = 3 * config.decoder_channels[stage], session.arguments.side >> stage
    x = torch.randn(1, side, side, channels, device=session.device).bfloat16()
    taps = torch.randn(25, channels, device=session.device).bfloat16()
    groups = torch.randn(channels // 32, 32, 32, device=session.device).bfloat16()
    first = x.permute(0, 3, 1, 2)
    weight = taps.view(5, 5, 1, channels).permute(3, 2, 0, 1).contiguous()
    grouped = groups.flatten(0, 1)[:, :, None, None].contiguous()
    shifted = torch.compile(vae.shifted_sum, fullgraph=True, dynamic=False, options=dict(vae.ONE_PASS))
    rows = x.flatten(0, 2).unflatten(-1, (-1, 32)).transpose(0, 1)
    work: dict[str, Callable[[], object]] = {
        "depthwise 5x5, library": lambda: F.conv2d(first, weight, padding=2, groups=channels),
        "depthwise 5x5, shifted sum": lambda: shifted(x, taps),
        "grouped 1x1, library": lambda: F.conv2d(first, grouped, groups=channels // 32),
        "grouped 1x1, batched and copied": lambda: torch.bmm(rows, groups).transpose(0, 1).contiguous(),
    }
    for what, call in work.items():
        session.row("decoder", f"stage {stage}", what, operator_time(session, call, 5), "us")


# --- The text encoder ---


def text_encoder(session: Session, size: str) -> None:
    """All layers with one compiled layer, bf16 and INT8 weights."""
    table = catalogue()
    config = {**table["text_encoder_common"], **table["text_encoders"]["tiny" if size == "tiny" else "gemma-2-2b"]}
    for precision in ("bf16", "int8"):
        for variant in session.arguments.variants if precision in session.arguments.precisions else ():
            with session.part(f"text encoder {precision} {variant}"):
                one_text_encoder(session, config, precision, variant)


def one_text_encoder(session: Session, config: Mapping[str, Any], precision: str, variant: str) -> None:
    codes = INT8 if precision == "int8" else None
    impl: Any = "triton" if session.on_gpu else "reference"
    layout = gemma.TextEncoderLayout.from_upstream(config, PROMPT_TOKENS, torch.bfloat16, codes, impl)
    forms = {name: LinearForm(False, codes) for name in gemma.LAYER_LINEARS}
    pieces, layers = gemma.text_encoder_pieces(layout, (forms,) * layout.layers)
    prefix, whole, short = gemma.text_encoder_calls(pieces, layers)
    kept = frozenset(name for call in prefix for name in call.outputs)
    values = text_encoder_weights(session, config, layout, codes)
    values["caption_mask"] = torch.ones(1, PROMPT_TOKENS, dtype=torch.int64, device=session.device)
    for lookup in gemma.text_encoder_lookups(layout):
        # The host reads as many rows for any tokens: the table's first.
        values[lookup.output] = values[lookup.table][None, : lookup.end - lookup.first]
    subject = f"{precision} {variant}"
    started = time.monotonic()
    options = dict(VARIANTS[variant])
    if hasattr(torch._inductor.config, "prologue_fusion"):
        options["prologue_fusion"] = True
    fast = {name: compiled(piece, options if name.endswith("layer") else {}) for name, piece in pieces.items()}

    def with_prefix(with_pieces: Mapping[str, Any]) -> Values:
        found = dict(values)
        run_calls(prefix, with_pieces, found, kept)
        return found

    def run(calls: tuple[Call, ...], with_pieces: Mapping[str, Any], found: Values) -> torch.Tensor:
        found = dict(found)
        run_calls(calls, with_pieces, found, frozenset({"caption_embeds"}))
        return found["caption_embeds"]

    prepared, prepared_eagerly = with_prefix(fast), with_prefix(pieces)
    got = {calls: run(calls, fast, prepared) for calls in (whole, short)}
    session.row("build", "text encoder", subject, time.monotonic() - started, "s")
    bound = 2 * math.sqrt(ROUNDINGS_PER_BLOCK * layout.layers) * BF16_ROUNDOFF
    stored = sum(values[n].nbytes for n in values if n.startswith("layers."))
    for calls, tokens in ((whole, PROMPT_TOKENS), (short, layout.short_end)):
        error = relative_rms(got[calls], run(calls, pieces, prepared_eagerly))
        held(session, "text encoder", f"{subject} against eager pieces, {tokens} tokens", error, bound)
        replay = capture(session, lambda calls=calls: run(calls, fast, prepared))
        time_us = microseconds(session, replay, 10)
        note = f"layers' weights {stored >> 20} MiB, {layout.prefix} positions kept"
        session.row("encoder", subject, f"{tokens} tokens", time_us, "us", note)
        kernel_table(session, f"encoder {subject}, {tokens} tokens", replay, layout.layers)


def text_encoder_weights(
    session: Session, config: Mapping[str, Any], layout: gemma.TextEncoderLayout, codes: torch.dtype | None
) -> Values:
    """Random weights under the names that the calls use."""
    channels, hidden = layout.channels, config["intermediate_size"]
    queries = layout.heads * layout.head_dim
    shapes = {
        "self_attn.qkv": (queries + 2 * layout.key_heads * layout.head_dim, channels),
        "self_attn.o_proj": (channels, queries),
        "mlp.gate_up": (2 * hidden, channels),
        "mlp.down_proj": (channels, hidden),
    }

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, device=session.device) / math.sqrt(columns)).bfloat16()

    def stored(name: str, weight: torch.Tensor) -> Values:
        if codes is None:
            return {f"{name}.weight": weight}
        found = quantized(name, weight, codes, 1.0)
        return {key: value for key, value in found.items() if not key.endswith("activation_scale")}

    values = stored("embed_tokens", matrix(PROMPT_TOKENS, channels))
    norm = torch.randn(channels, device=session.device).bfloat16() * 0.1
    values["norm.weight"] = norm
    for i in range(layout.layers):
        for name, shape in shapes.items():
            values |= stored(f"layers.{i}.{name}", matrix(*shape))
        values |= {f"layers.{i}.{name}.weight": norm for name in gemma.LAYER_NORMS}
    return values


# --- The command ---


def main() -> int:
    """Run the sections asked for."""
    prefer_little_memory()  # as the engines run
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("ceilings", "operators", "aoti", "steps", "decoder", "encoder")
    parser.add_argument("--sections", nargs="+", default=list(sections), choices=sections)
    parser.add_argument("--sizes", nargs="+", default=["0.6b", "1.6b"], choices=("0.6b", "1.6b", "tiny"))
    parser.add_argument("--precisions", nargs="+", default=["fp8", "bf16", "int8"], choices=("bf16", "fp8", "int8"))
    parser.add_argument("--variants", nargs="+", default=["library", "autotuned"], choices=tuple(VARIANTS))
    parser.add_argument("--side", type=int, default=1024, help="picture side in pixels")
    parser.add_argument(
        "--prompt-tokens", type=int, default=CAPTION_LENGTH, help="valid caption tokens of 300, in both halves"
    )
    parser.add_argument(
        "--fused-products",
        default=dit.TransformerLayout.fused_products,
        choices=get_args(dit.FusedProducts),
        help="which products with a residual behind them our kernel computes",
    )
    parser.add_argument("--budget-s", type=float, default=540.0, help="start no further part after this many seconds")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--commit", default="", help="what the rows call the commit, where git cannot tell")
    parser.add_argument("--output", type=Path, default=Path("inductor_profile.csv"))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu runs the script's logic without one", file=sys.stderr)
        return 1
    # fp32 is what everything is held to.
    torch.backends.cudnn.allow_tf32 = False
    for limit in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit"):
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, 512)
    with arguments.output.open("w", newline="") as file, torch.no_grad():
        session = Session.begin(arguments, file)
        work: dict[str, Callable[[], None]] = {
            "ceilings": lambda: ceilings(session),
            "operators": lambda: each(session, operators),
            "aoti": lambda: aoti(session, arguments.sizes[0]),
            "steps": lambda: each(session, lambda s, size: transformer_steps(s, size, arguments.precisions)),
            "decoder": lambda: decoder(session, arguments.sizes[0]),
            "encoder": lambda: text_encoder(session, arguments.sizes[0]),
        }
        for name in arguments.sections:
            try:
                with session.part(name):
                    work[name]()
            except OutOfTime as error:
                print(f"out of time before: {error}", flush=True)
    return 0


def each(session: Session, section: Callable[[Session, str], None]) -> None:
    """A section for every size asked for; one that fails does not stop the next."""
    for size in session.arguments.sizes:
        with session.part(size):
            section(session, size)


if __name__ == "__main__":
    sys.exit(main())
