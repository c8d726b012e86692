"""A component's graph written for one target: a small file beside the component's, which shares its weights."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from sana_export.graph.passes import gather_rows, plain_moves
from sana_runtime.files import whole_file

# A component's graph as ONNX Runtime takes it, where that is another one.
ONNXRUNTIME_GRAPH = "onnxruntime.onnx"


def write_onnxruntime_graph(source: Path) -> tuple[list[Path], dict[str, int]]:
    """ONNX Runtime's variant of `source` beside it, where it needs one; how often each rewriting fired."""
    fired: dict[str, int] = {}

    def rewrite(model: ir.Model) -> int:
        fired["tables_read_by_row"] = gather_rows.run(model)
        fired["plain_moves"] = plain_moves.run(model)
        return sum(fired.values())

    path, count = write_variant(source, ONNXRUNTIME_GRAPH, rewrite)
    return [path] if count else [], fired


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
