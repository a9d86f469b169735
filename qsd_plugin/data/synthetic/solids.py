"""A very small software renderer: shaded, textured tubes and balls in orthographic view, far ones painted first.

Axes of the screen: x to the right, y down, both in pixels; depth grows towards the camera. An *azimuth* is an angle
around a solid's long axis, 0 at the wearer's front and positive towards the wearer's left, so that a print stays on the
chest when its wearer turns. Paints map (azimuth, along) arrays [n] to RGB levels [n, 3].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Places = tuple[npt.NDArray[np.intp], ...]
Paint = Callable[[Floats, Floats], Floats]
Point = tuple[float, float]

#: Share of the light that reaches a surface from everywhere.
AMBIENT = 0.62


@dataclass(frozen=True)
class Tube:
    """A round tube along a straight axis. ``radii`` are its on-screen radii at the ``knots`` in [0, 1] of the axis."""

    start: Point
    end: Point
    radii: Sequence[float]
    paint: Paint
    knots: Sequence[float] = (0.0, 1.0)
    round_ends: bool = True


@dataclass(frozen=True)
class Ball:
    """An ellipse on screen; ``power`` 2 is round, 4 a box with round corners. ``along`` is -1 at the top, 1 below."""

    centre: Point
    radii: Point
    paint: Paint
    power: float = 2.0


class Canvas:
    """A picture in the making: ``pixels`` [height, width, 4] are RGB levels and coverage (0 or 1).

    Args:
        light: Unit vector towards the light: right, down, towards the camera.
    """

    def __init__(self, height: int, width: int, light: tuple[float, float, float]) -> None:
        self.pixels = np.zeros((height, width, 4), dtype=np.float32)
        self.light = light

    def paint(self, solid: Tube | Ball, facing: float) -> None:
        """Paint ``solid``, whose wearer is turned by ``facing`` radians (0: towards the camera), over the canvas."""
        if isinstance(solid, Tube):
            self._tube(solid, facing)
        else:
            self._ball(solid, facing)

    def _tube(self, tube: Tube, facing: float) -> None:
        (x0, y0), (x1, y1) = tube.start, tube.end
        reach = max(tube.radii)
        rows, columns = self._grid(min(x0, x1) - reach, max(x0, x1) + reach, min(y0, y1) - reach, max(y0, y1) + reach)
        length = max(float(np.hypot(x1 - x0, y1 - y0)), 1e-3)
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        dx, dy = columns - x0, rows - y0
        along = (dx * ux + dy * uy) / length
        inner = np.clip(along, 0.0, 1.0)
        radius = np.interp(inner, tube.knots, tube.radii).astype(np.float32)
        # A tube pointing down has its positive side on the right of the screen.
        across = (dx * uy - dy * ux) / radius
        beyond = (along - inner) * length / radius
        inside = across**2 + beyond**2 < 1.0 if tube.round_ends else (np.abs(across) < 1.0) & (along == inner)
        at = np.nonzero(inside)
        across, beyond = across[at], beyond[at]
        towards = np.sqrt(np.maximum(0.0, 1.0 - across**2 - beyond**2))
        colour = tube.paint(_wrap(np.arctan2(across, towards) - facing), inner[at])
        self._cover(rows, columns, at, colour, (across * uy + beyond * ux, beyond * uy - across * ux, towards))

    def _ball(self, ball: Ball, facing: float) -> None:
        (x, y), (rx, ry) = ball.centre, ball.radii
        rows, columns = self._grid(x - rx, x + rx, y - ry, y + ry)
        dx, dy = (columns - x) / rx, (rows - y) / ry
        at = np.nonzero(np.abs(dx) ** ball.power + np.abs(dy) ** ball.power < 1.0)
        dx, dy = dx[0, at[1]], dy[at[0], 0]
        towards = np.sqrt(np.maximum(0.05, 1.0 - dx**2 - dy**2))
        colour = ball.paint(_wrap(np.arctan2(dx, towards) - facing), dy)
        self._cover(rows, columns, at, colour, (dx, dy, towards))

    def _grid(self, left: float, right: float, top: float, bottom: float) -> tuple[Floats, Floats]:
        """Rows [h, 1] and columns [1, w] of the canvas that a box touches."""
        height, width, _ = self.pixels.shape
        rows = np.arange(max(0, int(top)), min(height, int(bottom) + 2), dtype=np.float32)
        columns = np.arange(max(0, int(left)), min(width, int(right) + 2), dtype=np.float32)
        return rows[:, None], columns[None, :]

    def _cover(
        self, rows: Floats, columns: Floats, at: Places, colour: Floats, normal: tuple[Floats, Floats, Floats]
    ) -> None:
        """Shade ``colour`` and put it at the places ``at`` of a grid."""
        if not at[0].size:
            return
        right, down, towards = normal
        lit = right * self.light[0] + down * self.light[1] + towards * self.light[2]
        shade = AMBIENT + (1.0 - AMBIENT) * 1.25 * np.maximum(0.0, lit)
        painted = np.ones((at[0].size, 4), dtype=np.float32)
        painted[:, :3] = colour * shade[:, None]
        self.pixels[at[0] + int(rows[0, 0]), at[1] + int(columns[0, 0])] = painted


def _wrap(angle: Floats) -> Floats:
    return ((angle + np.pi) % (2.0 * np.pi) - np.pi).astype(np.float32, copy=False)
