"""SDD-FIQA quality labels: how far an image's similarities to its own identity lie from those to all others.

Ou, Chen, Zhang, Huang, Li, Li, Li, Cao, Wang: "SDD-FIQA: Unsupervised Face Image Quality Assessment with Similarity
Distribution Distance", CVPR 2021, arXiv 2103.05977; QSD uses these labels (IEEE TMM 2024, doi
10.1109/TMM.2024.3358697).

Shapes: N images, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.progress import progress
from qsd_plugin.quality.labels import QualityLabels
from qsd_plugin.quality.sampling import Sample, SimilaritySampler
from qsd_plugin.quality.scaling import minmax


def sdd_fiqa_labels(
    embeddings: NDArray[Any] | torch.Tensor,
    identities: ArrayLike | torch.Tensor,
    *,
    keys: Sequence[str] | None = None,
    positives: int = 24,
    negatives: int = 24,
    rounds: int = 12,
    seed: int = 0,
    signed: bool = False,
) -> QualityLabels:
    """Label every image by the Wasserstein distance between its intra-class and inter-class similarities.

    One round draws, for each image, ``min(positives, n - 1)`` other images of its identity and exactly ``negatives``
    different images of other identities, takes the distance W1 of the two sets of cosine similarities, and maps the W1
    of all images linearly to [0, 100]. The label is the mean over the rounds. Only the drawn similarities are computed,
    never an N x N matrix.

    Args:
        embeddings: [N, D], not necessarily normalised. Float64 is computed in float64, everything else in float32.
        identities: [N], integers or strings.
        keys: Image keys for the label file; the row numbers by default.
        positives: Most images drawn from the own identity per round, >= 1.
        negatives: Images drawn from other identities per round, >= 1.
        rounds: Rounds to average, >= 1.
        seed: Seeds the draws, >= 0. The labels do not depend on the number of threads.
        signed: Multiply W1 by the sign of (mean positive - mean negative similarity), so that an image nearer to other
            identities than to its own, a wrong annotation for example, gets a low label instead of a high one.

    Returns:
        Labels in the order of the input. Images of one-image identities have no positive and stay unlabelled (NaN,
        counted in the header), but serve as negatives.

    Raises:
        LabelError: Embeddings that are not finite or zero, fewer than two identities, no identity with two images, or
            too few images of other identities.
        ConfigError: A count below 1.
    """
    for name, count in (("positives", positives), ("negatives", negatives), ("rounds", rounds)):
        if count < 1:
            raise ConfigError(f"sdd_fiqa_labels: {name}", value=count, expected="at least 1")
    names = tuple(keys) if keys is not None else tuple(str(row) for row in range(len(embeddings)))
    sampler = SimilaritySampler(embeddings, identities, positives=positives, negatives=negatives, seed=seed, keys=names)

    distance = np.empty((sampler.labelled, rounds))
    for block, turn in progress(list(product(range(sampler.blocks), range(rounds))), "SDD-FIQA labels"):
        sample = sampler.sample(block, turn)
        distance[sample.rows, turn] = sample_distances(sample, signed=signed)
    scaled = minmax(distance)

    total = len(names)
    order = sampler.order[: sampler.labelled]
    score, raw, spread = (np.full(total, np.nan) for _ in range(3))
    score[order] = scaled.mean(axis=1)
    raw[order] = distance.mean(axis=1)
    spread[order] = scaled.std(axis=1)
    meta: dict[str, Any] = {
        "method": "SDD-FIQA",
        "scale": "minmax",
        "images": total,
        "identities": sampler.identities,
        "unlabelled": total - sampler.labelled,
        "positives": positives,
        "negatives": negatives,
        "rounds": rounds,
        "seed": seed,
        "signed": signed,
        "raw_range": [float(distance.min()), float(distance.max())],
    }
    return QualityLabels(score, raw, spread, names, meta)


def wasserstein_1d(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """W1 between the empirical distributions of corresponding rows, the integral of ``|F - G|``, in float64.

    Args:
        first: [R, m] samples, m >= 1.
        second: [R, n] samples, n >= 1; equal sizes give the mean absolute difference of the order statistics.

    Returns:
        Distances, [R].
    """
    a = np.sort(np.asarray(first), axis=1).astype(np.float64)
    b = np.sort(np.asarray(second), axis=1).astype(np.float64)
    m, n = a.shape[1], b.shape[1]
    # W1 = integral over u in [0, 1] of |A(u) - B(u)| with quantile functions A, B, which are steps with edges at i/m
    # and j/n. In units of 1/(m n) all edges are integers, and the steps between them are the same for every row.
    edges = np.union1d(np.arange(m + 1) * n, np.arange(n + 1) * m)
    starts, widths = edges[:-1], np.diff(edges)
    gaps: NDArray[np.float64] = np.abs(a[:, starts // n] - b[:, starts // m])
    distances: NDArray[np.float64] = gaps @ (widths / (m * n))
    return distances


def sample_distances(sample: Sample, *, signed: bool = False) -> NDArray[np.float64]:
    """W1 between the positive and the negative similarities of each image, [R]; with ``signed`` below 0 if inverted."""
    distance = np.empty(len(sample.sizes))
    for size in np.unique(sample.sizes):
        rows = sample.sizes == size
        positive, negative = sample.positive[rows, :size], sample.negative[rows]
        distance[rows] = wasserstein_1d(positive, negative)
        if signed:
            distance[rows] *= np.sign(positive.mean(axis=1, dtype=np.float64) - negative.mean(axis=1, dtype=np.float64))
    return distance
