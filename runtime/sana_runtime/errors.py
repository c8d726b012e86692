"""Errors written for the person holding the device.

Every mistake a user can make ends in a `SanaError`: four parts, no traceback, exit code 1. Anything else
that escapes is a broken invariant of ours and keeps its traceback.
"""


class SanaError(Exception):
    """A user's error: what failed, the value received, what was expected, what to do."""

    exit_code = 1

    def __init__(self, failed: str, *, received: object = None, expected: str = "", action: str = "") -> None:
        self.failed = failed
        self.received = received
        self.expected = expected
        self.action = action
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.failed]
        if self.received is not None:
            lines.append(f"  received: {self.received}")
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.action:
            lines.append(f"  do: {self.action}")
        return "\n".join(lines)


class InputError(SanaError):
    """An argument, flag or array a user passed is wrong."""


class CheckpointError(SanaError):
    """A checkpoint is missing, damaged, ambiguous, or not a Sana model."""


class BundleError(SanaError):
    """A bundle is missing, incomplete, edited, or of another schema version."""


class TargetError(SanaError):
    """A target cannot be built or run on this machine."""


class BuildError(SanaError):
    """A compiler failed, crashed, was killed or ran out of memory or space."""
