"""Synthetic faces: the parameters of a set, the list of its pictures, and one picture.

A picture depends on (seed, identity, index), on its size and on the degradation level, so pictures can be made in any
order, in any process, and come out the same.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.synthetic.damage import damage
from qsd_plugin.data.synthetic.face_conditions import Conditions, draw_conditions
from qsd_plugin.data.synthetic.face_picture import draw_face
from qsd_plugin.data.synthetic.face_surface import surface
from qsd_plugin.degradations.operations import Image

#: Folders: people to train on, people to search for, people in the gallery only.
TRAIN, TEST, DISTRACTORS = "train", "test", "distractors"

#: Folds of the verification protocol; each has identities of its own.
FOLDS = 10

_MAX_IDENTITY, _MAX_INDEX = 99_999, 999


@dataclass(frozen=True)
class SyntheticFaces:
    """Parameters of a set; equal parameters and library versions give equal files, bit for bit.

    Args:
        num_train_identities: People to train on, numbered from 1.
        num_test_identities: People to search for, numbered after those.
        num_distractors: People who are in the gallery only. With those searched for at least 20, two per fold.
        images_per_identity: Pictures of each person, at least 2.
        num_pairs: Pairs to verify, half of them of one person; a multiple of 20, for ten folds of both kinds.
        size: Side of the pictures in pixels.
        degradation: In [0, 1]; severities are drawn from [0, ``degradation``].
        seed: Of everything random, >= 0.

    Raises:
        ConfigError: A number out of its range.
    """

    num_train_identities: int = 300
    num_test_identities: int = 100
    num_distractors: int = 50
    images_per_identity: int = 20
    num_pairs: int = 3000
    size: int = 112
    degradation: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "num_train_identities": (1, _MAX_IDENTITY),
            "num_test_identities": (1, _MAX_IDENTITY),
            "num_distractors": (0, _MAX_IDENTITY),
            "images_per_identity": (2, _MAX_INDEX + 1),
            "num_pairs": (2 * FOLDS, 10_000_000),
            "size": (32, 1024),
            "degradation": (0, 1),
            "seed": (0, 2**63 - 1),
        }
        for field in fields(self):
            low, high = limits[field.name]
            value = getattr(self, field.name)
            if not low <= value <= high:
                raise ConfigError(f"Synthetic faces: {field.name}", value=value, expected=f"{low} to {high}")
        self._check_sums()

    def _check_sums(self) -> None:
        held_apart = self.num_test_identities + self.num_distractors
        if held_apart < 2 * FOLDS:
            raise ConfigError(
                "Synthetic faces: people searched for and distractors together",
                value=held_apart,
                expected=f"at least {2 * FOLDS}, two for each of {FOLDS} folds",
                remedy="Raise num_test_identities or num_distractors.",
            )
        if self.num_train_identities + held_apart > _MAX_IDENTITY:
            raise ConfigError(
                "Synthetic faces: identities in all",
                value=self.num_train_identities + held_apart,
                expected=f"at most {_MAX_IDENTITY}",
            )
        # The smallest fold has the fewest pairs of both kinds.
        people, images = held_apart // FOLDS, self.images_per_identity
        possible = min(people * images * (images - 1) // 2, people * (people - 1) // 2 * images**2)
        if self.num_pairs % (2 * FOLDS) or self.num_pairs > 2 * FOLDS * possible:
            raise ConfigError(
                "Synthetic faces: num_pairs",
                value=self.num_pairs,
                expected=f"a multiple of {2 * FOLDS}, at most {2 * FOLDS * possible} with so many people and images",
            )

    def samples(self) -> list[FaceSample]:
        """Every picture of the set, sorted by path."""
        first_test = self.num_train_identities + 1
        first_distractor = first_test + self.num_test_identities
        parts = {
            TRAIN: range(1, first_test),
            TEST: range(first_test, first_distractor),
            DISTRACTORS: range(first_distractor, first_distractor + self.num_distractors),
        }
        listed = [
            FaceSample(folder, identity, index)
            for folder, identities in parts.items()
            for identity in identities
            for index in range(self.images_per_identity)
        ]
        return sorted(listed, key=lambda sample: sample.path)


@dataclass(frozen=True)
class FaceSample:
    """One picture; ``index`` counts from 0 within a person."""

    folder: str
    identity: int
    index: int

    @property
    def path(self) -> str:
        """POSIX path below the set's folder: ``train/00001/000.jpg``."""
        return f"{self.folder}/{self.identity:05d}/{self.index:03d}.jpg"


@dataclass(frozen=True, eq=False)
class FacePicture:
    """A picture and the truth about it.

    Attributes:
        image: [size, size, 3] uint8 RGB.
        landmarks: [5, 2] x and y in pixels: eyes, tip of the nose, mouth corners, as in
            :mod:`qsd_plugin.data.align`.
        severities: Severity in [0, 1] of every degradation it went through.
        conditions: Pose, expression, light and what else is not identity.
    """

    image: Image
    landmarks: npt.NDArray[np.float64]
    severities: dict[str, float]
    conditions: Conditions


def render_face(spec: SyntheticFaces, sample: FaceSample) -> FacePicture:
    """Make one picture."""
    generator = numpy_stream(spec.seed, "face picture", sample.identity, sample.index)
    face = surface(spec.seed, sample.identity)
    conditions = draw_conditions(generator, face.traits)
    # A stream of its own: what the camera and the network do to a picture does not depend on how it was drawn.
    drawn, landmarks = draw_face(face, conditions, spec.size, numpy_stream(int(generator.integers(2**62)), "drawing"))
    levels = np.rint(np.clip(drawn, 0.0, 255.0)).astype(np.uint8)
    image, severities = damage(levels, generator, spec.degradation)
    return FacePicture(image, landmarks, severities, conditions)
