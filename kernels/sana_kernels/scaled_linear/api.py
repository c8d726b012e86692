"""The scaled linear layer for PyTorch: one op for eager and torch.export, and explicit choices.

`torch.ops.sana.scaled_linear` runs the Triton kernel on CUDA tensors where Triton can be imported, and the reference
everywhere else. `torch.ops.sana.scaled_linear_triton` is the Triton path alone, open to torch.compile and AOTInductor.
Neither has gradients: codes have none, and training does not come here.
"""

from typing import Any, Literal

import torch
from torch import library

from sana_kernels.mix_ffn_depthwise.quantization import QUANTIZED_DTYPES, check_quantization
from sana_kernels.scaled_linear.reference import scaled_linear_reference

# At import, not on first use: torch.compile cannot trace an import.
try:
    from sana_kernels.scaled_linear import triton as kernels
    from sana_kernels.scaled_linear import triton_ops
except ImportError as error:
    TRITON_PROBLEM: str | None = f"triton cannot be imported ({error})"
else:
    TRITON_PROBLEM = None

Impl = Literal["reference", "triton"]


@library.custom_op("sana::scaled_linear", mutates_args=())
def _scaled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    inverse_smooth: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    limit: float | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    forward = scaled_linear_reference if TRITON_PROBLEM or x.device.type != "cuda" else triton_ops.scaled_linear_triton
    return forward(
        x,
        weight,
        activation_scale,
        weight_scale,
        bias,
        residual,
        gate,
        inverse_smooth,
        out_scale,
        limit,
        dtype,
        out_dtype,
    )


@_scaled_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    inverse_smooth: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    limit: float | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape if out_dtype else (0,), dtype=out_dtype or dtype)


def scaled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    dtype: torch.dtype,
    activation_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    limit: float | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """residual + gate * (x weight^T * activation_scale * weight_scale + bias): x [..., K] -> a new tensor [..., N].

    x and weight [N, K] have one dtype: float8_e4m3fn or int8 codes, or a float dtype. Of codes, `activation_scale` is
    one float32 number and `weight_scale` one or N of them; floats have none. bias [N], gate [N] or [B, N] beside
    x [B, ..., K]: any float dtype; a gate needs a residual [..., N], whose dtype is `dtype`, float32, bfloat16 or
    float16, like the result's. Sums are fp32 (int32 of int8); the bracket is rounded to `dtype`, held within
    +-`limit`, and the result is rounded once more, as separate operations would.

    `impl`: "reference" is eager PyTorch, "triton" the kernel; None takes the kernel for CUDA tensors where Triton is
    installed, the reference otherwise, and is one op to torch.export. There are no gradients.

    Raises ValueError for shapes or dtypes that do not fit each other and for tensors the chosen implementation cannot
    run; nothing falls back silently.
    """
    arguments = (x, weight, activation_scale, weight_scale, bias, residual, gate, None, None, limit, dtype, None)
    return _run(arguments, impl)[0]


def scaled_linear_codes(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    dtype: torch.dtype,
    out_scale: torch.Tensor,
    out_dtype: torch.dtype,
    inverse_smooth: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    limit: float | None = None,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, codes): y as from `scaled_linear`, and saturate(round_half_even(y * inverse_smooth / out_scale)).

    `out_dtype` float8_e4m3fn or int8, `out_scale` one float32 number (amax / 448 or amax / 127), `inverse_smooth` [N],
    any float dtype. The codes are those of the rounded y. The rest as in `scaled_linear`.
    """
    check_quantization("scaled_linear", out_scale, out_dtype)
    tensors = (x, weight, activation_scale, weight_scale, bias, residual, gate, inverse_smooth, out_scale)
    return _run((*tensors, limit, dtype, out_dtype), impl)


def _run(arguments: tuple[Any, ...], impl: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"scaled_linear: impl must be 'reference', 'triton' or None, got {impl!r}")
    x, weight, *scales, bias, residual, gate, inverse_smooth, _, limit, dtype, out_dtype = arguments
    _check_product(x, weight, *scales)
    _check_epilogue(x, weight.shape[0], {"bias": bias, "inverse_smooth": inverse_smooth}, residual, gate, dtype)
    if limit is not None and not 0 < limit < float("inf"):
        raise ValueError(f"scaled_linear: limit must be positive and finite, got {limit}; without one, None")
    if impl == "reference":
        return scaled_linear_reference(*arguments)
    if impl == "triton":
        if TRITON_PROBLEM:
            raise ValueError(
                f"scaled_linear: impl='triton', but {TRITON_PROBLEM}. Use impl='reference', or pip install triton."
            )
        kernels.check_support(x, dtype, out_dtype)
        return triton_ops.scaled_linear_triton(*arguments)
    return _scaled_linear(*arguments)


def _check_product(
    x: torch.Tensor, weight: torch.Tensor, activation_scale: torch.Tensor | None, weight_scale: torch.Tensor | None
) -> None:
    if x.ndim < 2 or weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.shape[1] == 0:
        raise ValueError(
            f"scaled_linear: x must be [..., K] and weight [N, K], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"scaled_linear: x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
    quantized = x.dtype in QUANTIZED_DTYPES
    for name, scale, sizes in (
        ("activation_scale", activation_scale, (1,)),
        ("weight_scale", weight_scale, (1, weight.shape[0])),
    ):
        if (scale is not None) != quantized:
            raise ValueError(
                f"scaled_linear: {name} belongs to codes and only to them, got {scale} beside x in {x.dtype}"
            )
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() not in sizes or scale.ndim > 1):
            expected = " or ".join(f"{size}" for size in dict.fromkeys(sizes))
            raise ValueError(
                f"scaled_linear: {name} must be {expected} float32 numbers, got {scale.dtype} {tuple(scale.shape)}"
            )


def _check_epilogue(
    x: torch.Tensor,
    columns: int,
    rows: dict[str, torch.Tensor | None],
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    for name, row in rows.items():
        if row is not None and tuple(row.shape) != (columns,):
            raise ValueError(f"scaled_linear: {name} must be [{columns}], got {tuple(row.shape)}")
    if residual is not None and (tuple(residual.shape), residual.dtype) != ((*x.shape[:-1], columns), dtype):
        raise ValueError(
            f"scaled_linear: residual must be {dtype} {(*x.shape[:-1], columns)}, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    if gate is not None and residual is None:
        raise ValueError("scaled_linear: gate is for a residual, got a gate alone. Leave it out, or give the residual.")
    if gate is not None and tuple(gate.shape) not in ((columns,), (x.shape[0], columns)):
        raise ValueError(
            f"scaled_linear: gate must be [{columns}] or [{x.shape[0]}, {columns}], got {tuple(gate.shape)}"
        )
