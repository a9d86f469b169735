"""The draws behind SDD-FIQA labels: for every image others of its identity, images of other identities, similarities.

Images are kept in *identity order*: sorted by identity, those of one-image identities last, so that identities are runs
of rows and the images to label come first.

Shapes: N images, D embedding size, R images of one block, P positives, Q negatives.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from qsd_plugin.core.errors import LabelError
from qsd_plugin.core.streams import numpy_stream

#: Images per random stream. Part of what a seed means: another value draws other images.
BLOCK = 4096


class Sample(NamedTuple):
    """One round's similarities of a block of images; which draw stands in which column carries no meaning."""

    rows: slice  #: place of the block in identity order
    positive: NDArray[Any]  #: [R, P] similarities to the own identity; the first ``sizes[r]`` of row r count
    sizes: NDArray[np.int64]  #: [R], 1 to P
    negative: NDArray[Any]  #: [R, Q] similarities to other identities


class SimilaritySampler:
    """Draws positives and negatives of every image of a training set and computes their cosine similarities.

    A draw depends on (seed, round, block, number of images per identity) only. Arguments as in
    :func:`~qsd_plugin.quality.sdd_fiqa.sdd_fiqa_labels`, ``keys`` are only for messages.

    Attributes:
        order: [N], identity order: place -> input row.
        labelled: How many images, the first in identity order, have a positive.
        blocks: Number of blocks of at most :data:`BLOCK` images that the labelled images make.
        identities: Number of identities.
    """

    def __init__(
        self,
        embeddings: NDArray[Any] | torch.Tensor,
        identities: ArrayLike | torch.Tensor,
        *,
        positives: int,
        negatives: int,
        seed: int,
        keys: Sequence[str],
    ) -> None:
        vectors = _as_matrix(embeddings, keys)
        names, identity, counts = _identities(identities, len(vectors))
        size = counts[identity]
        self.order = np.lexsort((identity, size == 1))
        self.labelled = int((size > 1).sum())
        self.blocks = -(-self.labelled // BLOCK)
        self.identities = len(counts)
        self._positives, self._negatives, self._seed = positives, negatives, seed
        self._check_enough(names, counts)

        self._size = size[self.order]
        ordered = identity[self.order]
        first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self._start = np.repeat(first, np.diff(np.r_[first, len(ordered)]))
        self._vectors = vectors[torch.from_numpy(self.order)]
        self._vectors /= torch.linalg.vector_norm(self._vectors, dim=1, keepdim=True)

    def sample(self, block: int, turn: int) -> Sample:
        """The similarities of round ``turn`` for block number ``block``."""
        rows = slice(block * BLOCK, min((block + 1) * BLOCK, self.labelled))
        own, sizes, other = self._draw(rows, numpy_stream(self._seed, "sdd_fiqa", turn, block))
        positive = np.zeros(own.shape, dtype=self._vectors.numpy().dtype)
        drawn = np.arange(self._positives) < sizes[:, None]
        positive[drawn] = self._similarities(rows, own[drawn], sizes)
        count = np.full(len(other), self._negatives)
        negative = self._similarities(rows, other.reshape(-1), count).reshape(other.shape)
        return Sample(rows, positive, sizes, negative)

    def _draw(
        self, rows: slice, generator: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Places of the positives [R, P], ascending and then padded, their counts [R], and the negatives [R, Q]."""
        start, size = self._start[rows], self._size[rows]
        place = np.arange(rows.start, rows.stop)

        rest = size - 1
        sizes = np.minimum(rest, self._positives)
        own = np.tile(np.arange(self._positives), (len(place), 1))
        many = rest > self._positives
        own[many] = _distinct(generator, rest[many], self._positives)
        own += start[:, None]
        own += own >= place[:, None]  # step over the image itself

        other = _distinct(generator, len(self._size) - size, self._negatives)
        other += np.where(other >= start[:, None], size[:, None], 0)  # step over the own identity
        return own, sizes, other

    def _similarities(self, rows: slice, columns: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[Any]:
        """Cosine similarities of each row with its own ascending list of columns; the lists follow one another."""
        vectors = self._vectors
        offsets = torch.from_numpy(np.r_[0, np.cumsum(counts)])
        with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
            warnings.simplefilter("ignore", UserWarning)
            pattern = torch.sparse_csr_tensor(
                offsets,
                torch.from_numpy(columns),
                torch.zeros(len(columns), dtype=vectors.dtype),
                size=(len(counts), len(vectors)),
                check_invariants=True,
            )
        # A product evaluated only where the pattern has an entry: 576 dot products per image instead of N.
        product = torch.sparse.sampled_addmm(pattern, vectors[rows], vectors.t(), beta=0.0)
        similarities: NDArray[Any] = product.values().numpy()
        return similarities

    def _check_enough(self, names: NDArray[Any], counts: NDArray[np.int64]) -> None:
        remedy = "SDD-FIQA compares images with their own and with other identities: pass the whole training set."
        if len(counts) < 2:
            raise LabelError("Identities to label", value=len(counts), expected="at least 2", remedy=remedy)
        if not self.labelled:
            raise LabelError(
                f"None of {len(counts)} identities has two images",
                expected="identities with 2 images or more",
                remedy=remedy,
            )
        largest = int(np.argmax(counts))
        available = int(counts.sum() - counts[largest])
        if available < self._negatives:
            raise LabelError(
                f"Images of identities other than {names[largest].item()!r}",
                value=available,
                expected=f"at least {self._negatives} (negatives)",
                remedy=f"{remedy} For a small set pass negatives={available}." if available else remedy,
            )


def _distinct(generator: np.random.Generator, pool: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Per row a uniformly drawn set of ``count`` different numbers below ``pool[r]`` >= count, ascending, [R, count].

    Floyd's algorithm (Bentley and Floyd, CACM 30(9), 1987), all rows at once: no rejection, no permutation of a pool.
    """
    chosen = np.empty((len(pool), count), dtype=np.int64)
    for column in range(count):
        last = pool - count + column
        pick = generator.integers(0, last, endpoint=True)
        taken = (chosen[:, :column] == pick[:, None]).any(axis=1)
        chosen[:, column] = np.where(taken, last, pick)
    chosen.sort(axis=1)
    return chosen


def _as_matrix(embeddings: NDArray[Any] | torch.Tensor, keys: Sequence[str]) -> torch.Tensor:
    """The embeddings as a CPU matrix, float64 if they were and float32 otherwise; every row finite and not zero."""
    matrix = torch.as_tensor(embeddings).detach().cpu()
    if matrix.dtype != torch.float64:
        matrix = matrix.float()
    if matrix.ndim != 2 or len(matrix) != len(keys):
        raise LabelError(
            "Embeddings", value=tuple(matrix.shape), expected=f"[N, D] with one row for each of {len(keys)} keys"
        )
    norm = torch.linalg.vector_norm(matrix, dim=1)
    for fault, bad in (("not finite", ~torch.isfinite(norm)), ("zero", norm == 0)):
        rows = bad.nonzero().flatten().tolist()
        if rows:
            raise LabelError(
                f"{len(rows)} of {len(matrix)} embeddings are {fault}",
                value=", ".join(keys[row] for row in rows[:3]),
                expected="finite vectors other than zero",
                remedy="Check the model and these images; without mixed precision the overflow may go away.",
            )
    return matrix


def _identities(
    identities: ArrayLike | torch.Tensor, rows: int
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """The different identities, each image's number among them, and their image counts."""
    values = np.asarray(identities.cpu() if isinstance(identities, torch.Tensor) else identities)
    if values.shape != (rows,) or values.dtype.kind not in "iuUS":
        raise LabelError(
            "Identities",
            value=f"{values.dtype} {values.shape}",
            expected=f"one integer or string for each of {rows} embeddings",
        )
    names, identity, counts = np.unique(values, return_inverse=True, return_counts=True)
    return names, identity.reshape(-1), counts
