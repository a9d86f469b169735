"""What tells one synthetic pedestrian from another: clothes, hair, skin, build and what is carried.

The palettes are small and skewed towards black, grey and blue, as streets are, so many people share their main colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Colour = tuple[float, float, float]

# RGB levels and how often they are worn.
_TOPS: dict[Colour, float] = {
    (28, 28, 32): 5,  # black
    (120, 122, 126): 4,  # grey
    (225, 224, 220): 5,  # white
    (36, 46, 84): 3,  # navy
    (168, 40, 44): 2,  # red
    (70, 110, 170): 2,  # blue
    (64, 100, 66): 1.5,  # green
    (214, 180, 70): 1,  # yellow
    (208, 140, 160): 1.5,  # pink
    (140, 104, 76): 1.5,  # brown
}
_BOTTOMS: dict[Colour, float] = {
    (30, 30, 34): 5,
    (46, 60, 96): 5,  # denim
    (96, 116, 150): 2,  # washed denim
    (110, 108, 104): 2,
    (176, 158, 126): 2,  # khaki
    (205, 200, 192): 1,
    (120, 54, 54): 0.7,
}
_SHOES: dict[Colour, float] = {
    (26, 26, 28): 4,
    (220, 220, 218): 3,
    (110, 74, 50): 2,
    (150, 44, 48): 1,
    (70, 90, 140): 1,
}
_BAGS: dict[Colour, float] = {
    (30, 30, 34): 3,
    (120, 84, 56): 2,
    (150, 40, 46): 1,
    (60, 80, 130): 1.5,
    (200, 186, 150): 1,
}
_HAIR: dict[Colour, float] = {(24, 20, 18): 5, (62, 42, 30): 4, (120, 84, 50): 2, (186, 150, 96): 1, (150, 148, 146): 1}
_SKIN: dict[Colour, float] = {(236, 200, 176): 3, (214, 168, 136): 3, (172, 122, 90): 2, (110, 74, 54): 2}

# Choices and how often they occur.
_PATTERNS = {"plain": 5.0, "hoops": 1.5, "stripes": 1.0, "checks": 1.2, "block": 1.2, "print": 2.0, "open": 2.0}
_SLEEVES = {"long": 4.0, "short": 4.0, "none": 0.7}
_CUTS = {"waist": 4.0, "hip": 3.0, "coat": 1.2}
_LEGWEAR = {"trousers": 5.0, "shorts": 1.6, "skirt": 1.4, "long skirt": 0.7}
_HAIRSTYLES = {"short": 4.0, "long": 2.5, "bun": 1.0, "bald": 0.6}
_HEADWEAR = {"none": 6.0, "cap": 1.2, "beanie": 0.8}
_CARRIED = {"nothing": 3.5, "backpack": 2.5, "shoulder bag": 1.6, "handbag": 1.2}


@dataclass(frozen=True)
class Appearance:
    """One pedestrian. Colours are RGB levels; lengths of the build are factors on an average body."""

    skin: Colour
    hair: Colour
    hairstyle: str
    headwear: str
    headwear_colour: Colour
    top: Colour
    top_second: Colour
    pattern: str
    pattern_scale: float
    sleeves: str
    cut: str
    bottom: Colour
    legwear: str
    side_stripe: bool
    shoes: Colour
    carried: str
    carried_colour: Colour
    carried_side: int  # +1: the person's left, -1: right
    height: float
    girth: float
    shoulders: float
    legs: float
    stoop: float  # forward lean of the trunk, in radians


def draw_appearance(generator: np.random.Generator) -> Appearance:
    """Draw a pedestrian; every call takes the same number of draws."""
    return Appearance(
        skin=_colour(generator, _SKIN, spread=5.0),
        hair=_colour(generator, _HAIR, spread=6.0),
        hairstyle=_choice(generator, _HAIRSTYLES),
        headwear=_choice(generator, _HEADWEAR),
        headwear_colour=_colour(generator, _TOPS),
        top=_colour(generator, _TOPS),
        top_second=_colour(generator, _TOPS),
        pattern=_choice(generator, _PATTERNS),
        pattern_scale=float(generator.uniform(0.7, 1.5)),
        sleeves=_choice(generator, _SLEEVES),
        cut=_choice(generator, _CUTS),
        bottom=_colour(generator, _BOTTOMS),
        legwear=_choice(generator, _LEGWEAR),
        side_stripe=bool(generator.uniform() < 0.12),
        shoes=_colour(generator, _SHOES),
        carried=_choice(generator, _CARRIED),
        carried_colour=_colour(generator, _BAGS),
        carried_side=1 if generator.uniform() < 0.5 else -1,
        height=float(generator.uniform(0.92, 1.06)),
        girth=float(generator.uniform(0.82, 1.3)),
        shoulders=float(generator.uniform(0.9, 1.12)),
        legs=float(generator.uniform(0.93, 1.06)),
        stoop=float(generator.uniform(0.0, 0.1)),
    )


def _choice(generator: np.random.Generator, weights: dict[str, float]) -> str:
    return list(weights)[_weighted(generator, list(weights.values()))]


def _colour(generator: np.random.Generator, palette: dict[Colour, float], spread: float = 8.0) -> Colour:
    base = list(palette)[_weighted(generator, list(palette.values()))]
    red, green, blue = np.clip(np.asarray(base) + generator.normal(0.0, spread, size=3), 8.0, 245.0).tolist()
    return red, green, blue


def _weighted(generator: np.random.Generator, weights: Sequence[float]) -> int:
    shares = np.cumsum(weights)
    return int(np.searchsorted(shares, generator.uniform(0.0, shares[-1]), side="right"))
