"""Synthetic pedestrians: the parameters of a set, the list of its pictures, and one picture.

A picture depends on (seed, identity, camera, index), on the number of cameras and on the degradation level, so pictures
can be made in any order, in any process, and come out the same.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.synthetic.appearance import Appearance, draw_appearance
from qsd_plugin.data.synthetic.cameras import HORIZON, SCENE_WIDTH, Camera, camera
from qsd_plugin.data.synthetic.damage import damage
from qsd_plugin.data.synthetic.figure import Pose, draw_figure
from qsd_plugin.data.synthetic.solids import Floats
from qsd_plugin.degradations.operations import Image

HEIGHT, WIDTH = 128, 64

#: Market-1501's own limits, which readers of its layout enforce.
MAX_IDENTITY, MAX_CAMERAS = 1501, 6

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"


@dataclass(frozen=True)
class SyntheticPedestrians:
    """Parameters of a set; equal parameters and library versions give equal files, bit for bit.

    Args:
        num_train_identities: People to train on, numbered from 1.
        num_test_identities: People to search for, numbered after those; nobody is in both parts.
        num_distractors: People who are in the gallery only.
        num_cameras: 2 to 6.
        cameras_per_identity: How many of the cameras each person passes, at least 2.
        images_per_camera: Pictures of a person by one camera, at least 2; of a searched person's, the first is a
            query and the others are gallery.
        degradation: In [0, 1]; severities are drawn from [0, ``degradation``].
        seed: Of everything random, >= 0.

    Raises:
        ConfigError: A number out of its range.
    """

    num_train_identities: int = 200
    num_test_identities: int = 150
    num_distractors: int = 25
    num_cameras: int = 6
    cameras_per_identity: int = 4
    images_per_camera: int = 3
    degradation: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        people = self.num_train_identities + self.num_test_identities + self.num_distractors
        limits: dict[str, tuple[float, float]] = {
            "num_train_identities": (1, MAX_IDENTITY),
            "num_test_identities": (1, MAX_IDENTITY),
            "num_distractors": (0, MAX_IDENTITY),
            "num_cameras": (2, MAX_CAMERAS),
            "cameras_per_identity": (2, self.num_cameras),
            "images_per_camera": (2, 1000),
            "degradation": (0, 1),
            "seed": (0, 2**63 - 1),
        }
        for field in fields(self):
            low, high = limits[field.name]
            value = getattr(self, field.name)
            if not low <= value <= high:
                raise ConfigError(f"Synthetic pedestrians: {field.name}", value=value, expected=f"{low} to {high}")
        if people > MAX_IDENTITY:
            raise ConfigError(
                "Synthetic pedestrians: identities in all",
                value=people,
                expected=f"at most {MAX_IDENTITY}, the highest number in Market-1501's file names",
                remedy="Lower num_train_identities, num_test_identities or num_distractors.",
            )

    def samples(self) -> list[Sample]:
        """Every picture of the set, sorted by path."""
        first_test = self.num_train_identities + 1
        first_distractor = first_test + self.num_test_identities
        listed = []
        for identity in range(1, first_distractor + self.num_distractors):
            route = numpy_stream(self.seed, "route", identity).permutation(self.num_cameras)
            for place in route[: self.cameras_per_identity].tolist():
                for index in range(self.images_per_camera):
                    searched = first_test <= identity < first_distractor and index == 0
                    folder = TRAIN if identity < first_test else QUERY if searched else GALLERY
                    listed.append(Sample(folder, identity, place + 1, index))
        return sorted(listed, key=lambda sample: sample.path)


@dataclass(frozen=True)
class Sample:
    """One picture; ``camera`` counts from 1, ``index`` from 0 within a person and camera."""

    folder: str
    identity: int
    camera: int
    index: int

    @property
    def path(self) -> str:
        """POSIX path below the set's folder, named as in Market-1501."""
        return f"{self.folder}/{self.identity:04d}_c{self.camera}s1_{self.index:06d}_00.jpg"


