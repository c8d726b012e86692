"""What the GPU runs in one call of a bundle's engine, kernel by kernel, most time first.

    python benchmarks/engine_profile.py build/bench/bundles/random-0.6b-fp8-1024x1024-inductor
    python benchmarks/engine_profile.py BUNDLE --component transformer

For bundles of the target inductor. The inputs are zeros: time does not depend on them. Rows are those of
`inductor_profile.py`, the subject is the bundle's name.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

import torch
from inductor_profile import Session, kernel_table

from sana_runtime.bundle import engine_entry
from sana_runtime.contract import ComponentName
from sana_runtime.errors import SanaError
from sana_runtime.inductor_engine import prefer_little_memory
from sana_runtime.pipeline import Pipeline


def main() -> int:
    """Write and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--component", default="vae_decoder", choices=get_args(ComponentName))
    parser.add_argument("--commit", default="", help="what the rows call the commit, where git cannot tell")
    parser.add_argument("--output", type=Path, default=Path("engine_profile.csv"))
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: this script looks at a GPU's kernels", file=sys.stderr)
        return 1
    chosen.device, chosen.budget_s = "cuda", float("inf")
    prefer_little_memory()  # as the engines run
    with chosen.output.open("w", newline="") as file:
        session = Session.begin(chosen, file)
        try:
            profile(session, chosen.bundle, chosen.component)
        except SanaError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def profile(session: Session, bundle: Path, name: ComponentName) -> None:
    """Of the component `name`."""
    pipeline = Pipeline.load(bundle, "inductor", report=lambda _: None)
    component = pipeline.manifest.component(name)
    engine = pipeline.backend.load(bundle, component, engine_entry(pipeline.manifest, name, pipeline.target))
    inputs = {spec.name: pipeline.backend.memory.allocate(spec) for spec in component.inputs}
    outputs = {spec.name: pipeline.backend.memory.allocate(spec) for spec in component.outputs}

    def call() -> None:
        engine.execute(inputs, outputs)

    call()  # captures its graphs
    kernel_table(session, f"{name} of {bundle.name}", call, 1)


if __name__ == "__main__":
    sys.exit(main())
