"""What tells one synthetic face from another: some fifty lengths and tones, each from a distribution of its own.

Lengths are shares of the average distance between the eyes. The origin lies between the eyes; x grows to the right of
a picture, y downwards, z towards the camera, from the plane of the ears.

No trait is a giveaway: skin and hair vary less between most people than light and camera make them vary between two
pictures of one person, so a face has to be told by its geometry and by the marks on its skin.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

#: Draws further than this many spreads from the mean are cut off.
_REACH = 2.3


def _trait(mean: float, spread: float) -> Any:
    return field(metadata={"mean": mean, "spread": spread})


@dataclass(frozen=True)
class FaceTraits:
    """One face. Widths named ``*_width`` are half widths; ``*_height`` are places along y, ``*_depth`` lie along z."""

    # Outline, from the crown to the chin.
    forehead_width: float = _trait(0.98, 0.05)
    cheek_width: float = _trait(1.06, 0.05)
    jaw_width: float = _trait(0.88, 0.065)
    chin_width: float = _trait(0.42, 0.07)
    chin_height: float = _trait(1.86, 0.08)
    # Profile.
    head_depth: float = _trait(1.25, 0.06)
    forehead_slope: float = _trait(0.07, 0.04)
    chin_depth: float = _trait(0.0, 0.05)
    brow_ridge: float = _trait(0.05, 0.025)
    cheekbone: float = _trait(0.09, 0.035)
    cheekbone_height: float = _trait(0.45, 0.06)
    cheek_hollow: float = _trait(0.05, 0.035)
    chin_ball: float = _trait(0.08, 0.03)
    # Eyes.
    eye_distance: float = _trait(1.0, 0.05)
    eye_width: float = _trait(0.26, 0.022)
    eye_opening: float = _trait(0.098, 0.017)
    eye_tilt: float = _trait(0.0, 0.07)
    eye_depth: float = _trait(0.11, 0.03)
    lid_fold: float = _trait(0.085, 0.03)
    iris_radius: float = _trait(0.105, 0.006)
    iris_light: float = _trait(0.3, 0.2)
    iris_blue: float = _trait(0.35, 0.25)
    eye_shadow: float = _trait(0.12, 0.06)
    # Brows.
    brow_height: float = _trait(-0.34, 0.045)
    brow_width: float = _trait(0.31, 0.035)
    brow_thickness: float = _trait(0.05, 0.013)
    brow_arch: float = _trait(0.05, 0.03)
    brow_tilt: float = _trait(-0.01, 0.035)
    brow_darkness: float = _trait(0.65, 0.15)
    # Nose.
    nose_length: float = _trait(0.62, 0.06)
    nose_bridge: float = _trait(0.15, 0.04)
    nose_tip: float = _trait(0.35, 0.05)
    nose_hump: float = _trait(0.0, 0.025)
    bridge_width: float = _trait(0.12, 0.018)
    tip_width: float = _trait(0.17, 0.025)
    nostril_width: float = _trait(0.215, 0.028)
    # Mouth.
    mouth_height: float = _trait(1.17, 0.055)
    mouth_width: float = _trait(0.41, 0.045)
    upper_lip: float = _trait(0.075, 0.02)
    lower_lip: float = _trait(0.105, 0.024)
    cupid_bow: float = _trait(0.022, 0.01)
    mouth_tilt: float = _trait(0.0, 0.02)
    lip_red: float = _trait(0.45, 0.15)
    cheek_fold: float = _trait(0.025, 0.015)
    # Skin and hair. ``melanin`` and ``hair_tone`` are cut off at 0 and 1.
    melanin: float = _trait(0.36, 0.22)
    redness: float = _trait(0.0, 0.5)
    freckles: float = _trait(-0.3, 0.5)
    hair_tone: float = _trait(0.25, 0.2)
    hair_red: float = _trait(0.0, 0.4)
    hairline_height: float = _trait(-1.0, 0.09)
    hairline_arch: float = _trait(0.18, 0.09)
    stubble: float = _trait(0.1, 0.5)
    hair_length: float = _trait(0.0, 1.0)


def draw_traits(generator: np.random.Generator) -> FaceTraits:
    """Draw a face; every call takes the same number of draws."""
    deviations = np.clip(generator.standard_normal(len(fields(FaceTraits))), -_REACH, _REACH).tolist()
    return FaceTraits(
        **{
            entry.name: entry.metadata["mean"] + entry.metadata["spread"] * deviation
            for entry, deviation in zip(fields(FaceTraits), deviations, strict=True)
        }
    )


def mean_face() -> FaceTraits:
    """The face in the middle of all distributions."""
    return FaceTraits(**{entry.name: entry.metadata["mean"] for entry in fields(FaceTraits)})
