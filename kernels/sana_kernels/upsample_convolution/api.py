"""The upsampling convolution for PyTorch: one op for eager and torch.export, and explicit choices.

`torch.ops.sana.upsample_convolution` runs the Triton kernel on CUDA tensors where Triton can be imported, and the
reference everywhere else. `torch.ops.sana.upsample_convolution_triton` is the Triton path alone, open to torch.compile
and AOTInductor.
"""

from typing import Literal

import torch
from torch import library

from sana_kernels.mix_ffn_depthwise.quantization import check_quantization
from sana_kernels.upsample_convolution import autograd
from sana_kernels.upsample_convolution.reference import upsample_convolution_reference

# At import, not on first use: torch.compile cannot trace an import.
try:
    from sana_kernels.upsample_convolution import triton as kernels
    from sana_kernels.upsample_convolution import triton_ops
except ImportError as error:
    TRITON_PROBLEM: str | None = f"triton cannot be imported ({error})"
else:
    TRITON_PROBLEM = None

Impl = Literal["reference", "triton"]


@library.custom_op("sana::upsample_convolution", mutates_args=())
def _upsample_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    on_gpu = not TRITON_PROBLEM and x.device.type == "cuda"
    forward = triton_ops.upsample_convolution_triton if on_gpu else upsample_convolution_reference
    out, codes = forward(x, weight, bias, out_scale, out_dtype)
    # Contiguous, as the fake says; the reference's convolution has strides of its own.
    return out.contiguous(), codes.contiguous()


@_upsample_convolution.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, height, width, _ = x.shape
    out = x.new_empty((batch, 2 * height, 2 * width, bias.shape[0]))
    return out, x.new_empty(0) if out_dtype is None else x.new_empty(out.shape, dtype=out_dtype)


_upsample_convolution.register_autograd(
    autograd.upsample_convolution_gradients, setup_context=autograd.upsample_convolution_context
)


def upsample_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, impl: Impl | None = None
) -> torch.Tensor:
    """A 3x3 convolution of x repeated 2x2, plus bias and shortcut: x [B, H, W, I] -> a new tensor [B, 2H, 2W, O].

    weight [4 O, 2, 2, I] is `phase_weight` of the convolution's [O, I, 3, 3], channels last; bias [O]. The shortcut
    repeats every channel of x 4 O / I times and shuffles them into pixels: output pixel (2i + a, 2j + b) takes channel
    4c + 2a + b of pixel (i, j). x and weight: one dtype, float32, bfloat16 or float16, which the result has; fp32
    inside.

    `impl`: "reference" is eager PyTorch, "triton" the kernel; None takes the kernel for CUDA tensors where Triton is
    installed, the reference otherwise, and is one op to torch.export.

    Raises ValueError for shapes or dtypes that do not fit each other and for tensors the chosen implementation cannot
    run; nothing falls back silently.
    """
    return _run(x, weight, bias, None, None, impl)[0]


def upsample_convolution_codes(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    out_scale: torch.Tensor,
    out_dtype: torch.dtype,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the result of `upsample_convolution`, saturate(round_half_even(result / out_scale))), in one launch.

    The codes are those of the result as it is returned, rounded to x's dtype. `out_dtype` float8_e4m3fn or int8,
    `out_scale` one float32 number on x's device (amax / 448 or amax / 127). The codes have no gradient.
    """
    check_quantization("upsample_convolution", out_scale, out_dtype)
    return _run(x, weight, bias, out_scale, out_dtype, impl)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"upsample_convolution: impl must be 'reference', 'triton' or None, got {impl!r}")
    _check(x, weight, bias)
    arguments = (x, weight, bias, out_scale, out_dtype)
    if impl == "reference":
        return upsample_convolution_reference(*arguments)
    if impl == "triton":
        if TRITON_PROBLEM:
            raise ValueError(
                f"upsample_convolution: impl='triton', but {TRITON_PROBLEM}. "
                "Use impl='reference', or pip install triton."
            )
        kernels.check_support(x, out_dtype)
        return triton_ops.upsample_convolution_triton(*arguments)
    return _upsample_convolution(*arguments)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    if x.ndim != 4 or bias.ndim != 1 or not x.shape[-1] or 4 * bias.shape[0] % x.shape[-1]:
        raise ValueError(
            "upsample_convolution: x must be [B, H, W, I] and bias [O], with I a divisor of 4 O, "
            f"got {tuple(x.shape)} and {tuple(bias.shape)}"
        )
    expected = (4 * bias.shape[0], 2, 2, x.shape[-1])
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"upsample_convolution: weight must be {expected}, phases of a 3x3 one, got {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"upsample_convolution: x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
