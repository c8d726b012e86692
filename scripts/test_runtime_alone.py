"""Install only the runtime, with ONNX Runtime and pytest, into an empty environment and run its tests there.

The tests run from a copy outside the repository, so that nothing else of it can be imported.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("torch", "triton", "onnx", "transformers", "diffusers", "sana_export", "sana_kernels", "sana_plugins")
CHECK_ABSENT = f"""
import importlib.util, sys
present = [name for name in {ABSENT!r} if importlib.util.find_spec(name)]
sys.exit(f"not a torch-free environment: {{present}}" if present else 0)
"""


def main() -> int:
    """Exit code of the tests, or 1 when the environment is not as small as promised."""
    with tempfile.TemporaryDirectory(prefix="sana-runtime-alone-") as folder:
        python = make_environment(Path(folder) / "venv")
        tests = copy_tests(Path(folder) / "copy")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for command in ([python, "-c", CHECK_ABSENT], [python, "-m", "pytest", "-q", *pytest_options(tests)]):
            code = subprocess.run(command, cwd=tests, env=environment, check=False).returncode
            if code:
                return code
    return 0


def make_environment(folder: Path) -> str:
    """A virtual environment with the runtime's wheel; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*install, f"{ROOT / 'runtime'}[onnxruntime,test]"], check=True)
    return python


def copy_tests(folder: Path) -> Path:
    """`folder` with tests/runtime in it."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests" / "runtime", folder / "tests" / "runtime", ignore=ignore)
    return folder


def pytest_options(tests: Path) -> list[str]:
    """The repository's pytest settings, applied to the copy."""
    return [
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(tests),
        "-p",
        "no:cacheprovider",
        "tests/runtime",
    ]


if __name__ == "__main__":
    sys.exit(main())
