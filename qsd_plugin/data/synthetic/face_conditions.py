"""What differs between two pictures of one synthetic face: pose, expression, light, hair, beard, glasses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qsd_plugin.data.synthetic.face_traits import FaceTraits

HAIRSTYLES = ("short", "fringe", "long", "receding", "cap")
BEARDS = ("none", "stubble", "moustache", "goatee", "full")
GLASSES = ("none", "thin", "thick", "dark")

_BEARD_SHARES = (0.45, 0.25, 0.1, 0.08, 0.12)
_GLASSES_SHARES = (0.78, 0.09, 0.09, 0.04)
#: From this value of the trait on a face sometimes has a beard.
_BEARDED = 0.4


@dataclass(frozen=True)
class Conditions:
    """Of one picture. Angles in radians, lengths in distances between the eyes."""

    yaw: float  # > 0: turned to the right of the picture
    pitch: float  # > 0: looking down
    smile: float  # -0.3 to 1
    mouth: float  # how far it is open, 0 to 1
    brows: float  # how far they are raised, -1 to 1
    lids: float  # opening of the eyes, 1 is neutral
    gaze: tuple[float, float]
    light_azimuth: float  # > 0: from the right
    light_elevation: float
    ambient: float  # share of the light that comes from everywhere
    exposure: float
    cast: tuple[float, float, float]  # factor on each colour
    hairstyle: str
    parting: float  # -1 to 1
    volume: float
    beard: str
    glasses: str
    frame: tuple[float, float]  # half width and half height of a lens


def draw_conditions(generator: np.random.Generator, traits: FaceTraits) -> Conditions:
    """Draw them; every call takes the same number of draws."""
    turn, nod, light, height = np.clip(generator.standard_normal(4), -2.3, 2.3).tolist()
    smiling, opening, brows, lids, gaze_x, gaze_y = generator.uniform(size=6).tolist()
    ambient, exposure, parting, volume, wide, tall = generator.uniform(size=6).tolist()
    cast = (1.0 + np.clip(generator.normal(0.0, 0.035, size=3), -0.08, 0.08)).tolist()
    # Somebody's hair is mostly as it usually is: short, with a fringe or long.
    usual = 0 if traits.hair_length < -0.1 else 1 if traits.hair_length < 0.4 else 2
    other, change = int(generator.integers(len(HAIRSTYLES))), generator.uniform()
    beard, glasses = _choice(generator, _BEARD_SHARES), _choice(generator, _GLASSES_SHARES)
    return Conditions(
        yaw=0.27 * turn,
        pitch=0.13 * nod,
        smile=max(-0.3, 1.5 * smiling - 0.5),
        mouth=max(0.0, 1.6 * opening - 0.6),
        brows=2.0 * brows - 1.0,
        lids=0.12 if lids < 0.03 else 0.7 + 0.5 * lids,
        gaze=(0.12 * gaze_x - 0.06, 0.05 * gaze_y - 0.025),
        light_azimuth=0.75 * light,
        light_elevation=0.45 + 0.35 * height,
        ambient=0.3 + 0.4 * ambient,
        exposure=0.75 + 0.5 * exposure,
        cast=(cast[0], cast[1], cast[2]),
        hairstyle=HAIRSTYLES[other if change < 0.3 else usual],
        parting=2.0 * parting - 1.0,
        volume=0.2 * volume,
        beard=BEARDS[beard] if traits.stubble > _BEARDED else "none",
        glasses=GLASSES[glasses],
        frame=(0.31 + 0.09 * wide, 0.2 + 0.12 * tall),
    )


def rotation(yaw: float, pitch: float) -> npt.NDArray[np.float64]:
    """Matrix [3, 3] that turns a point of the face as the head is turned."""
    cos, sin, up, over = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    turn = np.array([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])
    nod = np.array([[1.0, 0.0, 0.0], [0.0, up, over], [0.0, -over, up]])
    return np.asarray(nod @ turn)


def _choice(generator: np.random.Generator, shares: tuple[float, ...]) -> int:
    return int(np.searchsorted(np.cumsum(shares), generator.uniform(), side="right"))
