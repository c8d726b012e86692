"""The torch-free runtime for Sana bundles: `Pipeline.load(bundle).generate(prompt)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sana_runtime.pipeline import Pipeline as Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """`Pipeline` on first use: `sana-runtime --help` needs no NumPy."""
    if name == "Pipeline":
        from sana_runtime.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
