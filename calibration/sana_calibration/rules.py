"""Rules of a recipe: which layer of which component is stored and computed in which format, and why others are not."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Literal, get_args

import msgspec

from sana_runtime.contract import COMPONENTS, ComponentName
from sana_runtime.errors import InputError

StoredDtype = Literal["float8e4m3fn", "int8", "int4"]
BaseDtype = Literal["float32", "bfloat16", "float16"]
AmaxRule = Literal["max", "percentile", "entropy"]
Rounding = Literal["nearest", "gptq"]
# A search tries these unless the recipe names others.
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: [O, I] -> []."""

    def __str__(self) -> str:
        return "per_tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale per output channel: [O, I] -> [O, 1]; convolution [O, I, kh, kw] -> [O, 1, 1, 1]."""

    def __str__(self) -> str:
        return "per_channel"


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` consecutive inputs of an output channel: [O, I] -> [O, I / size]."""

    size: int

    def __str__(self) -> str:
        return f"per_group({self.size})"


Granularity = PerTensor | PerChannel | PerGroup


@dataclass(frozen=True)
class LayerRule:
    """How the layers that match `pattern` (fnmatch over layer names) are quantised.

    `activation_dtype` None stores the weight in `weight_dtype` and computes in the base dtype. `amax` chooses the
    activation's scale from what calibration saw; `percentile` is used by that choice alone. `smoothing_alpha` moves
    the activation's outlier channels into the weight (SmoothQuant), 0 <= alpha <= 1; "search" chooses for every layer
    among `smoothing_candidates` (none: `ALPHAS`) and no smoothing. `rounding`: of the weight, each number by itself, or
    so that the errors of a row cancel on the inputs that calibration saw (GPTQ).
    """

    component: ComponentName
    pattern: str
    weight_dtype: StoredDtype
    activation_dtype: StoredDtype | None
    granularity: Granularity
    amax: AmaxRule = "max"
    percentile: float = 99.99
    smoothing_alpha: float | Literal["search"] | None = None
    smoothing_candidates: tuple[float, ...] = ()
    rounding: Rounding = "nearest"

    @property
    def calibrated(self) -> bool:
        """Whether calibration must see the layer's inputs."""
        return self.activation_dtype is not None or self.rounding != "nearest"

    def __post_init__(self) -> None:
        _check_choice(self, "component", self.component, COMPONENTS)
        _check_choice(self, "weight_dtype", self.weight_dtype, get_args(StoredDtype))
        _check_choice(self, "activation_dtype", self.activation_dtype, (None, "float8e4m3fn", "int8"))
        _check_choice(self, "amax", self.amax, get_args(AmaxRule))
        _check_choice(self, "rounding", self.rounding, get_args(Rounding))
        for field, value, rule, holds in self._conditions():
            if not holds:
                raise _wrong_value(self, field, value, rule)

    def _conditions(self) -> Iterator[tuple[str, object, str, bool]]:
        """(field, value, the rule in words, whether it holds)."""
        group, alpha, act = self.granularity, self.smoothing_alpha, self.activation_dtype
        yield "pattern", self.pattern, "a layer name or an fnmatch pattern", bool(self.pattern)
        if isinstance(group, PerGroup):
            yield "granularity", group, "a group of 16 or more inputs", group.size >= 16
            yield "granularity", group, "groups for weight_dtype int4 only", self.weight_dtype == "int4"
        else:
            yield "granularity", group, "per_group(size) for weight_dtype int4", self.weight_dtype != "int4"
        same = act in (None, self.weight_dtype)
        yield "activation_dtype", act, f"none, or {self.weight_dtype} like the weight", same
        yield "percentile", self.percentile, "a number in (0, 100]", 0 < self.percentile <= 100
        entropy_fits = self.amax != "entropy" or act == "int8"
        yield "amax", self.amax, "entropy for int8 activations only: it counts equal steps", entropy_fits
        candidates, searched = self.smoothing_candidates, alpha == "search"
        yield "smoothing_candidates", candidates, "numbers from 0 to 1", all(0 <= value <= 1 for value in candidates)
        yield "smoothing_candidates", candidates, "each number once", len(set(candidates)) == len(candidates)
        if self.rounding == "gptq":
            yield "rounding", "gptq", "nearest, or weight_dtype int4 with gptq", self.weight_dtype == "int4"
            # A square of its inputs for each layer: Gemma-2's MLPs would need 9 GB.
            yield "rounding", "gptq", "nearest, or component transformer with gptq", self.component == "transformer"
            even = isinstance(group, PerGroup) and group.size % 2 == 0
            yield "granularity", group, "groups of an even size with gptq, whose codes are kept in pairs", even
        if alpha is not None:
            in_range = searched or (not isinstance(alpha, str) and 0 <= alpha <= 1)
            yield "smoothing_alpha", alpha, "a number from 0 to 1, or search", in_range
            yield "smoothing_alpha", alpha, "an activation_dtype to smooth", act is not None
            yield "smoothing_alpha", alpha, "amax: max, which alone is exact after smoothing", self.amax == "max"


@dataclass(frozen=True)
class Exclusion:
    """Layers that stay in the base dtype, and why. Exclusions win over rules."""

    component: ComponentName
    pattern: str
    reason: str

    def __post_init__(self) -> None:
        _check_choice(self, "component", self.component, COMPONENTS)
        for field in ("pattern", "reason"):
            if not getattr(self, field).strip():
                raise _wrong_value(self, field, repr(getattr(self, field)), "a text that is not empty")


@dataclass(frozen=True)
class Gate:
    """What a quantised model must keep, against the unquantised one on the same seed.

    `min_x0_sqnr_db` at every step on equal inputs; PSNR in dB and SSIM (0..1) of the picture. x0 is what the solver
    takes from the model. The velocity, (latent - x0) / sigma, has x0's error times 1 / sigma, which grows towards the
    end while the picture stays right.
    """

    min_x0_sqnr_db: float
    min_psnr_db: float
    min_ssim: float

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if not isfinite(value):
                raise _wrong_value(self, field, value, "a finite number")
        if not 0 <= self.min_ssim <= 1:
            raise _wrong_value(self, "min_ssim", self.min_ssim, "a number from 0 to 1")


@dataclass(frozen=True)
class Recipe:
    """One precision: rules for the layers it quantises, exclusions for the ones it does not. The first rule that
    matches a layer counts.
    """

    name: str
    base_dtype: BaseDtype
    rules: tuple[LayerRule, ...]
    exclusions: tuple[Exclusion, ...]
    gate: Gate

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise _wrong_value(self, "name", repr(self.name), "a text that is not empty")
        _check_choice(self, "base_dtype", self.base_dtype, get_args(BaseDtype))

    @property
    def digest(self) -> str:
        """Hex SHA-256 of everything that decides what calibration measures and quantisation does: not the name,
        the gate or the reasons, and of the base dtype only whether it has fp16's narrow range.
        """
        rules = [_content(rule) for rule in self.rules]
        exclusions = [(exclusion.component, exclusion.pattern) for exclusion in self.exclusions]
        return hashlib.sha256(
            msgspec.json.encode((rules, exclusions, self.base_dtype == "float16"), order="sorted")
        ).hexdigest()

    def excluding(self, more: tuple[Exclusion, ...]) -> "Recipe":
        """The same recipe with further exclusions."""
        return replace(self, exclusions=(*self.exclusions, *more))


def rules_digest(rules: Mapping[str, LayerRule]) -> str:
    """Hex SHA-256 of the rules of a component's layers (name -> rule), whichever patterns they were found by; "none"
    for no rules.
    """
    if not rules:
        return "none"
    content = {layer: _content(replace(rule, pattern=layer)) for layer, rule in rules.items()}
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def _content(rule: LayerRule) -> dict[str, object]:
    """A rule as it enters the digest; candidates and rounding only where they are not what they were before they were
    fields.
    """
    content = {**asdict(rule), "granularity": str(rule.granularity)}
    if not rule.smoothing_candidates:
        del content["smoothing_candidates"]
    if rule.rounding == "nearest":
        del content["rounding"]
    return content


def _check_choice(owner: object, field: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise _wrong_value(owner, field, repr(value), " or ".join("none" if c is None else str(c) for c in choices))


def _wrong_value(owner: object, field: str, value: object, rule: str) -> InputError:
    where = getattr(owner, "pattern", None) or getattr(owner, "name", None)
    of = f" of '{where}'" if where else ""
    return InputError(
        f"recipe: {type(owner).__name__} field {field}{of} has a wrong value",
        received=value,
        expected=rule,
        action="correct the recipe",
    )
