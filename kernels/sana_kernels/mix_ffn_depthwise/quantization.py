"""Outputs in 8 bits with a static scale: what the kernels and their references mean by it."""

import torch

# dtype -> smallest and largest value. The same arithmetic as ONNX QuantizeLinear without a zero point.
QUANTIZED_DTYPES: dict[torch.dtype, tuple[float, float]] = {
    torch.float8_e4m3fn: (-448.0, 448.0),
    torch.int8: (-128.0, 127.0),
}


def narrow(y: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """fp32 `y` as `dtype`; in 8 bits saturate(round_half_even(y / scale)), scale one fp32 number.

    NaN stays NaN in float8_e4m3fn; int8 has none, and what it becomes there is undefined.
    """
    if scale is None:
        return y.to(dtype)
    scaled = (y / scale.to(y.dtype)).clamp(*QUANTIZED_DTYPES[dtype])
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype)


def check_quantization(op: str, out_scale: torch.Tensor | None, out_dtype: torch.dtype | None) -> None:
    """Raise ValueError unless scale and 8-bit dtype are given together or not at all, and are what they must be."""
    if (out_scale is None) != (out_dtype is None):
        raise ValueError(f"{op}: out_scale and out_dtype must be given together, got {out_scale} and {out_dtype}")
    if out_dtype is not None and out_dtype not in QUANTIZED_DTYPES:
        raise ValueError(f"{op}: out_dtype must be float8_e4m3fn or int8, got {out_dtype}; without it, it is x's")
    if out_scale is not None and (out_scale.numel() != 1 or out_scale.dtype != torch.float32):
        raise ValueError(f"{op}: out_scale must be one float32 number, got {out_scale.dtype} {tuple(out_scale.shape)}")
