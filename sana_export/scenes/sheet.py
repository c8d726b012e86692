"""Many pictures on one, each with its prompt."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

# The text is as high as the longest one needs, up to this.
_MOST_LINES: Final = 6
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
    texts = [_lines(entry.text, side) for entry in entries]
    height = max(map(len, texts)) * _LINE_PX
    cells = [_cell(entry, lines, side, height) for entry, lines in zip(entries, texts, strict=True)]
    blank = np.full_like(cells[0], 255)
    cells += [blank] * (-len(cells) % columns)
    return np.concatenate(
        [np.concatenate(cells[start : start + columns], axis=1) for start in range(0, len(cells), columns)]
    )


def _lines(text: str, side: int) -> list[str]:
    return textwrap.wrap(text, width=max(8, side // 7), max_lines=_MOST_LINES, placeholder=" …")


def _cell(entry: SheetEntry, lines: Sequence[str], side: int, text_height: int) -> Pixels:
    from PIL import Image, ImageDraw, ImageFont

    outer = side + 4 * _FRAME_PX
    cell = Image.new("RGB", (outer, outer + text_height), "white")
    draw = ImageDraw.Draw(cell)
    if entry.right is not None:
        edge = outer - _FRAME_PX
        draw.rectangle((_FRAME_PX, _FRAME_PX, edge, edge), fill=_RIGHT if entry.right else _WRONG)
    picture = Image.fromarray(entry.picture).resize((side, side), Image.Resampling.LANCZOS)
    cell.paste(picture, (2 * _FRAME_PX, 2 * _FRAME_PX))
    font = ImageFont.load_default(_FONT_PX)
    draw.multiline_text((2 * _FRAME_PX, outer), "\n".join(lines), fill=_INK, font=font, spacing=2)
    return np.asarray(cell)
