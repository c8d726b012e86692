"""Contact sheets and curves, drawn with Pillow."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from sana_runtime.files import whole_file

_WRAP = 30
_LINE = 11
_PLOT = (420, 240)
_MARGIN = 34


def _save(picture: Image.Image, path: Path) -> None:
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def save_sheet(
    pictures: npt.NDArray[np.uint8], labels: Sequence[str], path: Path, *, columns: int = 8, side: int = 160
) -> None:
    """Pictures [n, H, W, 3] in rows, each over its label; a label that starts with "x " is drawn in red."""
    lines = [_wrapped(label) for label in labels]
    caption = _LINE * max((len(found) for found in lines), default=1) + 6
    rows = max(1, -(-len(pictures) // columns))
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, text) in enumerate(zip(pictures, lines, strict=True)):
        x, y = index % columns * (side + 4), index // columns * (side + caption)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        colour = "red" if text and text[0].startswith("x ") else "black"
        for number, line in enumerate(text):
            draw.text((x, y + side + number * _LINE), line, fill=colour)
    _save(sheet, path)


def _wrapped(text: str) -> list[str]:
    lines = [""]
    for word in text.encode("ascii", "replace").decode().split():
        if len(lines[-1]) + len(word) >= _WRAP:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip() if lines[-1] else word
    return lines


def save_curves(records: Mapping[str, Sequence[Mapping[str, float]]], names: Sequence[str], path: Path) -> None:
    """One row of plots per stage: each of `names` that its records have, over seconds."""
    stages = {stage: rows for stage, rows in records.items() if len(rows) > 1}
    shown = {stage: [name for name in names if name in rows[0]] for stage, rows in stages.items()}
    width = max((len(found) for found in shown.values()), default=1)
    sheet = Image.new("RGB", (width * _PLOT[0], max(len(stages), 1) * _PLOT[1]), "white")
    for row, (stage, rows) in enumerate(stages.items()):
        for column, name in enumerate(shown[stage]):
            points = [(record["seconds"], record[name]) for record in rows]
            sheet.paste(_plot(f"{stage}: {name}", points), (column * _PLOT[0], row * _PLOT[1]))
    _save(sheet, path)


def _plot(title: str, points: Sequence[tuple[float, float]]) -> Image.Image:
    plot = Image.new("RGB", _PLOT, "white")
    draw = ImageDraw.Draw(plot)
    xs, ys = (np.array(values, np.float64) for values in zip(*points, strict=True))
    # The first records are off every scale.
    low, high = float(np.nanmin(ys)), float(np.nanquantile(ys, 0.97))
    high = high if high > low else low + 1
    box = (_MARGIN + 16, 20, _PLOT[0] - 12, _PLOT[1] - 24)
    draw.rectangle(box, outline="gray")
    draw.text((box[0], 4), title, fill="black")
    draw.text((2, box[1]), f"{high:.3g}", fill="black")
    draw.text((2, box[3] - 10), f"{low:.3g}", fill="black")
    draw.text((box[2] - 50, box[3] + 6), f"{xs[-1]:.0f} s", fill="black")
    x = box[0] + (xs - xs[0]) / max(xs[-1] - xs[0], 1e-9) * (box[2] - box[0])
    y = box[3] - (np.clip(ys, low, high) - low) / (high - low) * (box[3] - box[1])
    draw.line([(float(a), float(b)) for a, b in zip(x, y, strict=True)], fill="blue", width=2)
    return plot
