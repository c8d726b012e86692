"""The main job from one command: `make demo`.

Builds a tiny random-weight Sana into real TensorRT-RTX plans and ONNX Runtime models, paints a picture with the
torch-free runtime, and compares the engines with the PyTorch reference. Where no TensorRT-RTX builder can be had,
it goes on with ONNX Runtime and says what is missing.
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
        shlex.split(f"sana-export build random:tiny --precision fp32 --resolution 512 --output {bundle}") + targets,
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
