"""Kernels for the plugin tests: compiled here once, or brought from another machine."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from sana_runtime.plugins import KernelFolder, PluginForm


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
    """The plugin class's kernels of every dtype and form for one compute capability."""
    brought = request.config.getoption("--kernels", default=None)
    if brought is not None:
        return lambda capability: KernelFolder.open(brought)
    return compiled(tmp_path_factory, "class")


@pytest.fixture(scope="session")
def quick_kernels_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], KernelFolder]:
    """The quick plugins' kernels of every dtype and form for one compute capability."""
    return compiled(tmp_path_factory, "quick")


def compiled(tmp_path_factory: pytest.TempPathFactory, form: PluginForm) -> Callable[[int], KernelFolder]:
    """Compiles each compute capability once."""

    @cache
    def kernels(capability: int) -> KernelFolder:
        pytest.importorskip("triton")
        from sana_plugins.aot import compile_kernels

        folder = tmp_path_factory.mktemp(f"{form}-sm{capability}")
        compile_kernels(folder, capabilities=(capability,), plugin_form=form)
        return KernelFolder.open(folder, form)

    return kernels
