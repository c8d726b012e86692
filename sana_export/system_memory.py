"""How much memory this machine has."""

from pathlib import Path

_TABLE = Path("/proc/meminfo")


def system_memory() -> tuple[int, int] | None:
    """(available, total) in bytes; None where the system does not tell."""
    try:
        lines = _TABLE.read_text(encoding="ascii").splitlines()
        sizes = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        return sizes["MemAvailable"], sizes["MemTotal"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
