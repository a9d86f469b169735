"""Exact retrieval metrics: CMC, mAP and mINP of single-query person re-identification, in bounded memory.

Shapes: Q queries, G gallery images, D embedding dimension, V queries with at least one positive.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qsd_plugin.core.errors import DataError
from qsd_plugin.evaluation.arrays import Array, Labels, Matrix
from qsd_plugin.evaluation.distances import distance_blocks, row_blocks
from qsd_plugin.evaluation.ground_truth import GroundTruth

MAX_RANK = 50
#: Share of the gallery up to a query's last positive above which sorting the whole row beats picking the negatives.
_PICK_UP_TO = 0.5


@dataclass(frozen=True)
class RetrievalResult:
    """Ranking quality; all values are fractions.

    Attributes:
        cmc: ``cmc[k - 1]``, the share of valid queries with a positive among the first k; at most ``max_rank`` values.
        ap: Average precision [V] of the valid queries, in query order.
        inp: Inverse negative penalty [V]: number of positives over the rank of the last one
            (Ye et al., TPAMI 2021, "Deep learning for person re-identification: a survey and outlook").
        mAP: Mean of ``ap``.
        mINP: Mean of ``inp``.
        num_valid: V; queries without a positive in the gallery are skipped.
        valid: Which queries those are, bool [Q].
        first_hit: Rank of the first positive [V], from 1.
    """

    cmc: Array
    ap: Array
    inp: Array
    mAP: float  # noqa: N815 - the field's names
    mINP: float  # noqa: N815
    num_valid: int
    valid: Array
    first_hit: Array


def rank(
    query: Matrix,
    gallery: Matrix,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels | None = None,
    gallery_cams: Labels | None = None,
    *,
    metric: str = "cosine",
    max_rank: int = MAX_RANK,
) -> RetrievalResult:
    """Rank the gallery for every query; the Q x G distances are never held at once.

    Args:
        query: Embeddings [Q, D]; need not be normalised.
        gallery: Embeddings [G, D].
        query_ids: Identities [Q].
        gallery_ids: Identities [G].
        query_cams: Cameras [Q]; gallery images of the query's identity and camera are left out. ``None`` for both
            sides: nothing is left out.
        gallery_cams: Cameras [G].
        metric: ``cosine`` or ``euclidean``.
        max_rank: Longest CMC rank.

    Raises:
        DataError: Shapes that do not fit, NaN embeddings, or no query with a match.
        ConfigError: Unknown metric.
    """
    truth = GroundTruth(query_ids, gallery_ids, query_cams, gallery_cams)
    truth.check_shape((len(query), len(gallery)), "embeddings")
    return rank_blocks(distance_blocks(query, gallery, metric), truth, max_rank=max_rank)


def rank_distances(
    distances: Matrix,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels | None = None,
    gallery_cams: Labels | None = None,
    *,
    max_rank: int = MAX_RANK,
) -> RetrievalResult:
    """Like :func:`rank` for given distances [Q, G] of any float type, which are compared as they are.

    A positive and a negative at the same distance come in the order of ``numpy.argsort``, fast-reid's.
    """
    truth = GroundTruth(query_ids, gallery_ids, query_cams, gallery_cams)
    truth.check_shape(tuple(distances.shape), "distances")
    return rank_blocks(row_blocks(distances), truth, max_rank=max_rank)


def rank_blocks(
    blocks: Iterable[tuple[int, Array]], truth: GroundTruth, *, max_rank: int = MAX_RANK
) -> RetrievalResult:
    """Like :func:`rank_distances` for distances that arrive as ``(first query, distances [B, G])``."""
    ranker = Ranker(truth, max_rank=max_rank)
    for start, distances in blocks:
        ranker.add(start, distances)
    return ranker.result()


class Ranker:
    """Takes distances block by block, in any order, and gives the metrics at the end.

    Only how many negatives precede each positive matters, so distances are sorted and no indices, and where the last
    positive comes early only the distances up to it. Queries with a negative exactly as far as a positive depend on the
    order of equal distances and take the full ``argsort``.

    Args:
        truth: Which gallery images count for which query.
        max_rank: Longest CMC rank.
    """

    def __init__(self, truth: GroundTruth, *, max_rank: int = MAX_RANK) -> None:
        self._truth = truth
        self._max_rank = max_rank
        self._first_hit = np.zeros(truth.num_query, dtype=np.int64)  # 0: no positive
        self._ap = np.zeros(truth.num_query)
        self._inp = np.zeros(truth.num_query)

    def add(self, start: int, distances: Array) -> None:
        """Rank the queries ``start, start + 1, ...`` by their ``distances`` [B, G].

        Raises:
            DataError: A distance is NaN.
        """
        invalid = np.flatnonzero(np.isnan(distances.min(axis=1, initial=0)))
        if len(invalid):
            shown = ", ".join(str(start + row) for row in invalid[:10]) + (", ..." if len(invalid) > 10 else "")
            raise DataError(
                f"Distances of {len(invalid)} queries contain NaN (query rows {shown})",
                expected="numbers",
                remedy="Check the embeddings of these queries and of the gallery; a diverged network produces NaN.",
            )
        # One thread: these calls are too short to share the interpreter lock, two threads take twice as long.
        mask = np.empty(distances.shape[1], dtype=bool)
        for query, row in enumerate(np.ascontiguousarray(distances), start):
            matches, is_positive = self._truth.matches(query)
            if is_positive.any():
                ranks = _positive_ranks(row, matches, is_positive, mask)
                self._first_hit[query] = ranks[0]
                self._ap[query] = (np.arange(1, len(ranks) + 1) / ranks).mean()
                self._inp[query] = len(ranks) / ranks[-1]

    def result(self) -> RetrievalResult:
        """The metrics of all queries added.

        Raises:
            DataError: No query has a positive in the gallery.
        """
        valid = self._first_hit > 0
        num_valid = int(valid.sum())
        if not num_valid:
            raise DataError(
                f"None of the {self._truth.num_query} queries has a match among the {self._truth.num_gallery} gallery "
                "images",
                expected="gallery images of the queries' identities from other cameras",
                remedy="Check that query and gallery share identities, and that the cameras are told apart.",
            )
        first_hit, ap, inp = self._first_hit[valid], self._ap[valid], self._inp[valid]
        length = min(self._max_rank, self._truth.num_gallery)
        hits = np.bincount(first_hit, minlength=length + 1)[1 : length + 1].cumsum()
        return RetrievalResult(
            cmc=hits / num_valid,
            ap=ap,
            inp=inp,
            mAP=float(ap.mean()),
            mINP=float(inp.mean()),
            num_valid=num_valid,
            valid=valid,
            first_hit=first_hit,
        )


def _positive_ranks(row: Array, matches: Array, is_positive: Array, mask: Array) -> Array:
    """Ascending ranks, from 1, of the positives among positives and negatives of one query.

    Args:
        row: Distances [G].
        matches: Gallery indices of positives and junk.
        is_positive: Which of ``matches`` are positives.
        mask: Scratch memory, bool [G].
    """
    positives = np.sort(row[matches[is_positive]])
    np.less_equal(row, positives[-1], out=mask)
    if np.count_nonzero(mask) <= _PICK_UP_TO * len(row):
        mask[matches] = False
        negatives = np.sort(row.compress(mask))
        before, up_to = _below_and_up_to(negatives, positives)
    else:
        # Count among all images, then take off the matches themselves.
        before, up_to = _below_and_up_to(np.sort(row), positives)
        for others in (positives, np.sort(row[matches[~is_positive]])):
            below, equal_or_below = _below_and_up_to(others, positives)
            before, up_to = before - below, up_to - equal_or_below
    if np.array_equal(before, up_to):
        return before + np.arange(1, len(positives) + 1)
    order = np.argsort(row)
    mask[:] = True
    mask[matches[~is_positive]] = False
    kept = order[mask[order]]
    mask[:] = False
    mask[matches[is_positive]] = True
    return np.flatnonzero(mask[kept]) + 1


def _below_and_up_to(ordered: Array, values: Array) -> tuple[Array, Array]:
    """How many of ``ordered`` (ascending) are below each value, and how many are not above it."""
    return ordered.searchsorted(values, side="left"), ordered.searchsorted(values, side="right")
