# Device code returns blocks, which have no Python types.
# ruff: noqa: ANN202
"""The middle of Mix-FFN for training: depthwise 3x3, then value * SiLU(gate), with a fused backward.

`sana_kernels.mix_ffn_depthwise` has the fused forward that inference needs; its backward is plain PyTorch in fp32. Here
both directions are Triton kernels. Every program reads the nine neighbours of its tokens from the L1 cache, where
they are after the first read, and no intermediate but the gradient of the convolution's output is stored.
On a CPU, or with `impl="reference"`, everything is PyTorch's convolution.
"""

from typing import Any, Literal

import torch
from torch import library
from torch.nn import functional as F

from sana_export.reference.dc_ae import AutoencoderMixFFN
from sana_export.reference.layers import MixFFN

try:
    import triton
    import triton.language as tl
except ImportError as error:
    TRITON_PROBLEM: str | None = str(error)
else:
    TRITON_PROBLEM = None

Impl = Literal["triton", "reference"]
_TOKENS, _CHANNELS, _WARPS = 64, 32, 8
# Programs along the batch in the backward: each sums its images' weight gradients in registers.
_BATCH_PARTS = 64


def depthwise_gate_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """x [B, N, 2F] -> [B, N, F]: [value | gate] = depthwise3x3(x) + bias; value * SiLU(gate)."""
    grid = x.transpose(1, 2).unflatten(2, (height, width))
    grid = F.conv2d(grid, weight.to(x.dtype), bias.to(x.dtype), padding=1, groups=grid.shape[1])
    value, gate = grid.flatten(2).transpose(1, 2).chunk(2, dim=-1)
    return value * F.silu(gate)


