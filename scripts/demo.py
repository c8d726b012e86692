"""The main job from one command: `make demo`.

Quantises a tiny random-weight Sana to FP8, builds real TensorRT-RTX plans and ONNX Runtime models of it, paints a
picture with the torch-free runtime, and compares the engines with the unquantised PyTorch reference. Where no
TensorRT-RTX builder can be had, it goes on with ONNX Runtime and says what is missing.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from sana_runtime.errors import TargetError
from sana_runtime.tensorrt_library import find_tensorrt

FOLDER = Path("demo")
PROMPT = "a red circle left of a blue square on a green background"


def main() -> int:
    console = Console(highlight=False)
    targets = ["--target", "onnxruntime"]
    try:
        console.print(f"TensorRT-RTX builder: {find_tensorrt('tensorrt-rtx').reason}")
        targets = ["--target", "tensorrt-rtx", *targets]
    except TargetError as error:
        console.print(f"[yellow]going on without TensorRT-RTX plans[/]\n{error}", markup=True)
    bundle, picture = str(FOLDER / "bundle"), str(FOLDER / "picture.png")
    commands = [
        # fp32 around the FP8 products, so that ONNX Runtime runs the bundle on any CPU.
        shlex.split("sana-export build random:tiny --precision fp8 --base-precision fp32 --resolution 512")
        + shlex.split("--calibration-prompts 2 --calibration-steps 4 --calibration-side 256")
        + [*targets, "--output", bundle],
        ["sana-runtime", "generate", bundle, PROMPT, "--output", picture, "--num-steps", "20", "--seed", "0"],
        ["sana-export", "compare", bundle, "--prompt", PROMPT, "--json", str(FOLDER / "parity.json")],
    ]
    for command in commands:
        console.print(f"\n[bold]$ {shlex.join(command)}[/]")
        program = Path(sys.executable).with_name(command[0])
        code = subprocess.run([program, *command[1:]], check=False).returncode
        if code:
            return code
    console.print(
        f"\nbundle: {bundle}\npicture: {picture} (noise: the weights are random)\nparity: {FOLDER / 'parity.json'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
