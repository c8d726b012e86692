"""Train `nano`, the small Sana that is shipped, from nothing.

    python -m scripts.train_nano --work build/nano                         # all of it, on an NVIDIA GPU
    python -m scripts.train_nano --work build/nano --session-minutes 9     # in pieces: run it again to go on
    python -m scripts.train_nano --work build/next --start FOLDER          # only diffusion, from finished stages
    python -m scripts.train_nano --work build/next --start sana_export/models/nano   # go on with the shipped model
    python -m scripts.train_nano --work build/nano --smoke                 # every stage for some seconds
    python -m scripts.train_nano --work build/tiny --size tiny --smoke     # the same on a CPU, in two minutes

Every stage has a share of `--minutes` and ends cooled down, whatever the machine's speed:
{plan}
With --start, of stages that FOLDER has finished (STAGE.pt, tokenizer.json, record.json, and start.pt, weights to go on
from), or of a trained model's directory, whose autoencoder is finished:
{start_plan}
`--small-minutes` and `--large-minutes` say for the two diffusion stages how long instead. Checkpoints, with a sheet of
validation prompts and how many of them are right, are never older than two minutes. The model is written to
WORK/model, a diffusers directory with its card; WORK holds curves, sheets of samples, scores and record.json beside it.
"""

import argparse
import faulthandler
import functools
import os
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import torch

from sana_export.reference import dc_ae, transformer
from sana_kernels.linear_attention import linear_attention
from sana_runtime.errors import InputError, SanaError
from scripts.train_nano.depthwise import TRITON_PROBLEM
from scripts.train_nano.evaluation import CAN_JUDGE, RUNS
from scripts.train_nano.export import pack_checkpoints, unpack_checkpoints
from scripts.train_nano.measure import measure
from scripts.train_nano.profiling import PROFILED_SCENES, profile_diffusion
from scripts.train_nano.run import FROM_FINISHED, FROM_NOTHING, STAGES, Plan, Run, Share
from scripts.train_nano.sizes import SIZES
from scripts.train_nano.stage import Session

_SMOKE_MINUTES = {"cuda": 0.8, "cpu": 0.5}
_SMOKE_SCENES = 20_000


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_nano",
        description=_description(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="checkpoints and results")
    parser.add_argument("--size", choices=tuple(SIZES), default="nano")
    parser.add_argument("--minutes", type=float, default=18, help="of training, all stages together (default: 18)")
    parser.add_argument("--session-minutes", type=float, help="stop in time to be run again; default: no limit")
    parser.add_argument(
        "--stall-minutes",
        type=float,
        help="without a message, then say where every thread is and end; default: 3 on a GPU, 0 (never) on a CPU",
    )
    parser.add_argument("--smoke", action="store_true", help="a minute of training in all, few scenes and prompts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, help="processes for scenes and scores; default: the cores, 0 on a CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--mix-ffn", choices=("triton", "reference"), help="default: triton on a GPU")
    parser.add_argument("--linear-attention", choices=("kernel", "reference"), default="kernel")
    parser.add_argument(
        "--start", type=Path, metavar="DIR", help="finished stages, and weights to start diffusion from"
    )
    parser.add_argument("--text-encoder", choices=("joint", "frozen"), default="joint", help="at the small side")
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True, help="for the blocks' matrices")
    parser.add_argument("--small-minutes", type=float, help="of diffusion at the small side, instead of its share")
    parser.add_argument("--large-minutes", type=float, help="of diffusion at the large side, instead of its share")
    parser.add_argument(
        "--latents-minutes", type=float, nargs=2, metavar=("SMALL", "LARGE"), help="to encode scenes at both sides"
    )
    parser.add_argument("--diffusion-batch", type=int, nargs=2, metavar=("SMALL", "LARGE"), help="pictures per step")
    parser.add_argument("--profile", action="store_true", help="only profile 20 diffusion steps of each side")
    parser.add_argument("--measure", action="store_true", help="only time the fused operators against PyTorch's")
    parser.add_argument("--stop-after", choices=STAGES, help="train no further than this stage")
    parser.add_argument("--test-prompts", type=int, default=500)
    parser.add_argument("--validation-prompts", type=int, default=200)
    parser.add_argument("--no-evaluation", action="store_true", help="export only")
    parser.add_argument("--export", type=Path, metavar="FILE.tar", help="the model's directory as one file")
    parser.add_argument("--pack-checkpoint", type=Path, metavar="DIR", help="checkpoints as files of 15 MiB or less")
    parser.add_argument("--unpack-checkpoint", type=Path, metavar="DIR", help="go on from such files")
    return parser.parse_args()


def _description() -> str:
    def shown(shares: Share) -> str:
        parts = [f"{name} {100 * share:g} %" for name, share in shares.items()]
        return textwrap.fill(", ".join(parts), 118)

    return (__doc__ or "").format(plan=shown(FROM_NOTHING), start_plan=shown(FROM_FINISHED))


