"""Re-ranking with k-reciprocal encoding (Zhong et al., CVPR 2017), sparse and in bounded memory.

Shapes: Q queries, G gallery images, N = Q + G; the sparse matrices [N, N] hold a few dozen entries per row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.evaluation.arrays import Array, Matrix, to_features
from qsd_plugin.evaluation.distances import BLOCK_BYTES, distance_blocks
from qsd_plugin.evaluation.neighbours import nearest

#: Distances plus pairs of non-zero entries that one block of queries may take (some 40 bytes each).
_BLOCK_WORK = 1 << 20


def rerank_blocks(
    query: Matrix,
    gallery: Matrix,
    *,
    metric: str = "cosine",
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, Array]]:
    """Yield ``(first query, re-ranked distances [B, G])``: ``(1 - lambda) * jaccard + lambda * original``.

    Args:
        query: Embeddings [Q, D].
        gallery: Embeddings [G, D].
        metric: Original distance; ``cosine`` also normalises the embeddings for the neighbourhoods.
        k1: Neighbours of the k-reciprocal sets, the image itself included (``TEST.RERANK.K1``); all where there are
            fewer images.
        k2: Neighbours averaged in the local query expansion, itself included (``TEST.RERANK.K2``).
        lambda_value: Weight of the original distance, 0 to 1 (``TEST.RERANK.LAMBDA``).
        block_bytes: Size of a block.

    Yields:
        The block's memory is used again for the next one.

    Raises:
        ConfigError: Unknown metric, or ``k1``, ``k2``, ``lambda_value`` out of range.
    """
    if not 0 <= lambda_value <= 1:
        raise ConfigError("Re-ranking lambda", value=lambda_value, expected="0 to 1")
    query, gallery = to_features(query), to_features(gallery)
    original = distance_blocks(query, gallery, metric, block_bytes=block_bytes)
    encoding = k_reciprocal_encoding(_join(query, gallery, normalise=metric == "cosine"), k1=k1, k2=k2)
    sets = JaccardDistances(encoding, len(query))
    for start, block in original:
        block *= lambda_value
        for first, jaccard in sets.blocks(range(start, start + len(block))):
            jaccard *= 1 - lambda_value
            block[first - start : first - start + len(jaccard)] += jaccard
        yield start, block


def jaccard_distances(query: Matrix, gallery: Matrix, *, k1: int = 20, k2: int = 6) -> Array:
    """Jaccard distances [Q, G] of the k-reciprocal encodings; the embeddings are taken as they are."""
    query, gallery = to_features(query), to_features(gallery)
    encoding = k_reciprocal_encoding(_join(query, gallery, normalise=False), k1=k1, k2=k2)
    distances = np.empty((len(query), len(gallery)), dtype=np.float32)
    for start, block in JaccardDistances(encoding, len(query)).blocks(range(len(query))):
        distances[start : start + len(block)] = block
    return distances


def k_reciprocal_encoding(features: torch.Tensor, *, k1: int = 20, k2: int = 6) -> sparse.csr_array:
    """Every image as a soft set of images: rows of a sparse matrix [N, N] that sum to 1 (equations 3 to 7 and 11).

    Args:
        features: Embeddings [N, D].
        k1: As for :func:`rerank_blocks`.
        k2: As for :func:`rerank_blocks`.

    Raises:
        ConfigError: ``k1`` or ``k2`` below 1.
    """
    for name, value in (("k1", k1), ("k2", k2)):
        if value < 1:
            raise ConfigError(f"Re-ranking {name}", value=value, expected="1 or more")
    features = to_features(features)
    k1 = min(k1, len(features))
    similarity, index = (part.cpu().numpy() for part in nearest(features, k1, similarity="euclidean"))
    members = _expanded_sets(index, round(k1 / 2) + 1)
    encoding = _softmax_weights(features, members, similarity, index)
    if k2 == 1:
        return encoding
    neighbours = _relation(index[:, :k2])
    neighbours.data /= min(k2, k1)
    return (neighbours @ encoding).tocsr()


class JaccardDistances:
    """Jaccard distances between the sets of queries and gallery images (equation 10), a block of queries at a time.

    ``1 - sum_k min(a_k, b_k) / (2 - sum_k min(a_k, b_k))``, where only columns k that both rows share contribute.

    Args:
        encoding: Rows of queries, then of the gallery, that sum to 1.
        num_query: Number of queries in ``encoding``.
    """

    def __init__(self, encoding: sparse.csr_array, num_query: int) -> None:
        self._encoding = encoding
        self._gallery = encoding[num_query:].tocsc()
        # For every entry of a query's row: how many gallery images share its column.
        self._sharing = np.diff(self._gallery.indptr)[encoding.indices[: encoding.indptr[num_query]]]
        pairs = np.concatenate(([0], np.cumsum(self._sharing, dtype=np.int64)))[encoding.indptr[: num_query + 1]]
        self._work = pairs + self._gallery.shape[0] * np.arange(num_query + 1)

    def blocks(self, queries: range) -> Iterator[tuple[int, Array]]:
        """Yield ``(first query, distances [B, G])`` for consecutive ``queries``."""
        start = queries.start
        while start < queries.stop:
            limit = np.searchsorted(self._work, self._work[start] + _BLOCK_WORK, side="right") - 1
            stop = int(min(max(limit, start + 1), queries.stop))
            distances = self._overlap(start, stop).astype(np.float32)
            distances /= 2 - distances
            np.subtract(1, distances, out=distances)
            yield start, distances.clip(min=0, out=distances)
            start = stop

    def _overlap(self, start: int, stop: int) -> Array:
        """``sum_k min(a_k, b_k)`` [stop - start, G]."""
        encoding, gallery = self._encoding, self._gallery
        entries = slice(encoding.indptr[start], encoding.indptr[stop])
        lengths = self._sharing[entries]
        ends = np.cumsum(lengths)
        # Where the column of each entry lies in `gallery`, position by position, one entry after the other.
        offsets = gallery.indptr[encoding.indices[entries]] - ends + lengths
        positions = np.arange(lengths.sum()) + np.repeat(offsets, lengths)
        shared = np.minimum(np.repeat(encoding.data[entries], lengths), gallery.data[positions])
        rows = np.repeat(np.arange(stop - start), np.diff(encoding.indptr[start : stop + 1]))
        shape = stop - start, gallery.shape[0]
        cells = np.repeat(rows * shape[1], lengths) + gallery.indices[positions]
        return np.bincount(cells, shared, minlength=shape[0] * shape[1]).reshape(shape)


def _join(query: torch.Tensor, gallery: torch.Tensor, *, normalise: bool) -> torch.Tensor:
    features = torch.cat((query, gallery))
    return F.normalize(features, out=features) if normalise else features


def _relation(index: Array) -> sparse.csr_array:
    """The sparse 0/1 matrix [N, N] with row i set at ``index[i]``."""
    total, count = index.shape
    data = np.ones(index.size, dtype=np.float32)
    relation = sparse.csr_array((data, index.flatten(), np.arange(0, index.size + 1, count)), shape=(total, total))
    relation.sort_indices()
    return relation


def _expanded_sets(index: Array, half: int) -> sparse.csr_array:
    """The k-reciprocal sets R*, equation 5: a member's half-sized set joins when most of it is shared already."""
    full, small = _relation(index), _relation(index[:, :half])
    full = full.multiply(full.T).tocsr()
    small = small.multiply(small.T).tocsr()
    shared = (full @ small.T).multiply(full).tocsr()
    sizes = np.diff(small.indptr)
    shared.data = (shared.data > 2 / 3 * sizes[shared.indices]).astype(np.float32)
    shared.eliminate_zeros()
    members = (full + shared @ small).tocsr()
    members.sort_indices()
    return members


