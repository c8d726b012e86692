"""A contact sheet shows every picture, whether it is right, and all of its prompt."""

import numpy as np

from sana_export.scenes.sheet import SheetEntry, contact_sheet

SIDE = 64
OUTER = SIDE + 16
LINE = 16


def entry(text: str = "a ring", right: bool | None = None, level: int = 90) -> SheetEntry:
    return SheetEntry(np.full((32, 32, 3), level, np.uint8), text, right)


def test_pictures_stand_row_by_row_in_their_frames() -> None:
    sheet = contact_sheet([entry(right=True, level=10), entry(right=False, level=20), entry(level=30)], 2, SIDE)
    height = OUTER + LINE
    assert sheet.shape == (2 * height, 2 * OUTER, 3)
    corners = [(0, 0), (0, OUTER), (height, 0), (height, OUTER)]
    assert [sheet[top + OUTER // 2, left + OUTER // 2, 0] for top, left in corners] == [10, 20, 30, 255]
    green, red, none, blank = (sheet[top + 5, left + OUTER // 2].astype(int) for top, left in corners)
    assert green[1] - green[0] > 80
    assert red[0] - red[1] > 80
    assert (none == 255).all()
    assert (blank == 255).all()


def test_text_is_as_high_as_the_longest_one_needs() -> None:
    """At this side a line holds nine characters."""
    sheet = contact_sheet([entry("one line"), entry("one two, three, four five")], 2, SIDE)
    assert sheet.shape[0] == OUTER + 3 * LINE
    third = sheet[OUTER + 2 * LINE :]
    assert (third[:, :OUTER] == 255).all()
    assert (third[:, OUTER:] < 128).any(), "the third line is drawn"
