"""Kernels for the plugin tests: compiled here once, or brought from another machine."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sana_runtime.plugins import KernelFolder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        type=Path,
        default=None,
        help="folder of compiled plugin kernels for the GPU tests; without it they are compiled first",
    )


@pytest.fixture(scope="session")
def kernels_for(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], KernelFolder]:
    """The kernels of every dtype and form for one compute capability."""
    folders: dict[int, KernelFolder] = {}

    def kernels(capability: int) -> KernelFolder:
        brought = request.config.getoption("--kernels", default=None)
        if brought is not None:
            return KernelFolder.open(brought)
        if capability not in folders:
            pytest.importorskip("triton")
            from sana_plugins.aot import compile_kernels

            folder = tmp_path_factory.mktemp(f"sm{capability}")
            compile_kernels(folder, capabilities=(capability,))
            folders[capability] = KernelFolder.open(folder)
        return folders[capability]

    return kernels
