"""Is a set of stored tensors exactly what the configuration implies?"""

from collections.abc import Mapping

import torch

from sana_export.weights.key_map import Shape, dropped
from sana_export.weights.lazy import LazyTensor
from sana_runtime.errors import CheckpointError

_SHOWN = 20
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def problems(
    component: str, found: Mapping[str, LazyTensor], expected: Mapping[str, Shape], drop: tuple[str, ...]
) -> list[str]:
    """One line per tensor that is missing, unexpected, wrongly shaped or not floating point."""
    lines = [f"{component}: missing {name} {list(expected[name])}" for name in expected if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            if not dropped(name, drop):
                lines.append(f"{component}: unexpected {name} {list(tensor.shape)}")
        elif tensor.shape != expected[name]:
            lines.append(f"{component}: {name} has shape {list(tensor.shape)}, not {list(expected[name])}")
        elif tensor.dtype not in _FLOATS:
            lines.append(f"{component}: {name} is stored as {tensor.dtype}, not as a 16- or 32-bit float")
    return lines


def refuse_problems(source: str, lines: list[str], expected: str) -> None:
    """Raise one `CheckpointError` that lists the problems, if there are any."""
    if not lines:
        return
    shown = lines[:_SHOWN]
    if len(lines) > _SHOWN:
        shown.append(f"and {len(lines) - _SHOWN} more")
    raise CheckpointError(
        f"{source} does not hold the tensors that its configuration implies",
        received=f"{len(lines)} problems\n    " + "\n    ".join(shown),
        expected=expected,
        action=_action(lines),
    )


def _action(lines: list[str]) -> str:
    quantised = any("is stored as" in line for line in lines)
    if quantised:
        return "use the 16-bit or 32-bit checkpoint: quantised weights cannot be exported"
    return "download the checkpoint again, or correct the config.json if it belongs to another model"