def main() -> int:
    """Run it; 0 unless the input was wrong."""
    try:
        return _run(_arguments())
    except SanaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    begun = time.monotonic()
    device = torch.device(arguments.device)
    _prepare(device, arguments.linear_attention)
    if arguments.measure:
        measure(device, SIZES[arguments.size])
        return 0
    if not (arguments.profile or CAN_JUDGE or arguments.no_evaluation):
        raise InputError(
            "pictures cannot be scored here",
            received="no scikit-image",
            expected="scikit-image, which reads the pictures",
            action="pip install scikit-image, or add --no-evaluation: sheets are painted without scores",
        )
    run = Run(_session(arguments, device, begun), _plan(arguments, device))
    run.session.log(f"{arguments.size} on {device}, {run.plan.minutes:.2f} minutes of training")
    try:
        if arguments.profile:
            profile_diffusion(run)
            return 0
        if arguments.unpack_checkpoint:
            unpack_checkpoints(arguments.unpack_checkpoint, arguments.work)
        finished = run.train()
        faulthandler.cancel_dump_traceback_later()
        if finished:
            run.export()
            if not arguments.no_evaluation:
                run.evaluate()
            if arguments.export:
                run.pack(arguments.export)
        if arguments.pack_checkpoint:
            pack_checkpoints(arguments.work, STAGES, arguments.pack_checkpoint)
    finally:
        run.pool.shutdown(cancel_futures=True)
    run.session.log("end")
    return 0


def _prepare(device: torch.device, attention: str) -> None:
    """Settings of PyTorch for this process."""
    torch._dynamo.config.recompile_limit = 64
    torch.backends.cudnn.benchmark = device.type == "cuda"
    # fp32 is fp32; training's products are bf16 by autocast.
    torch.backends.cudnn.allow_tf32 = False
    if attention == "reference":
        plain = functools.partial(linear_attention, impl="reference")
        dc_ae.linear_attention = plain  # type: ignore[assignment]
        transformer.linear_attention = plain  # type: ignore[assignment]


def _session(arguments: argparse.Namespace, device: torch.device, begun: float) -> Session:
    on_gpu = device.type == "cuda"
    minutes = arguments.session_minutes
    stall_minutes = arguments.stall_minutes if arguments.stall_minutes is not None else 3.0 if on_gpu else 0.0
    arguments.work.mkdir(parents=True, exist_ok=True)

    def log(text: str) -> None:
        line = f"[{time.monotonic() - begun:7.1f}] {text}"
        print(line, flush=True)
        with (arguments.work / "train.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if stall_minutes:
            faulthandler.dump_traceback_later(60 * stall_minutes, exit=True)

    return Session(
        work=arguments.work,
        device=device,
        deadline=None if minutes is None else begun + 60 * minutes,
        compiled=on_gpu if arguments.compile is None else arguments.compile,
        cuda_graph=on_gpu if arguments.cuda_graph is None else arguments.cuda_graph,
        log=log,
    )


def _plan(arguments: argparse.Namespace, device: torch.device) -> Plan:
    on_gpu = device.type == "cuda"
    workers = arguments.workers
    if workers is None:
        workers = (os.cpu_count() or 1) if on_gpu else 0
    mix_ffn = arguments.mix_ffn or ("triton" if on_gpu else "reference")
    if mix_ffn == "triton" and TRITON_PROBLEM:
        raise InputError(
            "the fused Mix-FFN cannot run", received=TRITON_PROBLEM, expected="triton", action="--mix-ffn reference"
        )
    size = SIZES[arguments.size]
    if arguments.diffusion_batch:
        size = replace(size, batches=replace(size.batches, diffusion=tuple(arguments.diffusion_batch)))
    minutes = {"diffusion-small": arguments.small_minutes, "diffusion-large": arguments.large_minutes}
    if arguments.latents_minutes:
        minutes |= dict(zip(("latents-small", "latents-large"), arguments.latents_minutes, strict=True))
    scenes = None
    if arguments.smoke or arguments.profile:
        scenes = PROFILED_SCENES if arguments.profile else min(size.scenes, _SMOKE_SCENES)
    return Plan(
        size=size,
        minutes=_SMOKE_MINUTES[device.type] if arguments.smoke else arguments.minutes,
        workers=workers,
        mix_ffn=mix_ffn,
        test_prompts=16 if arguments.smoke else arguments.test_prompts,
        validation_prompts=8 if arguments.smoke else arguments.validation_prompts,
        stop_after=arguments.stop_after,
        runs=RUNS[:3] if arguments.smoke else RUNS,
        scenes=scenes,
        start=arguments.start,
        muon=arguments.muon,
        frozen_text=arguments.text_encoder == "frozen",
        stage_minutes={name: value for name, value in minutes.items() if value is not None},
    )


if __name__ == "__main__":
    sys.exit(main())
