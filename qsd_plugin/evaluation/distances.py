"""Distances between all queries and all gallery images, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from qsd_plugin.core.errors import ConfigError, DataError, did_you_mean
from qsd_plugin.evaluation.arrays import Array, Matrix, squared_norms, to_features, to_numpy

METRICS = ("cosine", "euclidean")

#: Size of one block of distances. Large enough that the matrix product runs at full speed.
BLOCK_BYTES = 32 << 20


def distance_blocks(
    query: Matrix, gallery: Matrix, metric: str = "cosine", *, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, Array]]:
    """Yield ``(first query, distances [B, G])`` for consecutive blocks of queries.

    ``cosine`` is 1 - cos, in [0, 2]; ``euclidean`` is the squared Euclidean distance, fast-reid's convention (the same
    ranking; rounding may leave values just below 0).

    Args:
        query: Embeddings [Q, D].
        gallery: Embeddings [G, D], on the same device.
        metric: One of :data:`METRICS`.
        block_bytes: Size of a block; neither a full matrix nor a copy of the gallery is ever held.

    Yields:
        The block's memory is used again for the next one: copy what must outlive the step.

    Raises:
        ConfigError: Unknown metric.
        DataError: The two sides' dimensions differ.
    """
    if metric not in METRICS:
        raise ConfigError("Retrieval metric", value=metric, remedy=did_you_mean(metric, METRICS))
    query, gallery = to_features(query), to_features(gallery)
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
        raise DataError(
            "Shapes of query and gallery embeddings",
            value=(tuple(query.shape), tuple(gallery.shape)),
            expected="[Q, D] and [G, D]",
        )
    return _blocks(query, gallery, metric, block_bytes)


def row_blocks(distances: Matrix, *, rows: int = 256) -> Iterator[tuple[int, Array]]:
    """Given distances [Q, G] in the form of :func:`distance_blocks`."""
    for start in range(0, len(distances), rows):
        yield start, to_numpy(distances[start : start + rows])


def _blocks(query: torch.Tensor, gallery: torch.Tensor, metric: str, block_bytes: int) -> Iterator[tuple[int, Array]]:
    num_query, num_gallery = len(query), len(gallery)
    # The gallery is not normalised but its products are scaled: normalising would copy it.
    column = (
        gallery.norm(dim=1).clamp_min_(1e-12).reciprocal_().neg_() if metric == "cosine" else squared_norms(gallery)
    )
    rows = max(1, min(num_query, block_bytes // max(1, num_gallery * query.element_size())))
    buffer = query.new_empty(rows, num_gallery)
    one = query.new_ones(())
    for start in range(0, num_query, rows):
        part = query[start : start + rows]
        block = buffer[: len(part)]
        if metric == "cosine":
            torch.mm(F.normalize(part), gallery.T, out=block)
            torch.addcmul(one, block, column, out=block)
        else:
            torch.add(squared_norms(part).unsqueeze(1), column, out=block)
            block.addmm_(part, gallery.T, alpha=-2)
        yield start, to_numpy(block)
