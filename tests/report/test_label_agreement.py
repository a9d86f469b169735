"""Agreement of labellings against closed forms and a loop over all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qsd_plugin.report.label_agreement import agreement_with_truth, direction_agreement, rank_correlation
from qsd_plugin.report.label_tables import agreement_table, truth_table

NAN = float("nan")


def test_rank_correlation_closed_forms():
    assert rank_correlation([1, 2, 3, 4], [10, 100, 1000, 10000]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = (1, -1, 0, 0)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    # Ties share their mean rank: Pearson's correlation of (1, 2.5, 2.5, 4) and (1, 2, 3, 4).
    assert rank_correlation([0, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(
        np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1]
    )


def test_rank_correlation_uses_what_both_know():
    assert rank_correlation([1, NAN, 3, 2], [1, 0, NAN, 5]) == pytest.approx(1.0)
    assert math.isnan(rank_correlation([1, NAN], [NAN, 1]))
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_direction_closed_form():
    identities = ["a", "a", "a", "b", "b", "c"]
    reference = [1.0, 2.0, 3.0, 5.0, 5.0, 9.0]  # b's pair has no direction
    found = direction_agreement([10, 20, 15, 1, 2, 0], reference, identities)
    assert (found.agreement, found.pairs, found.ties) == (pytest.approx(2 / 3), 3, 0)
    assert direction_agreement([7] * 6, reference, identities).agreement == 0.5
    assert direction_agreement([7] * 6, reference, identities).ties == 3
    assert direction_agreement([-value for value in reference], reference, identities).agreement == 0.0
    assert direction_agreement([NAN, 20, 15, 1, 2, 0], reference, identities).pairs == 1
    wide = direction_agreement([10, 20, 15, 1, 2, 0], reference, identities, min_gap=2.0)
    assert (wide.agreement, wide.pairs) == (1.0, 1)
    assert math.isnan(direction_agreement([1.0, 2.0], [1.0, 2.0], ["a", "b"]).agreement)


def test_a_gap_that_rounding_makes_smaller_still_counts():
    assert 0.7 - 0.4 < 0.3 < 0.4 - 0.1
    for better, worse in ((0.7, 0.4), (0.4, 0.1)):
        assert direction_agreement([1, 2], [-better, -worse], ["a", "a"], min_gap=0.3).pairs == 1


def test_direction_is_that_of_a_loop_over_all_pairs():
    generator = np.random.default_rng(0)
    identities = generator.integers(0, 12, size=90)
    labels, reference = generator.integers(0, 6, size=90).astype(float), generator.integers(0, 9, size=90) / 8
    agreeing = pairs = 0.0
    for i in range(90):
        for j in range(i + 1, 90):
            if identities[i] == identities[j] and abs(reference[i] - reference[j]) >= 0.25:
                pairs += 1
                product = (labels[i] - labels[j]) * (reference[i] - reference[j])
                agreeing += 0.5 if product == 0 else float(product > 0)
    found = direction_agreement(labels, reference, identities, min_gap=0.25)
    assert (found.agreement, found.pairs) == (pytest.approx(agreeing / pairs), pairs)


def test_agreement_with_truth_looks_at_each_degradation_where_it_was_applied():
    kinds = {"blur": np.array([0.2, 0.4, 0.6, 0, 0, 0]), "noise": np.array([0, 0, 0, 0.1, 0.5, 0.9])}
    severity = np.array([0.2, 0.4, 0.6, 0.1, 0.5, 0.9])
    labels = [90, 70, 40, 1, 2, 3]  # right about blur, wrong way round about noise
    found = agreement_with_truth(labels, severity, kinds, list("aaabbb"))
    assert found.by_degradation == {"blur": pytest.approx(1.0), "noise": pytest.approx(-1.0)}
    assert found.images == {"blur": 3, "noise": 3}
    assert found.correlation == pytest.approx(rank_correlation(labels, [-0.2, -0.4, -0.6, -0.1, -0.5, -0.9]))
    assert (found.direction.agreement, found.direction.pairs) == (0.5, 6)
    assert (found.clear_direction.agreement, found.clear_direction.pairs) == (pytest.approx(1 / 4), 4)
    text = truth_table({"mine": found})
    assert "| blur (3) " in text
    assert "0.500 of 6" in text
    assert "0.250 of 4" in text


def test_agreement_table_is_read_by_rows():
    pairs = {
        ("a", "b"): (0.25, direction_agreement([1, 2], [1, 2], ["x", "x"])),
        ("b", "a"): (NAN, direction_agreement([], [], [])),
    }
    table = agreement_table(["a", "b"], pairs).splitlines()
    assert [cell.strip() for cell in table[-2].split("|")[1:-1]] == ["a", "", "0.25 / 1.000"]
    assert [cell.strip() for cell in table[-1].split("|")[1:-1]] == ["b", "- / -", ""]