def _softmax_weights(
    features: torch.Tensor, members: sparse.csr_array, similarity: Array, index: Array, pairs: int = 4096
) -> sparse.csr_array:
    """Gaussian weights of the set members, normalised per row: softmax of the negated squared distances, equation 7.

    Args:
        features: Embeddings [N, D].
        members: The sets, sorted.
        similarity: Negated squared distances [N, k1] of the nearest neighbours; members among them need no other.
        index: The nearest neighbours [N, k1].
        pairs: Distances computed at a time.
    """
    total = len(index)
    sizes = np.diff(members.indptr)
    rows, columns = np.repeat(np.arange(total), sizes), members.indices
    known_pairs = (np.arange(total)[:, None] * total + index).ravel()
    order = np.argsort(known_pairs)
    wanted = rows * total + columns
    found = order[np.searchsorted(known_pairs, wanted, sorter=order).clip(max=len(order) - 1)]
    logits = similarity.ravel()[found]
    unknown = np.flatnonzero(known_pairs[found] != wanted)
    for start in range(0, len(unknown), pairs):
        part = unknown[start : start + pairs]
        difference = features[torch.from_numpy(rows[part])] - features[torch.from_numpy(columns[part])]
        logits[part] = -difference.square_().sum(dim=1).cpu().numpy()
    sets = members.indptr[:-1][sizes > 0]  # an image crowded out of its own neighbourhood by duplicates has no set
    logits -= np.repeat(np.maximum.reduceat(logits, sets), sizes[sizes > 0])
    weights = np.exp(logits, out=logits)
    weights /= np.repeat(np.add.reduceat(weights, sets), sizes[sizes > 0])
    return sparse.csr_array((weights, members.indices, members.indptr), shape=members.shape)
