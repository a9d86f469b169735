"""Ranking against the recorded values, a plain loop over a stable order, and the hard cases: ties, junk, no match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.distances import distance_blocks
from qsd_plugin.evaluation.ground_truth import GroundTruth
from qsd_plugin.evaluation.retrieval import Ranker, RetrievalResult, rank, rank_blocks, rank_distances

GOLDEN = Path(__file__).parents[1] / "data" / "retrieval.npz"


@pytest.fixture(autouse=True, params=["negatives picked", "whole rows"])
def _both_ways_of_counting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for queries whose last positive comes early and for those where it comes late."""
    limit = 1.0 if request.param == "negatives picked" else -1.0
    monkeypatch.setattr("qsd_plugin.evaluation.retrieval._PICK_UP_TO", limit)


def problem(seed: int, queries: int = 37, gallery: int = 211, ids: int = 12, cams: int = 4) -> tuple[Array, ...]:
    """Random distances with random identities and cameras: (distances, query ids, gallery ids, query cams, cams)."""
    rng = np.random.default_rng(seed)
    return (
        rng.random((queries, gallery), dtype=np.float32),
        rng.integers(0, ids, queries),
        rng.integers(0, ids, gallery),
        rng.integers(0, cams, queries),
        rng.integers(0, cams, gallery),
    )


def plain_loop(
    distances: Array, query_ids: Array, gallery_ids: Array, query_cams: Array, gallery_cams: Array, max_rank: int = 50
) -> dict[str, Any]:
    """The definitions, one gallery image after the other; equal distances in the order of ``numpy.argsort``."""
    hits, precisions, penalties = np.zeros(min(max_rank, distances.shape[1])), [], []
    for row, identity, camera in zip(distances, query_ids, query_cams, strict=True):
        seen, found_at = 0, []
        for index in np.argsort(row):
            if gallery_ids[index] == identity and gallery_cams[index] == camera:
                continue
            seen += 1
            if gallery_ids[index] == identity:
                found_at.append(seen)
        if found_at:
            hits[found_at[0] - 1 :] += 1
            precisions.append(sum((n + 1) / place for n, place in enumerate(found_at)) / len(found_at))
            penalties.append(len(found_at) / found_at[-1])
    return {"cmc": hits / len(precisions), "ap": np.array(precisions), "inp": np.array(penalties)}


