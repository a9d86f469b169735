"""Closed-set identification: who of the gallery is it, among distractors (TinyFace), by distance (SCface).

A rank is the number of gallery images of other people that are at least as near as the nearest image of the right one,
plus one: ties count against the probe, so a network that gives every image one embedding gets no credit.

Shapes: Q probes, G gallery images, X distractors, D embedding dimension, V probes with a mate in the gallery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.scface import scface_split
from qsd_plugin.evaluation.arrays import Array, Labels, Matrix, to_features, to_numpy
from qsd_plugin.evaluation.distances import BLOCK_BYTES, distance_blocks

#: Ranks that are reported for TinyFace.
RANKS = (1, 5, 20)


@dataclass(frozen=True)
class IdentificationResult:
    """Identification rates; fractions of the probes with a mate.

    Attributes:
        rates: Share of the probes with a mate among the first r, by r.
        cmc: ``cmc[r - 1]``, the same for every r up to the largest one asked for.
        rank: Rank [V] of the nearest mate of each valid probe, from 1.
        valid: Which probes have a mate, bool [Q]; the others are left out.
        num_gallery: G + X.
    """

    rates: dict[int, float]
    cmc: Array
    rank: Array
    valid: Array
    num_gallery: int


def closed_set(
    probe: Matrix,
    gallery: Matrix,
    probe_ids: Labels,
    gallery_ids: Labels,
    *,
    distractors: Matrix | None = None,
    ranks: Sequence[int] = RANKS,
    metric: str = "cosine",
    block_bytes: int = BLOCK_BYTES,
) -> IdentificationResult:
    """Rank the gallery for every probe; neither the distances nor a joined gallery are ever held at once.

    Args:
        probe: Embeddings [Q, D]; need not be normalised.
        gallery: Embeddings [G, D]. Several images of one identity may be there; the nearest one counts.
        probe_ids: Identities [Q].
        gallery_ids: Identities [G]. One that no probe has is a distractor, too.
        distractors: Embeddings [X, D] of people who are no probe's identity.
        ranks: Ranks to report, each >= 1.
        metric: ``cosine`` or ``euclidean``.
        block_bytes: Size of a block of distances.

    Raises:
        DataError: Shapes that do not fit, NaN embeddings, or no probe with a mate.
        ConfigError: Unknown metric, or a rank below 1.
    """
    if not ranks or min(ranks) < 1:
        raise ConfigError("Identification ranks", value=tuple(ranks), expected="one or more numbers from 1 on")
    wanted, present = _identities(probe_ids, probe, "probe"), _identities(gallery_ids, gallery, "gallery")
    codes = np.unique(np.concatenate((wanted, present)), return_inverse=True)[1]
    wanted, present = codes[: len(wanted)], codes[len(wanted) :]
    sides = [("probe", probe), ("gallery", gallery)] + ([] if distractors is None else [("distractors", distractors)])
    for side, features in sides:
        _check_numbers(features, side)

    best = np.full(len(wanted), np.inf)
    before = np.zeros(len(wanted), dtype=np.int64)
    for start, distances in distance_blocks(probe, gallery, metric, block_bytes=block_bytes):
        part = slice(start, start + len(distances))
        mates = wanted[part, None] == present
        best[part] = np.where(mates, distances, np.inf).min(1, initial=np.inf)
        before[part] = np.count_nonzero((distances <= best[part, None]) & ~mates, axis=1)
    valid = np.isfinite(best)
    if not valid.any():
        raise DataError(
            f"None of the {len(wanted)} probes has a mate among the {len(present)} gallery images",
            expected="gallery images of the probes' identities",
            remedy="Check how identities are read from the file names of both sides.",
        )
    num_gallery = len(present)
    if distractors is not None:
        num_gallery += len(distractors)
        for start, distances in distance_blocks(probe, distractors, metric, block_bytes=block_bytes):
            part = slice(start, start + len(distances))
            before[part] += np.count_nonzero(distances <= best[part, None], axis=1)
    return _result(before[valid] + 1, valid, num_gallery, ranks)


def by_group(result: IdentificationResult, groups: Labels) -> dict[int, IdentificationResult]:
    """The result of each group of probes on its own.

    Args:
        result: Of all probes.
        groups: Group number [Q] of every probe, such as SCface's distance.

    Raises:
        DataError: Not one number per probe, or a group without a probe that has a mate.
    """
    numbers = to_numpy(groups)
    if numbers.shape != result.valid.shape:
        raise DataError("Shape of groups", value=numbers.shape, expected=f"{result.valid.shape}, one per probe")
    parts = {}
    for number in np.unique(numbers).tolist():
        chosen = numbers == number
        rank = result.rank[chosen[result.valid]]
        if not len(rank):
            raise DataError(f"No probe of group {number} has a mate in the gallery")
        parts[number] = _result(rank, result.valid & chosen, result.num_gallery, sorted(result.rates))
    return parts


def scface(embeddings: Matrix, names: Sequence[str], *, ranks: Sequence[int] = (1,)) -> dict[int, IdentificationResult]:
    """Closed-set identification at SCface's three distances.

    Args:
        embeddings: Of all images, [N, D].
        names: Their file names, N of them; see :func:`~qsd_plugin.data.scface.scface_split`.
        ranks: Ranks to report.

    Returns:
        Results by distance, 1 (4.2 m), 2 (2.6 m) and 3 (1.0 m).
    """
    if len(names) != len(embeddings):
        raise DataError("Number of SCface names", value=len(names), expected=f"{len(embeddings)}, one per embedding")
    split = scface_split(names)
    features = to_numpy(embeddings)
    result = closed_set(features[split.probe], features[split.gallery], split.probe_ids, split.gallery_ids, ranks=ranks)
    return by_group(result, split.distance)


def _result(rank: Array, valid: Array, num_gallery: int, ranks: Sequence[int]) -> IdentificationResult:
    length = max(ranks)
    cmc = np.bincount(rank.clip(max=length + 1), minlength=length + 2)[1 : length + 1].cumsum() / len(rank)
    return IdentificationResult({int(r): float(cmc[r - 1]) for r in ranks}, cmc, rank, valid, num_gallery)


def _identities(values: Labels, features: Matrix, side: str) -> Array:
    identities = to_numpy(values)
    if identities.shape != (len(features),):
        raise DataError(
            f"Shape of {side}_ids", value=identities.shape, expected=f"({len(features)},), one per embedding"
        )
    return identities


def _check_numbers(features: Matrix, side: str) -> None:
    bad = to_features(features).isnan().any(1).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"Embeddings of {len(bad)} {side} images contain NaN (first row: {bad[0]})",
            expected="numbers",
            remedy="Check these images and the network; a diverged network produces NaN.",
        )
