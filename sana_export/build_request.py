"""What a user asks `build` for, checked before anything heavy is imported."""

from dataclasses import dataclass
from pathlib import Path

from sana_runtime.contract import (
    COMPONENTS,
    PIXELS_PER_LATENT,
    PRECISIONS,
    TARGETS,
    ComponentName,
    PrecisionName,
    TargetName,
)
from sana_runtime.errors import InputError

_MAX_SIDE = 4096


@dataclass(frozen=True)
class BuildRequest:
    """What to build. `height`, `width` in pixels."""

    model: str
    precision: PrecisionName
    targets: tuple[TargetName, ...]
    height: int
    width: int
    output: Path
    variant: str | None = None
    base: str | None = None
    components: tuple[ComponentName, ...] = COMPONENTS

    def __post_init__(self) -> None:
        _check_choice("precision", self.precision, PRECISIONS)
        for target in self.targets:
            _check_choice("target", target, TARGETS)
        for component in self.components:
            _check_choice("component", component, COMPONENTS)
        if not self.targets or not self.components:
            raise InputError("nothing to build", received="no target or no component", expected="at least one")
        for side, pixels in (("height", self.height), ("width", self.width)):
            if not PIXELS_PER_LATENT <= pixels <= _MAX_SIDE or pixels % PIXELS_PER_LATENT:
                raise InputError(
                    f"the picture's {side} cannot be built",
                    received=f"{pixels} pixels",
                    expected=f"a multiple of {PIXELS_PER_LATENT} from {PIXELS_PER_LATENT} to {_MAX_SIDE}",
                    action=f"for example --{side} {_nearest_side(pixels)}",
                )


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(
            f"unknown {what}",
            received=value,
            expected=" or ".join(allowed),
            action=f"choose --{what} from these",
        )


def _nearest_side(pixels: int) -> int:
    units = max(1, min(_MAX_SIDE, pixels) // PIXELS_PER_LATENT)
    return units * PIXELS_PER_LATENT
