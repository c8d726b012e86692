"""The specification of the upsampling convolution: eager PyTorch, fp32 inside, one rounding per result."""

import torch
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from sana_kernels.mix_ffn_depthwise.quantization import narrow


def phase_weight(weight: torch.Tensor) -> torch.Tensor:
    """The 2x2 weights [4 O, I, 2, 2] of the four output pixels of a nearest-upsampled 3x3 convolution [O, I, 3, 3].

    Output row 2i sees the input rows i - 1, i, i; row 2i + 1 sees i, i, i + 1; columns likewise. Phase 2a + b is that
    of row a and column b. Sums are formed in fp32.
    """
    low = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    high = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    maps = torch.stack([low, high]).to(weight.device)  # [phase, 2, 3]
    phases = torch.einsum("aky,blx,oiyx->aboikl", maps, maps, weight.float())
    return phases.flatten(0, 2).to(weight.dtype)


def upsample_convolution_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(convolution of the upsampled x + bias + shuffled channels of x, its codes): x [B, H, W, I] -> [B, 2H, 2W, O].

    weight [4 O, 2, 2, I], that of `phase_weight` with channels last; bias [O]. The codes are those of the result in
    x's dtype, quantised to `out_dtype` with `out_scale`; empty without.
    """
    phases = F.conv2d(x.float().permute(0, 3, 1, 2), weight.float().permute(0, 3, 1, 2), padding=1)
    return finish(phases.permute(0, 2, 3, 1), x, bias, out_scale, out_dtype)


def finish(
    phases: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What follows the convolution, whose result is `phases` [B, H + 1, W + 1, 4 O], any float dtype."""
    batch, height, width, inputs = x.shape
    outputs = bias.shape[0]
    shortcut = x.float().repeat_interleave(4 * outputs // inputs, dim=-1).unflatten(-1, (outputs, 2, 2))
    shortcut = shortcut.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, outputs)
    phases = phases.float().unflatten(-1, (2, 2, outputs))
    # Row i of phase a belongs to output row 2 (i - a) + a; columns likewise.
    rows = [torch.stack([phases[:, a : a + height, b : b + width, a, b] for b in (0, 1)], dim=3) for a in (0, 1)]
    out = torch.stack(rows, dim=2).reshape(shortcut.shape)
    out = (out + bias.float() + shortcut).to(x.dtype)
    return out, x.new_empty(0) if out_dtype is None else narrow(out.float(), out_scale, out_dtype)


def upsample_convolution_backward_reference(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (x, weight, bias), in their dtypes, given that of the result [B, 2H, 2W, O]."""
    batch, height, width, inputs = x.shape
    outputs = bias.shape[0]
    wide = grad.float()
    phases = wide.new_zeros(batch, height + 1, width + 1, 2, 2, outputs)
    for a in (0, 1):
        for b in (0, 1):
            phases[:, a : a + height, b : b + width, a, b] = wide[:, a::2, b::2]
    pixels, kernel = x.float().permute(0, 3, 1, 2), weight.float().permute(0, 3, 1, 2)
    of_phases = phases.flatten(3).permute(0, 3, 1, 2)
    grad_x = conv2d_input(pixels.shape, kernel, of_phases, padding=1).permute(0, 2, 3, 1)
    grad_weight = conv2d_weight(pixels, kernel.shape, of_phases, padding=1).permute(0, 2, 3, 1)
    # Of the shortcut, channel by channel as the repeated ones of x.
    shuffled = wide.unflatten(2, (width, 2)).unflatten(1, (height, 2)).permute(0, 1, 3, 5, 2, 4).flatten(3)
    grad_x = grad_x + shuffled.unflatten(-1, (inputs, -1)).sum(-1)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), wide.sum((0, 1, 2)).to(bias.dtype)
