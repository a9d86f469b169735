"""Ten-fold verification beside a plain loop over folds and thresholds, at LFW's size."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.verification import FINE_THRESHOLDS, THRESHOLDS, verify_distances, verify_pairs
from qsd_plugin.report.benchmarks.paired import extra_memory_mib, paired_ratio

FAR_TARGET = 1e-3


def run(
    pairs_of_images: int = 6000, dim: int = 512, folds: int = 10, seed: int = 0, *, pairs: int = 30
) -> dict[str, Any]:
    """Time the protocol on given distances, and the whole of ``verify_pairs``, against the loop.

    Args:
        pairs_of_images: Pairs verified.
        dim: Embedding size.
        folds: Folds.
        seed: Seeds the embeddings.
        pairs: Interleaved pairs of timings after a warm-up.

    Returns:
        ``size``, ``threads``, ``load`` and ``items`` as :func:`qsd_plugin.report.benchmarks.ranking.run` gives them;
        ``bit_equal`` says whether both gave the same accuracies, thresholds, rates and operating points.
    """
    generator = np.random.default_rng(seed)
    issame = np.arange(pairs_of_images) // (pairs_of_images // (2 * folds)) % 2 == 0
    first = generator.standard_normal((pairs_of_images, dim), dtype=np.float32)
    second = generator.standard_normal((pairs_of_images, dim), dtype=np.float32)
    second[issame] = first[issame] + 2.5 * second[issame]
    embeddings = np.stack((first, second), 1).reshape(-1, dim)
    distances = _distances(embeddings)

    result = verify_distances(distances, issame, folds=folds, far_targets=(FAR_TARGET,))
    point = result.at_far[0]
    ours = result.fold_accuracy, result.fold_threshold, result.tpr, result.fpr, point.fold_val, point.fold_far
    load = os.getloadavg()[0]
    memory = extra_memory_mib(lambda: verify_pairs(embeddings, issame, folds=folds))
    given = paired_ratio(
        lambda: verify_distances(distances, issame, folds=folds, far_targets=(FAR_TARGET,)),
        lambda: by_loop(distances, issame, folds),
        pairs,
    )
    whole = paired_ratio(
        lambda: verify_pairs(embeddings, issame, folds=folds, far_targets=(FAR_TARGET,)),
        lambda: by_loop(_distances(embeddings), issame, folds),
        pairs,
    )
    equal = all(map(np.array_equal, ours, by_loop(distances, issame, folds)))
    items = {
        "verification, given distances": given | {"limit": 0.01, "bit_equal": equal},
        "verification, from embeddings": whole | {"seconds_limit": 1.0, "extra_memory_mib": memory},
    }
    size = {"pairs": pairs_of_images, "dim": dim, "folds": folds}
    return {"size": size, "threads": torch.get_num_threads(), "load": load, "items": items}


def _distances(embeddings: Array) -> Array:
    rows = embeddings.astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    distances: Array = np.square(unit[0::2] - unit[1::2]).sum(1)
    return distances


def by_loop(distances: Array, issame: Array, folds: int) -> tuple[Array, ...]:
    """The protocol threshold by threshold, each one in NumPy over all pairs.

    Returns:
        Accuracies [F], thresholds [F], mean TPR and FPR [T], and TAR and FAR [F] at :data:`FAR_TARGET`.
    """
    parts = np.array_split(np.arange(len(distances)), folds)
    rows: list[tuple[float, float, float, float]] = []
    tprs, fprs = np.empty((2, folds, len(THRESHOLDS)))
    for number, held_out in enumerate(parts):
        training = np.concatenate([part for part in parts if part is not held_out])
        accuracies = [_rates(distances[training], issame[training], threshold)[2] for threshold in THRESHOLDS]
        threshold = THRESHOLDS[int(np.argmax(accuracies))]
        tested = [_rates(distances[held_out], issame[held_out], at) for at in THRESHOLDS]
        tprs[number], fprs[number] = [rates[0] for rates in tested], [rates[1] for rates in tested]
        far = [_rates(distances[training], issame[training], at)[1] for at in FINE_THRESHOLDS]
        at = float(np.interp(FAR_TARGET, far, FINE_THRESHOLDS)) if max(far) >= FAR_TARGET else 0.0
        val, false, _ = _rates(distances[held_out], issame[held_out], at)
        rows.append((_rates(distances[held_out], issame[held_out], threshold)[2], threshold, val, false))
    accuracy, chosen, vals, fars = np.array(rows).T
    return accuracy, chosen, tprs.mean(0), fprs.mean(0), vals, fars


def _rates(distances: Array, issame: Array, threshold: float) -> tuple[float, float, float]:
    """TPR, FPR and accuracy."""
    accepted = distances < threshold
    right = np.count_nonzero(accepted & issame)
    false = np.count_nonzero(accepted) - right
    genuine = np.count_nonzero(issame)
    impostor = len(issame) - genuine
    return right / genuine, false / impostor, (right + impostor - false) / len(issame)
