"""Where Triton's kernels run here, and the error for what they cannot run."""

import triton
import triton.language as tl

# Under TRITON_INTERPRET=1 kernels run on CPU tensors, slowly.
ON_CPU = bool(triton.knobs.runtime.interpret)
INTERPRETED = tl.constexpr(ON_CPU)


class UnsupportedByTriton(ValueError):
    """The Triton kernels cannot run these tensors on this machine; the message says why and what to do."""
