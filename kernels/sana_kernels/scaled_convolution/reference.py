"""The specification of the scaled convolution: eager PyTorch, the roundings of the separate operations."""

import torch
from torch.nn import functional as F

from sana_kernels.mix_ffn_depthwise.quantization import narrow


def scaled_convolution_reference(
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
    """x [B, H, W, C], weight [O, 3, 3, C], codes of one dtype -> [B, H, W, O] in `dtype`, or its codes in `out_dtype`.

    The scales are fp32: `activation_scale` [], `weight_scale` [] or [O]. The convolution with its bias, and SiLU of it,
    are rounded to `dtype` once each, all else is fp32; the codes are those of the rounded result.
    """
    # Sums of INT8 products are exact, in int32 on a GPU, and are rounded once to fp32.
    exact = torch.float64 if x.dtype == torch.int8 else torch.float32
    sums = F.conv2d(x.to(exact).permute(0, 3, 1, 2), weight.to(exact).permute(0, 3, 1, 2), padding=1)
    return finish(
        sums.permute(0, 2, 3, 1).float(), activation_scale * weight_scale, bias, out_scale, silu, dtype, out_dtype
    )


def finish(
    sums: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    silu: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """What follows the fp32 `sums` [B, H, W, O]; `scale` [] or [O]."""
    wide = sums * scale
    y = (wide if bias is None else wide + bias.float()).to(dtype)
    if silu:
        y = F.silu(y.float()).to(dtype)
    return y if out_dtype is None else narrow(y.float(), out_scale, out_dtype)
