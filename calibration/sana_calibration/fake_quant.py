"""A module that computes with quantised weights and activations, in PyTorch: the reference of the Q/DQ graph."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sana_calibration.layers import weight_of
from sana_calibration.quantize import activation_scale, calibrated_weight, fake_quantize, quantize_weight
from sana_calibration.rules import LayerRule, PerTensor
from sana_calibration.scales import LayerScales
from sana_runtime.errors import InputError

# Elements of a weight that are quantised together: the working copies are fp32.
_CHUNK = 1 << 22


@contextmanager
def fake_quantized(
    module: nn.Module, prefix: str, rules: Mapping[str, LayerRule], scales: Mapping[str, LayerScales]
) -> Iterator[nn.Module]:
    """The module itself, fake-quantised while the context lasts. Layers are named below `prefix`.

    Keeps the original weights beside the quantised ones: twice the memory of the quantised layers.
    """
    originals = {name: weight_of(module, prefix + name).data for name in rules}
    with ExitStack() as stack:
        for name, data in originals.items():
            layer = module.get_submodule(prefix + name)
            stack.callback(_set_weight, layer, data)
            _set_weight(layer, data.clone())
        for handle in fake_quantize_in_place(module, prefix, rules, scales):
            stack.callback(handle.remove)
        yield module


def fake_quantize_in_place(
    module: nn.Module, prefix: str, rules: Mapping[str, LayerRule], scales: Mapping[str, LayerScales]
) -> list[RemovableHandle]:
    """Fake-quantise for good, in the weights' own memory. The handles stop the activations' quantisation."""
    found = {name: _scales_of(name, rule, scales) for name, rule in rules.items()}
    handles = []
    for name, rule in rules.items():
        layer = module.get_submodule(prefix + name)
        _fake_quantize_weight_(weight_of(layer).data, rule, found[name])
        if rule.activation_dtype is not None:
            handles.append(layer.register_forward_pre_hook(_ActivationHook(rule, found[name])))
    return handles


def fake_quantized_product(
    inputs: torch.Tensor, weight: torch.Tensor, rule: LayerRule, scales: LayerScales
) -> torch.Tensor:
    """What a fake-quantised linear layer without bias computes: inputs [R, I], weight [O, I] -> [R, O]."""
    (quantized,) = _ActivationHook(rule, scales)(nn.Identity(), (inputs,))
    return quantized @ _fake_weight(weight, rule, scales).T


def _set_weight(layer: nn.Module, data: torch.Tensor) -> None:
    weight_of(layer).data = data


def _fake_quantize_weight_(weight: torch.Tensor, rule: LayerRule, scales: LayerScales) -> None:
    """In place, a few rows at a time where no scale spans them: of Gemma-2's table alone a copy is 2.2 GiB."""
    rows = weight.shape[0]
    if scales.weight_codes is None and not isinstance(rule.granularity, PerTensor):
        rows = max(1, _CHUNK // max(1, weight[0].numel()))
    for part in weight.split(rows):
        part.copy_(_fake_weight(part, rule, scales))


def _fake_weight(weight: torch.Tensor, rule: LayerRule, scales: LayerScales) -> torch.Tensor:
    if scales.weight_codes is not None:
        assert scales.weight_scale is not None
        return calibrated_weight(scales.weight_codes, scales.weight_scale).dequantized().to(weight)
    factor = scales.smooth_factor
    if factor is not None:  # in the dtype the activation is divided in, as in the graph
        factor = torch.from_numpy(factor).to(weight.dtype).float().numpy()
    quantized = quantize_weight(weight, rule, factor, weight.dtype)
    return quantized.dequantized().to(weight.dtype)


class _ActivationHook:
    """Divides a layer's input by the smooth factor and fake-quantises it."""

    def __init__(self, rule: LayerRule, scales: LayerScales) -> None:
        assert rule.activation_dtype is not None
        assert scales.activation_amax is not None
        self._dtype = rule.activation_dtype
        self._scale = activation_scale(scales.activation_amax, rule.activation_dtype)
        self._factor = None if scales.smooth_factor is None else torch.from_numpy(scales.smooth_factor)

    def __call__(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *rest = inputs
        if self._factor is not None:
            x = x / self._factor.to(x.device, x.dtype)
        return (fake_quantize(x, self._scale, self._dtype), *rest)


def _scales_of(name: str, rule: LayerRule, scales: Mapping[str, LayerScales]) -> LayerScales:
    found = scales.get(name)
    if rule.rounding == "gptq" and (found is None or found.weight_codes is None):
        raise InputError(
            f"layer '{name}' has no rounded weight",
            received="no codes for it in the calibration",
            expected="codes, because the recipe rounds its weight by what calibration saw",
            action="calibrate again with this recipe",
        )
    if rule.activation_dtype is None:
        return found or LayerScales(None)
    if found is None or found.activation_amax is None:
        raise InputError(
            f"layer '{name}' has no activation scale",
            received="no amax for it in the calibration",
            expected=f"an amax, because the recipe quantises its activations to {rule.activation_dtype}",
            action="calibrate again with this recipe",
        )
    return found
