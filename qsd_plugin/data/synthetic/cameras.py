"""The cameras of the synthetic city: where each one hangs, what lies before it and how it renders colour."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage
from PIL import ImageDraw

from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.synthetic.solids import Floats

#: Size of the still scene before a camera, of which every picture shows a part, in pixels.
SCENE_HEIGHT, SCENE_WIDTH = 220, 560
#: Row of the scene where wall and ground meet.
HORIZON = 84

_GROUNDS = ("tiles", "grass", "crossing", "brick", "asphalt", "boards")
_GROUND_COLOURS = {
    "tiles": (150, 146, 138),
    "grass": (92, 112, 66),
    "crossing": (104, 104, 108),
    "brick": (146, 104, 86),
    "asphalt": (84, 86, 92),
    "boards": (168, 150, 122),
}


@dataclass(frozen=True, eq=False)
class Camera:
    """One camera; lengths in pixels of its pictures, angles in radians."""

    scene: Floats  # [SCENE_HEIGHT, SCENE_WIDTH, 3] RGB levels
    gain: Floats  # [3], colour cast times exposure
    gamma: float
    contrast: float
    saturation: float
    pitch: float
    path: float  # the direction people walk; half of them walk the other way
    path_spread: float
    body: float  # mean body height, share of the picture's height
    body_spread: float
    aside: float  # mean sideways error of the detector, share of the picture's width
    light: float  # direction of the light, 0 from straight ahead

    def respond(self, scene: Floats) -> Floats:
        """What the sensor makes of ``scene`` [H, W, 3]: RGB levels in [0, 255]."""
        grey = scene.mean(axis=2, keepdims=True)
        coloured = (grey + self.saturation * (scene - grey)) * self.gain
        contrasted = 118.0 + self.contrast * (coloured - 118.0)
        return np.asarray(255.0 * (np.clip(contrasted, 0.0, 255.0) / 255.0) ** self.gamma, dtype=np.float32)


@functools.lru_cache(maxsize=64)
def camera(seed: int, index: int, count: int) -> Camera:
    """Camera ``index`` (1-based) of ``count``.

    What tells cameras apart (hue of the cast, walking direction, ground) is spread evenly over them and only shifted as
    a whole by the seed, so that no two cameras of a set are alike by chance.
    """
    shared = numpy_stream(seed, "cameras")
    turn, path = shared.uniform(0.0, 1.0, size=2)
    order = shared.permutation(count)
    generator = numpy_stream(seed, "camera", index)
    place = order[index - 1] / count
    hue = 2.0 * math.pi * (turn + place)
    cast = 1.0 + generator.uniform(0.04, 0.1) * np.cos(hue - np.array([0.0, 2.0, 4.0]) * math.pi / 3.0)
    return Camera(
        scene=_scene(generator, _GROUNDS[order[index - 1] % len(_GROUNDS)]),
        gain=(cast * generator.uniform(0.85, 1.2)).astype(np.float32),
        gamma=float(generator.uniform(0.9, 1.12)),
        contrast=float(generator.uniform(0.85, 1.12)),
        saturation=float(generator.uniform(0.7, 1.1)),
        pitch=float(generator.uniform(0.05, 0.45)),
        path=math.pi * (path + (index - 1) / count),
        path_spread=float(generator.uniform(0.2, 0.5)),
        body=float(generator.uniform(0.8, 0.92)),
        body_spread=float(generator.uniform(0.02, 0.06)),
        aside=float(generator.uniform(-0.06, 0.06)),
        light=float(generator.uniform(-1.2, 1.2)),
    )


def _scene(generator: np.random.Generator, ground: str) -> Floats:
    """House fronts above, one kind of ground below, in uneven light."""
    picture = PILImage.new("RGB", (SCENE_WIDTH, SCENE_HEIGHT))
    draw = ImageDraw.Draw(picture)
    left = 0
    while left < SCENE_WIDTH:
        right = left + int(generator.integers(70, 170))
        _draw_front(draw, generator, left, right)
        left = right
    _draw_ground(draw, generator, ground)
    plain = np.asarray(picture, dtype=np.float32)
    light = 1.0 + _blotches(generator, 55, 0.13)
    grain = _blotches(generator, 12, 4.0) + _blotches(generator, 2, 14.0 if ground == "grass" else 5.0)
    return np.asarray(np.clip(plain * light + grain, 0.0, 255.0), dtype=np.float32)


def _draw_front(draw: ImageDraw.ImageDraw, generator: np.random.Generator, left: int, right: int) -> None:
    wall = generator.integers(70, 205) + generator.integers(-28, 29, size=3)
    draw.rectangle((left, 0, right, HORIZON), fill=_rgb(wall))
    x = left
    while x < right:
        width, kind = int(generator.integers(14, 50)), int(generator.integers(5))
        level = generator.integers(30, 215, size=3) * 0.5 + wall * 0.5
        if kind == 0:  # door
            draw.rectangle((x, HORIZON - int(generator.integers(40, 70)), x + width * 0.6, HORIZON), fill=_rgb(level))
        elif kind == 1:  # window
            top = int(generator.integers(2, 40))
            draw.rectangle((x, top, x + width * 0.8, top + 26), fill=_rgb(level * 0.6), outline=_rgb(wall * 1.15))
        elif kind == 2:  # column
            draw.rectangle((x, 0, x + 6, HORIZON + 4), fill=_rgb(wall * 0.7))
        elif kind == 3:  # hedge
            top = HORIZON - int(generator.integers(12, 36))
            for stem in range(x, x + width, 6):
                crown = top + int(generator.integers(-5, 6))
                draw.ellipse((stem - 7, crown, stem + 9, HORIZON + 4), fill=_rgb(np.array([60, 84, 48]) + level * 0.15))
        x += width + int(generator.integers(4, 30))


def _draw_ground(draw: ImageDraw.ImageDraw, generator: np.random.Generator, ground: str) -> None:
    colour = np.asarray(_GROUND_COLOURS[ground]) + generator.integers(-15, 16, size=3)
    line = _rgb(colour * generator.uniform(0.75, 0.88))
    draw.rectangle((0, HORIZON, SCENE_WIDTH, SCENE_HEIGHT), fill=_rgb(colour))
    depth = SCENE_HEIGHT - HORIZON
    if ground in ("tiles", "brick", "boards"):
        step = {"tiles": 1.35, "brick": 1.16, "boards": 1.25}[ground]
        row = 6.0
        while row < depth:
            draw.line((0, HORIZON + row, SCENE_WIDTH, HORIZON + row), fill=line)
            row *= step
    if ground in ("tiles", "boards"):
        for foot in range(-SCENE_WIDTH, 2 * SCENE_WIDTH, 44):
            top = SCENE_WIDTH / 2 + (foot - SCENE_WIDTH / 2) * 0.35
            draw.line((top, HORIZON, foot, SCENE_HEIGHT), fill=line)
    if ground == "crossing":
        for foot in range(0, SCENE_WIDTH, 64):
            far = HORIZON + 30
            corners = [(foot, SCENE_HEIGHT), (foot + 30, SCENE_HEIGHT), (foot + 52, far), (foot + 34, far)]
            draw.polygon(corners, fill=(206, 206, 200))
    if ground == "asphalt":
        draw.line((0, HORIZON + 34, SCENE_WIDTH, HORIZON + 46), fill=(190, 176, 110), width=3)
        draw.rectangle((0, HORIZON, SCENE_WIDTH, HORIZON + 6), fill=_rgb(colour * 1.35))


def _blotches(generator: np.random.Generator, size: int, strength: float) -> Floats:
    """Smooth grey noise [height, width, 1] of standard deviation ``strength``, grains about ``size`` pixels wide."""
    coarse = generator.standard_normal((-(-SCENE_HEIGHT // size), -(-SCENE_WIDTH // size)), dtype=np.float32)
    fine = PILImage.fromarray(coarse).resize((SCENE_WIDTH, SCENE_HEIGHT), PILImage.Resampling.BICUBIC)
    return strength * np.asarray(fine, dtype=np.float32)[:, :, None]


def _rgb(colour: npt.NDArray[Any]) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.rint(colour), 0, 255).astype(int).tolist()
    return red, green, blue
