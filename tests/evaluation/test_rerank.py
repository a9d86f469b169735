"""Re-ranking against the paper's definitions written out with sets and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.neighbours import nearest
from qsd_plugin.evaluation.rerank import (
    JaccardDistances,
    jaccard_distances,
    k_reciprocal_encoding,
    rerank_blocks,
)


def people(seed: int, num_query: int = 40, num_gallery: int = 160, ids: int = 25, dim: int = 16) -> tuple[Array, Array]:
    """Query and gallery embeddings that cluster by identity, with enough noise that the sets overlap."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((ids, dim))
    sides = [centres[rng.integers(0, ids, n)] + 0.6 * rng.standard_normal((n, dim)) for n in (num_query, num_gallery)]
    return sides[0] / 4, sides[1] / 4  # squared distances around 1: the Gaussian weights differ, but none vanishes


def jaccard_by_sets(features: Array, num_query: int, k1: int, k2: int) -> Array:
    """Equations 3 to 11 of Zhong et al., image by image; neighbourhoods include the image itself."""
    total = len(features)
    squared = ((features[:, None] - features[None]) ** 2).sum(axis=2)
    ranking = squared.argsort(axis=1, kind="stable")

    def reciprocal(image: int, k: int) -> set[int]:
        return {int(other) for other in ranking[image, :k] if image in ranking[other, :k]}

    half = round(k1 / 2) + 1
    vectors = np.zeros((total, total))
    for image in range(total):
        core = reciprocal(image, k1)
        members = set(core)
        for candidate in core:
            theirs = reciprocal(candidate, min(half, k1))
            if len(theirs & core) > 2 / 3 * len(theirs):
                members |= theirs
        for member in members:
            vectors[image, member] = np.exp(-squared[image, member])
        vectors[image] /= vectors[image].sum()
    vectors = np.array([vectors[ranking[image, : min(k2, k1)]].mean(axis=0) for image in range(total)])
    distances = np.empty((num_query, total - num_query))
    for query in range(num_query):
        for image in range(num_query, total):
            low, high = (f(vectors[query], vectors[image]).sum() for f in (np.minimum, np.maximum))
            distances[query, image - num_query] = 1 - low / high
    return distances


@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (7, 3), (5, 1), (4, 9), (1, 1)])
def test_jaccard_distance_is_the_papers(k1: int, k2: int) -> None:
    query, gallery = people(0)
    ours = jaccard_distances(query, gallery, k1=k1, k2=k2)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, jaccard_by_sets(np.concatenate((query, gallery)), len(query), k1, k2), atol=2e-6)
    assert (k1 == 1) == (ours.min() == 1)  # otherwise the sets do overlap


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("block_bytes", [1, 10_000, 1 << 30])
def test_blocks_mix_both_distances(metric: str, block_bytes: int) -> None:
    query, gallery = people(1)
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (query, gallery)]
    if metric == "cosine":
        original, sides = 1 - unit[0] @ unit[1].T, unit
    else:
        original, sides = ((query[:, None] - gallery[None]) ** 2).sum(axis=2), [query, gallery]
    expected = 0.7 * jaccard_by_sets(np.concatenate(sides), len(query), 20, 6) + 0.3 * original
    blocks = [
        (start, block.copy()) for start, block in rerank_blocks(query, gallery, metric=metric, block_bytes=block_bytes)
    ]
    np.testing.assert_allclose(np.concatenate([block for _, block in blocks]), expected, atol=5e-6)
    assert [start for start, _ in blocks] == np.cumsum([0, *(len(block) for _, block in blocks)])[:-1].tolist()


def test_jaccard_blocks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    query, gallery = people(2)
    sets = JaccardDistances(k_reciprocal_encoding(torch.from_numpy(np.concatenate((query, gallery)))), 40)
    whole = np.concatenate([block for _, block in sets.blocks(range(40))])
    monkeypatch.setattr("qsd_plugin.evaluation.rerank._BLOCK_WORK", 4000)
    parts = list(sets.blocks(range(5, 40)))
    assert len(parts) > 5
    assert parts[0][0] == 5
    np.testing.assert_array_equal(np.concatenate([block for _, block in parts]), whole[5:])


def test_encoding_rows_are_distributions() -> None:
    encoding = k_reciprocal_encoding(torch.from_numpy(np.concatenate(people(3))))
    np.testing.assert_allclose(encoding.sum(axis=1), 1, atol=1e-6)
    assert encoding.data.min() >= 0


def test_large_embeddings_do_not_underflow() -> None:
    """Squared distances of thousands: exp(-d) is 0 in float32, the softmax is not."""
    query, gallery = people(4)
    ours = jaccard_distances(400 * query, 400 * gallery, k2=1)
    assert np.isfinite(ours).all()
    encoding = k_reciprocal_encoding(torch.from_numpy(400 * np.concatenate((query, gallery))).float(), k2=1)
    np.testing.assert_allclose(encoding.sum(axis=1), 1, atol=1e-6)


def test_identical_embeddings_that_crowd_each_other_out() -> None:
    """More copies than k1: some are not in their own neighbourhood; the distances stay defined."""
    query, gallery = people(5)
    gallery[:60] = gallery[0]
    distances = jaccard_distances(query.astype(np.float32), gallery.astype(np.float32), k1=10, k2=1)
    assert np.isfinite(distances).all()
    assert distances.min() >= 0
    assert distances.max() <= 1


def test_fewer_images_than_k1() -> None:
    query, gallery = people(6, num_query=3, num_gallery=6)
    np.testing.assert_allclose(
        jaccard_distances(query, gallery, k1=20, k2=6),
        jaccard_by_sets(np.concatenate((query, gallery)), 3, 9, 6),
        atol=2e-6,
    )


def test_bad_arguments() -> None:
    query, gallery = people(7)
    with pytest.raises(ConfigError, match=r"Re-ranking lambda: got 1.5; expected 0 to 1"):
        next(rerank_blocks(query, gallery, lambda_value=1.5))
    with pytest.raises(ConfigError, match=r"Re-ranking k2: got 0; expected 1 or more"):
        next(rerank_blocks(query, gallery, k2=0))
    with pytest.raises(ConfigError, match=r"Retrieval metric: got 'l2'. Known names: cosine, euclidean"):
        next(rerank_blocks(query, gallery, metric="l2"))


@pytest.mark.parametrize("similarity", ["inner", "euclidean"])
@pytest.mark.parametrize("tile", [23, 64, 200, 4096])
def test_nearest_of_all_pairs(similarity: str, tile: int) -> None:
    features = torch.from_numpy(np.concatenate(people(8)))
    table = features @ features.T if similarity == "inner" else -(torch.cdist(features, features) ** 2)
    values, index = nearest(features, 9, similarity=similarity, tile=tile)  # type: ignore[arg-type]
    expected = table.sort(dim=1, descending=True)
    torch.testing.assert_close(values, expected.values[:, :9], atol=1e-10, rtol=0)
    assert index.equal(expected.indices[:, :9])
