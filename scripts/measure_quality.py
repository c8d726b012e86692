"""What each precision, number of steps and solver does to the trained model's pictures.

Paints the test prompts, reads every picture, and writes one row per way of painting to
benchmarks/results/nano_quality.csv: the share of prompts whose claims hold, and PSNR and SSIM against the bf16 picture
of the same seed, solver and steps. Two ways of painting:

- pytorch: the reference modules in batches, on a GPU if there is one; for a recipe the fake-quantised modules with the
  scales of the bundle, which compute what its graphs compute;
- onnxruntime: the bundle itself through sana-runtime on the CPU, one process per core.

Bundles are built where they are missing, and the bf16 pictures are kept beside them (references/): painted on a GPU,
they serve for the rows of another machine. `--compared N` paints those of the first N prompts only: a CPU takes seconds
for each. Rows that are there already are not measured again.

    python scripts/measure_quality.py --bundles build/quality
    python scripts/measure_quality.py --bundles build/quality --target onnxruntime --precision fp8 int8 --steps 20
"""

import argparse
import csv
import io
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from importlib.metadata import version
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

# A picture is small work: processes, not threads, share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from sana_calibration.fake_quant import fake_quantize_in_place
from sana_calibration.recipe import load_recipe
from sana_calibration.scales import Scales
from sana_export.calibration_run import NEGATIVE, DenoisingRun, rules_of, sampling_of
from sana_export.components import loaded_module
from sana_export.parity.metrics import measure, ssim
from sana_export.prompting import scheduler_entry
from sana_export.scenes.prompts import Prompt, test_prompts
from sana_export.scenes.quality import EQUAL_PSNR_DB
from sana_export.scenes.reading import read_picture
from sana_export.scenes.scoring import ATTRIBUTES, Score, score, summarise
from sana_export.weights.checkpoint import SHIPPED_MODEL, SHIPPED_SIDE, open_checkpoint
from sana_runtime.contract import COMPONENTS, ComponentName
from sana_runtime.errors import BuildError, InputError, SanaError
from sana_runtime.files import whole_file
from sana_runtime.manifest import MANIFEST_NAME, SchedulerEntry, read_manifest
from sana_runtime.pipeline import Pipeline, draw_noise, seeded_generator
from sana_runtime.scheduler import StepTable, step_table

Pixels = npt.NDArray[np.uint8]

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "nano_quality.csv"
RECIPES = ("fp8", "int8", "int8-weight-only", "int4-weight-only")
REFERENCE = "bf16"
DPM, EULER = "flow_dpm_solver", "flow_euler"
_BATCH = 50
_DECODED_AT_ONCE = 10
# Those that this process may run on.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Way:
    """A way of painting."""

    precision: str
    target: str
    solver: str
    steps: int

    @property
    def reference(self) -> "Way":
        """Whose pictures it is compared with."""
        return Way(REFERENCE, "pytorch", self.solver, self.steps)

    @property
    def needs_bundle(self) -> bool:
        """Whether it paints with a bundle, or with a bundle's scales."""
        return self.target == "onnxruntime" or self.precision in RECIPES

    @property
    def recipe(self) -> str:
        """Digest of the recipe with fp32 beside it; empty for a plain dtype."""
        if self.precision not in RECIPES:
            return ""
        return replace(load_recipe(self.precision), base_dtype="float32").digest


@dataclass(frozen=True)
class Row:
    """Shares of the prompts 0..1; `low`, `high`: Wilson's 95 % interval of `overall`; mean PSNR and SSIM of the first
    `compared` pictures. `flow_shift` and `guidance_scale` are what the model was shipped with.
    """

    precision: str
    target: str
    solver: str
    steps: int
    flow_shift: float
    guidance_scale: float
    prompts: int
    overall: float
    low: float
    high: float
    count: float
    colour: float
    shape: float
    position: float
    binding: float
    background: float
    compared: int
    psnr_db: float | None
    worst_psnr_db: float | None
    ssim: float | None
    weights: str
    recipe: str
    device: str
    versions: str
    commit: str
    date: str


@dataclass(frozen=True)
class Judged:
    """One picture."""

    score: Score
    psnr_db: float | None
    ssim: float | None


