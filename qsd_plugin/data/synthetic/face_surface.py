"""A face's surface, seen straight on: height, normals and skin on one grid, made once per identity.

Units and axes: :mod:`~qsd_plugin.data.synthetic.face_traits`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.interpolate import PchipInterpolator

from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.synthetic.face_traits import FaceTraits, draw_traits
from qsd_plugin.data.synthetic.solids import Floats

#: The grid: left and top end, right and bottom end, cells per unit.
LEFT, TOP, RIGHT, BOTTOM = -1.5, -2.05, 1.5, 2.15
PITCH = 48.0

#: Height of what is not face.
NOWHERE = -0.6

#: Skin from the lightest to the darkest, RGB levels.
_SKIN_TONES = np.array([[238, 203, 184], [222, 178, 150], [190, 140, 108], [142, 96, 70], [96, 64, 48]], np.float32)
_HAIR_TONES = np.array([[22, 18, 17], [58, 40, 30], [104, 74, 48], [158, 124, 80], [196, 172, 128]], np.float32)


@dataclass(frozen=True, eq=False)
class Surface:
    """One face, without expression.

    Attributes:
        traits: What it was made from.
        height: z, [H, W]; :data:`NOWHERE` outside the outline.
        place: [H, W, 2]: where on a symmetric face without expression the cell lies, which what is not skin is painted
            by.
        colour: [H, W, 3]: RGB levels of the skin with brows and lips.
        normal: [H, W, 3].
        landmarks: [5, 3]: eyes, tip of the nose, mouth corners, those on the left of a picture first.
        ears: [2, 3].
        hair: RGB levels [3] of the hair.
        skin: RGB levels [3], the mean of the skin.
    """

    traits: FaceTraits
    height: Floats
    place: Floats
    colour: Floats
    normal: Floats
    landmarks: Floats
    ears: Floats
    hair: Floats
    skin: Floats


def edge(distance: Floats, softness: float = 0.03) -> Floats:
    """Coverage of a shape, 1 inside: ``distance`` is negative there."""
    return np.asarray(np.clip(0.5 - distance / softness, 0.0, 1.0))


def bump(x: Floats, y: Floats, width: float, height: float) -> Floats:
    """A Gaussian hill of height 1."""
    return np.exp(-((x / width) ** 2) - (y / height) ** 2)


@functools.lru_cache(maxsize=8)
def surface(seed: int, identity: int) -> Surface:
    """The face of an identity; depends on nothing else."""
    generator = numpy_stream(seed, "face", identity)
    return make_surface(draw_traits(generator), generator)


def make_surface(traits: FaceTraits, generator: np.random.Generator) -> Surface:
    """The surface of a face.

    Args:
        traits: Its measures.
        generator: Of its asymmetry and of the marks on its skin.
    """
    rows = np.arange(TOP, BOTTOM, 1.0 / PITCH, dtype=np.float32)[:, None]
    columns = np.arange(LEFT, RIGHT, 1.0 / PITCH, dtype=np.float32)[None, :]
    # No face is symmetric: its grid is bent a little, smoothly.
    bends = [0.018 * smooth_noise(generator, (7, 6), (rows.size, columns.size)) for _ in range(2)]
    x, y = (columns + bends[0]).astype(np.float32), (rows + bends[1]).astype(np.float32)
    height = _height(traits, x, y)
    inside = height > NOWHERE
    smooth = cv2.GaussianBlur(np.where(inside, height, 0.0).astype(np.float32), (0, 0), 1.2)
    slope_y, slope_x = np.gradient(smooth, 1.0 / PITCH)
    normal = np.stack([-slope_x, -slope_y, np.ones_like(smooth)], axis=2)
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    skin, hair = _tone(_SKIN_TONES, traits.melanin), _tone(_HAIR_TONES, traits.hair_tone)
    skin = skin * (1.0 + 0.025 * traits.redness * np.array([1.0, -0.8, -0.6], np.float32))
    hair = hair * (1.0 + 0.12 * traits.hair_red * np.array([1.0, -0.2, -0.6], np.float32))
    colour = _skin(traits, x, y, skin, hair, generator)

    marks = _landmarks(traits)
    for bend, axis in zip(bends, (0, 1), strict=True):
        marks[:, axis] -= _sample(bend, marks[:, 0], marks[:, 1])
    marks[:, 2] = _sample(height, marks[:, 0], marks[:, 1])
    return Surface(
        traits=traits,
        height=height,
        place=np.dstack([x, y]),
        colour=colour,
        normal=normal.astype(np.float32),
        landmarks=marks,
        ears=np.array([[side * (traits.cheek_width + 0.01), 0.32, -0.08] for side in (-1.0, 1.0)]),
        hair=hair,
        skin=skin,
    )


def _height(traits: FaceTraits, x: Floats, y: Floats) -> Floats:
    t = traits
    chin = t.chin_height
    width = PchipInterpolator(
        [-2.0, -1.85, -1.45, -0.8, 0.35, 1.15, chin - 0.2, chin - 0.04, chin + 0.02],
        [0.1, 0.42, 0.84, t.forehead_width, t.cheek_width, t.jaw_width, t.chin_width, 0.6 * t.chin_width, 0.05],
    )
    depth = PchipInterpolator(
        [-2.0, -1.4, -0.8, -0.3, 0.0, 0.6, 1.1, chin - 0.2, chin + 0.02],
        [0.3, 0.78 - t.forehead_slope, 0.95 - t.forehead_slope, 1.0, 0.96, 1.0, 1.03, 1.0 + t.chin_depth, 0.8],
    )
    reach = np.clip(y, -2.0, chin + 0.02)
    across = np.abs(x) / width(reach)
    height = t.head_depth * depth(reach) * np.maximum(0.0, 1.0 - across**2.3) ** 0.55
    side = np.abs(x)
    eye = side - t.eye_distance / 2
    height += t.brow_ridge * bump(side - 0.35, y + 0.3, 0.45, 0.11)
    height -= t.eye_depth * bump(eye, y - 0.01, 0.3, 0.2)
    height += 0.07 * bump(eye, y, 0.2, 0.13)
    height += t.cheekbone * bump(side - 0.62, y - t.cheekbone_height, 0.28, 0.24)
    height -= t.cheek_hollow * bump(side - 0.6, y - 1.02, 0.25, 0.3)
    height += _nose(t, x, y)
    mouth = y - t.mouth_height
    height += 0.06 * bump(x, mouth, 0.45, 0.22)
    height += 0.5 * t.upper_lip * bump(x, mouth + 0.6 * t.upper_lip, t.mouth_width, 0.08)
    height += 0.6 * t.lower_lip * bump(x, mouth - 0.7 * t.lower_lip, 0.8 * t.mouth_width, 0.09)
    height -= 0.035 * bump(x, mouth, t.mouth_width, 0.03)
    height -= 0.04 * bump(x, mouth - 0.25, 0.3, 0.08)
    height += t.chin_ball * bump(x, y - chin + 0.32, 0.26, 0.2)
    height -= t.cheek_fold * _cheek_fold(t, side, y)
    outside = (across >= 1.0) | (y > chin + 0.02) | (y < -2.0)
    return np.where(outside, NOWHERE, height).astype(np.float32)


def _nose(t: FaceTraits, x: Floats, y: Floats) -> Floats:
    along = np.clip(y / t.nose_length, -0.35, 1.0)
    ridge = np.interp(along, [-0.35, 0.0, 0.9, 1.0], [0.0, t.nose_bridge, t.nose_tip, t.nose_tip])
    ridge += t.nose_hump * bump(along - 0.45, 0.0 * y, 0.25, 1.0)
    below = np.clip((y - t.nose_length) / 0.17, 0.0, 1.0)
    ridge = ridge * (1.0 - below) ** 1.5
    width = t.bridge_width + (t.tip_width - t.bridge_width) * np.clip(along, 0.0, 1.0) ** 2
    wings = 0.14 * bump(np.abs(x) - 0.75 * t.nostril_width, y - t.nose_length - 0.03, 0.3 * t.nostril_width, 0.1)
    return np.asarray(ridge * np.exp(-((x / width) ** 2)) + wings)


def _cheek_fold(t: FaceTraits, side: Floats, y: Floats) -> Floats:
    """The line from the nostril to beside the mouth corner."""
    down = (y - t.nose_length) / (t.mouth_height - t.nose_length)
    line = t.nostril_width + 0.04 + (t.mouth_width + 0.08 - t.nostril_width) * np.clip(down, 0.0, 1.1) ** 0.8
    return bump(side - line, 0.9 * (down - 0.5), 0.05, 0.55)


def _skin(t: FaceTraits, x: Floats, y: Floats, skin: Floats, hair: Floats, generator: np.random.Generator) -> Floats:
    shape = (y.shape[0], x.shape[1])
    side = np.abs(x)
    mottled = 0.03 * smooth_noise(generator, (26, 19), shape) + 0.02 * smooth_noise(generator, (70, 50), shape)
    spots = smooth_noise(generator, (100, 72), shape) - 1.6 + 0.8 * t.freckles
    freckled = np.clip(0.5 * spots, 0.0, 0.3) * bump(x, y - 0.4, 0.8, 0.4)
    flush = 0.05 * (1.0 + t.redness) * (bump(side - 0.6, y - 0.55, 0.3, 0.28) + bump(x, y - t.nose_length, 0.2, 0.2))
    shadow = t.eye_shadow * bump(side - t.eye_distance / 2, y - 0.2, 0.25, 0.08)
    level = 1.0 + mottled - freckled - shadow - t.cheek_fold * 3.0 * _cheek_fold(t, side, y)
    level = level - 0.12 * bump(x, y - t.nose_length - 0.16, 0.2, 0.05)
    tint = np.dstack([1.0 + 0.4 * flush, 1.0 - flush, 1.0 - flush])
    colour = skin * level[:, :, None] * tint
    # Moles lie where they lie: the one mark that no pose, light or expression takes away.
    for _ in range(int(generator.poisson(1.5))):
        place_x, place_y = generator.uniform(-0.8, 0.8), generator.uniform(-0.75, 1.5)
        size, dark = generator.uniform(0.018, 0.04), generator.uniform(0.3, 0.6)
        colour = colour * (1.0 - dark * bump(x - place_x, y - place_y, size, size))[:, :, None]
    colour = mix(colour, 0.25 * skin, 0.75 * _nostrils(t, x, y))
    lips, gap = _lips(t, x, y)
    red = (1.0 - t.lip_red) * skin + t.lip_red * (0.35 * skin + np.array([95.0, 25.0, 32.0]))
    colour = mix(colour, red * np.array([0.94, 0.82, 0.84]), 0.85 * lips)
    colour = mix(colour, 0.35 * skin, 0.8 * gap)
    strands = 0.85 + 0.15 * smooth_noise(generator, (60, 60), shape)
    return mix(colour, 0.8 * hair, np.clip(t.brow_darkness * strands, 0.0, 1.0) * _brows(t, x, y)).astype(np.float32)


def _nostrils(t: FaceTraits, x: Floats, y: Floats) -> Floats:
    return bump(np.abs(x) - 0.55 * t.nostril_width, y - t.nose_length - 0.1, 0.055, 0.026)


def _brows(t: FaceTraits, x: Floats, y: Floats) -> Floats:
    along = (np.abs(x) - t.eye_distance / 2 - 0.03) / t.brow_width  # -1 at the inner end, 1 at the outer
    line = t.brow_height + t.brow_tilt * along - t.brow_arch * (1.0 - (along - 0.25) ** 2)
    thickness = t.brow_thickness * np.clip(1.0 - 0.4 * along, 0.3, 1.3)
    return edge(np.abs(y - line) - thickness, 0.06) * edge(np.abs(along) - 1.0, 0.35)


def _lips(t: FaceTraits, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Coverage of the lips, and of the line between them."""
    across = np.clip(np.abs(x) / t.mouth_width, 0.0, 1.0)
    line = mouth_line(t, x)
    dip = t.cupid_bow * (bump(across, 0.0 * y, 0.18, 1.0) - 0.6 * bump(across - 0.3, 0.0 * y, 0.2, 1.0))
    top = line - t.upper_lip * (1.0 - across**2) + dip
    bottom = line + t.lower_lip * (1.0 - across**2.5)
    within = edge(np.abs(x) - t.mouth_width, 0.05)
    return edge(np.maximum(top - y, y - bottom), 0.035) * within, edge(np.abs(y - line) - 0.012, 0.03) * within