if TRITON_PROBLEM is None:

    @triton.jit
    def _neighbours(ptr, image, token, height, width, TAP: tl.constexpr, STRIDE: tl.constexpr, channel, inside):
        """One tap of the 3 x 3 window of each token, fp32 [tokens, channels], zero outside the image."""
        row = token // width + (TAP // 3 - 1)
        column = token % width + (TAP % 3 - 1)
        there = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (token < height * width)
        place = (image + row * width + column)[:, None] * STRIDE + channel[None, :]
        return tl.load(ptr + place, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)

    @triton.jit
    def _convolve(
        x_ptr, weight_ptr, bias_ptr, image, token, height, width, STRIDE: tl.constexpr, channel, weight_channel, inside
    ):
        """Depthwise 3 x 3 with bias: fp32 [tokens, channels]. `channel` counts from x_ptr."""
        bias = tl.load(bias_ptr + weight_channel, mask=inside, other=0.0)
        total = tl.zeros((token.shape[0], channel.shape[0]), tl.float32) + bias[None, :]
        for tap in tl.static_range(9):
            weight = tl.load(weight_ptr + weight_channel * 9 + tap, mask=inside, other=0.0)
            near = _neighbours(x_ptr, image, token, height, width, tap, STRIDE, channel, inside)
            total += near * weight[None, :]
        return total

    @triton.jit
    def _forward_kernel(
        x_ptr, weight_ptr, bias_ptr, out_ptr, height, width, HIDDEN: tl.constexpr, TOKENS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """Program (channel block, token block, image)."""
        channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        inside = channel < HIDDEN
        token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        image = tl.program_id(2).to(tl.int64) * height * width
        gate_channel = HIDDEN + channel
        value = _convolve(
            x_ptr, weight_ptr, bias_ptr, image, token, height, width, 2 * HIDDEN, channel, channel, inside
        )
        gate = _convolve(
            x_ptr, weight_ptr, bias_ptr, image, token, height, width, 2 * HIDDEN, gate_channel, gate_channel, inside
        )
        out = value * gate * tl.sigmoid(gate)
        place = (image + token)[:, None] * HIDDEN + channel[None, :]
        there = (token < height * width)[:, None] & inside[None, :]
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=there)

    @triton.jit
    def _weight_gradient(sums, x_ptr, gradient, image, token, height, width, STRIDE: tl.constexpr, channel, inside):
        """`sums` [16, channels] plus the sums over tokens of gradient times each tap (rows 0..8) and of the gradient
        (row 9).
        """
        row = tl.arange(0, 16)[:, None]
        for tap in tl.static_range(9):
            near = _neighbours(x_ptr, image, token, height, width, tap, STRIDE, channel, inside)
            sums = tl.where(row == tap, sums + tl.sum(gradient * near, axis=0)[None, :], sums)
        return tl.where(row == 9, sums + tl.sum(gradient, axis=0)[None, :], sums)

    @triton.jit
    def _gate_backward_kernel(
        grad_ptr, x_ptr, weight_ptr, bias_ptr, inner_ptr, parts_ptr, batch, height, width, images,
        HIDDEN: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """Program (channel block, token block, run of images): the gradient of the convolution's output, stored, and
        this program's part of the gradients of weight and bias, [parts, 10, 2F] fp32.
        """
        channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        inside = channel < HIDDEN
        gate_channel = HIDDEN + channel
        token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        there = (token < height * width)[:, None] & inside[None, :]
        part = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        value_sums = tl.zeros((16, CHANNELS), tl.float32)
        gate_sums = tl.zeros((16, CHANNELS), tl.float32)
        first = tl.program_id(2) * images
        for index in range(0, tl.minimum(images, batch - first)):
            image = (first.to(tl.int64) + index) * height * width
            value = _convolve(
                x_ptr, weight_ptr, bias_ptr, image, token, height, width, 2 * HIDDEN, channel, channel, inside
            )
            gate = _convolve(
                x_ptr, weight_ptr, bias_ptr, image, token, height, width, 2 * HIDDEN, gate_channel, gate_channel,
                inside,
            )  # fmt: skip
            place = (image + token)[:, None]
            grad = tl.load(grad_ptr + place * HIDDEN + channel[None, :], mask=there, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            value_grad = grad * gate * sigmoid
            gate_grad = grad * value * sigmoid * (1 + gate * (1 - sigmoid))
            inner = inner_ptr + place * (2 * HIDDEN)
            tl.store(inner + channel[None, :], value_grad.to(inner_ptr.dtype.element_ty), mask=there)
            tl.store(inner + gate_channel[None, :], gate_grad.to(inner_ptr.dtype.element_ty), mask=there)
            value_sums = _weight_gradient(
                value_sums, x_ptr, value_grad, image, token, height, width, 2 * HIDDEN, channel, inside
            )
            gate_sums = _weight_gradient(
                gate_sums, x_ptr, gate_grad, image, token, height, width, 2 * HIDDEN, gate_channel, inside
            )
        row = tl.arange(0, 16)[:, None]
        place = parts_ptr + part.to(tl.int64) * (20 * HIDDEN) + row * (2 * HIDDEN)
        tl.store(place + channel[None, :], value_sums, mask=(row < 10) & inside[None, :])
        tl.store(place + gate_channel[None, :], gate_sums, mask=(row < 10) & inside[None, :])

    @triton.jit
    def _input_backward_kernel(
        inner_ptr, weight_ptr, out_ptr, height, width, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """Program (channel block, token block, image): the transposed convolution, which is the one with the
        weight's taps in reverse order.
        """
        channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        inside = channel < WIDTH
        token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        image = tl.program_id(2).to(tl.int64) * height * width
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for tap in tl.static_range(9):
            weight = tl.load(weight_ptr + channel * 9 + (8 - tap), mask=inside, other=0.0)
            near = _neighbours(inner_ptr, image, token, height, width, tap, WIDTH, channel, inside)
            total += near * weight[None, :]
        place = (image + token)[:, None] * WIDTH + channel[None, :]
        there = (token < height * width)[:, None] & inside[None, :]
        tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=there)


def _triton_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int) -> torch.Tensor:
    batch, tokens, channels = x.shape
    hidden = channels // 2
    out = x.new_empty(batch, tokens, hidden)
    grid = (triton.cdiv(hidden, _CHANNELS), triton.cdiv(tokens, _TOKENS), batch)
    _forward_kernel[grid](
        x, weight, bias, out, height, width, HIDDEN=hidden, TOKENS=_TOKENS, CHANNELS=_CHANNELS, num_warps=_WARPS
    )
    return out


def _triton_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, channels = x.shape
    hidden = channels // 2
    images = triton.cdiv(batch, _BATCH_PARTS)
    runs, blocks = triton.cdiv(batch, images), triton.cdiv(tokens, _TOKENS)
    inner = torch.empty_like(x)
    parts = torch.empty(runs * blocks, 10, channels, dtype=torch.float32, device=x.device)
    _gate_backward_kernel[(triton.cdiv(hidden, _CHANNELS), blocks, runs)](
        grad, x, weight, bias, inner, parts, batch, height, width, images,
        HIDDEN=hidden, TOKENS=_TOKENS, CHANNELS=_CHANNELS, num_warps=_WARPS,
    )  # fmt: skip
    x_grad = torch.empty_like(x)
    _input_backward_kernel[(triton.cdiv(channels, _CHANNELS), blocks, batch)](
        inner, weight, x_grad, height, width, WIDTH=channels, TOKENS=_TOKENS, CHANNELS=_CHANNELS, num_warps=_WARPS
    )
    sums = parts.sum(0)  # [10, 2F]
    return x_grad, sums[:9].t().contiguous().view(weight.shape), sums[9].clone()


@library.custom_op("train_nano::depthwise_gate", mutates_args=())
def depthwise_gate(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`depthwise_gate_reference` by the kernels: x contiguous; weight and bias contiguous fp32."""
    return _triton_forward(x.contiguous(), weight.contiguous(), bias.contiguous(), height, width)


@depthwise_gate.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@library.custom_op("train_nano::depthwise_gate_backward", mutates_args=())
def depthwise_gate_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias."""
    return _triton_backward(grad.contiguous(), x.contiguous(), weight.contiguous(), bias.contiguous(), height, width)


@depthwise_gate_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x_grad, torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, ctx.height, ctx.width = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    return *depthwise_gate_backward(grad, x, weight, bias, ctx.height, ctx.width), None, None


depthwise_gate.register_autograd(_gradients, setup_context=_setup_context)


def _mix_ffn(layer: MixFFN, x: torch.Tensor, height: int, width: int, impl: Impl) -> torch.Tensor:
    """`MixFFN.forward` of the reference, with the fused middle where `impl` is "triton"."""
    x = F.silu(layer.conv_inverted(x))
    middle = depthwise_gate if impl == "triton" else depthwise_gate_reference
    return layer.conv_point(middle(x, layer.conv_depth.weight, layer.conv_depth.bias, height, width))


class TrainingMixFFN(MixFFN):
    """The transformer's Mix-FFN: parameters and mathematics of the reference."""

    def __init__(self, channels: int, hidden: int, impl: Impl) -> None:
        super().__init__(channels, hidden)
        self.impl = impl

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return _mix_ffn(self, x, height, width, self.impl)


class TrainingAutoencoderMixFFN(AutoencoderMixFFN):
    """The autoencoder's Mix-FFN: parameters and mathematics of the reference."""

    def __init__(self, channels: int, impl: Impl) -> None:
        super().__init__(channels)
        self.impl = impl

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        height, width = x.shape[-2:]
        tokens = _mix_ffn(self, x.flatten(2).transpose(1, 2), height, width, self.impl)
        return x + self.norm(tokens).transpose(1, 2).unflatten(2, (height, width))
