"""What a pedestrian's surface looks like: paints for clothes, straps and heads, fixed to the body as it turns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qsd_plugin.data.synthetic.appearance import Appearance, Colour
from qsd_plugin.data.synthetic.solids import Floats, Paint


def plain(colour: Colour) -> Paint:
    """One colour everywhere."""
    level = np.asarray(colour, dtype=np.float32)
    return lambda azimuth, _along: np.broadcast_to(level, (*azimuth.shape, 3))


def _two(first: Colour, second: Colour, chosen: npt.NDArray[np.bool_]) -> Floats:
    """``second`` where ``chosen``, else ``first``."""
    return np.asarray([first, second], dtype=np.float32)[chosen.astype(np.intp)]


def _over(colour: Floats, other: Colour, chosen: npt.NDArray[np.bool_]) -> Floats:
    """``colour`` with ``other`` where ``chosen``."""
    return np.where(chosen[:, None], np.asarray(other, dtype=np.float32), colour)


def top_paint(person: Appearance) -> Paint:
    """Pattern, then what lies over it: backpack straps, or the strap of a shoulder bag."""

    def paint(azimuth: Floats, along: Floats) -> Floats:
        front = np.abs(azimuth)
        colour = _two(person.top, person.top_second, _pattern(person.pattern, person.pattern_scale, azimuth, along))
        strap = np.zeros(azimuth.shape, dtype=np.bool_)
        if person.carried == "backpack":
            strap = (np.abs(front - 0.62) < 0.13) & (along < 0.62)
        elif person.carried == "shoulder bag":
            # From one shoulder down to the opposite hip, on the chest and on the back.
            across = person.carried_side * np.sin(azimuth)
            strap = np.abs(across - (0.6 - 1.5 * along)) < 0.11
        return _over(colour, person.carried_colour, strap)

    return paint


def _pattern(name: str, scale: float, azimuth: Floats, along: Floats) -> npt.NDArray[np.bool_]:
    """Where the second colour of a top is; ``along`` runs from the neck to the hem."""
    front = np.abs(azimuth)
    chosen: npt.NDArray[np.bool_] = np.zeros(azimuth.shape, dtype=np.bool_)
    if name == "hoops":
        chosen = np.sin(along * 22.0 / scale) > 0.2
    elif name == "stripes":
        chosen = np.sin(azimuth * 7.0 / scale) > 0.3
    elif name == "checks":
        chosen = (np.sin(along * 20.0 / scale) > 0.0) ^ (np.sin(azimuth * 6.0 / scale) > 0.0)
    elif name == "block":
        chosen = along > 0.38 * scale
    elif name == "print":
        chosen = (front < 0.5 * scale) & (np.abs(along - 0.32) < 0.12 * scale)
    elif name == "open":
        chosen = front < 0.1 + 0.35 * scale * (1.0 - 0.5 * along)
    return chosen


def sleeve_paint(person: Appearance) -> Paint:
    """Sleeves repeat hoops and checks; every other pattern leaves them plain."""

    def paint(azimuth: Floats, along: Floats) -> Floats:
        ringed = person.pattern in ("hoops", "checks")
        return _two(person.top, person.top_second, ringed & (np.sin(along * 9.0 / person.pattern_scale) > 0.2))

    return paint


def legwear_paint(person: Appearance) -> Paint:
    """Trousers, shorts or a skirt, with or without a white stripe down the seam."""

    def paint(azimuth: Floats, along: Floats) -> Floats:
        seam = person.side_stripe & (np.abs(np.abs(azimuth) - np.pi / 2) < 0.35)
        return _two(person.bottom, (215.0, 215.0, 212.0), seam)

    return paint


def head_paint(person: Appearance) -> Paint:
    """Face and eyes in front, hair on top and behind down to the nape, a hat over it."""

    def paint(azimuth: Floats, along: Floats) -> Floats:
        front = np.abs(azimuth)
        nape = {"long": 0.9, "short": 0.25, "bun": 0.3, "bald": -1.0}[person.hairstyle]
        hairy = ((along < -0.5) | (front > 1.15)) & (along < nape)
        colour = _two(person.skin, person.hair, hairy)
        eyes = (np.abs(front - 0.42) < 0.16) & (np.abs(along + 0.08) < 0.09)
        colour = _over(colour, (45.0, 45.0, 45.0), eyes)
        hat = (along < -0.28) & (person.headwear != "none")
        return _over(colour, person.headwear_colour, hat)

    return paint
