"""What lies on or in a synthetic face without being its skin: eyes, the open mouth, beard, glasses, hair.

Painted by place on the face (x, y), units and axes of :mod:`~qsd_plugin.data.synthetic.face_traits`.
"""

from __future__ import annotations

import numpy as np

from qsd_plugin.data.synthetic.face_conditions import Conditions
from qsd_plugin.data.synthetic.face_surface import Surface, bump, edge, mix, mouth_line
from qsd_plugin.data.synthetic.face_traits import FaceTraits
from qsd_plugin.data.synthetic.solids import Floats


def paint_details(
    colour: Floats, face: Surface, conditions: Conditions, x: Floats, y: Floats, unmoved_y: Floats, strands: Floats
) -> Floats:
    """Beard, mouth and, before the light falls on them, the frames of glasses.

    Args:
        colour: RGB levels [H, W, 3] of the skin.
        face: Whose.
        conditions: Of the picture.
        x: Place on the face [H, W], expression taken back.
        y: The same.
        unmoved_y: y with the expression left in, for what opens.
        strands: Noise [H, W] that hair is drawn with.
    """
    colour = mix(colour, 0.8 * face.hair, _beard(face.traits, conditions, x, y, strands))
    return _open_mouth(colour, face.traits, conditions, x, unmoved_y)


def paint_eyes(colour: Floats, t: FaceTraits, conditions: Conditions, x: Floats, y: Floats) -> Floats:
    """Eyes, and glasses over them, on a face that is lit already."""
    side = np.abs(x) - t.eye_distance / 2
    y = y + t.eye_tilt * side
    across = np.clip(np.abs(side) / t.eye_width, 0.0, 1.0)
    arch = 1.0 - across**2.2
    upper = -1.05 * t.eye_opening * conditions.lids * arch
    lower = 0.75 * t.eye_opening * min(1.0, conditions.lids) * arch
    within = edge(np.maximum(upper - y, y - lower), 0.035) * edge(np.abs(side) - t.eye_width, 0.03)
    # The eyeball takes its light from the skin around it, or white would glow in the dark.
    level = colour.mean(axis=2, keepdims=True) / 150.0
    white = np.array([226.0, 218.0, 212.0]) * np.clip(level, 0.15, 1.15)
    gaze_x = np.sign(x) * conditions.gaze[0]
    distance = np.hypot(side - gaze_x, y + 0.012 - conditions.gaze[1])
    light, blue = np.clip(t.iris_light, 0.0, 1.0), np.clip(t.iris_blue, 0.0, 1.0)
    iris = np.array([60.0, 38.0, 24.0]) + light * (
        (1.0 - blue) * np.array([90, 76, 36]) + blue * np.array([50, 80, 110])
    )
    ball = mix(white, iris, edge(distance - t.iris_radius, 0.03))
    ball = mix(ball, np.array([12.0, 10.0, 10.0]), edge(distance - 0.42 * t.iris_radius, 0.03))
    ball = mix(
        ball, np.array([235.0, 235.0, 235.0]), 0.7 * edge(np.hypot(side - gaze_x - 0.03, y + 0.05) - 0.018, 0.02)
    )
    painted = mix(colour, ball, within)
    lashes = edge(np.abs(y - upper) - 0.014, 0.03) * edge(np.abs(side) - 1.06 * t.eye_width, 0.05)
    fold = edge(np.abs(y - upper + t.lid_fold * arch) - 0.008, 0.04) * edge(np.abs(side) - t.eye_width, 0.1)
    painted = painted * (1.0 - 0.75 * lashes - 0.3 * fold * (1.0 - within))[:, :, None]
    return _glasses(painted, t, conditions, x, y)


