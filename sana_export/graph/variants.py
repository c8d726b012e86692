"""A component's graph written for one target: a small file beside the component's, which shares its weights."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from sana_runtime.files import whole_file


def write_variant(source: Path, name: str, rewrite: Callable[[ir.Model], int]) -> tuple[Path, int]:
    """Rewrite the graph of `source` into the file `name` of its folder; weights are neither read nor copied.

    Returns the file and how often `rewrite` fired; where that is never, no file is written.
    """
    path = source.with_name(name)
    model = ir.load(source)
    fired = rewrite(model)
    if fired:
        with whole_file(path) as temporary:
            ir.save(model, temporary, format="protobuf")
    return path, fired