def assert_same(result: RetrievalResult, expected: dict[str, Any]) -> None:
    np.testing.assert_array_equal(result.cmc, expected["cmc"])
    np.testing.assert_allclose(result.ap, expected["ap"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(result.inp, expected["inp"])
    assert result.num_valid == len(expected["ap"]) == result.valid.sum()
    assert result.mAP == pytest.approx(expected["ap"].mean(), abs=1e-12)
    assert result.mINP == pytest.approx(expected["inp"].mean(), abs=1e-12)


def test_golden_values() -> None:
    golden = np.load(GOLDEN)
    normalised = [golden[key] / np.linalg.norm(golden[key], axis=1, keepdims=True) for key in ("qf", "gf")]
    labels = [golden[key] for key in ("q_pids", "g_pids", "q_camids", "g_camids")]
    for result in (rank(golden["qf"], golden["gf"], *labels), rank(*normalised, *labels, metric="euclidean")):
        np.testing.assert_allclose(result.cmc, golden["cmc"], atol=1e-6)
        assert result.mAP == pytest.approx(float(golden["mAP"]), abs=1e-6)
        assert result.mINP == pytest.approx(float(golden["mINP"]), abs=1e-6)
    assert result.cmc[0] == pytest.approx(0.3076923, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_matches_a_plain_loop(seed: int) -> None:
    sizes = np.random.default_rng(100 + seed)
    case = problem(
        seed,
        int(sizes.integers(1, 40)),
        int(sizes.integers(1, 300)),
        int(sizes.integers(1, 30)),
        int(sizes.integers(2, 7)),
    )
    assert_same(rank_distances(*case), plain_loop(*case))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_ties_come_in_the_order_of_argsort(dtype: type) -> None:
    distances, *labels = problem(3)
    coarse = np.round(distances * 20).astype(dtype)  # about ten gallery images at every distance
    assert_same(rank_distances(coarse, *labels), plain_loop(coarse, *labels))


def test_compares_in_the_given_precision() -> None:
    distances, *labels = problem(4)
    close = 1 + distances.astype(np.float64) * 1e-9  # all equal in float32
    assert_same(rank_distances(close, *labels), plain_loop(distances.astype(np.float64), *labels))
    assert rank_distances(close, *labels).mAP != rank_distances(close.astype(np.float32), *labels).mAP


def test_only_tied_queries_are_ordered_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full argsort is for queries with a negative as far as a positive; junk and other positives do not count."""
    distances, *labels = problem(19)
    truth = GroundTruth(*labels)
    for query in range(3):  # distances that positives share with each other and with junk
        distances[query, truth.matches(query)[0]] = 0.25
    matches, is_positive = truth.matches(5)
    negative = np.setdiff1d(np.arange(211), matches)[0]
    distances[5, negative] = distances[5, matches[is_positive][0]]
    expected, ordered = plain_loop(distances, *labels), []
    argsort = np.argsort
    monkeypatch.setattr(np, "argsort", lambda row: ordered.append(row) or argsort(row))
    assert_same(rank_blocks([(0, distances)], truth), expected)
    np.testing.assert_array_equal(ordered, distances[5:6])


def test_all_distances_equal() -> None:
    distances, *labels = problem(5)
    distances[:] = 0.25
    assert_same(rank_distances(distances, *labels), plain_loop(distances, *labels))


def test_infinite_distances() -> None:
    distances, *labels = problem(6)
    distances[distances > 0.5] = np.inf
    distances[distances < 0.1] = -np.inf
    assert_same(rank_distances(distances, *labels), plain_loop(distances, *labels))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_long_rows(dtype: type) -> None:
    """Half precision ties, and far outliers on either side."""
    distances, *labels = problem(18, queries=8, gallery=6000)
    distances[::2, ::500] = 3e4
    distances[1::2, ::500] = -3e4
    assert_same(rank_distances(distances.astype(dtype), *labels), plain_loop(distances.astype(dtype), *labels))


def test_a_tie_with_junk_changes_nothing() -> None:
    # Query of identity 0, camera 0: junk at 0.1 and 0.3, positives at 0.1 and 0.3, a negative at 0.2.
    distances = np.array([[0.1, 0.1, 0.2, 0.3, 0.3]])
    result = rank_distances(distances, [0], [0, 0, 1, 0, 0], [0], [0, 1, 0, 0, 1])
    assert result.ap.tolist() == [pytest.approx((1 / 1 + 2 / 3) / 2)]
    assert result.inp.tolist() == [pytest.approx(2 / 3)]
    assert result.cmc.tolist() == [1, 1, 1, 1, 1]


def test_without_cameras_nothing_is_left_out() -> None:
    distances, query_ids, gallery_ids, query_cams, gallery_cams = problem(7)
    elsewhere = np.full_like(query_cams, 99)
    expected = plain_loop(distances, query_ids, gallery_ids, elsewhere, gallery_cams)
    assert_same(rank_distances(distances, query_ids, gallery_ids), expected)
    assert rank_distances(distances, query_ids, gallery_ids, query_cams, gallery_cams).mAP != expected["ap"].mean()


def test_queries_without_a_match_are_skipped() -> None:
    distances, query_ids, *rest = problem(8)
    query_ids[::3] = 777
    result = rank_distances(distances, query_ids, *rest)
    assert_same(result, plain_loop(distances, query_ids, *rest))
    assert not result.valid[::3].any()
    assert result.first_hit.shape == (result.num_valid,)


def test_no_query_with_a_match_is_an_error() -> None:
    distances, query_ids, *rest = problem(9)
    with pytest.raises(DataError, match=r"None of the 37 queries has a match among the 211 gallery images.*cameras"):
        rank_distances(distances, query_ids + 1000, *rest)


@pytest.mark.parametrize("kind", ["single", "empty"])
def test_smallest_galleries(kind: str) -> None:
    if kind == "single":
        result = rank_distances(np.array([[0.5], [0.5]]), ["a", "b"], ["a"])
        assert (result.cmc.tolist(), result.mAP, result.mINP, result.num_valid) == ([1.0], 1.0, 1.0, 1)
    else:
        with pytest.raises(DataError, match="match among the 0 gallery images"):
            rank_distances(np.empty((2, 0)), np.array([1, 2]), np.array([], dtype=int))


def test_duplicate_images_share_every_rank_fairly() -> None:
    """A gallery in which every image occurs twice: every positive ties with its twin, never with a negative."""
    distances, query_ids, gallery_ids, query_cams, gallery_cams = problem(10)
    twice = np.repeat(distances, 2, axis=1)
    case = (twice, query_ids, np.repeat(gallery_ids, 2), query_cams, np.repeat(gallery_cams, 2))
    assert_same(rank_distances(*case), plain_loop(*case))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("block_bytes", [1, 5000, 1 << 30])
def test_streamed_equals_given(metric: str, block_bytes: int) -> None:
    rng = np.random.default_rng(11)
    query, gallery = rng.standard_normal((37, 24)), rng.standard_normal((211, 24))
    _, *labels = problem(11)
    truth = GroundTruth(*labels)
    streamed = rank_blocks(distance_blocks(query, gallery, metric, block_bytes=block_bytes), truth)
    if metric == "cosine":
        unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (query, gallery)]
        distances = 1 - unit[0] @ unit[1].T
    else:
        distances = ((query[:, None] - gallery[None]) ** 2).sum(axis=2)
    assert_same(streamed, plain_loop(distances, *labels))
    assert_same(
        rank(torch.from_numpy(query), torch.from_numpy(gallery), *labels, metric=metric), plain_loop(distances, *labels)
    )
    blocks = [block.copy() for _, block in distance_blocks(query, gallery, metric, block_bytes=block_bytes)]
    np.testing.assert_allclose(np.concatenate(blocks), distances, atol=1e-12)


def test_blocks_in_any_order_and_any_memory_layout() -> None:
    distances, *labels = problem(12)
    expected = plain_loop(distances, *labels)
    ranker = Ranker(GroundTruth(*labels))
    for start in (20, 0, 30, 10):
        ranker.add(start, distances[start : start + 10])
    assert_same(ranker.result(), expected)
    assert_same(rank_distances(np.asfortranarray(distances), *labels), expected)
    assert_same(rank_distances(torch.from_numpy(distances).bfloat16(), *map(torch.from_numpy, labels)),
                plain_loop(torch.from_numpy(distances).bfloat16().float().numpy(), *labels))  # fmt: skip


def test_embeddings_and_distances_are_left_alone() -> None:
    distances, *labels = problem(14)
    given = distances.copy()
    rank_distances(distances, *labels)
    np.testing.assert_array_equal(distances, given)
    query, gallery = torch.randn(37, 8), torch.randn(211, 8)
    copies = query.clone(), gallery.clone()
    rank(query, gallery, *labels)
    assert query.equal(copies[0])
    assert gallery.equal(copies[1])


def test_max_rank() -> None:
    distances, *labels = problem(15)
    assert_same(rank_distances(distances, *labels, max_rank=7), plain_loop(distances, *labels, max_rank=7))


def test_nan_distances_are_an_error_that_names_the_queries() -> None:
    distances, *labels = problem(16)
    distances[[4, 20], [0, 7]] = np.nan
    with pytest.raises(DataError, match=r"Distances of 2 queries contain NaN \(query rows 4, 20\).*diverged network"):
        rank_distances(distances, *labels)
    query = np.full((300, 2), np.nan)
    with pytest.raises(DataError, match=r"300 queries contain NaN \(query rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\)"):
        rank(query, np.ones((3, 2)), np.zeros(300), np.zeros(3))


def test_bad_arguments() -> None:
    distances, query_ids, gallery_ids, query_cams, gallery_cams = problem(17)
    with pytest.raises(
        DataError, match=r"Number of query and gallery distances: got \(37, 210\); expected \(37, 211\)"
    ):
        rank_distances(distances[:, 1:], query_ids, gallery_ids)
    with pytest.raises(DataError, match="Argument gallery_cams is None while the other side's cameras are given"):
        rank_distances(distances, query_ids, gallery_ids, query_cams)
    with pytest.raises(DataError, match="Number of query_cams: got 36; expected 37, as many as query_ids"):
        rank_distances(distances, query_ids, gallery_ids, query_cams[1:], gallery_cams)
    with pytest.raises(DataError, match=r"Shape of gallery_ids: got \(211, 1\); expected one dimension"):
        rank_distances(distances, query_ids, gallery_ids[:, None])
    with pytest.raises(DataError, match=r"\(\(37, 8\), \(211, 9\)\); expected \[Q, D\] and \[G, D\]"):
        rank(np.ones((37, 8)), np.ones((211, 9)), query_ids, gallery_ids)
    with pytest.raises(ConfigError, match=r"Retrieval metric: got 'cosin'. Did you mean 'cosine'"):
        rank(np.ones((37, 8)), np.ones((211, 8)), query_ids, gallery_ids, metric="cosin")
