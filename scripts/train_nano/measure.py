"""Are the fused operators faster than PyTorch's at the shapes of the training? Forward and backward together."""

from collections.abc import Callable

import torch

from sana_kernels.linear_attention import linear_attention
from sana_kernels.linear_attention.reference import linear_attention_reference
from scripts.train_nano.depthwise import depthwise_gate, depthwise_gate_reference
from scripts.train_nano.sizes import Size

_REPLAYS = 20
Operator = Callable[..., torch.Tensor]


def measure(device: torch.device, size: Size) -> None:
    """Print a line per operator and resolution: milliseconds of both, and the largest difference of the results."""
    config = size.configs.transformer
    channels = config["num_attention_heads"] * config["attention_head_dim"]
    hidden = int(config["mlp_ratio"] * channels)
    for side, batch in zip(size.sides, size.batches.diffusion, strict=True):
        grid = side // 32
        qkv = _random(device, batch, grid * grid, 3 * channels)
        print(f"linear attention, {side} px, {batch} pictures: {_compared(_attention, _plain_attention, (qkv,))}")
        x = _random(device, batch, grid * grid, 2 * hidden)
        weight = torch.randn(2 * hidden, 1, 3, 3, device=device, requires_grad=True)
        bias = torch.randn(2 * hidden, device=device, requires_grad=True)

        def fused(*tensors: torch.Tensor, grid: int = grid) -> torch.Tensor:
            return depthwise_gate(*tensors, grid, grid)

        def plain(*tensors: torch.Tensor, grid: int = grid) -> torch.Tensor:
            return depthwise_gate_reference(*tensors, grid, grid)

        print(f"Mix-FFN's middle, {side} px, {batch} pictures: {_compared(fused, plain, (x, weight, bias))}")


def _attention(qkv: torch.Tensor) -> torch.Tensor:
    return linear_attention(qkv, head_dim=32)


def _plain_attention(qkv: torch.Tensor) -> torch.Tensor:
    return linear_attention_reference(qkv, None, None, 32, 1e-15, 1e-5)


def _random(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True)


def _compared(fused: Operator, plain: Operator, inputs: tuple[torch.Tensor, ...]) -> str:
    compiled = torch.compile(plain, dynamic=False)
    expected = plain(*inputs).float()
    difference = (fused(*inputs).float() - expected).abs().max() / expected.abs().max()
    times = [_milliseconds(operator, inputs) for operator in (fused, compiled)]
    return f"fused {times[0]:.3f} ms, torch.compile {times[1]:.3f} ms, error {difference.item():.1e} of the largest"


def _milliseconds(operator: Operator, inputs: tuple[torch.Tensor, ...]) -> float:
    """Forward and backward."""
    gradient = torch.ones_like(operator(*inputs))

    def once() -> None:
        torch.autograd.grad(operator(*inputs), inputs, gradient)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_REPLAYS):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / _REPLAYS
