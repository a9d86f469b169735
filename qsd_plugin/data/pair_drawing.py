"""Drawing pairs to verify from images of people: ten contiguous folds of equal length, half of each genuine.

With twenty people or more every fold has people of its own, so that the protocol's thresholds are chosen on other
people than they are applied to; with fewer, all folds draw from all of them.

Shapes: P pairs, K people or couples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.verification_bin import FOLDS, interleaved

#: Person and number of an image.
Face = tuple[str, int]


def draw_pairs(images: Mapping[str, int], pairs: int, *, seed: int) -> tuple[list[tuple[Face, Face]], bool]:
    """Draw pairs without repetition; nobody and no couple has more of them than others while those have any left.

    Args:
        images: Number of images of each person held out, 2 or more.
        pairs: P, a multiple of 20.
        seed: Of the draws.

    Returns:
        The pairs [P] in the order of the folds, a genuine one whenever both persons are the same; and whether every
        fold has people of its own.

    Raises:
        ConfigError: No multiple of 20.
        DataError: Too few images for so many pairs.
    """
    if pairs < 2 * FOLDS or pairs % (2 * FOLDS):
        raise ConfigError(
            "Number of pairs",
            value=pairs,
            expected=f"a multiple of {2 * FOLDS}: {FOLDS} folds, half of each genuine",
            remedy=f"Such as {max(1, round(pairs / (2 * FOLDS))) * 2 * FOLDS}.",
        )
    generator = numpy_stream(seed, "face pairs")
    names = [list(images)[place] for place in generator.permutation(len(images))]
    own_people = len(names) >= 2 * FOLDS
    groups = [[names[place] for place in part] for part in np.array_split(np.arange(len(names)), FOLDS)]
    groups = groups if own_people else [names]
    each = pairs // 2 // len(groups)
    _check_enough(groups, images, pairs)
    genuine = [pair for group in groups for pair in _genuine(group, images, each, generator)]
    impostor = [pair for group in groups for pair in _impostor(group, images, each, generator)]
    count = pairs // 2 // FOLDS
    kinds = np.arange(2 * count) < count
    order = interleaved(kinds).tolist()
    drawn = []
    for start in range(0, FOLDS * count, count):
        fold = genuine[start : start + count] + impostor[start : start + count]
        drawn += [fold[place] for place in order]
    return drawn, own_people


def _check_enough(groups: Sequence[Sequence[str]], images: Mapping[str, int], pairs: int) -> None:
    possible = []
    for group in groups:
        counts = np.array([images[name] for name in group])
        genuine = int((counts * (counts - 1) // 2).sum())
        impostor = int((counts.sum() ** 2 - (counts**2).sum()) // 2)
        possible.append(min(genuine, impostor))
    most = 2 * FOLDS * (min(possible) // (FOLDS // len(groups)))
    if pairs > most:
        raise DataError(
            f"Number of pairs of the {len(images)} people held out",
            value=pairs,
            expected=f"at most {most}: half of them genuine, none twice, in {FOLDS} folds of equal length",
            remedy=f"Pass --pairs {most} or less." if most else "Add images or people.",
        )


def _genuine(
    group: Sequence[str], images: Mapping[str, int], count: int, generator: np.random.Generator
) -> list[tuple[Face, Face]]:
    """``count`` pairs of images of one person, spread evenly over the people of a group, in random order."""
    counts = np.array([images[name] for name in group])
    pairs: list[tuple[Face, Face]] = []
    for name, wanted in zip(group, allot(counts * (counts - 1) // 2, count, generator).tolist(), strict=True):
        first, second = np.triu_indices(images[name], 1)
        for place in generator.choice(len(first), wanted, replace=False).tolist():
            one, other = int(first[place]), int(second[place])
            pairs.append(((name, one), (name, other)))
    return [pairs[place] for place in generator.permutation(count)]


def _impostor(
    group: Sequence[str], images: Mapping[str, int], count: int, generator: np.random.Generator
) -> list[tuple[Face, Face]]:
    """``count`` pairs of images of two people, spread evenly over the couples of a group, in random order."""
    counts = np.array([images[name] for name in group])
    one, other = np.triu_indices(len(group), 1)
    wanted = allot(counts[one] * counts[other], count, generator)
    pairs: list[tuple[Face, Face]] = []
    for couple in np.flatnonzero(wanted).tolist():
        a, b = group[one[couple]], group[other[couple]]
        for place in generator.choice(images[a] * images[b], int(wanted[couple]), replace=False).tolist():
            pair = (a, place // images[b]), (b, place % images[b])
            # The first image's person stands for the pair in statistics: everybody has to come first as often.
            pairs.append(pair if generator.random() < 0.5 else pair[::-1])
    return [pairs[place] for place in generator.permutation(count)]


def allot(capacity: NDArray[np.int64], total: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Share out ``total``, at most the sum of ``capacity`` [K], as evenly as that allows, [K]; the rest goes by lot."""
    shares = np.zeros_like(capacity)
    while left := total - int(shares.sum()):
        room = np.flatnonzero(shares < capacity)
        if left < len(room):
            shares[generator.choice(room, left, replace=False)] += 1
        else:
            shares[room] += np.minimum(left // len(room), (capacity - shares)[room])
    return shares
