"""The largest resident set of this process between two points."""

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Starts a measurement when made. On Linux the kernel's high-water mark is reset; elsewhere it cannot be, and
    the figure is the process's own maximum.
    """

    def __init__(self) -> None:
        if _CLEAR.exists():
            _CLEAR.write_text("5")

    def mib(self) -> int:
        """Peak resident set in MiB, mapped files included."""
        if _STATUS.exists():
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) // 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20
