"""Exact nearest neighbours of all points among themselves: the first half of re-ranking and of query expansion."""

from __future__ import annotations

from typing import Literal

import torch

from qsd_plugin.evaluation.arrays import squared_norms

#: Points per side of a tile; a tile of products, 16 MiB in float32, stays in the processor's cache.
TILE = 2048


@torch.no_grad()
def nearest(
    features: torch.Tensor, count: int, *, similarity: Literal["inner", "euclidean"], tile: int = TILE
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` most similar points of every point, itself included.

    Similarities are symmetric, so every tile of products serves its rows and its columns: half the arithmetic of the
    plain N x N product.

    Args:
        features: Points [N, D].
        count: Neighbours per point, 1 to N.
        similarity: ``inner`` product, or ``euclidean``: the negated squared distance.
        tile: Points per side of a tile.

    Returns:
        Similarities [N, count] in descending order, and the neighbours' indices [N, count].
    """
    total = len(features)
    squares = squared_norms(features) if similarity == "euclidean" else None
    best = features.new_full((total, count), -torch.inf)
    index = torch.zeros(total, count, dtype=torch.long, device=features.device)
    buffer = features.new_empty(tile, tile)

    def merge(start: int, block: torch.Tensor, offset: int) -> None:
        rows = slice(start, start + len(block))
        values, found = block.topk(min(count, block.shape[1]), dim=1)
        values, order = torch.cat((best[rows], values), dim=1).topk(count, dim=1)
        best[rows] = values
        index[rows] = torch.cat((index[rows], found + offset), dim=1).gather(1, order)

    for top in range(0, total, tile):
        rows = features[top : top + tile]
        for left in range(top, total, tile):
            columns = features[left : left + tile]
            block = buffer[: len(rows), : len(columns)]
            torch.mm(rows, columns.T, out=block)
            if squares is not None:
                block.mul_(2).sub_(squares[left : left + tile]).sub_(squares[top : top + tile].unsqueeze(1))
            merge(top, block, left)
            if left > top:
                merge(left, block.T.contiguous(), top)
    return best, index
