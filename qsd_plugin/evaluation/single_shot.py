"""Single-shot retrieval: one gallery image of every person is drawn, and the expectation over the draws is reported.

With one right image per draw, average precision is the reciprocal rank, so the "mAP" of papers with this protocol
(CAVIAR, CUHK03, VIPeR and their low-resolution forms) is a mean reciprocal rank. The mean of average
precisions over all gallery images is :attr:`~qsd_plugin.evaluation.retrieval.RetrievalResult.mAP`.

Shapes: Q queries, G gallery images, V queries with a match, P people in the gallery, K ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.evaluation.arrays import Array, Labels, Matrix
from qsd_plugin.evaluation.distances import distance_blocks, row_blocks
from qsd_plugin.evaluation.ground_truth import GroundTruth
from qsd_plugin.evaluation.retrieval import MAX_RANK

#: Draws of the authors of DIL, and of most programs with this protocol.
AUTHORS_DRAWS = 100


@dataclass(frozen=True)
class SingleShotResult:
    """Ranking quality; all values are fractions, and means over the draws.

    Attributes:
        cmc: ``cmc[k - 1]``, the share of valid queries whose match is among the first k people; K values.
        reciprocal: Mean reciprocal rank of each valid query, [V], in query order.
        hits: Share of draws in which the match is among the first k, [V, K].
        mean_reciprocal: Mean of ``reciprocal``; the "mAP" of papers with this protocol.
        num_valid: V; queries without a match in the gallery are skipped.
        valid: Which queries those are, bool [Q].
    """

    cmc: Array
    reciprocal: Array
    hits: Array
    mean_reciprocal: float
    num_valid: int
    valid: Array


def rank_single_shot(
    query: Matrix,
    gallery: Matrix,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels | None = None,
    gallery_cams: Labels | None = None,
    *,
    metric: str = "cosine",
    draws: int = 0,
    seed: int = 0,
    max_rank: int = MAX_RANK,
) -> SingleShotResult:
    """Rank one drawn gallery image of every person for every query.

    Args:
        query: Embeddings [Q, D]; need not be normalised.
        gallery: Embeddings [G, D].
        query_ids: Identities [Q].
        gallery_ids: Identities [G].
        query_cams: Cameras [Q]; gallery images of the query's identity and camera are left out before drawing. ``None``
            for both sides: nothing is left out.
        gallery_cams: Cameras [G].
        metric: ``cosine`` or ``euclidean``.
        draws: 0: the exact expectation. Otherwise the mean of so many draws for each query, the authors' 100.
        seed: Of the draws.
        max_rank: Longest rank in ``cmc`` and ``hits``.

    Raises:
        DataError: Shapes that do not fit, NaN embeddings, or no query with a match.
        ConfigError: Unknown metric, or fewer than 0 draws.
    """
    truth = GroundTruth(query_ids, gallery_ids, query_cams, gallery_cams)
    truth.check_shape((len(query), len(gallery)), "embeddings")
    return _rank(distance_blocks(query, gallery, metric), truth, draws, seed, max_rank)


def rank_distances_single_shot(
    distances: Matrix,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels | None = None,
    gallery_cams: Labels | None = None,
    *,
    draws: int = 0,
    seed: int = 0,
    max_rank: int = MAX_RANK,
) -> SingleShotResult:
    """Like :func:`rank_single_shot` for given distances [Q, G]; equal ones come in the order of ``numpy.argsort``."""
    truth = GroundTruth(query_ids, gallery_ids, query_cams, gallery_cams)
    truth.check_shape(tuple(distances.shape), "distances")
    return _rank(row_blocks(distances), truth, draws, seed, max_rank)


class SingleShotRanker:
    """Takes distances block by block, from the first query to the last, and gives the metrics at the end.

    Args:
        truth: Which gallery images count for which query.
        draws: 0: the exact expectation; otherwise the mean of so many draws. They are the official program's, number by
            number: a ``RandomState(seed)`` draws for each query and draw an image of every person, people in the order
            of their nearest image.
        seed: Of the draws.
        max_rank: Longest rank.

    Raises:
        ConfigError: Fewer than 0 draws.
    """

    def __init__(self, truth: GroundTruth, *, draws: int = 0, seed: int = 0, max_rank: int = MAX_RANK) -> None:
        if draws < 0:
            raise ConfigError("Single-shot draws", value=draws, expected="0 (exact) or a number of draws, such as 100")
        self._truth, self._draws = truth, draws
        self._generator = np.random.RandomState(seed)  # the official program draws from this one
        self._people = truth.gallery_people
        length = min(max_rank, len(np.unique(self._people)))
        self._hits = np.zeros((truth.num_query, length))
        self._reciprocal = np.zeros(truth.num_query)  # 0: no match

    def add(self, start: int, distances: Array) -> None:
        """Rank the queries ``start, start + 1, ...`` by their ``distances`` [B, G].

        Raises:
            DataError: A distance is NaN.
        """
        if np.isnan(distances).any():
            raise DataError(
                "Distances contain NaN",
                expected="numbers",
                remedy="Check the embeddings; a diverged network produces NaN.",
            )
        for query, row in enumerate(distances, start):
            matches, is_positive = self._truth.matches(query)
            if not is_positive.any():
                continue
            kept = np.ones(len(row), dtype=bool)
            kept[matches[~is_positive]] = False
            order = np.argsort(row)
            people = self._people[order[kept[order]]]
            own = int(self._people[matches[0]])
            pmf = self._drawn(people, own) if self._draws else expected_ranks(people, own)
            cumulative = np.cumsum(pmf)[: self._hits.shape[1]]
            self._hits[query, : len(cumulative)] = cumulative
            self._hits[query, len(cumulative) :] = 1.0
            self._reciprocal[query] = float((pmf / np.arange(1, len(pmf) + 1)).sum())

    def result(self) -> SingleShotResult:
        """The metrics of all queries added.

        Raises:
            DataError: No query has a match in the gallery.
        """
        valid = self._reciprocal > 0
        if not valid.any():
            raise DataError(
                f"None of the {self._truth.num_query} queries has a match among the {self._truth.num_gallery} gallery "
                "images",
                expected="gallery images of the queries' identities from other cameras",
                remedy="Check that query and gallery share identities, and that the cameras are told apart.",
            )
        hits, reciprocal = self._hits[valid], self._reciprocal[valid]
        return SingleShotResult(
            cmc=hits.mean(axis=0),
            reciprocal=reciprocal,
            hits=hits,
            mean_reciprocal=float(reciprocal.mean()),
            num_valid=int(valid.sum()),
            valid=valid,
        )

    def _drawn(self, people: Array, own: int) -> Array:
        """Shares of the ranks in ``draws`` draws."""
        names, first = np.unique(people, return_index=True)
        names = names[np.argsort(first)]  # by nearest image
        by_person = np.argsort(people, kind="stable")
        starts = np.searchsorted(people[by_person], names)
        counts = np.searchsorted(people[by_person], names, side="right") - starts
        chosen = self._generator.randint(0, np.broadcast_to(counts, (self._draws, len(names))))
        places = by_person[starts + chosen]  # [draws, P], in the order of distances
        ahead = (places < places[:, names == own]).sum(axis=1)
        return np.bincount(ahead) / self._draws


def expected_ranks(people: Array, own: int) -> Array:
    """Probability of each rank of the person ``own`` when one image of every person is drawn, all alike.

    If the image of ``own`` is the one at position p, each other person j is ahead with probability q_j: the share of
    j's images before p. People are drawn independently, so their number is Poisson-binomial; the mean over the images
    of ``own`` follows.

    Args:
        people: Whom each image shows, nearest first, without those that are left out. Integers >= 0.
        own: The person searched for, who is among them.

    Returns:
        Probabilities of rank 1, 2, ... up to the last possible one; they sum to 1.
    """
    counts = np.bincount(people)
    places = np.flatnonzero(people == own)
    pmf = np.zeros(np.count_nonzero(counts))
    for place in places:
        ahead = np.bincount(people[:place], minlength=len(counts))
        ahead[own] = 0
        share = ahead[ahead > 0] / counts[ahead > 0]
        certain = int((share == 1).sum())
        number = _poisson_binomial(share[share < 1])
        pmf[certain : certain + len(number)] += number / len(places)
    return pmf[: np.flatnonzero(pmf)[-1] + 1]


def _poisson_binomial(probabilities: Array) -> Array:
    """Distribution of the number of successes, 0 to n, of independent trials."""
    pmf = np.zeros(len(probabilities) + 1)
    pmf[0] = 1.0
    for done, probability in enumerate(probabilities, 1):
        pmf[1 : done + 1] += probability * (pmf[:done] - pmf[1 : done + 1])
        pmf[0] *= 1.0 - probability
    return pmf


def _rank(
    blocks: Iterable[tuple[int, Array]], truth: GroundTruth, draws: int, seed: int, max_rank: int
) -> SingleShotResult:
    ranker = SingleShotRanker(truth, draws=draws, seed=seed, max_rank=max_rank)
    for start, distances in blocks:
        ranker.add(start, distances)
    return ranker.result()
