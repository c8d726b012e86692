"""What a measuring process is asked for, and what it reports: one JSON line per finding, written as soon as known."""

from typing import Literal

import msgspec

PROMPT = "a red fox in fresh snow at sunrise, detailed fur, soft light"
ONE_AT_A_TIME = "total_one_at_a_time"
STAGES = ("step", "vae_decoder", "text_encoder", "total", "cold_start")
# Of engines that compute fewer positions for a short caption, as that of `PROMPT` is.
SHORT_CAPTION = "text_encoder_short"
SubjectKind = Literal["ceilings", "parity", "engines", "peer"]


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """One process's work. `height`, `width` in pixels; `caption_tokens` is the padded prompt length L; `started` is
    when the process was started, in seconds since the epoch; `stages` are the ones still to be measured.
    `one_at_a_time`: keep one engine in memory.
    """

    kind: SubjectKind
    device: str = "cpu"
    source: str = ""
    variant: str | None = None
    base: str | None = None
    bundle: str = ""
    target: str | None = None
    peer: str = ""
    height: int = 0
    width: int = 0
    caption_tokens: int = 0
    num_steps: int = 0
    runs: int = 5
    warmup: int = 1
    stages: tuple[str, ...] = STAGES
    one_at_a_time: bool = False
    started: float = 0.0


class Timed(msgspec.Struct, frozen=True, tag=True):
    """Milliseconds of one stage. `note` says what a reader of the figure must know."""

    stage: str
    p50_ms: float
    p20_ms: float
    p80_ms: float
    runs: int
    note: str = ""


class Memory(msgspec.Struct, frozen=True, tag=True):
    """Peaks while one picture was painted: torch's own allocations, and the whole device's memory in use, in MiB."""

    allocated_mib: float | None
    device_mib: float | None


class Noted(msgspec.Struct, frozen=True, tag=True):
    """Something found that is not a time."""

    stage: str
    note: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A stage that gave no figure, and why. `red`: its result was wrong, rather than missing."""

    stage: str
    error: str
    red: bool = False


class Judged(msgspec.Struct, frozen=True, tag=True):
    """Parity held. `device`: "cuda" or "cpu"; `description` names it; `verdict` in words."""

    device: str
    description: str
    target: str
    verdict: str


class Measured(msgspec.Struct, frozen=True, tag=True):
    """The ceilings of the device."""

    tflop_per_s: dict[str, float]
    copy_gb_per_s: float


Finding = Timed | Memory | Noted | Failed | Judged | Measured
finding_decoder = msgspec.json.Decoder(Finding)
