"""Linear layers over named tensors: base dtype, 8-bit weights, or 8-bit weights and activations.

A layer `name` owns up to five tensors: `name.weight` [O, I], `name.bias` [O], `name.weight_scale` fp32 ([] or [O]),
`name.activation_scale` fp32 [] and `name.inverse_smooth` [I].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from sana_kernels.mix_ffn_depthwise.quantization import narrow
from sana_kernels.scaled_linear import scaled_linear, scaled_linear_codes
from sana_kernels.weight_only_linear import weight_only_linear

Tensors = Mapping[str, torch.Tensor]
FP8, INT8 = torch.float8_e4m3fn, torch.int8


@dataclass(frozen=True)
class LinearForm:
    """How one layer is stored and computed. `weight_dtype` None: the base dtype; `activation_dtype` None: base dtype.

    `smooth`: the activation is multiplied with `inverse_smooth` before it is quantised (otherwise what feeds the layer
    has the factor in its own weights).
    """

    bias: bool
    weight_dtype: torch.dtype | None = None
    activation_dtype: torch.dtype | None = None
    smooth: bool = False

    def tensors(self, name: str) -> tuple[str, ...]:
        """The names of the layer's tensors."""
        parts = ["weight"]
        parts += ["bias"] * self.bias
        parts += ["weight_scale"] * (self.weight_dtype is not None)
        parts += ["activation_scale"] * (self.activation_dtype is not None)
        parts += ["inverse_smooth"] * self.smooth
        return tuple(f"{name}.{part}" for part in parts)

    @property
    def codes_wanted(self) -> torch.dtype | None:
        """The dtype in which what feeds the layer should write; None for the base dtype."""
        return None if self.smooth else self.activation_dtype

    @property
    def takes_residual(self) -> bool:
        """Whether `residual_linear` computes it: not where weights alone are in 8 bits."""
        return self.activation_dtype == self.weight_dtype

    def scale_wanted(self, tensors: Tensors, name: str) -> torch.Tensor | None:
        """The static scale to write with; None for the base dtype."""
        return None if self.codes_wanted is None else tensors[f"{name}.activation_scale"]


def linear(
    x: torch.Tensor,
    tensors: Tensors,
    name: str,
    form: LinearForm,
    dtype: torch.dtype,
    *,
    own_int8: bool = False,
    own_weight_only: bool = False,
) -> torch.Tensor:
    """x [..., I], in the base dtype or already as codes -> [..., O] in `dtype`.

    `own_int8`: INT8 products by our kernel, which scales the sums where they are; the library writes 32-bit integers
    for another pass to scale. `own_weight_only`: products of INT8 weights by our kernel, which widens them where it
    multiplies; the library needs a pass that writes them out in 16 bits. That pass is worth its time for many rows.
    """
    weight = tensors[f"{name}.weight"]
    bias = tensors[f"{name}.bias"] if form.bias else None
    if form.activation_dtype is None:
        if form.weight_dtype is None:
            return F.linear(x, weight, bias)
        if own_weight_only and form.weight_dtype == INT8:
            return weight_only_linear(x, weight, tensors[f"{name}.weight_scale"], bias, impl="triton")
        return _scaled(x @ weight.to(dtype).t(), tensors[f"{name}.weight_scale"], bias, dtype)
    codes = codes_of(x, tensors, name, form)
    scales = tensors[f"{name}.activation_scale"], tensors[f"{name}.weight_scale"]
    if own_int8 and form.activation_dtype == INT8:
        activation_scale, weight_scale = scales
        return scaled_linear(
            codes,
            weight,
            dtype=dtype,
            activation_scale=activation_scale,
            weight_scale=weight_scale,
            bias=bias,
            impl="triton",
        )
    product = _fp8_product if form.activation_dtype == FP8 else _int8_product
    return product(codes.flatten(0, -2), weight, *scales, bias, dtype).unflatten(0, x.shape[:-1])


def gated_linear(
    x: torch.Tensor, tensors: Tensors, name: str, form: LinearForm, dtype: torch.dtype, *, own_weight_only: bool = False
) -> torch.Tensor:
    """gelu(gate) * up of a layer that is both, gate first: x [..., I] -> [..., O / 2] in `dtype`."""
    if own_weight_only and form.weight_dtype == INT8 and form.activation_dtype is None:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        bias = tensors[f"{name}.bias"] if form.bias else None
        return weight_only_linear(x, weight, scale, bias, gated=True, impl="triton")
    gate, up = linear(x, tensors, name, form, dtype).chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def residual_linear(
    x: torch.Tensor,
    tensors: Tensors,
    name: str,
    form: LinearForm,
    residual: torch.Tensor,
    gate: torch.Tensor,
    limit: float | None,
    following: tuple[str, LinearForm],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, what `following` takes of it): y = residual [..., O] + gate [O] * linear(x), in one launch of our kernel.

    The branch is held within +-`limit`. The second result is y's codes where the layer `following` (name, form) is fed
    by codes, else y. `form` has weights and activations of one dtype (`takes_residual`).
    """
    codes = x if form.activation_dtype is None else codes_of(x, tensors, name, form)
    parts = ("bias", "weight_scale", "activation_scale")
    arguments: dict[str, Any] = {part: tensors.get(f"{name}.{part}") for part in parts}
    arguments |= {"dtype": residual.dtype, "residual": residual, "gate": gate, "limit": limit, "impl": "triton"}
    weight, (fed, fed_form) = tensors[f"{name}.weight"], following
    if fed_form.activation_dtype is None:
        y = scaled_linear(codes, weight, **arguments)
        return y, y
    return scaled_linear_codes(
        codes,
        weight,
        out_scale=tensors[f"{fed}.activation_scale"],
        out_dtype=fed_form.activation_dtype,
        inverse_smooth=tensors[f"{fed}.inverse_smooth"] if fed_form.smooth else None,
        **arguments,
    )


def codes_of(x: torch.Tensor, tensors: Tensors, name: str, form: LinearForm) -> torch.Tensor:
    """What the layer `name` multiplies of x, which is in the base dtype or already that."""
    assert form.activation_dtype is not None
    if x.dtype == form.activation_dtype:
        return x
    wide = x.float()
    if form.smooth:
        wide = wide * tensors[f"{name}.inverse_smooth"].float()
    return narrow(wide, tensors[f"{name}.activation_scale"], form.activation_dtype)


def _fp8_product(
    codes: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """codes [R, I], weight [O, I] -> [R, O]. One scale per tensor each goes into the product; one per channel after."""
    if weight_scale.ndim == 0 and dtype == torch.bfloat16:
        return torch._scaled_mm(
            codes, weight.t(), activation_scale, weight_scale, bias=bias, out_dtype=dtype, use_fast_accum=True
        )
    one = torch.ones_like(activation_scale)
    # The library adds a bias in 16 bits only, and scales rows only together with columns.
    out = torch._scaled_mm(codes, weight.t(), activation_scale, one, out_dtype=torch.float32, use_fast_accum=True)
    return _scaled(out, weight_scale, bias, dtype)


def _int8_product(
    codes: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return _scaled(torch._int_mm(codes, weight.t()), activation_scale * weight_scale, bias, dtype)


def _scaled(product: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    out = product.float() * scale
    return (out if bias is None else out + bias.float()).to(dtype)