def render(spec: SyntheticPedestrians, sample: Sample) -> tuple[Image, dict[str, float]]:
    """Make one picture.

    Returns:
        The picture, [128, 64, 3] uint8 RGB, and the severity in [0, 1] of every degradation it went through.
    """
    generator = numpy_stream(spec.seed, "picture", sample.identity, sample.camera, sample.index)
    view = camera(spec.seed, sample.camera, spec.num_cameras)
    scene = _background(view, generator)
    if generator.uniform() < 0.2:
        side = generator.choice((-1.0, 1.0)) * generator.uniform(0.32, 0.6)
        scene = _add_person(scene, draw_appearance(generator), view, generator, size=0.8, aside=side)
    scene = _add_person(scene, _person(spec.seed, sample.identity), view, generator, size=1.0, aside=0.0)
    picture = np.rint(view.respond(_light(scene, generator))).astype(np.uint8)
    return damage(picture, generator, spec.degradation)


@functools.lru_cache(maxsize=4096)
def _person(seed: int, identity: int) -> Appearance:
    return draw_appearance(numpy_stream(seed, "identity", identity))


def _background(view: Camera, generator: np.random.Generator) -> Floats:
    """A part of the camera's scene with up to two things that do not belong to the person."""
    top = HORIZON - int(generator.uniform(0.12, 0.45) * HEIGHT)
    left = int(generator.integers(SCENE_WIDTH - WIDTH))
    part = PILImage.fromarray(view.scene[top : top + HEIGHT, left : left + WIDTH].astype(np.uint8))
    draw = ImageDraw.Draw(part)
    for _ in range(int(generator.integers(3))):
        red, green, blue = (int(v) for v in generator.integers(50, 190) + generator.integers(-40, 41, size=3))
        x, foot, kind = generator.uniform(0, WIDTH), generator.uniform(0.55, 1.0) * HEIGHT, generator.integers(3)
        if kind == 0:  # post
            draw.rectangle((x, 0, x + generator.uniform(2, 6), foot), fill=(red, green, blue))
        elif kind == 1:  # bin or box
            draw.rectangle((x - 9, foot - generator.uniform(16, 46), x + 9, foot), fill=(red, green, blue))
        else:  # wheel
            draw.ellipse((x - 11, foot - 22, x + 11, foot), outline=(red // 2, green // 2, blue // 2), width=2)
    return np.asarray(part, dtype=np.float32)


def _add_person(
    scene: Floats, person: Appearance, view: Camera, generator: np.random.Generator, *, size: float, aside: float
) -> Floats:
    direction = view.path + math.pi * int(generator.integers(2))
    pose = Pose(
        facing=direction + float(generator.normal(0.0, view.path_spread)),
        pitch=view.pitch + float(generator.normal(0.0, 0.04)),
        phase=float(generator.uniform(0.0, 2.0 * math.pi)),
        stride=float(generator.uniform(0.05, 0.5)),
        elbow=float(generator.uniform(0.1, 1.0)),
        spread=float(generator.uniform(0.02, 0.22)),
    )
    # The crop is a detector's, which misses the person a little in size and in place.
    scale = size * HEIGHT * float(generator.normal(view.body, view.body_spread)) / math.cos(pose.pitch)
    feet = (
        WIDTH * (0.5 + aside + float(generator.normal(view.aside, 0.05))),
        HEIGHT * (0.5 + size * 0.46 + float(generator.normal(0.0, 0.025))),
    )
    bearing = view.light + float(generator.normal(0.0, 0.3))
    light = (0.7 * math.sin(bearing), -0.714, 0.7 * math.cos(bearing))
    colour, coverage = draw_figure(person, pose, shape=(HEIGHT, WIDTH), feet=feet, scale=scale, light=light)
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    distance = ((columns - feet[0] + 6.0 * light[0]) / 15.0) ** 2 + ((rows - feet[1]) / 4.5) ** 2
    shadow = 1.0 - 0.45 * np.exp(-distance)
    return scene * (shadow * (1.0 - coverage)).astype(np.float32)[:, :, None] + colour


def _light(scene: Floats, generator: np.random.Generator) -> Floats:
    """Weather, and in a third of the pictures a shadow that falls across."""
    lit = scene * np.float32(generator.uniform(0.82, 1.18))
    depth = generator.uniform(0.45, 0.85)
    angle, place = generator.uniform(0.0, 2.0 * math.pi), generator.normal(0.0, 22.0)
    if generator.uniform() > 1.0 / 3.0:
        return lit
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    across = (columns - WIDTH / 2) * math.cos(angle) + (rows - HEIGHT / 2) * math.sin(angle) - place
    shade = depth + (1.0 - depth) / (1.0 + np.exp(-across / 2.5))
    return lit * shade.astype(np.float32)[:, :, None]