def mouth_line(t: FaceTraits, x: Floats) -> Floats:
    """y of the line between the closed lips."""
    across = np.clip(np.abs(x) / t.mouth_width, 0.0, 1.2)
    return np.asarray(t.mouth_height + t.mouth_tilt * (across**2 - 1.0))


def _landmarks(t: FaceTraits) -> Floats:
    """On a symmetric face; the depth is still to be found."""
    half, corner = t.eye_distance / 2, 0.97 * t.mouth_width
    mouth = float(mouth_line(t, np.array(corner)))
    points = [(-half, 0.0), (half, 0.0), (0.0, t.nose_length), (-corner, mouth), (corner, mouth)]
    return np.array([[x, y, 0.0] for x, y in points])


def _sample(values: Floats, x: Floats, y: Floats) -> Floats:
    """Values of the grid at points [N], linear."""
    column, row = (((part - start) * PITCH).astype(np.float32)[None] for part, start in ((x, LEFT), (y, TOP)))
    return np.asarray(cv2.remap(values.astype(np.float32), column, row, cv2.INTER_LINEAR)[0], dtype=np.float64)


def smooth_noise(generator: np.random.Generator, knots: tuple[int, int], shape: tuple[int, int]) -> Floats:
    """Smooth noise [H, W] of about unit standard deviation, drawn at ``knots`` rows and columns."""
    coarse = generator.standard_normal(knots, dtype=np.float32)
    return np.asarray(cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC), dtype=np.float32)


def _tone(tones: Floats, place: float) -> Floats:
    """A colour of a scale, ``place`` from 0 to 1."""
    at = np.linspace(0.0, 1.0, len(tones))
    return np.array([np.interp(place, at, channel) for channel in tones.T], dtype=np.float32)


def mix(colour: Floats, other: Floats, share: Floats) -> Floats:
    """``colour`` [H, W, 3] with ``share`` [H, W] of it replaced by ``other``."""
    return np.asarray(colour + (other.astype(np.float32, copy=False) - colour) * share.astype(np.float32)[:, :, None])
