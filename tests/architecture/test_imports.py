"""The device side needs no torch, and imports point down."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

BLOCKED_IMPORTS = """
import importlib, pkgutil, sys
from pathlib import Path

BLOCKED = {"torch", "triton", "onnx", "transformers", "diffusers", "sana_export", "sana_kernels", "sana_plugins"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import sana_runtime
imported = ["sana_runtime"]
for module in pkgutil.walk_packages(sana_runtime.__path__, "sana_runtime."):
    importlib.import_module(module.name)
    imported.append(module.name)
loaded = sorted(BLOCKED & {name.partition(".")[0] for name in sys.modules})
assert not loaded, f"loaded: {loaded}"
print(*imported)
"""


def test_every_runtime_module_imports_without_torch_or_onnx() -> None:
    run = subprocess.run([sys.executable, "-c", BLOCKED_IMPORTS], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    folder = ROOT / "runtime" / "sana_runtime"
    names = {".".join(path.relative_to(folder.parent).with_suffix("").parts) for path in folder.rglob("*.py")}
    assert {*run.stdout.split()} == {name.removesuffix(".__init__") for name in names}


def test_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 broken" in run.stdout
