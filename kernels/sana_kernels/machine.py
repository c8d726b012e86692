"""Where Triton's kernels run here, and the error for what they cannot run."""

import torch
import triton
import triton.language as tl

# Under TRITON_INTERPRET=1 kernels run on CPU tensors, slowly.
ON_CPU = bool(triton.knobs.runtime.interpret)
INTERPRETED = tl.constexpr(ON_CPU)
# What every GPU since compute capability 8.0 gives a program; 9.0, 10.x and 11.0 give 227 KiB.
COMMON_SHARED_BYTES = 99 << 10


class UnsupportedByTriton(ValueError):
    """The Triton kernels cannot run these tensors on this machine; the message says why and what to do."""


def shared_bytes(device: torch.device) -> int:
    """The shared memory that a program can have on this device; off a GPU, what it has on every one."""
    if device.type != "cuda":
        return COMMON_SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # PyTorch's stubs leave it out
