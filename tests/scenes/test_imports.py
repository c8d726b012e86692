"""The scenes stand on few libraries: training imports them on machines that lack the exporter's."""

import ast
import sys
from pathlib import Path

import pytest

import sana_export.scenes

FOLDER = Path(sana_export.scenes.__file__).parent
ALLOWED = {"numpy", "torch", "skimage", "PIL", "sana_export.scenes", "sana_runtime.errors"}
# Beyond the allowed ones, by file.
MORE = {"quality.py": {"sana_export.parity.metrics"}}
# What training calls in its worker processes: no image library there.
LIGHT = {"vocabulary.py", "scene.py", "content.py", "english.py", "chinese.py", "captions.py", "prompts.py"}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_scenes_import_little(path: Path) -> None:
    allowed = ALLOWED | MORE.get(path.name, set())
    if path.name in LIGHT:
        allowed -= {"numpy", "torch", "skimage", "PIL"}
    extra = {name for name in imported(path) if not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)}
    assert extra == set()
