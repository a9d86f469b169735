"""Ten-fold verification against the host's own results (see tests/data) and a plain loop over thresholds and folds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.results import to_json
from qsd_plugin.evaluation.verification import (
    FINE_THRESHOLDS,
    THRESHOLDS,
    mean_norm,
    sum_with_flip,
    threshold_at,
    verify_distances,
    verify_pairs,
)

FOLDS = 10


@pytest.fixture(scope="module")
def golden() -> dict[str, Array]:
    with np.load(Path(__file__).parents[1] / "data" / "verification.npz", allow_pickle=False) as file:
        return dict(file)


def lfw_sized() -> Array:
    """Case D of the golden file: 6000 pairs, 300 of a kind in turn, drawn as its README says."""
    random = np.random.RandomState(3)
    rows = []
    for pair in range(6000):
        first = random.randn(32)
        second = first + 1.5 * random.randn(32) if (pair // 300) % 2 == 0 else random.randn(32)
        rows += [first, second]
    return np.array(rows)


def summed(case: str, golden: dict[str, Array]) -> Array:
    """Plain plus mirrored embeddings of a case; checks XNorm on the way."""
    if case == "A":
        return golden["A_sum"]
    if case == "D":
        plain = lfw_sized()
        assert plain[:4].tolist() == golden["D_emb_first4"].tolist()
        assert plain.sum() == pytest.approx(golden["D_emb_sum"], rel=1e-12)
        flipped = plain + 0.1 * np.random.RandomState(99).randn(*plain.shape)
    else:
        plain, flipped = golden[f"{case}_emb"], golden[f"{case}_flip"]
    assert mean_norm(plain, flipped) == pytest.approx(float(golden[f"{case}_xnorm"]), rel=1e-12)
    return sum_with_flip(plain, flipped)


@pytest.mark.parametrize("case", "ABCD")
def test_equals_the_host(case: str, golden: dict[str, Array]) -> None:
    result = verify_pairs(summed(case, golden), golden[f"{case}_issame"])
    (point,) = result.at_far
    assert result.fold_accuracy.tolist() == golden[f"{case}_acc_folds"].tolist()
    assert result.fold_threshold.tolist() == golden[f"{case}_best_thr"].tolist()
    assert (result.accuracy, result.accuracy_std) == (golden[f"{case}_acc_mean"], golden[f"{case}_acc_std"])
    assert result.tpr.tolist() == golden[f"{case}_tpr"].tolist()
    assert result.fpr.tolist() == golden[f"{case}_fpr"].tolist()
    assert (point.val, point.val_std, point.far) == tuple(golden[f"{case}_{key}"] for key in ("val", "val_std", "far"))


@pytest.mark.parametrize(("case", "accuracy"), [("V1", 0.983333), ("V2", 0.940492)])
def test_equals_qud_s_program(case: str, accuracy: float, golden: dict[str, Array]) -> None:
    result = verify_pairs(torch.from_numpy(golden[f"{case}_embeddings"]), golden[f"{case}_issame"])
    (point,) = result.at_far
    assert result.accuracy == pytest.approx(accuracy, abs=5e-7)
    assert result.fold_accuracy.tolist() == golden[f"{case}_accuracy_folds"].tolist()
    assert result.fold_threshold.tolist() == golden[f"{case}_best_threshold_folds"].tolist()
    assert result.tpr.tolist() == golden[f"{case}_tpr"].tolist()
    assert result.fpr.tolist() == golden[f"{case}_fpr"].tolist()
    expected = [golden[f"{case}_{key}"] for key in ("acc_std", "val_at_1e-3", "val_std", "far_mean")]
    assert [result.accuracy_std, point.val, point.val_std, point.far] == expected


@pytest.mark.parametrize(("case", "plain", "flip"), [("E", "emb", "emb_flip"), ("V3", "emb_orig", "emb_flip")])
def test_equals_the_whole_chain_from_its_embeddings(case: str, plain: str, flip: str, golden: dict[str, Array]) -> None:
    sides = golden[f"{case}_{plain}"], golden[f"{case}_{flip}"]
    result = verify_pairs(sum_with_flip(*sides), golden[f"{case}_issame"])
    assert (result.accuracy, result.accuracy_std) == (golden[f"{case}_acc2"], golden[f"{case}_std2"])
    assert mean_norm(*sides) == pytest.approx(float(golden[f"{case}_xnorm"]), rel=1e-12)


def test_several_false_acceptance_rates(golden: dict[str, Array]) -> None:
    result = verify_pairs(summed("B", golden), golden["B_issame"], far_targets=(0.1, 0.01, 0.001))
    for point in result.at_far:
        expected = golden[f"B_val_at_{point.far_target:g}"]
        assert [point.val, point.val_std, point.far] == pytest.approx(expected.tolist(), abs=1e-15)


def by_loop(distances: Array, issame: Array, folds: int, target: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The protocol word by word: folds, thresholds and pairs counted one after another."""
    parts = np.array_split(np.arange(len(distances)), folds)
    accuracy, chosen, tprs, fprs, vals, fars, at = [], [], [], [], [], [], []

    def rates(part: Array, threshold: float) -> tuple[float, float, float]:
        accepted, same = distances[part] < threshold, issame[part]
        tp, fp = (accepted & same).sum(), (accepted & ~same).sum()
        return tp / same.sum(), fp / (~same).sum(), (accepted == same).sum() / len(part)

    for held_out in parts:
        training = np.setdiff1d(np.arange(len(distances)), held_out)
        best = int(np.argmax([rates(training, threshold)[2] for threshold in THRESHOLDS]))
        chosen.append(THRESHOLDS[best])
        accuracy.append(rates(held_out, THRESHOLDS[best])[2])
        tprs.append([rates(held_out, threshold)[0] for threshold in THRESHOLDS])
        fprs.append([rates(held_out, threshold)[1] for threshold in THRESHOLDS])
        far = [rates(training, threshold)[1] for threshold in FINE_THRESHOLDS]
        at.append(np.interp(target, far, FINE_THRESHOLDS) if max(far) >= target else 0.0)
        vals.append(rates(held_out, at[-1])[0])
        fars.append(rates(held_out, at[-1])[1])
    numbers = {
        "fold_accuracy": accuracy,
        "fold_threshold": chosen,
        "tpr": np.mean(tprs, axis=0),
        "fpr": np.mean(fprs, axis=0),
        "accuracy": np.mean(accuracy),
        "accuracy_std": np.std(accuracy),
    }
    return numbers, {"fold_threshold": at, "fold_val": vals, "fold_far": fars}


