"""The main job from one command: `make demo`.

Quantises `nano`, the small trained Sana of this repository, to FP8, builds real TensorRT-RTX plans and ONNX Runtime
models of it, paints a picture with the torch-free runtime, compares the engines with the unquantised PyTorch
reference, and reads the picture: exit code 1 if anything that its prompt says cannot be seen on it. Where no
TensorRT-RTX builder can be had, it goes on with ONNX Runtime and says what is missing.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from sana_export.scenes.prompts import DEMO_PROMPT
from sana_export.scenes.reading import PictureReading, read_picture
from sana_export.scenes.scoring import ATTRIBUTES, score
from sana_runtime.errors import TargetError
from sana_runtime.tensorrt_library import find_tensorrt

FOLDER = Path("demo")
BUNDLE, PICTURE, PAIR = (FOLDER / name for name in ("bundle", "picture.png", "side-by-side.png"))
REPORT, PARITY = FOLDER / "report.html", FOLDER / "parity.json"
# The first there is, for both sides.
PAINTING = ["--num-steps", "20", "--seed", "0"]


def main() -> int:
    """The exit code of the first command that fails; 1 for a picture that is not what its prompt says."""
    console = Console(highlight=False)
    for command in commands(targets(console)):
        console.print(f"\n[bold]$ {shlex.join(command)}[/]")
        program = Path(sys.executable).with_name(command[0])
        code = subprocess.run([program, *command[1:]], check=False).returncode
        if code:
            return code
    right = judge(console)
    console.print(f"\nbundle: {BUNDLE}\npicture: {PICTURE}\nengine beside PyTorch: {PAIR}\nreport: {REPORT}, {PARITY}")
    return 0 if right else 1


def targets(console: Console) -> list[str]:
    """What can be built here, as flags."""
    try:
        console.print(f"TensorRT-RTX builder: {find_tensorrt('tensorrt-rtx').reason}")
    except TargetError as error:
        console.print(f"[yellow]going on without TensorRT-RTX plans[/]\n{error}", markup=True)
        return ["--target", "onnxruntime"]
    return ["--target", "tensorrt-rtx", "--target", "onnxruntime"]


def commands(built_for: list[str]) -> list[list[str]]:
    """Build, paint, compare."""
    prompt, bundle = DEMO_PROMPT.text, str(BUNDLE)
    compared = ["--pictures", str(PAIR), "--report", str(REPORT), "--json", str(PARITY)]
    return [
        # fp32 around the FP8 products, so that ONNX Runtime runs the bundle on any CPU.
        [*shlex.split("sana-export build nano --precision fp8 --base-precision fp32"), *built_for, "--output", bundle],
        ["sana-runtime", "generate", bundle, prompt, *PAINTING, "--output", str(PICTURE)],
        ["sana-export", "compare", bundle, "--prompt", prompt, *PAINTING, *compared],
    ]


def judge(console: Console) -> bool:
    """Say what is seen on the picture, claim by claim, and whether all of them hold."""
    with Image.open(PICTURE) as image:
        reading = read_picture(np.asarray(image.convert("RGB")))
    found = score(DEMO_PROMPT, reading)
    console.print(
        f"\n[bold]{PICTURE}, read by image analysis[/]\n  prompt: {DEMO_PROMPT.text}\n  seen:   {seen(reading)}"
    )
    for claim in ATTRIBUTES:
        console.print(f"  {claim:<10} {'[red]WRONG[/]' if getattr(found, claim) is False else 'right'}")
    console.print("the picture is what its prompt says" if found.overall else "[red]not what its prompt says[/]")
    return found.overall


def seen(reading: PictureReading) -> str:
    """Objects from left to right."""
    objects = sorted(reading.objects, key=lambda item: item.x)
    named = [f"{item.colour} {item.shape} at ({item.x:.2f}, {item.y:.2f})" for item in objects]
    return f"{', '.join(named) or 'nothing'} on {reading.background_colour}"


if __name__ == "__main__":
    sys.exit(main())
