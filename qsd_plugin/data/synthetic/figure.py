"""A walking pedestrian: the skeleton, and the solids that make a picture of it.

Body axes: x to the person's left, y up, z to the front, in body heights; the feet stand at y = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from qsd_plugin.data.synthetic.appearance import Appearance
from qsd_plugin.data.synthetic.clothes import head_paint, legwear_paint, plain, sleeve_paint, top_paint
from qsd_plugin.data.synthetic.solids import Ball, Canvas, Floats, Paint, Tube

Joint = tuple[float, float, float]
#: A solid and its depth, the order of painting.
Placed = tuple[float, Tube | Ball]

#: Canvas pixels per image pixel and side; averaging them smooths the edges.
SUPERSAMPLING = 3


@dataclass(frozen=True)
class Pose:
    """How a person stands before a camera; angles in radians."""

    facing: float  # 0: towards the camera, pi: away
    pitch: float  # how far the camera looks down
    phase: float  # of the walking cycle, 0 to 2 pi
    stride: float  # amplitude of the thighs
    elbow: float
    spread: float  # of the arms from the trunk


def draw_figure(
    person: Appearance,
    pose: Pose,
    *,
    shape: tuple[int, int],
    feet: tuple[float, float],
    scale: float,
    light: tuple[float, float, float],
) -> tuple[Floats, Floats]:
    """Render a person without background.

    Args:
        shape: Height and width of the picture, in pixels.
        feet: x and y of the point on the ground between the feet, in pixels; may lie outside.
        scale: Pixels per body height of an average person.
        light: Unit vector towards the light (right, down, towards the camera).

    Returns:
        RGB levels times coverage, [H, W, 3], and coverage in [0, 1], [H, W].
    """
    height, width = shape
    canvas = Canvas(height * SUPERSAMPLING, width * SUPERSAMPLING, light)
    view = _View(pose, scale * SUPERSAMPLING * person.height, feet[0] * SUPERSAMPLING, feet[1] * SUPERSAMPLING)
    solids = [*_legs(person, pose, view), *_trunk(person, view), *_arms(person, pose, view), *_head(person, view)]
    for _, solid in sorted(solids, key=lambda entry: entry[0]):
        canvas.paint(solid, pose.facing)
    # INTER_AREA over whole blocks is their mean.
    small = cv2.resize(canvas.pixels, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(small[:, :, :3], dtype=np.float32), np.asarray(small[:, :, 3], dtype=np.float32)


@dataclass(frozen=True)
class _View:
    """Orthographic projection of body axes to the canvas."""

    pose: Pose
    scale: float
    x: float
    y: float

    def screen(self, joint: Joint) -> tuple[float, float]:
        along = joint[0] * math.cos(self.pose.facing) + joint[2] * math.sin(self.pose.facing)
        up = joint[1] * math.cos(self.pose.pitch) - self.depth(joint) * math.sin(self.pose.pitch)
        return self.x + self.scale * along, self.y - self.scale * up

    def depth(self, joint: Joint) -> float:
        """Towards the camera, in body heights."""
        return joint[2] * math.cos(self.pose.facing) - joint[0] * math.sin(self.pose.facing)

    def breadth(self, across: float, through: float) -> float:
        """On-screen half-width of an ellipse ``across`` wide and ``through`` deep."""
        return self.scale * math.hypot(across * math.cos(self.pose.facing), through * math.sin(self.pose.facing))

    def limb(self, start: Joint, end: Joint, radii: tuple[float, float], paint: Paint, bias: float = 0.0) -> Placed:
        depth = (self.depth(start) + self.depth(end)) / 2.0 + bias
        thick = [self.scale * radius for radius in radii]
        return depth, Tube(self.screen(start), self.screen(end), thick, paint)

    def box(self, centre: Joint, half: Joint, paint: Paint, bias: float = 0.0, power: float = 4.0) -> Placed:
        radii = (self.breadth(half[0], half[2]), self.scale * half[1])
        return self.depth(centre) + bias, Ball(self.screen(centre), radii, paint, power)


def _legs(person: Appearance, pose: Pose, view: _View) -> list[Placed]:
    skin, cloth, shoe = plain(person.skin), legwear_paint(person), plain(person.shoes)
    hip_height = 0.5 * person.legs
    thigh, shin = 0.245 * person.legs, 0.235 * person.legs
    thick = 0.058 * math.sqrt(person.girth)
    lower = cloth if person.legwear == "trousers" else skin
    upper = cloth if person.legwear in ("trousers", "shorts") else skin
    loose = 1.1 if person.legwear == "trousers" else 0.85
    placed: list[Placed] = []
    for side, phase in ((1.0, pose.phase), (-1.0, pose.phase + math.pi)):
        swing = pose.stride * math.sin(phase)
        bend = pose.stride * (0.5 + 0.9 * max(0.0, math.cos(phase)))
        hip = (side * 0.052 * person.girth**0.5, hip_height, 0.0)
        knee = (hip[0], hip[1] - thigh * math.cos(swing), thigh * math.sin(swing))
        ankle = (hip[0], knee[1] - shin * math.cos(swing - bend), knee[2] + shin * math.sin(swing - bend))
        toe = (ankle[0] + 0.012 * side, ankle[1] - 0.018, ankle[2] + 0.085)
        leg = [
            view.limb(ankle, toe, (0.026, 0.02), shoe, -0.02),
            view.limb(knee, ankle, (0.036 * loose, 0.026 * loose), lower, -0.01),
            view.limb(hip, knee, (thick, 0.042 * loose), upper),
        ]
        # Between the far arm and the trunk, whose clothes hang over a leg even where it swings to the front.
        placed += [(0.1 * depth - 0.04, solid) for depth, solid in leg]
    if person.legwear in ("skirt", "long skirt"):
        hem = 0.31 if person.legwear == "skirt" else 0.12
        flare = 1.25 if person.legwear == "skirt" else 1.4
        placed.append(_hanging(view, (0.54, hem), (0.095 * person.girth, 0.1 * flare), cloth, -0.02))
    return placed


def _trunk(person: Appearance, view: _View) -> list[Placed]:
    top = top_paint(person)
    lean = math.sin(person.stoop)
    neck, hips = (0.0, 0.84, 0.3 * lean), (0.0, {"waist": 0.5, "hip": 0.45, "coat": 0.45}[person.cut], 0.0)
    wide, deep = 0.118 * person.shoulders * person.girth**0.4, 0.075 * person.girth
    profile = ((0.0, 0.42), (0.07, 0.86), (0.16, 1.0), (0.62, 0.8), (0.85, 0.86), (1.0, 0.88))
    radii = [share * view.breadth(wide, deep) for _, share in profile]
    placed: list[Placed] = [
        (0.0, Tube(view.screen(neck), view.screen(hips), radii, top, [knot for knot, _ in profile], round_ends=False)),
        view.limb((0.0, 0.82, 0.3 * lean), (0.0, 0.89, 0.4 * lean), (0.034, 0.03), plain(person.skin), 0.01),
    ]
    if person.cut == "coat":
        placed.append(_hanging(view, (0.47, 0.28), (0.1 * person.girth, 0.115 * person.girth), top, -0.01))
    carried, side = plain(person.carried_colour), person.carried_side
    if person.carried == "backpack":
        placed.append(view.box((0.0, 0.68, -deep - 0.045), (0.088, 0.125, 0.055), carried))
    elif person.carried == "shoulder bag":
        placed.append(view.box((-side * (wide * 0.9 + 0.02), 0.47, 0.0), (0.035, 0.07, 0.085), carried, 0.03))
    return placed


def _arms(person: Appearance, pose: Pose, view: _View) -> list[Placed]:
    cloth, skin = sleeve_paint(person), plain(person.skin)
    upper = skin if person.sleeves == "none" else cloth
    lower = cloth if person.sleeves == "long" else skin
    thick = person.girth**0.4
    lean = 0.3 * math.sin(person.stoop)
    placed: list[Placed] = []
    for side, phase in ((1.0, pose.phase + math.pi), (-1.0, pose.phase)):
        swing = 0.9 * pose.stride * math.sin(phase)
        carries = person.carried == "handbag" and side == person.carried_side
        bend = 0.1 if carries else pose.elbow
        shoulder = (side * 0.098 * person.shoulders * thick, 0.79, lean)
        out = side * math.sin(pose.spread + 0.12)
        elbow = (shoulder[0] + 0.165 * out, shoulder[1] - 0.165 * math.cos(swing), lean + 0.165 * math.sin(swing))
        reach = swing + bend
        hand = (elbow[0] + 0.08 * out, elbow[1] - 0.15 * math.cos(reach), elbow[2] + 0.15 * math.sin(reach))
        placed += [
            view.limb(shoulder, elbow, (0.036 * thick, 0.031 * thick), upper, 0.02),
            view.limb(elbow, hand, (0.03 * thick, 0.022), lower, 0.03),
            view.box(hand, (0.022, 0.026, 0.022), skin, 0.03, power=2.0),
        ]
        if carries:
            bag = (hand[0], hand[1] - 0.09, hand[2])
            placed.append(view.box(bag, (0.03, 0.07, 0.08), plain(person.carried_colour), 0.04))
    return placed


def _head(person: Appearance, view: _View) -> list[Placed]:
    lean = 0.45 * math.sin(person.stoop)
    centre = (0.0, 0.935, 0.01 + lean)
    placed = [view.box(centre, (0.05, 0.066, 0.058), head_paint(person), 0.1, power=2.2)]
    if person.hairstyle == "long":
        start, end = (0.0, 0.93, lean - 0.025), (0.0, 0.79, lean - 0.055)
        placed.append(view.limb(start, end, (0.05, 0.045), plain(person.hair), 0.03))
    elif person.hairstyle == "bun" and person.headwear != "beanie":
        placed.append(view.box((0.0, 0.975, lean - 0.055), (0.028, 0.028, 0.028), plain(person.hair), 0.08, power=2.0))
    if person.headwear == "cap":
        start, end = (0.0, 0.955, lean + 0.05), (0.0, 0.95, lean + 0.095)
        placed.append(view.limb(start, end, (0.022, 0.016), plain(person.headwear_colour), 0.12))
    return placed


def _hanging(
    view: _View, heights: tuple[float, float], radii: tuple[float, float], paint: Paint, depth: float
) -> Placed:
    """A skirt or coat tail between two heights."""
    start, end = view.screen((0.0, heights[0], 0.0)), view.screen((0.0, heights[1], 0.0))
    widths = [view.breadth(radius, 0.85 * radius) for radius in radii]
    return depth, Tube(start, end, widths, paint, round_ends=False)