@pytest.mark.parametrize(
    ("pairs", "folds", "target", "step"), [(103, 4, 0.2, 0), (60, 3, 1e-3, 0.01), (61, 3, 0.3, 0.1)]
)
def test_bit_equal_to_a_plain_loop(pairs: int, folds: int, target: float, step: float) -> None:
    random = np.random.default_rng(pairs)
    issame = np.arange(pairs) % 3 < 1
    distances = (random.random(pairs) * 3 - issame).clip(0)
    if step:  # distances that lie exactly on thresholds, with ties
        distances = THRESHOLDS[(distances / step).astype(int) * round(100 * step)]
    result = verify_distances(distances, issame, folds=folds, far_targets=(target,))
    numbers, point = by_loop(distances, issame, folds, target)
    for name, expected in numbers.items():
        assert np.asarray(getattr(result, name)).tolist() == np.asarray(expected).tolist(), name
    for name, expected in point.items():
        assert getattr(result.at_far[0], name).tolist() == np.asarray(expected).tolist(), name


def test_threshold_between_repeated_rates() -> None:
    far, thresholds = np.array([0, 0, 0.1, 0.1, 0.5]), np.array([0.0, 1, 2, 3, 4])
    assert threshold_at(far, thresholds, 0.05) == 1.5  # from the last 0 to the first 0.1
    assert threshold_at(far, thresholds, 0.1) == 3.0  # the last one that has it
    assert threshold_at(far, thresholds, 0.3) == 3.5
    assert threshold_at(far, thresholds, 0.5) == 4.0
    assert threshold_at(far, thresholds, 0.6) == 0.0


def test_a_wanted_rate_out_of_reach_accepts_nothing() -> None:
    issame = np.arange(40) % 2 == 0
    point = verify_distances(np.where(issame, 0.5, 4.0), issame, far_targets=(1.0,)).at_far[0]
    assert point.fold_threshold.tolist() == [0.0] * FOLDS
    assert (point.val, point.far) == (0.0, 0.0)


def test_zero_embeddings_are_at_distance_one_from_everything() -> None:
    embeddings = np.zeros((40, 3))
    embeddings[1::2] = [0, 3, 4]
    result = verify_pairs(embeddings, np.arange(20) % 2 == 0)
    assert result.tpr[THRESHOLDS > 1.005].min() == 1
    assert result.tpr[THRESHOLDS < 0.995].max() == 0


def test_results_are_json(golden: dict[str, Array]) -> None:
    result = verify_pairs(golden["V3_emb_orig"], golden["V3_issame"])
    read = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert read["fpr"] == result.fpr.tolist()
    assert read["at_far"][0]["val"] == result.at_far[0].val
    assert to_json({"roc": np.array([np.inf, np.nan, 1.0]), "count": np.int64(3)}) == {
        "roc": [None, None, 1.0],
        "count": 3,
    }


def test_bad_input_is_named() -> None:
    issame = np.arange(40) % 2 == 0
    embeddings = np.random.default_rng(0).standard_normal((80, 4))
    with pytest.raises(DataError, match=r"Shape of pair embeddings: got \(79, 4\); expected \[2P, D\]"):
        verify_pairs(embeddings[:-1], issame)
    with pytest.raises(DataError, match=r"Shape of issame: got \(40,\); expected \(39,\)"):
        verify_pairs(embeddings[:-2], issame)
    with pytest.raises(DataError, match=r"Values of issame: got \[0, 2\]"):
        verify_pairs(embeddings, 2 * issame)
    with pytest.raises(DataError, match="Verification fold 1, 3, 4 of 4 has only genuine or only impostor"):
        verify_pairs(embeddings, np.repeat([True, False, True, False], [10, 5, 5, 20]), folds=4)
    with pytest.raises(DataError, match="Number of verification pairs: got 8; expected at least 10"):
        verify_pairs(embeddings[:16], issame[:8])
    embeddings[7] = np.nan
    with pytest.raises(DataError, match=r"Distances of 1 pairs \(pair 3: nan\).*NaN comes from embeddings"):
        verify_pairs(embeddings, issame)
    with pytest.raises(DataError, match=r"pair 0: 4\.1.*squared Euclidean distances"):
        verify_distances(np.full(40, 4.1), issame)
    with pytest.raises(ConfigError, match="Number of verification folds: got 1"):
        verify_pairs(embeddings, issame, folds=1)
    with pytest.raises(ConfigError, match="Wanted false acceptance rate: got 0"):
        verify_pairs(embeddings, issame, far_targets=(0,))
    with pytest.raises(DataError, match="Shape of the mirror images' embeddings"):
        sum_with_flip(embeddings, embeddings[1:])
