"""Error-versus-discard curves: closed forms, and every point recomputed by brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.quality_curves import Curve, error_discard_curve


def hundred(quality: Array, **options: Any) -> Curve:
    """100 genuine pairs of similarity 0, 0.01, ..., 0.99 in this order, and 100 impostors at -1."""
    similarity = np.concatenate((np.arange(100) / 100, np.full(100, -1.0)))
    genuine = np.arange(200) < 100
    quality = np.concatenate((quality, np.zeros(100)))
    return error_discard_curve(similarity, genuine, quality, quality + 1, **{"start_error": 0.1, **options})


def test_perfect_quality_removes_errors_first() -> None:
    curve = hundred(np.arange(100))
    k = np.arange(31)
    assert curve.discard == pytest.approx(k / 100, abs=1e-15)
    assert curve.error == pytest.approx(np.maximum(10 - k, 0) / (100 - k), abs=1e-15)
    assert curve.threshold.tolist() == [0.1] * 31
    assert curve.pauc == pytest.approx(sum((10 - i) / (100 - i) for i in range(10)) / 100, abs=1e-15)
    assert curve.pauc == curve.pauc_best
    assert (curve.num_pairs, curve.max_discard) == (100, 0.3)
    assert curve.protocol == "FNMR, fixed threshold from FNMR 0.1, pair quality = minimum"


def test_reversed_and_constant_quality() -> None:
    reverse = hundred(-np.arange(100))
    assert reverse.error == pytest.approx(10 / (100 - np.arange(31)), abs=1e-15)
    constant = hundred(np.zeros(100))
    assert (constant.discard.tolist(), constant.error.tolist()) == ([0.0], [0.1])
    assert constant.pauc == pytest.approx(0.1 * 0.3, abs=1e-15)
    assert constant.pauc_best == reverse.pauc_best == hundred(np.arange(100)).pauc


def test_equal_qualities_go_together_and_the_curve_is_a_staircase() -> None:
    curve = hundred(np.arange(100) // 20, max_discard=0.5)  # the first step removes all errors
    assert curve.discard.tolist() == [0.0, 0.2, 0.4]
    assert curve.error.tolist() == [0.1, 0.0, 0.0]
    assert curve.pauc == pytest.approx(0.1 * 0.2, abs=1e-15)


@pytest.mark.parametrize("decimals", [None, 1])
@pytest.mark.parametrize("threshold", ["fixed", "subset"])
@pytest.mark.parametrize("error", ["fnmr", "fmr"])
def test_by_brute_force(error: str, threshold: str, decimals: int | None) -> None:
    random = np.random.default_rng(3)
    genuine = random.random(400) < 0.4
    qualities = random.random((2, 400)).round(2)
    similarity = random.standard_normal(400) * 0.7 + genuine * qualities.min(0)
    if decimals is not None:
        similarity = similarity.round(decimals)
    curve = error_discard_curve(
        similarity, genuine, *qualities, start_error=0.15, error=error, threshold=threshold, max_discard=0.4
    )
    quality = qualities.min(0)
    candidates = np.unique(np.concatenate((similarity, np.nextafter(similarity, np.inf))))

    def rates(kept: Array, at: float) -> tuple[float, float]:
        """(own, other) error rates of the kept pairs."""
        fnmr, fmr = (similarity[kept & genuine] < at).mean(), (similarity[kept & ~genuine] >= at).mean()
        return (fnmr, fmr) if error == "fnmr" else (fmr, fnmr)

    everything = np.ones(400, dtype=bool)
    start = max((at for at in candidates if rates(everything, at)[0] <= 0.15), key=lambda at: rates(everything, at)[0])
    share = rates(everything, start)[1]
    own = genuine if error == "fnmr" else ~genuine
    levels = [q for q in np.unique(quality[own]) if (quality[own] < q).mean() <= 0.4]
    assert curve.discard == pytest.approx([(quality[own] < q).mean() for q in levels], abs=1e-12)
    for found, at, level in zip(curve.error, curve.threshold, levels, strict=True):
        kept = quality >= level
        if threshold == "fixed":
            assert found == pytest.approx(rates(kept, start)[0], abs=1e-12)
        else:
            admissible = [rates(kept, t)[0] for t in candidates if rates(kept, t)[1] <= share]
            assert found == pytest.approx(min(admissible), abs=1e-12)
        assert rates(kept, at)[0] == pytest.approx(found, abs=1e-12)
    edges = np.append(curve.discard, 0.4)
    fine = np.linspace(0, 0.4, 40001)[:-1] + 5e-6
    staircase = curve.error[np.searchsorted(edges, fine, side="right") - 1]
    assert curve.pauc == pytest.approx(staircase.mean() * 0.4, abs=1e-5)


def test_monotone_transforms_change_nothing() -> None:
    random = np.random.default_rng(8)
    genuine, similarity, (a, b) = random.random(300) < 0.5, random.standard_normal(300), random.random((2, 300))
    plain = error_discard_curve(similarity, genuine, a, b, start_error=0.1)
    stretched = error_discard_curve(np.exp(similarity), genuine, 100 * a**3, 100 * b**3, start_error=0.1)
    assert plain.error.tolist() == stretched.error.tolist()
    assert plain.pauc == stretched.pauc
    exchanged = error_discard_curve(similarity, genuine, b, a, start_error=0.1)
    assert plain.error.tolist() == exchanged.error.tolist()


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match=r"Starting error 0.001 of 100 pairs is less than one pair.*0\.01 or more"):
        hundred(np.arange(100), start_error=0.001)
    with pytest.raises(ConfigError, match=r"Error-versus-discard error: got 'fnm'.*Did you mean 'fnmr'"):
        hundred(np.arange(100), error="fnm")
    with pytest.raises(ConfigError, match=r"Error-versus-discard threshold: got 'moving'.*fixed, subset"):
        hundred(np.arange(100), threshold="moving")
    with pytest.raises(ConfigError, match="max_discard: got 1; expected between 0 and 1"):
        hundred(np.arange(100), max_discard=1)
    with pytest.raises(DataError, match=r"1 pairs have an image without a quality \(NaN\)"):
        hundred(np.where(np.arange(100) == 3, np.nan, 1))
    with pytest.raises(DataError, match="No pairs of the other kind are left"):
        hundred(np.arange(100), threshold="subset")
    with pytest.raises(DataError, match=r"Shapes of quality_a and quality_b: got \(\(2,\), \(3,\)\)"):
        error_discard_curve(np.ones(2), [0, 1], np.ones(2), np.ones(3), start_error=0.1)
    with pytest.raises(DataError, match="Shape of the qualities"):
        error_discard_curve(np.ones(2), [0, 1], np.ones(3), np.ones(3), start_error=0.1)
