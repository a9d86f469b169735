"""The host's evaluation functions in our hands: same arguments, same results, exact, fast and in bounded memory."""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.distances import distance_blocks
from qsd_plugin.evaluation.expansion import expand_queries
from qsd_plugin.evaluation.ground_truth import GroundTruth
from qsd_plugin.evaluation.rerank import jaccard_distances, rerank_blocks
from qsd_plugin.evaluation.retrieval import MAX_RANK, Ranker, rank_distances
from qsd_plugin.evaluation.roc import RocCounter

logger = logging.getLogger(__name__)


def evaluate_rank(
    distmat: Array,
    q_pids: Array,
    g_pids: Array,
    q_camids: Array,
    g_camids: Array,
    max_rank: int = MAX_RANK,
    use_metric_cuhk03: bool = False,
    use_cython: bool = True,
) -> tuple[Any, ...]:
    """The host's ``evaluate_rank``: CMC, average precisions and inverse negative penalties of a distance matrix.

    Args:
        distmat: Distances [Q, G].
        q_pids: Query identities [Q].
        g_pids: Gallery identities [G].
        q_camids: Query cameras [Q].
        g_camids: Gallery cameras [G].
        max_rank: Longest CMC rank.
        use_metric_cuhk03: CUHK03's old protocol, drawn at random; the host's own function computes it.
        use_cython: Accepted for the host's sake; there is nothing to compile.
    """
    if use_metric_cuhk03:
        from fastreid.evaluation import rank

        return tuple(rank.eval_cuhk03(distmat, q_pids, g_pids, q_camids, g_camids, max_rank))
    result = rank_distances(distmat, q_pids, g_pids, q_camids, g_camids, max_rank=max_rank)
    return result.cmc.astype(np.float32), result.ap, result.inp


def with_cpu_jaccard(host_build_dist: Callable[..., Array]) -> Callable[..., Array]:
    """The host's ``build_dist`` with the Jaccard distance of re-ranking computed sparsely and without a GPU."""

    def build_dist(feat_1: torch.Tensor, feat_2: torch.Tensor, metric: str = "euclidean", **kwargs: Any) -> Array:
        if metric == "jaccard":
            return jaccard_distances(feat_1, feat_2, k1=kwargs["k1"], k2=kwargs["k2"])
        return host_build_dist(feat_1, feat_2, metric, **kwargs)

    return build_dist


def evaluate(evaluator: Any) -> OrderedDict[str, float]:
    """``ReidEvaluator.evaluate``: the host's results under the host's names, block by block.

    Neither the distance matrix nor an ordering of it is ever held. One number differs from the host's on purpose:
    ``TPR@FPR`` is the share of genuine pairs accepted by a threshold that accepts at most that share of impostor pairs.
    The host calls impostors positive and looks up the nearest point of a thinned-out curve, which gives 0 for a perfect
    model.

    Args:
        evaluator: The host's evaluator, which has processed the queries and then the gallery.

    Returns:
        ``Rank-1``, ``Rank-5``, ``Rank-10``, ``mAP``, ``mINP`` and ``metric`` in per cent, ``TPR@FPR=...`` as fractions;
        nothing on ranks other than the first.

    Raises:
        DataError: No query has a match, or embeddings are NaN.
    """
    found = gathered(evaluator)
    if found is None:
        return OrderedDict()
    features, pids, camids = found
    num_query = evaluator._num_query
    query, gallery = features[:num_query], features[num_query:]
    truth = GroundTruth(pids[:num_query], pids[num_query:], camids[:num_query], camids[num_query:])

    ranker = Ranker(truth)
    roc = RocCounter(truth) if evaluator.cfg.TEST.ROC.ENABLED else None
    for start, distances in compared(evaluator.cfg, query, gallery):
        ranker.add(start, distances)
        if roc is not None:
            roc.add(start, distances)

    result = ranker.result()
    results = OrderedDict((f"Rank-{k}", 100 * float(result.cmc[:k][-1])) for k in (1, 5, 10))
    results["mAP"] = 100 * result.mAP
    results["mINP"] = 100 * result.mINP
    results["metric"] = 50 * (result.mAP + float(result.cmc[0]))
    if roc is not None:
        results.update((f"TPR@FPR={target:.0e}", rate) for target, rate in roc.result().items())
    evaluator._results = results
    return results.copy()


def gathered(evaluator: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Embeddings [N, D], identities [N] and cameras [N] that an evaluator of the host has processed on all ranks.

    ``None`` on ranks other than the first.
    """
    from fastreid.utils import comm

    predictions = evaluator._predictions
    if comm.get_world_size() > 1:
        comm.synchronize()
        predictions = list(itertools.chain(*comm.gather(predictions, dst=0)))
        if not comm.is_main_process():
            return None
    features, pids, camids = (torch.cat([part[key] for part in predictions]) for key in ("feats", "pids", "camids"))
    return features, pids, camids


def compared(cfg: Any, query: torch.Tensor, gallery: torch.Tensor) -> Iterator[tuple[int, Array]]:
    """Distances of embeddings [Q, D] and [G, D] as ``cfg.TEST`` wants them, as ``(first query, distances [B, G])``."""
    options = cfg.TEST
    if options.AQE.ENABLED:
        logger.info("Test with AQE setting")
        aqe = options.AQE
        query, gallery = expand_queries(query, gallery, times=aqe.QE_TIME, neighbours=aqe.QE_K, alpha=aqe.ALPHA)
    if options.RERANK.ENABLED:
        logger.info("Test with rerank setting")
        rerank = options.RERANK
        yield from rerank_blocks(
            query, gallery, metric=options.METRIC, k1=rerank.K1, k2=rerank.K2, lambda_value=rerank.LAMBDA
        )
    else:
        yield from distance_blocks(query, gallery, options.METRIC)
