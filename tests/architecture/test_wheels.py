"""The wheels hold exactly what is tracked in their packages, and no generic top-level name."""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
# The import packages of each distribution. A new package is one more name here and in its pyproject.toml.
DISTRIBUTIONS = {".": {"sana_calibration", "sana_export", "sana_kernels", "sana_plugins"}, "runtime": {"sana_runtime"}}


@dataclass(frozen=True)
class Wheel:
    """A built wheel: its project's folder and metadata, and the files inside."""

    folder: Path
    project: dict[str, Any]
    packages: tuple[str, ...]
    names: frozenset[str]
    metadata: str


@pytest.fixture(scope="module", params=DISTRIBUTIONS, ids=lambda folder: "root" if folder == "." else folder)
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    folder = ROOT / request.param
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(output)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (path,) = output.iterdir()
    with zipfile.ZipFile(path) as archive:
        names = frozenset(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    pyproject = tomllib.loads((folder / "pyproject.toml").read_text())
    packages = tuple(pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    return Wheel(folder, pyproject["project"], packages, names, text)


def test_top_level_names(wheel: Wheel) -> None:
    tops = {name.partition("/")[0] for name in wheel.names}
    assert {top for top in tops if not top.endswith(".dist-info")} == DISTRIBUTIONS[
        wheel.folder.relative_to(ROOT).as_posix()
    ]
    assert len([top for top in tops if top.endswith(".dist-info")]) == 1


def test_wheel_holds_what_the_repository_holds(wheel: Wheel) -> None:
    expected = set()
    for package in wheel.packages:
        listed = repository_files(wheel.folder / package)
        expected |= {path.relative_to((wheel.folder / package).parent).as_posix() for path in listed}
    packed = {name for name in wheel.names if ".dist-info/" not in name}
    assert packed == expected
    assert {f"{Path(package).name}/py.typed" for package in wheel.packages} <= packed


def repository_files(folder: Path) -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "."]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in run.stdout.split("\0") if name and (path := folder / name).is_file()]


def test_license_and_console_script(wheel: Wheel) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.names)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel.names)
    assert "License-Expression: Apache-2.0" in wheel.metadata


def test_versions_agree(wheel: Wheel) -> None:
    runtime = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text())["project"]["version"]
    assert wheel.project["version"] == runtime
    if wheel.project["name"] == "sana-export":
        assert f"sana-runtime[onnxruntime]=={runtime}" in wheel.project["dependencies"]
