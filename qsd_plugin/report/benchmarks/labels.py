"""SDD-FIQA labels beside the bare chunked matrix product of the embeddings, which a full similarity matrix costs."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from qsd_plugin.quality.sampling import Sample, SimilaritySampler
from qsd_plugin.quality.sdd_fiqa import sample_distances, sdd_fiqa_labels
from qsd_plugin.report.benchmarks.paired import extra_memory_mib, paired_ratio

#: Rows per product of the baseline, so that 12,936 images make 54 MB of similarities at a time.
CHUNK = 1024
#: Images whose W1 is compared with SciPy's.
CHECKED = 500


def run(
    rows: int = 12936, dim: int = 2048, identities: int = 751, rounds: int = 12, seed: int = 0, *, pairs: int = 30
) -> dict[str, Any]:
    """Time labels and bare product alternately and compare W1 with SciPy's on the same draws.

    Args:
        rows: Images; the default sizes are those of Market-1501's training set with ResNet-50 features.
        dim: Embedding size.
        identities: Identities, drawn evenly.
        rounds: Rounds of the labels.
        seed: Seeds the embeddings and the draws.
        pairs: Interleaved pairs of timings after a warm-up.

    Returns:
        ``size``, ``threads``, ``load`` and ``items`` as :func:`qsd_plugin.report.benchmarks.ranking.run` gives them:
        ``median`` is ours over the product; ``w1_max_error`` the largest difference from SciPy.
    """
    embeddings, labels = _clusters(rows, dim, identities, seed)

    def ours() -> object:
        return sdd_fiqa_labels(embeddings, labels, rounds=rounds, seed=seed)

    def product() -> None:
        for start in range(0, rows, CHUNK):
            torch.mm(embeddings[start : start + CHUNK], embeddings.t())

    small = min(rows, CHUNK)
    sdd_fiqa_labels(embeddings[:small], np.arange(small) % (small // 8), rounds=1)  # starts threads, loads libraries
    load = os.getloadavg()[0]
    memory = extra_memory_mib(ours)
    figures = paired_ratio(ours, product, pairs) | {"limit": 2.0, "extra_memory_mib": memory}
    figures["w1_max_error"] = _w1_error(embeddings, labels, seed)
    size = {"rows": rows, "dim": dim, "identities": identities, "rounds": rounds}
    return {"size": size, "threads": torch.get_num_threads(), "load": load, "items": {"quality labels": figures}}


def _clusters(rows: int, dim: int, identities: int, seed: int) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """Noisy unit-variance clusters, built in place so that the peak before the measurement is the embeddings alone."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(identities, (rows,), generator=generator)
    centres = torch.randn(identities, dim, generator=generator)
    embeddings = torch.randn(rows, dim, generator=generator)
    for start in range(0, rows, CHUNK):
        embeddings[start : start + CHUNK] += centres[labels[start : start + CHUNK]]
    return embeddings, labels.numpy()


def _w1_error(embeddings: torch.Tensor, labels: np.ndarray[Any, Any], seed: int) -> float:
    from scipy.stats import wasserstein_distance

    names = [str(row) for row in range(len(labels))]
    sampler = SimilaritySampler(embeddings, labels, positives=24, negatives=24, seed=seed, keys=names)
    sample: Sample = sampler.sample(0, 0)
    ours = sample_distances(sample)[:CHECKED]
    theirs = [
        wasserstein_distance(
            sample.positive[row, : sample.sizes[row]].astype(float), sample.negative[row].astype(float)
        )
        for row in range(len(ours))
    ]
    return float(np.abs(ours - theirs).max())
