"""An aligned picture of a synthetic face: the turned surface is found by marching along the lines of sight, then lit.

The crop is one that ArcFace's alignment gives: five landmarks, with a detector's errors, on the template.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from qsd_plugin.data.align import TEMPLATE_112, similarity
from qsd_plugin.data.synthetic.face_conditions import Conditions, rotation
from qsd_plugin.data.synthetic.face_details import hair_coverage, paint_details, paint_eyes
from qsd_plugin.data.synthetic.face_surface import LEFT, NOWHERE, PITCH, TOP, Surface, bump, edge, mix, smooth_noise
from qsd_plugin.data.synthetic.solids import Floats

#: Standard deviation of a landmark detector's error, pixels of a crop of 112.
DETECTOR_ERROR = 0.7

_NEAREST, _FARTHEST, _STEP = 1.95, -0.1, 0.1


def draw_face(
    face: Surface, conditions: Conditions, size: int, generator: np.random.Generator
) -> tuple[Floats, npt.NDArray[np.float64]]:
    """Render one crop.

    Args:
        face: Whom it shows.
        conditions: In what pose, expression, light and state of hair.
        size: Side of the crop in pixels.
        generator: Of the detector's errors, the background and the strands of hair.

    Returns:
        RGB levels [size, size, 3], not clipped, and where the five landmarks are, [5, 2] in pixels.
    """
    turn = rotation(conditions.yaw, conditions.pitch)
    scale = size / 112.0
    marks = (_moved(face.landmarks, face, conditions) @ turn.T)[:, :2]
    found = generator.normal(0.0, DETECTOR_ERROR / 35.0, size=(5, 2))
    to_crop = similarity(marks + found, TEMPLATE_112 * scale)
    from_crop = np.linalg.inv(to_crop[:, :2])
    pixels = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=2)
    seen = ((pixels - to_crop[:, 2]) @ from_crop.T).astype(np.float32)

    x, y, hit = _march(face.height, seen[:, :, 0], seen[:, :, 1], turn)
    place = _look_up(face.place, x, y)
    shift_x, shift_y = _expression(face, conditions, place[:, :, 0], place[:, :, 1])
    colour = _look_up(face.colour, x - shift_x, y - shift_y)
    normal = _look_up(face.normal, x - shift_x, y - shift_y)
    across, along = place[:, :, 0] - shift_x, place[:, :, 1] - shift_y

    strands = smooth_noise(generator, (12, 64), (size, size)) + 0.5 * smooth_noise(generator, (40, 50), (size, size))
    worn = generator.uniform(30.0, 220.0, size=3) if conditions.hairstyle == "cap" else face.hair
    hair = worn * (1.0 + (0.02 if conditions.hairstyle == "cap" else 0.14) * strands)[:, :, None]
    colour = paint_details(colour, face, conditions, across, along, place[:, :, 1], strands)
    colour = mix(colour, hair, hair_coverage(face.traits, conditions, across, along, strands))
    light = _light(conditions)
    colour = _lit(colour, normal, conditions, light @ turn)
    colour = paint_eyes(colour, face.traits, conditions, across, along)

    behind = _behind(face, conditions, seen, hair, turn, generator)
    covered = cv2.GaussianBlur(hit.astype(np.float32), (0, 0), 0.55 * scale)
    picture = mix(behind, colour, covered) * (conditions.exposure * np.array(conditions.cast))
    return picture, marks @ to_crop[:, :2].T + to_crop[:, 2]


def _march(height: Floats, u: Floats, v: Floats, turn: Floats) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Where on the face's grid each line of sight meets the surface, x and y, and whether it does."""
    towards = turn[2]  # the line of sight in axes of the face
    slope_x, slope_y = towards[0] / towards[2], towards[1] / towards[2]
    start = [turn[0, axis] * u + turn[1, axis] * v for axis in range(3)]
    map_x = ((start[0] - start[2] * slope_x - LEFT) * PITCH).astype(np.float32)
    map_y = ((start[1] - start[2] * slope_y - TOP) * PITCH).astype(np.float32)
    slope_x, slope_y = np.float32(slope_x * PITCH), np.float32(slope_y * PITCH)
    depth = np.full(u.shape, np.float32(_FARTHEST))
    hit = np.zeros(u.shape, dtype=np.bool_)
    before = np.full(u.shape, np.float32(-1.0))
    for z in np.arange(_NEAREST, _FARTHEST, -_STEP, dtype=np.float32):
        at = cv2.remap(
            height,
            map_x + z * slope_x,
            map_y + z * slope_y,
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=NOWHERE,
        )
        above = at - z
        new = (above >= 0.0) & ~hit
        depth[new] = z + _STEP * above[new] / (above[new] - before[new])
        hit |= new
        before = above
    return (map_x + depth * slope_x) / PITCH + LEFT, (map_y + depth * slope_y) / PITCH + TOP, hit


