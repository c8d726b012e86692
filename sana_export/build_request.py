"""What a user asks `build` for, checked before anything heavy is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from sana_calibration.shipped import recipe_names
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
from sana_runtime.plan_builder import check_plugin_form
from sana_runtime.plugins import PluginForm

_MAX_SIDE = 4096


@dataclass(frozen=True)
class CalibrationSettings:
    """How activations are observed: prompts (None: the model's own, else the shipped list), how many of them (None: as
    many as the recipe needs), solver steps, seed, and the longest side in pixels of the pictures that are painted for
    it. `cache` is a finished calibration to use instead.
    """

    prompts: Path | None = None
    num_prompts: int | None = None
    # Also the gate's.
    num_steps: int = 8
    seed: int = 0
    side: int = 512
    cache: Path | None = None

    def __post_init__(self) -> None:
        for field in ("num_prompts", "num_steps", "side"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise InputError(
                    f"calibration: {field} is out of range",
                    received=value,
                    expected="a whole number of at least 1",
                    action=f"leave --calibration-{field.removeprefix('num_')} away for the default",
                )


@dataclass(frozen=True)
class BuildRequest:
    """What to build. `height`, `width` in pixels. `precision` is fp32, bf16, fp16 or a shipped recipe's name; `recipe`,
    a file, replaces it. `base_precision` is that of what a recipe does not quantise (None: the recipe's own).
    `gate`: judge a quantised build. `plugin`: compile linear attention as the TensorRT plugin, in the form
    `plugin_form`. `jobs`: how many pieces to compile at once for the target `inductor`; None: as many as this machine
    has room for. `reuse`: bundles to take finished stages from.
    """

    model: str
    precision: str
    targets: tuple[TargetName, ...]
    height: int
    width: int
    output: Path
    variant: str | None = None
    base: str | None = None
    components: tuple[ComponentName, ...] = COMPONENTS
    recipe: Path | None = None
    base_precision: PrecisionName | None = None
    calibration: CalibrationSettings = CalibrationSettings()
    gate: bool = True
    plugin: bool = False
    plugin_form: PluginForm = "class"
    jobs: int | None = None
    reuse: tuple[Path, ...] = ()

    @property
    def recipe_name(self) -> str | None:
        """The recipe's file or name; None for fp32, bf16 and fp16."""
        if self.recipe is not None:
            return str(self.recipe)
        return None if self.precision in PRECISIONS else self.precision

    def __post_init__(self) -> None:
        _check_choice("precision", self.precision, (*PRECISIONS, *recipe_names()))
        if self.base_precision is not None:
            _check_choice("base-precision", self.base_precision, PRECISIONS)
            self._check_base_precision()
        for target in self.targets:
            _check_choice("target", target, TARGETS)
            if self.plugin:
                check_plugin_form(target, self.plugin_form)
        _check_choice("plugin-form", self.plugin_form, get_args(PluginForm))
        for component in self.components:
            _check_choice("component", component, COMPONENTS)
        if self.jobs is not None and self.jobs < 1:
            raise InputError(
                "jobs is out of range",
                received=self.jobs,
                expected="a whole number of at least 1",
                action="leave --jobs away for as many as this machine has room for",
            )
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

    def _check_base_precision(self) -> None:
        if self.recipe_name is None and self.base_precision != self.precision:
            raise InputError(
                "two precisions for a build that quantises nothing",
                received=f"--precision {self.precision} --base-precision {self.base_precision}",
                expected="--base-precision with a quantised --precision or a --recipe",
                action="leave --base-precision away",
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
