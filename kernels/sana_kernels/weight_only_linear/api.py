"""The weight-only linear layer for PyTorch: one op for eager and torch.export, and explicit choices.

`torch.ops.sana.weight_only_linear` runs the Triton kernel on CUDA tensors where Triton can be imported, and the
reference everywhere else. `torch.ops.sana.weight_only_linear_triton` is the Triton path alone, open to torch.compile
and AOTInductor. Neither has gradients: codes have none.
"""

from typing import Literal

import torch
from torch import library

from sana_kernels.weight_only_linear.reference import weight_only_linear_reference

# At import, not on first use: torch.compile cannot trace an import.
try:
    from sana_kernels.weight_only_linear import triton as kernels
    from sana_kernels.weight_only_linear import triton_ops
except ImportError as error:
    TRITON_PROBLEM: str | None = f"triton cannot be imported ({error})"
else:
    TRITON_PROBLEM = None

Impl = Literal["reference", "triton"]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@library.custom_op("sana::weight_only_linear", mutates_args=())
def _weight_only_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, gated: bool
) -> torch.Tensor:
    on_gpu = TRITON_PROBLEM is None and x.device.type == "cuda"
    forward = triton_ops.weight_only_linear_triton if on_gpu else weight_only_linear_reference
    return forward(x, weight, weight_scale, bias, gated)


@_weight_only_linear.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, gated: bool
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (1 + gated)))


def weight_only_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    gated: bool = False,
    impl: Impl | None = None,
) -> torch.Tensor:
    """weight_scale * (x weight^T) + bias: x [..., K] float32, bfloat16 or float16 -> [..., N] of the same dtype.

    weight [N, K] int8, `weight_scale` one float32 number or N of them, bias [N] of any float dtype. Products of a float
    and a code are summed in fp32, scaled, and rounded once. Made for few rows, where reading the weights is most of the
    time; the result is right for any number. `gated` (N even): gelu(first half) * second half [..., N / 2], GELU by its
    tanh formula, as of Gemma's gate and up projections stacked.

    `impl`: "reference" is eager PyTorch, "triton" the kernel (not for float32); None takes the kernel for CUDA tensors
    where Triton is installed, the reference otherwise, and is one op to torch.export. There are no gradients.

    Raises ValueError for shapes or dtypes that do not fit each other and for tensors the chosen implementation cannot
    run; nothing falls back silently.
    """
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"weight_only_linear: impl must be 'reference', 'triton' or None, got {impl!r}")
    _check(x, weight, weight_scale, bias)
    if gated and weight.shape[0] % 2:
        raise ValueError(f"weight_only_linear: gated needs an even number of rows in weight, got {weight.shape[0]}")
    if impl == "reference":
        return weight_only_linear_reference(x, weight, weight_scale, bias, gated)
    if impl == "triton":
        if TRITON_PROBLEM:
            raise ValueError(
                f"weight_only_linear: impl='triton', but {TRITON_PROBLEM}. Use impl='reference', or pip install triton."
            )
        kernels.check_support(x)
        return triton_ops.weight_only_linear_triton(x, weight, weight_scale, bias, gated)
    return _weight_only_linear(x, weight, weight_scale, bias, gated)


def _check(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.ndim < 2 or weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.shape[1] == 0:
        raise ValueError(
            f"weight_only_linear: x must be [..., K] and weight [N, K], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype not in _FLOATS or weight.dtype != torch.int8:
        raise ValueError(
            "weight_only_linear: x must be float32, bfloat16 or float16 and weight int8, "
            f"got {x.dtype} and {weight.dtype}"
        )
    rows = weight.shape[0]
    if weight_scale.dtype != torch.float32 or tuple(weight_scale.shape) not in ((), (1,), (rows,)):
        raise ValueError(
            f"weight_only_linear: weight_scale must be 1 or {rows} float32 numbers, "
            f"got {weight_scale.dtype} {tuple(weight_scale.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"weight_only_linear: bias must be [{rows}], got {tuple(bias.shape)}")