def _look_up(values: Floats, x: Floats, y: Floats) -> Floats:
    map_x, map_y = ((x - LEFT) * PITCH).astype(np.float32), ((y - TOP) * PITCH).astype(np.float32)
    found = cv2.remap(values, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(found, dtype=np.float32)


def _expression(face: Surface, conditions: Conditions, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """How far the skin at (x, y) has moved: corners of the mouth, what lies below an open one, brows."""
    t = face.traits
    side, mouth = np.abs(x), y - t.mouth_height
    corner = bump(side - t.mouth_width, mouth, 0.24, 0.24)
    smile = conditions.smile * corner
    shift_x = 0.08 * smile * np.sign(x)
    jaw = 0.17 * conditions.mouth * np.clip(mouth / 0.12, 0.0, 1.0) * np.clip((1.15 - side) / 0.5, 0.0, 1.0)
    brow = bump(side - t.eye_distance / 2, y - t.brow_height, 0.45, 0.13)
    shift_y = -0.075 * smile + jaw - 0.05 * conditions.brows * brow
    return shift_x, shift_y


def _moved(landmarks: Floats, face: Surface, conditions: Conditions) -> npt.NDArray[np.float64]:
    """Landmarks [5, 3] where the expression puts them."""
    moved = landmarks.astype(np.float64)
    shift_x, shift_y = _expression(face, conditions, landmarks[:, 0], landmarks[:, 1])
    moved[:, 0] += shift_x
    moved[:, 1] += shift_y
    return moved


def _light(conditions: Conditions) -> npt.NDArray[np.float64]:
    """Unit vector towards the light: right, down, towards the camera."""
    level = np.cos(conditions.light_elevation)
    return np.array(
        [
            level * np.sin(conditions.light_azimuth),
            -np.sin(conditions.light_elevation),
            level * np.cos(conditions.light_azimuth),
        ]
    )


def _lit(colour: Floats, normal: Floats, conditions: Conditions, light: Floats) -> Floats:
    towards = np.maximum(0.0, normal @ light.astype(np.float32))
    sky = 0.85 - 0.2 * normal[:, :, 1]
    shade = conditions.ambient * sky + (1.0 - conditions.ambient) * 1.25 * towards
    gloss = 26.0 * (1.0 - conditions.ambient) * np.clip(towards, 0.0, 1.0) ** 24
    return np.asarray(colour * shade[:, :, None] + gloss[:, :, None])


def _behind(
    face: Surface, conditions: Conditions, seen: Floats, hair: Floats, turn: Floats, generator: np.random.Generator
) -> Floats:
    """Background, neck, the hair at the back of the head, and ears."""
    size = seen.shape[0]
    u, v = seen[:, :, 0], seen[:, :, 1]
    wall = generator.uniform(50.0, 200.0) + generator.normal(0.0, 22.0, size=(4, 4, 1))
    wall = wall + generator.normal(0.0, 14.0, size=3) + generator.normal(0.0, 9.0, size=(4, 4, 3))
    behind = cv2.resize(wall.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    for place, width, level in generator.uniform([-1.7, 0.02, 30.0], [1.7, 0.3, 220.0], size=(2, 3)).tolist():
        behind = mix(behind, np.full(3, level), 0.7 * edge(np.abs(u - place) - width))
    dim = conditions.ambient + 0.6 * (1.0 - conditions.ambient)
    neck_x, neck_y = (turn @ np.array([0.0, 1.2, 0.2]))[:2]
    neck = edge(np.maximum(np.abs(u - neck_x) - 0.62 - 0.1 * (v - neck_y), neck_y - v), 0.06)
    behind = mix(behind, 0.7 * dim * face.skin, neck)
    back_x, back_y = (turn @ np.array([0.0, -0.45, -0.5]))[:2]
    bare = conditions.hairstyle == "receding"
    grown = conditions.volume * (0.3 if bare else 1.0)
    width, height = face.traits.cheek_width + 0.05 + grown, 1.3 + grown
    skull = (np.hypot((u - back_x) / width, (v - back_y) / height) - 1.0) * width
    skull = np.maximum(skull, v - back_y - 0.9)
    if conditions.hairstyle == "long":
        fall = np.maximum(np.abs(u - back_x) - width - 0.05 * np.sin(5.0 * v + 3.0 * conditions.parting), back_y - v)
        skull = np.minimum(skull, fall)
    behind = mix(behind, 0.75 * dim * hair, edge(skull, 0.08))
    if conditions.hairstyle != "long":
        for ear in face.ears @ turn.T:
            shell = np.hypot((u - ear[0]) / 0.13, (v - ear[1]) / 0.29)
            lobe = face.skin * (0.95 * dim - 0.25 * bump(u - ear[0], v - ear[1], 0.06, 0.14))[:, :, None]
            behind = mix(behind, lobe, edge((shell - 1.0) * 0.13))
    return behind
