"""A contact sheet: one image through every degradation at rising severities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.panels import draw_panels
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.degradations.operations import Image, apply, check_image, names
from qsd_plugin.degradations.resampling import resize

SEVERITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Larger images are shrunk first, in pixels of the longer side.
LONGEST = 160


@dataclass(frozen=True)
class Sheet:
    """A drawn contact sheet.

    Args:
        picture: [H, W, 3] uint8 RGB.
        panels: For each degradation and severity, in reading order, the top left pixel of its panel: row and column.
        panel_size: Height and width of each panel, in pixels.
    """

    picture: Image
    panels: dict[tuple[str, float], tuple[int, int]]
    panel_size: tuple[int, int]

    def panel(self, name: str, severity: float) -> Image:
        """The pixels of one panel, [H, W, 3] uint8."""
        (top, left), (height, width) = self.panels[name, severity], self.panel_size
        return self.picture[top : top + height, left : left + width]


def contact_sheet(
    image: Image,
    *,
    degradations: Sequence[str] | None = None,
    severities: Sequence[float] = SEVERITIES,
    seed: int = 0,
    longest: int = LONGEST,
) -> Sheet:
    """Draw a row for each degradation and a column for each severity.

    A row keeps its random choices (an angle, a place) over all severities. What ``dil_res`` leaves small is enlarged
    with Pillow's bicubic.

    Args:
        image: [H, W, 3] uint8 RGB.
        degradations: Names of the rows; default: all, sorted.
        severities: Of the columns, each in [0, 1].
        seed: Of the random choices.
        longest: Larger images are shrunk to this longer side first, in pixels.

    Raises:
        DataError: Not an image, or too small a one.
        RegistryError: Unknown name.
        ConfigError: Severity outside [0, 1], or nothing to draw.
    """
    check_image(image)
    rows = list(names() if degradations is None else degradations)
    if not rows or not severities:
        raise ConfigError("Contact sheet without panels", remedy="Name at least one degradation and one severity.")
    shrinkage = longest / max(image.shape[:2])
    if shrinkage < 1.0:
        height, width = (max(1, round(side * shrinkage)) for side in image.shape[:2])
        image = resize(image, height, width, "pillow_lanczos")
    height, width = image.shape[:2]
    pictures = {}
    for row, name in enumerate(rows):
        for column, severity in enumerate(severities):
            degraded, _ = apply(name, image, numpy_stream(seed, name), severity)
            if degraded.shape != image.shape:
                degraded = resize(degraded, height, width, "pillow_bicubic")
            pictures[row, column] = degraded
    drawn = draw_panels(pictures, rows=rows, columns=[f"{severity:g}" for severity in severities])
    panels = {(rows[row], severities[column]): place for (row, column), place in drawn.places.items()}
    return Sheet(drawn.picture, panels, drawn.size)
