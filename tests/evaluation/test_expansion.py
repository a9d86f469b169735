"""Query expansion against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.expansion import expand_queries


def expand_by_loop(features: Array, times: int, neighbours: int, alpha: float) -> Array:
    for _ in range(times):
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        cosines = unit @ unit.T
        rows = []
        for row in cosines:
            near = np.argsort(-row)[:neighbours]
            rows.append(sum(max(row[i], 0) ** alpha * features[i] for i in near) / neighbours)
        features = np.array(rows)
    return features


@pytest.mark.parametrize(
    ("times", "neighbours", "alpha"), [(0, 5, 3.0), (1, 5, 3.0), (2, 3, 2.5), (1, 1, 0.5), (3, 8, 1.0)]
)
def test_expansion_is_the_weighted_mean(times: int, neighbours: int, alpha: float) -> None:
    rng = np.random.default_rng(0)
    # Positive features: no negative cosine, for which whole and other exponents differ.
    query, gallery = rng.random((30, 12)), rng.random((90, 12))
    expanded = expand_queries(query, gallery, times=times, neighbours=neighbours, alpha=alpha, rows=16)
    expected = expand_by_loop(np.concatenate((query, gallery)), times, neighbours, alpha)
    np.testing.assert_allclose(expanded[0], expected[:30], atol=1e-12)
    np.testing.assert_allclose(expanded[1], expected[30:], atol=1e-12)


def test_negative_neighbours_weigh_nothing_under_a_fractional_exponent() -> None:
    query, gallery = np.array([[1.0, 0.0]]), np.array([[-1.0, 0.1], [-1.0, -0.1]])
    first, _ = expand_queries(query, gallery, neighbours=3, alpha=0.5)
    np.testing.assert_allclose(first, [[1 / 3, 0]], atol=1e-12)


def test_fewer_images_than_neighbours() -> None:
    query, gallery = torch.rand(1, 4, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)
    few = expand_queries(query, gallery, neighbours=3)
    many = expand_queries(query, gallery, neighbours=30)
    assert few[0].equal(many[0])
    assert few[1].equal(many[1])


def test_bad_arguments() -> None:
    sides = np.ones((2, 3)), np.ones((4, 3))
    with pytest.raises(ConfigError, match=r"Number of query expansion rounds: got -1; expected 0 or more"):
        expand_queries(*sides, times=-1)
    with pytest.raises(ConfigError, match=r"Number of query expansion neighbours: got 0; expected 1 or more"):
        expand_queries(*sides, neighbours=0)
