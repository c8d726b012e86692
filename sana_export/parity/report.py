"""A comparison as one HTML page that needs no other file: verdict, pictures, curves over the steps, all figures."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jinja2 import Environment
from PIL import Image

from sana_export.parity.ladder import LadderResult
from sana_export.parity.metrics import Parity
from sana_runtime.files import whole_file
from sana_runtime.manifest import GateEntry

# A page carries pictures of up to this many pixels a side; larger ones are shown smaller.
_SHOWN_SIDE = 1024
# Differences of a few levels in 255 are seen at this gain.
_GAIN = 8
Pixels = npt.NDArray[np.uint8]


def write_report(
    path: Path,
    facts: Mapping[str, str],
    result: LadderResult,
    gate: GateEntry | None,
    bounds: Sequence[float],
) -> None:
    """Write the page of one prompt. `facts`: what was compared, by name. `gate`: the verdict on a bundle that
    quantises; without one a component may be as far from the reference as `bounds` say, relative RMS in their order.
    """
    candidate, reference = result.images
    passed = gate.passed if gate else all(row.relative_rms <= most for row, most in _pairs(result, bounds))
    page = (
        _environment()
        .from_string(_template())
        .render(
            facts=facts,
            passed=passed,
            demands=_of_gate(gate) if gate else _of_bounds(result, bounds),
            pictures={
                "engine": _png(_smaller(candidate)),
                "PyTorch fp32": _png(_smaller(reference)),
                f"difference, times {_GAIN}": _png(difference(candidate, reference)),
            },
            shrunk=max(candidate.shape[:2]) > _SHOWN_SIDE,
            size=f"{candidate.shape[1]} x {candidate.shape[0]} px",
            charts=_charts(result, gate),
            groups={
                "Each component on equal inputs": result.components,
                "x0 of every step on equal inputs": result.x0,
                "Velocity of every step on equal inputs": result.velocity,
                "The latent as it drifts, each side on its own": result.drift,
                f"The picture (SSIM {result.ssim:.4f})": (result.picture,),
            },
        )
    )
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _pairs(result: LadderResult, bounds: Sequence[float]) -> list[tuple[Parity, float]]:
    """Every component's distance and the most it may be."""
    return list(zip(result.components, bounds, strict=True))


def difference(candidate: Pixels, reference: Pixels) -> Pixels:
    """What differs between two pictures [H, W, 3], amplified; where it is shown smaller, the worst of each block."""
    from skimage.measure import block_reduce

    apart = np.abs(candidate.astype(np.int16) - reference.astype(np.int16))
    factor = _factor(apart.shape)
    worst = block_reduce(apart, (factor, factor, 1), np.max) if factor > 1 else apart
    return np.minimum(worst * _GAIN, 255).astype(np.uint8)


def _smaller(picture: Pixels) -> Pixels:
    factor = _factor(picture.shape)
    return np.asarray(Image.fromarray(picture).reduce(factor)) if factor > 1 else picture


def _factor(shape: Sequence[int]) -> int:
    return math.ceil(max(shape[:2]) / _SHOWN_SIDE)


def _png(picture: Pixels) -> str:
    """As the address of an image."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _of_gate(gate: GateEntry) -> list[tuple[str, str, str, bool]]:
    """(what, found, asked for, whether it holds)."""
    return [
        (
            "SQNR of x0 at the worst step",
            f"{gate.x0_sqnr_db:.1f} dB",
            f"at least {gate.min_x0_sqnr_db:g} dB",
            gate.x0_sqnr_db >= gate.min_x0_sqnr_db,
        ),
        (
            "PSNR of the picture",
            f"{gate.psnr_db:.1f} dB",
            f"at least {gate.min_psnr_db:g} dB",
            gate.psnr_db >= gate.min_psnr_db,
        ),
        ("SSIM of the picture", f"{gate.ssim:.3f}", f"at least {gate.min_ssim:g}", gate.ssim >= gate.min_ssim),
    ]


def _of_bounds(result: LadderResult, bounds: Sequence[float]) -> list[tuple[str, str, str, bool]]:
    return [
        (f"relative RMS of {row.stage}", f"{row.relative_rms:.2e}", f"at most {most:.2e}", row.relative_rms <= most)
        for row, most in _pairs(result, bounds)
    ]


def _charts(result: LadderResult, gate: GateEntry | None) -> dict[str, str]:
    """SVG drawings by what they show."""
    steps = range(1, len(result.x0) + 1)
    least = gate.min_x0_sqnr_db if gate else None
    return {
        "SQNR of x0 in dB, equal inputs": _chart(steps, [row.sqnr_db for row in result.x0], least=least),
        "Relative RMS of the latent, each side on its own": _chart(
            steps, [row.relative_rms for row in result.drift], logarithmic=True
        ),
    }


def _chart(
    steps: Sequence[int], values: Sequence[float], *, least: float | None = None, logarithmic: bool = False
) -> str:
    """A curve over the solver's steps; `least`: the line that it must stay above. Values without a place (infinite, or
    zero on a logarithmic axis) are left out.
    """
    import matplotlib as mpl

    shown = [v if math.isfinite(v) and (v > 0 or not logarithmic) else math.nan for v in values]
    with mpl.rc_context({"svg.hashsalt": "sana-export", "svg.fonttype": "none", "font.size": 9}):
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(5, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, shown, color="#4878a8", marker="o", markersize=3)
        if least is not None:
            axes.axhline(least, color="#c04040", linewidth=1)
        if logarithmic and not all(map(math.isnan, shown)):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    text = file.getvalue()
    return text[text.index("<svg") :]


def _environment() -> Environment:
    """Everything but our own drawings is escaped: prompts and names come from outside."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = _figure
    return environment


def _figure(value: float, how: str) -> str:
    return "equal" if math.isinf(value) else format(value, how)


def _template() -> str:
    return (files("sana_export.parity") / "report.html.j2").read_text(encoding="utf-8")
