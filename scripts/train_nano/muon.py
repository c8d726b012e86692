"""Muon for the matrices inside the transformer's blocks: momentum whose singular values are all made about 1.

Method: Jordan et al., "Muon: an optimizer for hidden layers in neural networks"; scale of the update: Liu et al.,
"Muon is scalable for LLM training", equation 4, which makes learning rates those of AdamW. PyTorch's own Muon takes
one matrix after the other; here matrices of one shape are one batch, and nothing goes through the CPU, so that a CUDA
graph can hold the step.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

# Newton-Schulz iteration of degree 5 whose slope at 0 is as large as convergence to about 1 allows.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_MOMENTUM = 0.95
# Root mean square of AdamW's updates, about.
_UPDATE_RMS = 0.2


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """[n, rows, columns] -> the same singular vectors, singular values within about 0.7..1.2; the input's dtype.

    In bf16 on a GPU, as the iteration forgives errors, and fp32 elsewhere.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, on matrices only. State per parameter: `momentum`.

    `params` pairs a matrix with the number of square-ish parts it is packed from along its rows (3 for q, k, v): each
    part is orthogonalised alone. `grad_scale` and `found_inf` are read as by PyTorch's fused AdamW: gradients are
    divided by the first; if the second is 1, the step leaves everything as it is.
    """

    def __init__(
        self, params: Iterable[tuple[torch.nn.Parameter, int]], lr: float | torch.Tensor, weight_decay: float
    ) -> None:
        pairs = list(params)
        self._parts = dict(pairs)
        super().__init__([parameter for parameter, _ in pairs], {"lr": lr, "weight_decay": weight_decay})
        self.grad_scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            batches: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows = parameter.shape[0] // self._parts[parameter]
                    batches.setdefault((rows, parameter.shape[1]), []).append(parameter)
            for shape, parameters in batches.items():
                self._update(parameters, shape, group)

    def _update(self, parameters: list[torch.nn.Parameter], shape: tuple[int, ...], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self._momentum(parameter) for parameter in parameters]
        one = torch.ones((), device=parameters[0].device)
        # 0 for a step that is left out, and its gradients, which are not numbers, become 0.
        taken = one if self.found_inf is None else 1 - self.found_inf
        scale = one if self.grad_scale is None else 1 / self.grad_scale
        stacked = torch.cat([gradient.reshape(-1, *shape) for gradient in gradients])  # type: ignore[union-attr]
        stacked = torch.where(taken > 0, stacked * scale, 0.0)
        old = torch.cat([momentum.reshape(-1, *shape) for momentum in momenta])
        new = torch.lerp(old, stacked, (1 - _MOMENTUM) * taken)
        direction = orthogonalised(torch.lerp(stacked, new, _MOMENTUM))
        rate = group["lr"] * taken
        step = rate * (_UPDATE_RMS * max(shape) ** 0.5) * direction
        counts = [parameter.shape[0] // shape[0] for parameter in parameters]
        for parameter, momentum, change, state in zip(
            parameters, momenta, step.split(counts), new.split(counts), strict=True
        ):
            momentum.copy_(state.reshape(momentum.shape))
            parameter.mul_(1 - rate * group["weight_decay"]).sub_(change.reshape(parameter.shape))

    def _momentum(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: torch.Tensor = state["momentum"]
        return momentum


def packed_parts(name: str) -> int:
    """From how many matrices a parameter of the transformer is packed along its rows."""
    if name.endswith("qkv.weight"):
        return 3
    return 2 if name.endswith("to_kv.weight") else 1


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Is it a linear layer inside a block? Tables of modulation are matrices by shape only."""
    return ".blocks." in name and parameter.ndim == 2 and not name.endswith("modulation")