def ways() -> Iterator[Way]:
    """Everything that is measured; what matters most comes first."""
    for steps in (20, 14, 8, 50):
        for precision in ("fp32", REFERENCE, "fp16", *RECIPES):
            yield Way(precision, "pytorch", DPM, steps)
        if steps == 20:
            for precision in ("fp8", "int8", "fp32", "int8-weight-only", "int4-weight-only"):
                yield Way(precision, "onnxruntime", DPM, steps)
            for euler_steps in (8, 14, 20, 28, 50):
                yield Way("fp32", "pytorch", EULER, euler_steps)
            yield Way("fp32", "onnxruntime", DPM, 14)
            yield Way("fp32", "onnxruntime", EULER, 28)


# --- Painting with PyTorch ---


class ModulePainter:
    """The modules of one precision, fake-quantised with what `bundle` says if there is one."""

    def __init__(self, precision: str, bundle: Path | None, texts: Sequence[str], device: str) -> None:
        self._device, self._bundle = device, bundle
        base: Any = "fp32" if bundle else precision
        with tempfile.TemporaryDirectory() as folder:
            self._run = DenoisingRun(
                open_checkpoint(SHIPPED_MODEL),
                tuple(texts),
                0,
                1,
                SHIPPED_SIDE,
                SHIPPED_SIDE,
                Path(folder),
                device,
                base,
            )
            self._captions = self._encoded()
        self._transformer = self._module("transformer").transformer
        self._decoder = self._module("vae_decoder")

    def _module(self, name: ComponentName) -> Any:
        module = loaded_module(self._run.plans[name], self._run.checkpoint)
        if self._bundle:
            _fake_quantize_as(self._bundle, name, module, self._run)
        return module.to(self._device)

    @torch.inference_mode()
    def _encoded(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """caption_embeds [1, 300, C] and mask [1, 300]: the negative prompt's, then every prompt's."""
        encoder = self._module("text_encoder")
        found = (self._run.caption(encoder, index) for index in self._run.items("text_encoder"))
        dtype = getattr(torch, self._run.plans["text_encoder"].dtype)
        return [
            (torch.from_numpy(item["embeds"]).to(self._device, dtype), torch.from_numpy(item["mask"]).to(self._device))
            for item in found
        ]

    @torch.inference_mode()
    def paint(
        self, scheduler: SchedulerEntry, steps: int, guidance_scale: float, count: int | None = None
    ) -> Iterator[Pixels]:
        """The picture of every prompt, or of the first `count`; prompt i starts from the runtime's noise of seed i."""
        table = step_table(scheduler, steps)
        count = len(self._run.prompts) if count is None else count
        for start in range(0, count, _BATCH):
            indices = range(start, min(start + _BATCH, count))
            noise = np.concatenate([draw_noise(seeded_generator(i), self._run.latent_shape) for i in indices])
            latent = self._solve(torch.from_numpy(noise).to(self._device), indices, table, guidance_scale)
            for part in latent.split(_DECODED_AT_ONCE):
                yield from self._decoder(part).cpu().numpy()

    def _solve(
        self, latent: torch.Tensor, indices: Sequence[int], table: StepTable, guidance_scale: float
    ) -> torch.Tensor:
        """`ClassifierFreeStep`'s arithmetic for many pictures at once: the batch is [negatives, positives]."""
        count, model = len(indices), self._transformer
        dtype = model.proj_out.weight.dtype
        captions = [self._captions[0]] * count + [self._captions[index - NEGATIVE] for index in indices]
        embeds, mask = (torch.cat(parts) for parts in zip(*captions, strict=True))
        previous = torch.zeros_like(latent)
        for sigma, timestep, (a, b, c) in zip(table.sigmas, table.timesteps, table.coefficients, strict=False):
            moments = torch.full((2 * count,), float(timestep), device=self._device)
            both = model(latent.to(dtype).repeat(2, 1, 1, 1), embeds, mask, moments).float()
            negative, positive = both.chunk(2)
            x0 = latent - float(sigma) * (negative + guidance_scale * (positive - negative))
            latent, previous = float(a) * latent + float(b) * x0 + float(c) * previous, x0
        return latent


def scheduler_of(solver: str, flow_shift: float | None = None) -> SchedulerEntry:
    """The shipped model's scheduler with another solver, and another shift if one is given."""
    entry = scheduler_entry(open_checkpoint(SHIPPED_MODEL))
    return msgspec.structs.replace(entry, kind=solver, flow_shift=flow_shift or entry.flow_shift)


def _fake_quantize_as(bundle: Path, name: ComponentName, module: nn.Module, run: DenoisingRun) -> None:
    """With the recipe and the scales of a bundle; a recipe for weights alone has no scales."""
    recipe = load_recipe(bundle / "quantization" / "recipe.yaml")
    path = bundle / "quantization" / "calibration.safetensors"
    found = {}
    if path.exists():
        weights = {component: run.checkpoint.digest(component) for component in COMPONENTS}
        sampling = sampling_of(run.checkpoint)
        found = dict(Scales.load(path, weights=weights, recipe=recipe.digest, sampling=sampling).component(name))
    plan = run.plans[name]
    fake_quantize_in_place(module, plan.prefix, rules_of(recipe, plan), found)


# --- Painting with ONNX Runtime ---

_pipeline: Pipeline


def _open_bundle(bundle: Path, scheduler: SchedulerEntry) -> None:
    """In a process of the pool."""
    global _pipeline
    _pipeline = Pipeline.load(bundle, "onnxruntime", threads=1, report=lambda _: None)
    _pipeline.manifest = msgspec.structs.replace(_pipeline.manifest, scheduler=scheduler)


def _paint_one(text: str, seed: int, steps: int, guidance_scale: float) -> Pixels:
    return _pipeline.generate(text, seed=seed, num_steps=steps, guidance_scale=guidance_scale).pixels


def paint_with_bundle(
    bundle: Path, texts: Sequence[str], scheduler: SchedulerEntry, steps: int, guidance_scale: float, cores: int
) -> Iterator[Pixels]:
    """Every prompt's picture."""
    with ProcessPoolExecutor(cores, get_context("spawn"), _open_bundle, (bundle, scheduler)) as pool:
        futures = [pool.submit(_paint_one, text, seed, steps, guidance_scale) for seed, text in enumerate(texts)]
        for future in futures:
            yield future.result()


def build_bundle(folder: Path, way: Way) -> Path:
    """The bundle of a precision, built unless it is there, by the recipe as it is now. fp32 beside what a recipe
    quantises: it runs on any CPU.
    """
    precision, bundle = way.precision, folder / way.precision
    if not _is_built(bundle, way.recipe):
        base = ["--base-precision", "fp32"] if precision in RECIPES else []
        command = [sys.executable, "-m", "sana_export", "build", SHIPPED_MODEL, "--precision", precision, *base]
        # A missed gate is a figure here, no obstacle.
        subprocess.run([*command, "--target", "onnxruntime", "--no-gate", "--output", str(bundle)], check=False)
    if not _is_built(bundle, way.recipe):
        raise BuildError(
            f"no bundle of {precision}",
            received=f"{bundle} is missing, or of another recipe",
            expected="a bundle",
            action="see the build's own message above",
        )
    return bundle


def _is_built(bundle: Path, recipe: str) -> bool:
    if not (bundle / MANIFEST_NAME).exists():
        return False
    manifest = read_manifest(bundle)
    # What is calibrated, is calibrated with the model's scheduler.
    if manifest.scheduler != scheduler_of(DPM):
        return False
    return (manifest.quantization.recipe_digest if manifest.quantization else "") == recipe


# --- Judging ---


def judged(picture: Pixels, prompt: Prompt, reference: Pixels | None) -> Judged:
    """Read and compare one picture."""
    if reference is None:
        return Judged(score(prompt, read_picture(picture)), None, None)
    psnr = min(measure("picture", "image", picture, reference).psnr_db, EQUAL_PSNR_DB)
    return Judged(score(prompt, read_picture(picture)), psnr, ssim(picture, reference))


def save_pictures(folder: Path, pictures: Iterable[Pixels]) -> None:
    """As `folder`/NNNN.png; the folder appears when all are there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(Path(temporary, f"{index:04}.png"))
        Path(temporary).replace(folder)


def load_pictures(folder: Path, count: int) -> list[Pixels]:
    """What `save_pictures` wrote. Raises `InputError` where pictures are missing or damaged."""
    try:
        return [np.asarray(Image.open(folder / f"{index:04}.png").convert("RGB")) for index in range(count)]
    except OSError as error:
        raise InputError(
            "the reference pictures cannot be read",
            received=str(error),
            expected=f"{count} pictures in {folder}",
            action=f"remove {folder}: they are painted again",
        ) from error


class Measurement:
    """All rows of one command. A set of reference pictures per solver and number of steps is held in memory."""

    def __init__(self, arguments: argparse.Namespace, pool: ProcessPoolExecutor) -> None:
        self.prompts = test_prompts(arguments.prompts)
        self.texts = tuple(prompt.text for prompt in self.prompts)
        self.bundles: Path = arguments.bundles
        self.device: str = arguments.device
        self.cores = CORES
        self.commit: str = arguments.commit
        self.compared = len(self.prompts) if arguments.compared is None else min(arguments.compared, len(self.prompts))
        self.painters: dict[str, ModulePainter] = {}
        self.references: dict[Way, list[Pixels]] = {}
        self.pool = pool
        checkpoint = open_checkpoint(SHIPPED_MODEL)
        self.weights = checkpoint.digest("transformer")[:12]
        # Files outlive a command: kept pictures are those of all components.
        self.model = "-".join(checkpoint.digest(name)[:8] for name in COMPONENTS)

    def pictures(self, way: Way, count: int) -> Iterator[Pixels]:
        """Paint the first `count` prompts."""
        bundle = build_bundle(self.bundles, way) if way.needs_bundle else None
        scheduler = scheduler_of(way.solver)
        scale = scheduler.default_guidance_scale
        if way.target == "onnxruntime":
            assert bundle is not None
            yield from paint_with_bundle(bundle, self.texts[:count], scheduler, way.steps, scale, self.cores)
            return
        if way.precision not in self.painters:
            self.painters[way.precision] = ModulePainter(way.precision, bundle, self.texts, self.device)
        yield from self.painters[way.precision].paint(scheduler, way.steps, scale, count)

    def reference(self, way: Way) -> list[Pixels]:
        """The bf16 pictures, kept as files beside the bundles: whoever painted them on a GPU need not paint them again
        where the bundles run.
        """
        if way.reference not in self.references:
            scheduler = scheduler_of(way.solver)
            asked = f"{scheduler.flow_shift:g}-{scheduler.default_guidance_scale:g}"
            name = f"{self.model}-{way.solver}-{asked}-{way.steps}-{self.compared}"
            folder = self.bundles / "references" / name
            if not folder.exists():
                save_pictures(folder, self.pictures(way.reference, self.compared))
            self.references[way.reference] = load_pictures(folder, self.compared)
        return self.references[way.reference]

    def row(self, way: Way) -> Row:
        """Paint and judge every prompt."""
        compared = self.compared if way != way.reference else 0
        references = [*(self.reference(way) if compared else ()), *[None] * (len(self.prompts) - compared)]
        painted = way == way.reference and self.compared == len(self.prompts)
        pictures = self.reference(way) if painted else self.pictures(way, len(self.prompts))
        futures: list[Future[Judged]] = [
            self.pool.submit(judged, *item) for item in zip(pictures, self.prompts, references, strict=True)
        ]
        found = [future.result() for future in futures]
        rates = {item.name: item for item in summarise([item.score for item in found]) if item.scope != "kind"}
        psnrs = [item.psnr_db for item in found if item.psnr_db is not None]
        similarities = [item.ssim for item in found if item.ssim is not None]
        return Row(
            **asdict(way),
            flow_shift=scheduler_of(way.solver).flow_shift,
            guidance_scale=scheduler_of(way.solver).default_guidance_scale,
            prompts=len(found),
            overall=round(rates["overall"].rate, 4),
            low=round(rates["overall"].low, 4),
            high=round(rates["overall"].high, 4),
            **{name: round(rates[name].rate, 4) for name in ATTRIBUTES},
            compared=compared,
            psnr_db=round(sum(psnrs) / len(psnrs), 2) if compared else None,
            worst_psnr_db=round(min(psnrs), 2) if compared else None,
            ssim=round(sum(similarities) / len(similarities), 4) if compared else None,
            weights=self.weights,
            recipe=way.recipe[:12],
            device=self._device_name(way),
            versions=f"torch {torch.__version__}, onnxruntime {version('onnxruntime')}",
            commit=self.commit,
            date=date.today().isoformat(),
        )

    def _device_name(self, way: Way) -> str:
        if way.target == "pytorch" and self.device == "cuda":
            return torch.cuda.get_device_name()
        return f"{self.cores} CPU cores, {platform.machine()}"


def read_rows(path: Path) -> list[dict[str, str]]:
    """What was measured before."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """In the order of `ways`, whatever was measured first; those of other sampling settings behind them."""
    order = {tuple(map(str, asdict(way).values())): index for index, way in enumerate(ways())}
    shipped = _sampling(DPM)

    def place(row: dict[str, Any]) -> tuple[bool, int]:
        *way, shift, scale = _key(row)
        return (shift, scale) != shipped, order.get(tuple(way), len(order))

    ordered = sorted(rows, key=place)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(ordered)
    with whole_file(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    names = (*(field.name for field in fields(Way)), "flow_shift", "guidance_scale")
    return tuple(str(row[name]) for name in names)


def _sampling(solver: str) -> tuple[str, str]:
    """What the shipped model is asked with, as rows write it: flow shift and guidance scale."""
    scheduler = scheduler_of(solver)
    return str(scheduler.flow_shift), str(scheduler.default_guidance_scale)


def _compares(row: dict[str, Any], wanted: int) -> bool:
    return int(row["compared"]) >= wanted or (row["precision"], row["target"]) == (REFERENCE, "pytorch")


def _chosen(arguments: argparse.Namespace) -> Iterator[Way]:
    for way in ways():
        asked = way.precision in (arguments.precision or [way.precision]) and way.steps in (
            arguments.steps or [way.steps]
        )
        if asked and way.target in arguments.target:
            yield way


def this_commit() -> str:
    """As git names it."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return found.stdout.strip() or "unknown"


def end_workers_on_sigterm() -> None:
    """Without it the processes of a pool outlive a script that is told to end."""

    def end(*_: object) -> None:
        for child in active_children():
            child.terminate()
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def main() -> int:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, required=True, help="folder of bundles, one per precision")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--target", choices=("pytorch", "onnxruntime"), nargs="+", default=("pytorch", "onnxruntime"))
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16", *RECIPES), nargs="+", help="default: all")
    parser.add_argument("--steps", type=int, nargs="+", help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compared", type=int, metavar="N", help="with bf16 pictures: the first N; default: all")
    parser.add_argument("--minutes", type=float, help="begin no further row after this long")
    parser.add_argument("--commit", default=this_commit(), help="default: git's")
    parser.add_argument("--rows", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.compared is not None and arguments.compared < 0:
        parser.error(f"--compared: {arguments.compared} given, 0 or more expected")
    end_workers_on_sigterm()
    # fp32 is fp32.
    torch.backends.cudnn.allow_tf32 = False
    # The modules paint in this process, alone.
    torch.set_num_threads(CORES)
    try:
        with ProcessPoolExecutor(CORES, get_context("spawn")) as pool:
            _measure(arguments, Measurement(arguments, pool))
    except SanaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _measure(arguments: argparse.Namespace, measurement: Measurement) -> None:
    begun = time.monotonic()
    # Rows of other weights say nothing about the model that is shipped.
    rows: list[dict[str, Any]] = [row for row in read_rows(arguments.rows) if row["weights"] == measurement.weights]
    known = {(*_key(row), row["recipe"], row["prompts"]) for row in rows if _compares(row, measurement.compared)}
    for way in _chosen(arguments):
        late = arguments.minutes is not None and time.monotonic() - begun > 60 * arguments.minutes
        key = (*map(str, asdict(way).values()), *_sampling(way.solver))
        if late or (*key, way.recipe[:12], str(len(measurement.texts))) in known:
            continue
        row = asdict(measurement.row(way))
        rows = [other for other in rows if _key(other) != key] + [row]
        write_rows(arguments.rows, rows)
        print(
            f"[{time.monotonic() - begun:6.0f} s] {' '.join(key[:-2])}: {row['overall']:.1%} of {row['prompts']}, "
            f"PSNR {row['psnr_db']} dB (worst {row['worst_psnr_db']}), SSIM {row['ssim']}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
