"""The scaled convolution for PyTorch: one op for eager and torch.export, and explicit choices.

`torch.ops.sana.scaled_convolution` runs the Triton kernel on CUDA tensors where Triton can be imported, and the
reference everywhere else. `torch.ops.sana.scaled_convolution_triton` is the Triton path alone, open to torch.compile
and AOTInductor. Neither has gradients: codes have none, and training does not come here.
"""

from typing import Any, Literal

import torch
from torch import library

from sana_kernels.mix_ffn_depthwise.quantization import QUANTIZED_DTYPES, check_quantization
from sana_kernels.scaled_convolution.reference import scaled_convolution_reference

# At import, not on first use: torch.compile cannot trace an import.
try:
    from sana_kernels.scaled_convolution import triton as kernels
    from sana_kernels.scaled_convolution import triton_ops
except ImportError as error:
    TRITON_PROBLEM: str | None = f"triton cannot be imported ({error})"
else:
    TRITON_PROBLEM = None

Impl = Literal["reference", "triton"]


@library.custom_op("sana::scaled_convolution", mutates_args=())
def _scaled_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    silu: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    on_gpu = not TRITON_PROBLEM and x.device.type == "cuda"
    forward = triton_ops.scaled_convolution_triton if on_gpu else scaled_convolution_reference
    # Contiguous, as the fake says; the reference's convolution has strides of its own.
    return forward(x, weight, activation_scale, weight_scale, bias, out_scale, silu, dtype, out_dtype).contiguous()


@_scaled_convolution.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    silu: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype or dtype)


def scaled_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    silu: bool = False,
    impl: Impl | None = None,
) -> torch.Tensor:
    """A 3x3 convolution with padding 1, x * weight * activation_scale * weight_scale + bias, and SiLU of it if asked.

    x [B, H, W, C] and weight [O, 3, 3, C] have one dtype, float8_e4m3fn or int8; `activation_scale` is one float32
    number and `weight_scale` one or O of them, bias [O] any float dtype. The result [B, H, W, O] has `dtype`, float32,
    bfloat16 or float16. Sums are fp32 (int32 of int8); the convolution and SiLU are rounded to `dtype`, as separate
    operations would.

    `impl`: "reference" is eager PyTorch, "triton" the kernel; None takes the kernel for CUDA tensors where Triton is
    installed, the reference otherwise, and is one op to torch.export. There are no gradients.

    Raises ValueError for shapes or dtypes that do not fit each other and for tensors the chosen implementation cannot
    run; nothing falls back silently.
    """
    return _run((x, weight, activation_scale, weight_scale, bias, None, silu, dtype, None), impl)


def scaled_convolution_codes(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    dtype: torch.dtype,
    out_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    silu: bool = False,
    impl: Impl | None = None,
) -> torch.Tensor:
    """saturate(round_half_even(y / out_scale)) of the y of `scaled_convolution`, which is not written.

    `out_dtype` float8_e4m3fn or int8, `out_scale` one float32 number (amax / 448 or amax / 127). The rest as in
    `scaled_convolution`.
    """
    check_quantization("scaled_convolution", out_scale, out_dtype)
    return _run((x, weight, activation_scale, weight_scale, bias, out_scale, silu, dtype, out_dtype), impl)


def _run(arguments: tuple[Any, ...], impl: str | None) -> torch.Tensor:
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"scaled_convolution: impl must be 'reference', 'triton' or None, got {impl!r}")
    x, weight, activation_scale, weight_scale, bias, *_, dtype, out_dtype = arguments
    _check(x, weight, activation_scale, weight_scale, bias)
    if impl == "reference":
        return scaled_convolution_reference(*arguments)
    if impl == "triton":
        if TRITON_PROBLEM:
            raise ValueError(
                f"scaled_convolution: impl='triton', but {TRITON_PROBLEM}. Use impl='reference', or pip install triton."
            )
        kernels.check_support(x, dtype, out_dtype)
        return triton_ops.scaled_convolution_triton(*arguments)
    return _scaled_convolution(*arguments)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    if x.ndim != 4 or x.shape[-1] == 0 or tuple(weight.shape[1:]) != (3, 3, x.shape[-1]):
        raise ValueError(
            "scaled_convolution: x must be [B, H, W, C] and weight [O, 3, 3, C], "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype not in QUANTIZED_DTYPES or x.dtype != weight.dtype:
        raise ValueError(
            f"scaled_convolution: x and weight must both be float8_e4m3fn or int8, got {x.dtype} and {weight.dtype}"
        )
    outputs = weight.shape[0]
    for name, scale, sizes in (
        ("activation_scale", activation_scale, (1,)),
        ("weight_scale", weight_scale, (1, outputs)),
    ):
        if scale.dtype != torch.float32 or scale.numel() not in sizes or scale.ndim > 1:
            expected = " or ".join(f"{size}" for size in dict.fromkeys(sizes))
            raise ValueError(
                f"scaled_convolution: {name} must be {expected} float32 numbers, got {scale.dtype} {tuple(scale.shape)}"
            )
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"scaled_convolution: bias must be [{outputs}], got {tuple(bias.shape)}")
