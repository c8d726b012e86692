"""The calibration cache: what calibration found, and what it was found with."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from sana_runtime.contract import ComponentName
from sana_runtime.errors import InputError
from sana_runtime.files import whole_file

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class LayerScales:
    """One layer. `activation_amax` None: weight only. `smooth_factor` [I] fp32: the activation is divided by it and the
    weight's columns are multiplied; `activation_amax` is that of the divided activation. `step_amax` [num_steps]
    fp32: the largest absolute value per solver step before smoothing. Where alpha was searched: `smoothing_alpha` is
    the one taken (None: no smoothing), `alpha_errors` fp32 the relative RMS without smoothing, then of each candidate.
    A weight whose rounding was calibrated: `weight_codes` int8 [O, I], -8..7, with `weight_scale` fp32 [O, groups].
    """

    activation_amax: float | None
    smooth_factor: np.ndarray | None = None
    step_amax: np.ndarray | None = None
    smoothing_alpha: float | None = None
    alpha_errors: np.ndarray | None = None
    weight_codes: np.ndarray | None = None
    weight_scale: np.ndarray | None = None


_FIELDS = ("activation_amax", "smooth_factor", "step_amax", "smoothing_alpha", "alpha_errors", "weight_scale")
# Two to a byte in the file.
_CODES = "weight_codes"


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a calibration was made from: digests (hex SHA-256), seed, steps, picture size in pixels, and how the model
    was asked, in words (empty: not recorded, by an earlier version).
    """

    weights: dict[str, str]
    recipe: str
    prompts: str
    seed: int
    num_steps: int
    height: int
    width: int
    sampling: str = ""


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales of every quantised layer: component -> layer -> `LayerScales`."""

    layers: Mapping[ComponentName, Mapping[str, LayerScales]]
    provenance: Provenance
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", _digest(self))

    def component(self, name: ComponentName) -> Mapping[str, LayerScales]:
        """The scales of one component's layers."""
        return self.layers.get(name, {})

    def component_digest(self, name: ComponentName) -> str:
        """Hex SHA-256 of one component's scales, whatever they were found with; "none" where nothing was measured."""
        tensors, names = _tensors({name: self.component(name)})
        return _content_digest(names, tensors) if tensors else "none"

    def narrowed(self, layers: Mapping[ComponentName, Collection[str]], recipe: str) -> "Scales":
        """The scales of some of the layers, under the digest of the recipe that quantises only those.

        Calibration watches the unquantised model, so leaving a layer alone does not change the others' scales.
        """
        kept = {
            component: {name: found for name, found in scales.items() if name in layers.get(component, ())}
            for component, scales in self.layers.items()
        }
        return Scales(kept, msgspec.structs.replace(self.provenance, recipe=recipe))

    def save(self, path: Path) -> None:
        """Write the cache, whole or not at all."""
        tensors, names = _tensors(self.layers)
        metadata = {
            "format": "sana-calibration",
            "version": str(FORMAT_VERSION),
            "digest": self.digest,
            "provenance": msgspec.json.encode(self.provenance, order="sorted").decode(),
            "layers": msgspec.json.encode(names).decode(),
        }
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: Path, *, weights: Mapping[str, str], recipe: str, sampling: str) -> "Scales":
        """Read a cache and check that it belongs to these weights (component -> digest), this recipe's digest and this
        way of asking the model, where the cache records one.

        Only components that the cache and `weights` share are compared; one that the cache lacks is refused. Raises
        `InputError`.
        """
        scales = _read(path)
        found = scales.provenance
        for component, digest in weights.items():
            if found.weights.get(component) != digest:
                raise _of_another(path, f"the model's {component}", found.weights.get(component), digest)
        if found.recipe != recipe:
            raise _of_another(path, "the recipe", found.recipe, recipe)
        if found.sampling not in ("", sampling):
            raise InputError(
                f"{path}: the calibration was made for another schedule or guidance",
                received=found.sampling,
                expected=sampling,
                action="calibrate the model as it is asked now: build without --calibration",
            )
        return scales


def _digest(scales: Scales) -> str:
    tensors, names = _tensors(scales.layers)
    return _content_digest((scales.provenance, names), tensors)


def _content_digest(described: object, tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(msgspec.json.encode(described, order="sorted"))
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].shape}".encode())
        kind = "<f4" if tensors[name].dtype == np.float32 else "u1"
        digest.update(np.ascontiguousarray(tensors[name], dtype=kind).tobytes())
    return digest.hexdigest()


def _tensors(
    layers_of: Mapping[ComponentName, Mapping[str, LayerScales]],
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """fp32 arrays named component/layer/what, codes in pairs, and the layer names, in which others appear alone."""
    tensors: dict[str, np.ndarray] = {}
    for component, layers in layers_of.items():
        for layer, found in layers.items():
            for what in _FIELDS:
                value = getattr(found, what)
                if value is not None:
                    tensors[f"{component}/{layer}/{what}"] = np.atleast_1d(np.asarray(value, np.float32))
            if found.weight_codes is not None:
                pairs = found.weight_codes.view(np.uint8) & 15
                tensors[f"{component}/{layer}/{_CODES}"] = pairs[:, ::2] | pairs[:, 1::2] << 4
    return tensors, {component: sorted(layers) for component, layers in sorted(layers_of.items())}


def _read(path: Path) -> Scales:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        version = metadata["version"]
        if metadata["format"] != "sana-calibration" or version != str(FORMAT_VERSION):
            raise ValueError(f"format {metadata['format']} version {version}")
        names = msgspec.json.decode(metadata["layers"], type=dict[str, list[str]])
        provenance = msgspec.json.decode(metadata["provenance"], type=Provenance)
        layers: Any = {
            component: {layer: _layer(tensors, f"{component}/{layer}") for layer in found}
            for component, found in names.items()
        }
        scales = Scales(layers, provenance)
        if scales.digest != metadata["digest"]:
            raise ValueError("the digest does not match the content")
    except FileNotFoundError as error:
        raise _unusable(path, "no such file") from error
    except Exception as error:  # safetensors raises its own type, which derives from Exception
        raise _unusable(path, str(error)) from error
    return scales


def _layer(tensors: Mapping[str, np.ndarray], name: str) -> LayerScales:
    found: dict[str, Any] = {what: tensors.get(f"{name}/{what}") for what in _FIELDS}
    for number in ("activation_amax", "smoothing_alpha"):
        found[number] = None if found[number] is None else float(found[number][0])
    pairs = tensors.get(f"{name}/{_CODES}")
    if pairs is not None:
        nibbles = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), -1)
        found[_CODES] = (nibbles ^ 8).view(np.int8) - np.int8(8)
    return LayerScales(**found)


def _unusable(path: Path, received: str) -> InputError:
    return InputError(
        f"{path} is not a calibration cache",
        received=received,
        expected="a file that a calibration wrote, unchanged",
        action="calibrate again",
    )


def _of_another(path: Path, what: str, found: str | None, expected: str) -> InputError:
    return InputError(
        f"{path}: the calibration was made for another model or recipe",
        received=f"{what} {found[:12] + '…' if found else 'not calibrated'}",
        expected=f"{what} {expected[:12]}…",
        action="calibrate this model with this recipe, or name the cache that belongs to them",
    )
