"""A sheet of small pictures in rows and columns, with text beside the rows and above the columns."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.files import write_atomically

Picture = NDArray[np.uint8]

_GAP = 6
_HEADING = 12  # height of a line of text, pixels
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


@dataclass(frozen=True)
class Panels:
    """A drawn sheet.

    Args:
        picture: [H, W, 3] uint8 RGB.
        places: Top left pixel of every panel by its row and column, in reading order: (top, left).
        size: Height and width of each panel, in pixels.
    """

    picture: Picture
    places: dict[tuple[int, int], tuple[int, int]]
    size: tuple[int, int]

    def panel(self, row: int, column: int) -> Picture:
        """The pixels of one panel, [h, w, 3] uint8."""
        (top, left), (height, width) = self.places[row, column], self.size
        return self.picture[top : top + height, left : left + width]

    def save(self, path: Path) -> None:
        """Write the picture as a PNG."""
        save_png(self.picture, path)


def save_png(picture: Picture, path: Path) -> None:
    """Write a picture, [H, W, 3] uint8 RGB."""
    packed = io.BytesIO()
    PILImage.fromarray(picture).save(packed, format="PNG")
    write_atomically(path, packed.getvalue())


def draw_panels(pictures: Mapping[tuple[int, int], Picture], *, rows: Sequence[str], columns: Sequence[str]) -> Panels:
    """Draw pictures in a grid.

    Args:
        pictures: By row and column, [h, w, 3] uint8 RGB each, all of one size; a place without a picture stays empty.
        rows: Text to the left of each row.
        columns: Text above each column; all empty: no line for it.

    Raises:
        DataError: No pictures, or of several sizes.
    """
    sizes = {picture.shape[:2] for picture in pictures.values()}
    if len(sizes) != 1:
        raise DataError("Pictures of a sheet", value=sorted(sizes), expected="at least one, and all of one size")
    height, width = sizes.pop()
    font = ImageFont.load_default()
    margin = 2 * _GAP + max(round(font.getlength(text)) for text in rows)
    head = 2 * _GAP + _HEADING if any(columns) else _GAP
    step = max(width, *(round(font.getlength(text)) for text in columns)) + _GAP
    paper = PILImage.new("RGB", (margin + len(columns) * step, head + len(rows) * (height + _GAP)), _PAPER)
    pen = ImageDraw.Draw(paper)
    for column, text in enumerate(columns):
        pen.text((margin + column * step + width / 2, head / 2), text, _INK, font, anchor="mm")
    for row, text in enumerate(rows):
        pen.text((margin - _GAP, head + row * (height + _GAP) + height / 2), text, _INK, font, anchor="rm")
    places = {}
    for row, column in sorted(pictures):
        places[row, column] = (head + row * (height + _GAP), margin + column * step)
        paper.paste(PILImage.fromarray(pictures[row, column]), places[row, column][::-1])
    return Panels(np.array(paper, dtype=np.uint8), places, (height, width))
