"""S7: re-ranking without a GPU, equal to the host's own CPU search; query expansion beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.evaluation.expansion import expand_queries


def embeddings(seed: int, dim: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """120 queries and 380 gallery images of 40 identities, normalised."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, dim, generator=generator)
    features = centres[torch.randint(40, (500,), generator=generator)] + 0.8 * torch.randn(
        500, dim, generator=generator
    )
    features = torch.nn.functional.normalize(features)
    return features[:120], features[120:]


@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (9, 1), (5, 4)])
def test_s07_reranking_runs_without_a_gpu(k1: int, k2: int) -> None:
    from fastreid.evaluation import reid_evaluation
    from fastreid.utils import compute_dist

    query, gallery = embeddings(0)
    ours = reid_evaluation.build_dist(query, gallery, metric="jaccard", k1=k1, k2=k2)
    cpu_search = 3
    host = compute_dist.compute_jaccard_distance(torch.cat((query, gallery)), k1=k1, k2=k2, search_option=cpu_search)
    assert ours.dtype == host.dtype
    np.testing.assert_allclose(ours, host[:120, 120:], rtol=0, atol=1e-5)
    assert compute_dist.build_dist is reid_evaluation.build_dist


def test_s07_other_metrics_stay_the_hosts() -> None:
    from fastreid.utils import compute_dist

    query, gallery = embeddings(1)
    cosine = compute_dist.build_dist(query, gallery, "cosine")
    np.testing.assert_array_equal(cosine, compute_dist.compute_cosine_distance(query, gallery))
    squared = compute_dist.build_dist(query, gallery)
    np.testing.assert_array_equal(squared, compute_dist.compute_euclidean_distance(query, gallery))


@pytest.mark.parametrize(("times", "neighbours", "alpha"), [(1, 5, 3.0), (2, 10, 2.0)])
def test_query_expansion_is_the_hosts(times: int, neighbours: int, alpha: float) -> None:
    from fastreid.evaluation.query_expansion import aqe

    query, gallery = (3 * side for side in embeddings(2))
    host = aqe(query, gallery, times, neighbours, alpha)
    ours = expand_queries(query, gallery, times=times, neighbours=neighbours, alpha=alpha)
    for mine, theirs in zip(ours, host, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
