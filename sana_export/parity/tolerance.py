"""How far an engine may be from the fp32 reference before it is wrong rather than rounded."""

import math

from sana_export.parity.metrics import Parity
from sana_runtime.errors import SanaError

# Unit roundoff of each dtype an engine computes in. fp32 sums in another order lose about 3e-5 over the depth of a
# component (tests/export/test_reference_modules.py); that is the floor for all.
_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_ORDER_OF_SUMS = 3e-5
_ROUNDINGS_PER_BLOCK = 10
_LEVEL = 0.5 / 128


class ParityError(SanaError):
    """An engine does not compute what the reference computes."""


def relative_rms_bound(dtype: str, blocks: int, *, image: bool = False) -> float:
    """Bound on the relative RMS error of a component of `blocks` blocks that computes in `dtype`.

    Each block rounds about ten times; roundings walk at random, so the bound is sqrt(10 blocks) unit roundoffs on top
    of what the order of fp32 sums costs. A uint8 image adds half a level around mid-grey.
    """
    bound = _ORDER_OF_SUMS + math.sqrt(_ROUNDINGS_PER_BLOCK * blocks) * _ROUNDOFF[dtype]
    return bound + (_LEVEL if image else 0.0)


def guidance_amplification(scale: float) -> float:
    """How much larger the error of the guided x0 is than each half's: u + g (c - u) takes 1 - g of one and g of the
    other, whose roundings are independent. 1 where there is no guidance.
    """
    return max(1.0, math.hypot(scale, scale - 1))


def check(row: Parity, dtype: str, blocks: int, amplification: float = 1.0) -> None:
    """Raise `ParityError` if a component is beyond its bound times `amplification`."""
    hold(row, amplification * relative_rms_bound(dtype, blocks, image=row.tensor == "image"), dtype)


def hold(row: Parity, bound: float, dtype: str) -> None:
    """Raise `ParityError` if a component that computes in `dtype` is beyond its bound."""
    if not row.relative_rms <= bound:
        raise ParityError(
            f"{row.stage}: the engine does not compute what PyTorch computes",
            received=f"{row.tensor}: relative RMS {row.relative_rms:.2e}, worst {row.max_abs:.3g} at {row.worst_index}",
            expected=f"relative RMS at most {bound:.2e} for {dtype}",
            action="rebuild the bundle; if the error stays, report it with the output of sana-export doctor",
        )
