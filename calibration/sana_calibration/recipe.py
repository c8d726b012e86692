"""Recipes: the rules, the layers they name, and the YAML files they come from (shipped by name, one's own by path)."""

import re
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from sana_calibration.layers import exclusions_of, layers_of, resolve
from sana_calibration.rules import (
    Exclusion,
    Gate,
    Granularity,
    LayerRule,
    PerChannel,
    PerGroup,
    PerTensor,
    Recipe,
    StoredDtype,
)
from sana_calibration.shipped import RECIPES, recipe_names
from sana_runtime.contract import ComponentName
from sana_runtime.errors import InputError

__all__ = [
    "Exclusion",
    "Gate",
    "Granularity",
    "LayerRule",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "Recipe",
    "StoredDtype",
    "exclusions_of",
    "layers_of",
    "load_recipe",
    "recipe_names",
    "recipe_yaml",
    "resolve",
]

_GROUP = re.compile(r"per_group\((\d+)\)")


class _RuleRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A rule of the file: one `LayerRule` per pattern of `layers`."""

    component: ComponentName
    layers: list[str]
    weight_dtype: str
    granularity: str
    activation_dtype: str | None = None
    amax: str = "max"
    percentile: float = 99.99
    smoothing_alpha: float | Literal["search"] | None = None
    smoothing_candidates: tuple[float, ...] = ()
    rounding: str = "nearest"


class _ExclusionRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    component: ComponentName
    layers: list[str]
    reason: str


class _GateRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    min_x0_sqnr_db: float
    min_psnr_db: float
    min_ssim: float


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    base_dtype: str
    gate: _GateRow
    rules: list[_RuleRow]
    exclusions: list[_ExclusionRow] = []


def load_recipe(path_or_name: str | Path) -> Recipe:
    """A shipped recipe by name ("fp8", ...), or a YAML file. Raises `InputError` for an unknown field or value."""
    where = str(path_or_name)
    try:
        content = yaml.safe_load(_text(where))
        file = msgspec.convert(content, _File)
    except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise InputError(
            f"recipe {where} cannot be read",
            received=str(error),
            expected="YAML with name, base_dtype, gate, rules and exclusions, as in the shipped recipes",
            action="correct the field that is named above",
        ) from error
    return Recipe(
        name=file.name,
        base_dtype=file.base_dtype,  # type: ignore[arg-type]  # Recipe checks the choices
        rules=tuple(_rule(row, pattern) for row in file.rules for pattern in row.layers),
        exclusions=tuple(
            Exclusion(row.component, pattern, row.reason) for row in file.exclusions for pattern in row.layers
        ),
        gate=Gate(**msgspec.structs.asdict(file.gate)),
    )


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as a file that `load_recipe` reads back equal."""
    content: dict[str, Any] = {
        "name": recipe.name,
        "base_dtype": recipe.base_dtype,
        "gate": {
            "min_x0_sqnr_db": recipe.gate.min_x0_sqnr_db,
            "min_psnr_db": recipe.gate.min_psnr_db,
            "min_ssim": recipe.gate.min_ssim,
        },
        "rules": [msgspec.to_builtins(_row(rule)) for rule in recipe.rules],
        "exclusions": [
            {"component": entry.component, "layers": [entry.pattern], "reason": entry.reason}
            for entry in recipe.exclusions
        ],
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def _text(where: str) -> str:
    """A path wins over a name only if it exists."""
    path = Path(where)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if where in recipe_names():
        return (RECIPES / f"{where}.yaml").read_text(encoding="utf-8")
    raise InputError(
        "no such recipe",
        received=where,
        expected=f"{', '.join(recipe_names())}, or a YAML file",
        action="choose a shipped recipe or write the path of your own",
    )


def _rule(row: _RuleRow, pattern: str) -> LayerRule:
    if row.smoothing_candidates and row.smoothing_alpha != "search":
        raise InputError(
            f"recipe: rule '{pattern}' has smoothing_candidates and no search",
            received=f"smoothing_alpha: {row.smoothing_alpha}",
            expected="smoothing_alpha: search",
            action="correct the recipe",
        )
    fields = msgspec.structs.asdict(row)
    del fields["layers"]
    return LayerRule(**{**fields, "pattern": pattern, "granularity": _granularity(row.granularity)})


def _row(rule: LayerRule) -> _RuleRow:
    return _RuleRow(
        rule.component,
        [rule.pattern],
        rule.weight_dtype,
        str(rule.granularity),
        rule.activation_dtype,
        rule.amax,
        rule.percentile,
        rule.smoothing_alpha,
        rule.smoothing_candidates,
        rule.rounding,
    )


def _granularity(text: str) -> Granularity:
    plain: dict[str, Granularity] = {"per_tensor": PerTensor(), "per_channel": PerChannel()}
    if text in plain:
        return plain[text]
    if found := _GROUP.fullmatch(text):
        return PerGroup(int(found[1]))
    raise InputError(
        "recipe: a granularity is not known",
        received=text,
        expected="per_tensor, per_channel or per_group(size)",
        action="correct the recipe",
    )
