"""What a bundle's engines take of this GPU, moment by moment: where a picture's peak comes from.

    python benchmarks/device_memory.py build/bench/bundles/random-0.6b-fp8-1024x1024-inductor
    python benchmarks/device_memory.py BUNDLE --one-at-a-time

For bundles of the target inductor. `GPU` is what all of this process takes (other programs must not use the GPU
meanwhile), `reserved` what PyTorch has taken of it, `allocated` what tensors and captured graphs hold, `most` the most
of it since the line before, `graphs` what the graphs' common memory has reserved. MiB.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sana_export.bench.machine import describe_machine, used_memory_mib
from sana_export.bench.subjects import PROMPT
from sana_runtime.errors import SanaError
from sana_runtime.inductor_engine import prefer_little_memory
from sana_runtime.pipeline import Pipeline, draw_noise, seeded_generator

_MIB = 1 << 20
_WIDTH = 10


class Watch:
    """Prints a line per moment."""

    def __init__(self) -> None:
        self._before = used_memory_mib()
        _line("", "GPU", "reserved", "allocated", "most", "graphs")

    def after(self, moment: str, work: Callable[[], Any]) -> Any:
        """Do it and look; what it gives."""
        found = work()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(0)
        segments = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]
        _line(
            moment,
            f"{(total - free) / _MIB - self._before:.0f}",
            f"{torch.cuda.memory_reserved() / _MIB:.0f}",
            f"{torch.cuda.memory_allocated() / _MIB:.0f}",
            f"{torch.cuda.max_memory_allocated() / _MIB:.0f}",
            f"{sum(segment['total_size'] for segment in segments) / _MIB:.0f}",
        )
        torch.cuda.reset_peak_memory_stats()
        return found


def _line(moment: str, *cells: str) -> None:
    print(f"{moment:24}" + "".join(cell.rjust(_WIDTH) for cell in cells), flush=True)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--one-at-a-time", action="store_true", help="keep one engine in memory")
    chosen = parser.parse_args()
    prefer_little_memory()  # as the engines run
    if not torch.cuda.is_available():
        print("no CUDA device: this script looks at a GPU's memory", file=sys.stderr)
        return 1
    machine = describe_machine("cuda")
    print(f"{machine.device}, driver {machine.driver}, {machine.versions}, commit {machine.commit}")
    watch = Watch()
    try:
        watch.after("CUDA itself", lambda: torch.zeros(1, device="cuda"))
        pipeline = watch.after(
            "loaded", lambda: Pipeline.load(chosen.bundle, "inductor", one_at_a_time=chosen.one_at_a_time)
        )
        look(watch, pipeline)
    except SanaError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def look(watch: Watch, pipeline: Pipeline) -> None:
    """One picture in its parts, and another one."""
    scheduler = pipeline.manifest.scheduler
    steps, scale = scheduler.default_num_steps, scheduler.default_guidance_scale
    noise = draw_noise(seeded_generator(0), pipeline.latent_shape)
    positive = watch.after("first caption", lambda: pipeline.encode_caption(PROMPT))
    negative = watch.after("second caption", lambda: pipeline.encode_caption("", negative=True))
    latent = watch.after(
        "latent", lambda: pipeline.denoise(positive, negative, noise, num_steps=steps, guidance_scale=scale)
    )
    watch.after("picture", lambda: pipeline.decode(latent))
    watch.after("whole picture again", lambda: pipeline.generate(PROMPT, num_steps=steps))


if __name__ == "__main__":
    sys.exit(main())
