"""Operating points against an exhaustive search over thresholds."""

from __future__ import annotations

import numpy as np
import pytest

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.ground_truth import GroundTruth
from qsd_plugin.evaluation.roc import RocCounter, tpr_at_fpr

TARGETS = (0.0, 1e-4, 1e-3, 1e-2, 0.3, 1.0)


def problem(seed: int, *, decimals: int | None = None) -> tuple[Array, ...]:
    rng = np.random.default_rng(seed)
    query_ids, gallery_ids = rng.integers(0, 9, 40), rng.integers(0, 9, 150)
    distances = rng.random((40, 150)) - 0.3 * (query_ids[:, None] == gallery_ids)
    if decimals is not None:
        distances = distances.round(decimals)
    return distances, query_ids, gallery_ids, rng.integers(0, 4, 40), rng.integers(0, 4, 150)


def by_search(
    distances: Array, query_ids: Array, gallery_ids: Array, query_cams: Array, gallery_cams: Array
) -> list[float]:
    """The best true positive rate over every threshold whose false positive rate is admissible."""
    same = query_ids[:, None] == gallery_ids
    junk = same & (query_cams[:, None] == gallery_cams)
    genuine, impostor = distances[same & ~junk], distances[~same]
    points = [(0.0, 0.0)]
    points += [((impostor <= t).mean(), (genuine <= t).mean()) for t in np.unique(distances)]
    return [max(tpr for fpr, tpr in points if fpr <= target) for target in TARGETS]


@pytest.mark.parametrize("decimals", [None, 3, 1])
@pytest.mark.parametrize("seed", range(3))
def test_best_admissible_threshold(seed: int, decimals: int | None) -> None:
    case = problem(seed, decimals=decimals)
    rates = tpr_at_fpr(*case, targets=TARGETS)
    assert list(rates) == list(TARGETS)
    assert list(rates.values()) == pytest.approx(by_search(*case), abs=1e-12)


def test_perfect_hopeless_and_constant_models() -> None:
    distances, query_ids, gallery_ids, *_ = problem(4)
    perfect = (query_ids[:, None] != gallery_ids).astype(np.float32)
    assert set(tpr_at_fpr(perfect, query_ids, gallery_ids).values()) == {1.0}
    assert set(tpr_at_fpr(-perfect, query_ids, gallery_ids).values()) == {0.0}
    assert set(tpr_at_fpr(0 * distances, query_ids, gallery_ids).values()) == {0.0}


def test_agrees_with_scikit_learn() -> None:
    from sklearn.metrics import roc_curve

    distances, query_ids, gallery_ids, *_ = problem(5)
    fpr, tpr, _ = roc_curve((query_ids[:, None] == gallery_ids).ravel(), -distances.ravel(), drop_intermediate=False)
    for target, rate in tpr_at_fpr(distances, query_ids, gallery_ids, targets=TARGETS).items():
        assert rate == pytest.approx(tpr[fpr <= target].max(), abs=1e-12)


def test_blocks_keep_few_impostors() -> None:
    distances, *labels = problem(6)
    counter = RocCounter(GroundTruth(*labels), (0.01,))
    kept = []
    for start in range(len(distances)):
        counter.add(start, distances[start : start + 1])
        kept.append(counter._pending)
    impostors = (labels[0][:, None] != labels[1]).sum()
    assert max(kept) < 0.01 * impostors + 2 * distances.shape[1] + 2
    assert counter.result() == tpr_at_fpr(distances, *labels, targets=(0.01,))


def test_whole_numbers_of_impostors_are_not_lost_to_rounding() -> None:
    # 0.07 * 100 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996 in binary.
    distances = np.arange(101.0)[None]
    labels = [0], [1] * 29 + [0] + [1] * 71
    assert tpr_at_fpr(distances, *labels, targets=(0.28, 0.29)) == {0.28: 0.0, 0.29: 1.0}


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match=r"False positive rate: got 2; expected 0 to 1"):
        tpr_at_fpr(np.ones((1, 2)), [0], [0, 1], targets=(2,))
    with pytest.raises(DataError, match=r"No genuine pairs between 1 queries and 2 gallery images"):
        tpr_at_fpr(np.ones((1, 2)), [0], [1, 1])
    with pytest.raises(DataError, match=r"No impostor pairs between 1 queries and 2 gallery images"):
        tpr_at_fpr(np.ones((1, 2)), [0], [0, 0])