def hair_coverage(t: FaceTraits, conditions: Conditions, x: Floats, y: Floats, strands: Floats) -> Floats:
    """Where hair, or a cap, covers the face, [H, W] in [0, 1]."""
    side = np.abs(x)
    temple = 1.25 * np.clip((side - 0.76) / 0.24, 0.0, 1.0) ** 2
    if conditions.hairstyle == "cap":
        return edge(y + 0.72 - 0.3 * temple - 0.08 * side**2)
    line = t.hairline_height - t.hairline_arch * x**2 + 0.12 * conditions.parting * x + temple
    if conditions.hairstyle == "receding":
        line = line - 0.3 - 0.4 * bump(side - 0.45, 0.0 * y, 0.25, 1.0)
    elif conditions.hairstyle == "fringe":
        line = np.maximum(line, -0.5 - 0.12 * np.abs(x - 0.4 * conditions.parting) ** 2 + 0.3 * temple)
    elif conditions.hairstyle == "long":
        line = line + 2.5 * np.clip((side - 0.88) / 0.14, 0.0, 1.0)
    return edge(y - line + 0.05 * strands, 0.1)


def _beard(t: FaceTraits, conditions: Conditions, x: Floats, y: Floats, strands: Floats) -> Floats:
    if conditions.beard == "none":
        return np.zeros_like(x)
    side = np.abs(x)
    top = t.mouth_height - 0.12 - 0.75 * np.clip((side - 0.5) / 0.4, 0.0, 1.0)
    moustache = 1.1 * bump(np.maximum(side - 0.2, 0.0), y - t.mouth_height + t.upper_lip + 0.1, 0.25, 0.085)
    chin = bump(x, y - t.chin_height + 0.3, 0.3, 0.24)
    jaw = edge(top - y, 0.25)
    grown = {"stubble": 0.32 * np.maximum(jaw, moustache), "moustache": 0.85 * moustache}
    grown |= {"goatee": 0.85 * np.maximum(chin, moustache), "full": 0.85 * np.maximum(jaw, moustache)}
    line = mouth_line(t, x)
    lips = edge(np.maximum(line - 0.8 * t.upper_lip - y, y - line - t.lower_lip), 0.04)
    lips = lips * edge(side - t.mouth_width, 0.05)
    return np.asarray(np.clip(grown[conditions.beard] * (1.0 + 0.25 * strands), 0.0, 0.95) * (1.0 - lips))


def _open_mouth(colour: Floats, t: FaceTraits, conditions: Conditions, x: Floats, y: Floats) -> Floats:
    across = np.clip(np.abs(x) / t.mouth_width, 0.0, 1.0)
    gap = 0.15 * conditions.mouth * (1.0 - across**2)
    top = mouth_line(t, x) - 0.075 * conditions.smile * np.exp(-(((np.abs(x) - t.mouth_width) / 0.24) ** 2))
    inside = edge(np.maximum(top - y, y - top - gap), 0.025) * edge(np.abs(x) - 0.95 * t.mouth_width, 0.05)
    inside = inside * np.clip(conditions.mouth / 0.1, 0.0, 1.0)
    teeth = edge(y - top - 0.6 * gap, 0.03) * np.clip(conditions.mouth + conditions.smile - 0.3, 0.0, 1.0)
    mouth = mix(np.broadcast_to(np.array([70.0, 26.0, 26.0]), colour.shape), np.array([225.0, 215.0, 200.0]), teeth)
    return mix(colour, mouth, inside)


def _glasses(colour: Floats, t: FaceTraits, conditions: Conditions, x: Floats, y: Floats) -> Floats:
    if conditions.glasses == "none":
        return colour
    side = np.abs(x) - t.eye_distance / 2
    wide, tall = conditions.frame
    reach = (np.abs(side / wide) ** 3 + np.abs((y - 0.03) / tall) ** 3) ** (1 / 3)
    thick = 0.03 if conditions.glasses == "thin" else 0.06
    rim = edge(np.abs(reach - 1.0) * tall - thick / 2, 0.03)
    bar = edge(np.abs(y + 0.06) - thick / 2, 0.03)
    between = bar * np.maximum(edge(side + wide, 0.03), edge(wide - side, 0.03))
    if conditions.glasses == "dark":
        colour = mix(colour, np.array([20.0, 20.0, 24.0]), 0.88 * edge((reach - 1.0) * tall, 0.03))
    dark = np.array([110.0, 104.0, 96.0]) if conditions.glasses == "thin" else np.array([24.0, 22.0, 22.0])
    return mix(colour, dark, 0.9 * np.maximum(rim, between))
