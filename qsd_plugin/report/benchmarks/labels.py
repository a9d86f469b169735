"""SDD-FIQA labels beside the bare chunked matrix product of the embeddings, which a full similarity matrix costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from qsd_plugin.quality.sampling import Sample, SimilaritySampler
from qsd_plugin.quality.sdd_fiqa import sample_distances, sdd_fiqa_labels

#: Rows per product of the baseline, so that 12,936 images make 54 MB of similarities at a time.
CHUNK = 1024
#: Images whose W1 is compared with SciPy's.
CHECKED = 500
#: Memory files of Linux: writing 5 to the first makes the process's peak (VmHWM) start again from now.
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


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
        Sizes, thread count; median seconds of both; ``ratio`` (ours / product), the median of the paired ratios, with
        ``ratio_interval``, its distribution-free 95 % interval (the range for fewer than 6 pairs);
        ``extra_memory_mib``, the peak beyond the embeddings, ``None`` where the system does not tell; ``w1_max_error``.
    """
    embeddings, labels = _clusters(rows, dim, identities, seed)

    def ours() -> object:
        return sdd_fiqa_labels(embeddings, labels, rounds=rounds, seed=seed)

    def product() -> None:
        for start in range(0, rows, CHUNK):
            torch.mm(embeddings[start : start + CHUNK], embeddings.t())

    small = min(rows, CHUNK)
    sdd_fiqa_labels(embeddings[:small], np.arange(small) % (small // 8), rounds=1)  # starts threads, loads libraries
    extra_memory = _extra_memory(ours)
    product()
    times = np.array([[_seconds(ours), _seconds(product)] for _ in range(pairs)])
    ratios = sorted((times[:, 0] / times[:, 1]).tolist())
    return {
        "rows": rows,
        "dim": dim,
        "identities": identities,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "pairs": pairs,
        "ours_seconds": float(np.median(times[:, 0])),
        "product_seconds": float(np.median(times[:, 1])),
        "ratio": median(ratios),
        "ratio_interval": _median_interval(ratios),
        "extra_memory_mib": extra_memory,
        "w1_max_error": _w1_error(embeddings, labels, seed),
    }


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


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _median_interval(ordered: list[float]) -> tuple[float, float]:
    """95 % interval of the median from order statistics; the range where there are too few values for one."""
    from scipy.stats import binom

    rank = max(int(binom.ppf(0.025, len(ordered), 0.5)), 1)
    return ordered[rank - 1], ordered[-rank]


def _extra_memory(work: Callable[[], object]) -> float | None:
    """Peak resident memory while ``work`` runs beyond what was resident before, MiB; exact, but Linux only."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A memory field of the process in KiB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])
