"""Many pictures on one, each with its prompt."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

_TEXT_LINES: Final = 3
_FONT_PX: Final = 13
_LINE_PX: Final = 16
_FRAME_PX: Final = 4
_RIGHT: Final = (46, 158, 70)
_WRONG: Final = (214, 38, 38)
_INK: Final = (40, 40, 40)


@dataclass(frozen=True)
class SheetEntry:
    """`picture` [H, W, 3] uint8. `right`: colours the frame; None draws none."""

    picture: Pixels
    text: str
    right: bool | None = None


def contact_sheet(entries: Sequence[SheetEntry], columns: int = 5, side: int = 224) -> Pixels:
    """A sheet [H, W, 3] uint8 of pictures scaled to `side`, row by row, a green or red frame around judged ones."""
    columns = min(columns, len(entries))
    cells = [_cell(entry, side) for entry in entries]
    blank = np.full_like(cells[0], 255)
    cells += [blank] * (-len(cells) % columns)
    return np.concatenate(
        [np.concatenate(cells[start : start + columns], axis=1) for start in range(0, len(cells), columns)]
    )


def _cell(entry: SheetEntry, side: int) -> Pixels:
    from PIL import Image, ImageDraw, ImageFont

    outer = side + 4 * _FRAME_PX
    cell = Image.new("RGB", (outer, outer + _TEXT_LINES * _LINE_PX), "white")
    draw = ImageDraw.Draw(cell)
    if entry.right is not None:
        edge = outer - _FRAME_PX
        draw.rectangle((_FRAME_PX, _FRAME_PX, edge, edge), fill=_RIGHT if entry.right else _WRONG)
    picture = Image.fromarray(entry.picture).resize((side, side), Image.Resampling.LANCZOS)
    cell.paste(picture, (2 * _FRAME_PX, 2 * _FRAME_PX))
    lines = textwrap.wrap(entry.text, width=max(8, side // 7), max_lines=_TEXT_LINES, placeholder=" …")
    font = ImageFont.load_default(_FONT_PX)
    draw.multiline_text((2 * _FRAME_PX, outer), "\n".join(lines), fill=_INK, font=font, spacing=2)
    return np.asarray(cell)
