"""How a set of synthetic faces is tested: ten-fold verification, and identification among distractors.

Both use people held apart from training; images are named by their paths below the set's folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.synthetic.faces import DISTRACTORS, FOLDS, TEST, TRAIN, SyntheticFaces
from qsd_plugin.data.verification_bin import interleaved

#: Gallery pictures of each person searched for (the first ones); fewer where probes would be left without any.
GALLERY_IMAGES = 3


@dataclass(frozen=True, eq=False)
class FaceVerification:
    """Pairs to verify, in ten folds of equal length that share no person.

    Attributes:
        paths: Images [N], sorted.
        identities: Of each image [N].
        pairs: Rows of ``paths``, [P, 2]; fold k is the k-th tenth.
        issame: Whether a pair shows one person, [P]; half of each fold.
    """

    paths: list[str]
    identities: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]
    issame: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class FaceIdentification:
    """Closed-set identification: every probe has a mate in the gallery.

    Attributes:
        paths: Images: probes, then the mated gallery, then distractors.
        identities: Of each image.
        num_probe: How many are probes.
        num_mated: How many are the mated gallery.
    """

    paths: list[str]
    identities: npt.NDArray[np.int64]
    num_probe: int
    num_mated: int


def verification(spec: SyntheticFaces) -> FaceVerification:
    """The pairs of a set: drawn without repetition, each fold from a tenth of the people held apart."""
    samples = [sample for sample in spec.samples() if sample.folder != TRAIN]
    people = sorted({sample.identity for sample in samples})
    rows = {who: [row for row, sample in enumerate(samples) if sample.identity == who] for who in people}
    generator = numpy_stream(spec.seed, "verification")
    shuffled = generator.permutation(np.array(people))
    count = spec.num_pairs // (2 * FOLDS)
    pairs, issame = [], []
    for members in np.array_split(shuffled, FOLDS):
        same = [pair for who in members.tolist() for pair in combinations(rows[who], 2)]
        chosen = generator.choice(len(same), count, replace=False)
        fold = [*(same[place] for place in chosen.tolist()), *_strangers(members, rows, count, generator)]
        kinds = np.arange(2 * count) < count
        order = interleaved(kinds)
        pairs.append(np.array(fold)[order])
        issame.append(kinds[order])
    identities = np.array([sample.identity for sample in samples])
    paths = [sample.path for sample in samples]
    return FaceVerification(paths, identities, np.concatenate(pairs), np.concatenate(issame))


def identification(spec: SyntheticFaces) -> FaceIdentification:
    """Who is probe, gallery and distractor in a set."""
    enrolled = min(GALLERY_IMAGES, spec.images_per_identity - 1)
    test = [sample for sample in spec.samples() if sample.folder == TEST]
    probe = [sample for sample in test if sample.index >= enrolled]
    mated = [sample for sample in test if sample.index < enrolled]
    distractors = [sample for sample in spec.samples() if sample.folder == DISTRACTORS]
    every = [*probe, *mated, *distractors]
    identities = np.array([sample.identity for sample in every])
    return FaceIdentification([sample.path for sample in every], identities, len(probe), len(mated))


def _strangers(
    members: npt.NDArray[np.int64], rows: dict[int, list[int]], count: int, generator: np.random.Generator
) -> list[tuple[int, int]]:
    """Different pairs of images of two different people."""
    images = len(rows[int(members[0])])
    people = list(combinations(members.tolist(), 2))
    found = generator.choice(len(people) * images**2, count, replace=False)
    pairs = []
    for number in found.tolist():
        couple, place = divmod(number, images**2)
        first, second = people[couple]
        pairs.append((rows[first][place // images], rows[second][place % images]))
    return pairs
