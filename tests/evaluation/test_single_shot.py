"""Single-shot ranking: the recorded values, every possible draw, a generating function, and sampling."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.retrieval import rank
from qsd_plugin.evaluation.single_shot import (
    AUTHORS_DRAWS,
    expected_ranks,
    rank_distances_single_shot,
    rank_single_shot,
)

GOLDEN = Path(__file__).parents[1] / "data" / "dil_rankings.npz"


def problem(seed: int, queries: int = 6, gallery: int = 13, ids: int = 4, cams: int = 3) -> tuple[Array, ...]:
    """Random distances with equal ones among them, identities and cameras; every identity is in the gallery."""
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 30, (queries, gallery)).astype(np.float64),
        rng.integers(0, ids, queries),
        np.concatenate([np.arange(ids), rng.integers(0, ids, gallery - ids)]),
        rng.integers(0, cams, queries),
        rng.integers(0, cams, gallery),
    )


def every_draw(row: Array, identity: int, camera: int, ids: Array, cams: Array) -> list[int]:
    """The rank of the match in every combination of one image per person; empty without a match."""
    order = [at for at in np.argsort(row) if not (ids[at] == identity and cams[at] == camera)]
    groups = [[place for place, at in enumerate(order) if ids[at] == person] for person in dict.fromkeys(ids.tolist())]
    groups = [group for group in groups if group]
    if not any(ids[order[group[0]]] == identity for group in groups):
        return []
    own = next(n for n, group in enumerate(groups) if ids[order[group[0]]] == identity)
    return [1 + sum(place < drawn[own] for place in drawn) for drawn in itertools.product(*groups)]


@pytest.mark.parametrize("seed", range(8))
def test_the_expectation_is_the_mean_over_all_draws(seed: int) -> None:
    distances, query_ids, gallery_ids, query_cams, gallery_cams = problem(seed)
    result = rank_distances_single_shot(distances, query_ids, gallery_ids, query_cams, gallery_cams)
    drawn = [
        every_draw(row, identity, camera, gallery_ids, gallery_cams)
        for row, identity, camera in zip(distances, query_ids, query_cams, strict=True)
    ]
    np.testing.assert_array_equal(result.valid, [bool(ranks) for ranks in drawn])
    ranks = [np.array(ranks) for ranks in drawn if ranks]
    for k in range(result.hits.shape[1]):
        np.testing.assert_allclose(result.hits[:, k], [np.mean(found <= k + 1) for found in ranks], atol=1e-12)
    np.testing.assert_allclose(result.reciprocal, [np.mean(1 / found) for found in ranks], atol=1e-12)
    np.testing.assert_allclose(result.cmc, result.hits.mean(axis=0), atol=1e-15)
    assert result.mean_reciprocal == pytest.approx(result.reciprocal.mean())
    assert result.num_valid == len(ranks)


@pytest.mark.parametrize("seed", range(4))
def test_the_mean_reciprocal_rank_is_the_integral_of_the_generating_function(seed: int) -> None:
    """E[1 / (1 + X)] is the integral of E[t^X] over 0 to 1, a polynomial that Gauss-Legendre integrates exactly."""
    rng = np.random.default_rng(seed)
    people = rng.permutation(np.repeat(np.arange(40), rng.integers(1, 6, 40)))
    nodes, weights = np.polynomial.legendre.leggauss(25)
    nodes, weights = (nodes + 1) / 2, weights / 2
    counts, expected = np.bincount(people), 0.0
    places = np.flatnonzero(people == 3)
    for place in places:
        share = np.bincount(people[:place], minlength=40) / counts
        share[3] = 0
        values = np.prod(1 - share[:, None] * (1 - nodes), axis=0)
        expected += float((weights * values).sum()) / len(places)
    pmf = expected_ranks(people, 3)
    assert pmf.sum() == pytest.approx(1, abs=1e-12)
    assert (pmf / np.arange(1, len(pmf) + 1)).sum() == pytest.approx(expected, abs=1e-12)


def test_sampling_approaches_the_expectation_at_the_rate_of_its_standard_error() -> None:
    distances, *labels = problem(3, queries=5)
    exact = rank_distances_single_shot(distances, *labels)
    draws = 4000
    sampled = rank_distances_single_shot(distances, *labels, draws=draws, seed=7)
    error = np.sqrt(exact.hits * (1 - exact.hits) / draws)
    np.testing.assert_array_less(np.abs(sampled.hits - exact.hits), 4 * error + 1e-9)
    np.testing.assert_allclose(sampled.reciprocal, exact.reciprocal, atol=4 * 0.5 / np.sqrt(draws))
    assert (np.abs(sampled.hits - exact.hits) > 0.2 * error)[error > 0].any(), "no draw was made"


def test_recorded_values_of_the_official_program() -> None:
    """Its samples number by number, and the closed form of the specification's own derivation."""
    golden = np.load(GOLDEN)
    inputs = [golden[key] for key in ("q", "g", "ql", "gl", "qc", "gc")]
    exact = rank_single_shot(*inputs)
    np.testing.assert_allclose(exact.cmc, golden["single.exact/cmc"], atol=1e-12)
    assert exact.mean_reciprocal == pytest.approx(float(golden["single.exact/map"]), abs=1e-12)
    for draws in (10, AUTHORS_DRAWS):
        sampled = rank_single_shot(*inputs, draws=draws, seed=0)
        np.testing.assert_allclose(sampled.cmc, golden[f"single(N={draws},seed0)/cmc"], atol=1e-6)
        assert sampled.mean_reciprocal == pytest.approx(float(golden[f"single(N={draws},seed0)/map"]), abs=1e-12)
    many = rank_single_shot(*inputs, draws=5000, seed=1)
    np.testing.assert_allclose(many.cmc, golden["single(N=5000,seed1)/cmc"], atol=1e-6)
    np.testing.assert_allclose(rank(*inputs).cmc, golden["multi/cmc"][: len(rank(*inputs).cmc)], atol=1e-6)


def test_one_image_per_person_is_plain_retrieval_and_draws_change_nothing() -> None:
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(7, 4)), rng.normal(size=(9, 4))
    labels = rng.integers(0, 9, 7), np.arange(9)
    plain, exact = rank(query, gallery, *labels), rank_single_shot(query, gallery, *labels)
    np.testing.assert_allclose(exact.cmc, plain.cmc)
    assert exact.mean_reciprocal == pytest.approx(
        plain.mAP
    )  # one right image: average precision is the reciprocal rank
    np.testing.assert_allclose(rank_single_shot(query, gallery, *labels, draws=3).hits, exact.hits)


def test_a_person_left_out_by_the_camera_does_not_count() -> None:
    """The query's own image in its own camera is nearer than everything, and is never drawn."""
    result = rank_distances_single_shot(np.array([[0.0, 1.0, 2.0, 3.0]]), [0], [0, 1, 0, 1], [5], [5, 6, 6, 6])
    np.testing.assert_allclose(result.hits, [[0.5, 1.0]])
    assert result.mean_reciprocal == pytest.approx(0.75)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"Single-shot draws: got -1; expected 0 \(exact\)"):
        rank_distances_single_shot(np.zeros((1, 1)), [0], [0], draws=-1)
    with pytest.raises(DataError, match="None of the 1 queries has a match among the 2 gallery images"):
        rank_distances_single_shot(np.zeros((1, 2)), [0], [1, 2])
    with pytest.raises(DataError, match="Distances contain NaN"):
        rank_distances_single_shot(np.array([[0.0, np.nan]]), [0], [0, 1])
