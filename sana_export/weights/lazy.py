"""Tensors whose shape and dtype are known before they are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class LazyTensor:
    """A stored tensor. `load()` reads this tensor only and returns it with `shape` and the stored `dtype`.

    What `load()` returns may be a private memory map of a file: its pages are read as they are used.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.count * self.dtype.itemsize


def rows(tensor: LazyTensor, start: int, count: int) -> LazyTensor:
    """`count` rows of [R, ...] from row `start`: shape [count, ...]."""
    return LazyTensor((count, *tensor.shape[1:]), tensor.dtype, lambda: tensor.load().narrow(0, start, count))


def most_common_dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype | None:
    """The dtype that holds most elements; None without tensors."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.count
    return max(counts, key=lambda dtype: counts[dtype], default=None)
