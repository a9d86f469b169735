"""Spread of labels, their fitness report and its warnings, norms as labels; against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qsd_plugin.core.errors import LabelError
from qsd_plugin.quality import QualityLabels, build_source, require_coverage
from qsd_plugin.quality.checks import check_labels, label_warnings, require_usable, same_identity_pairs
from qsd_plugin.quality.norms import norm_labels
from qsd_plugin.report.label_tables import check_table

NAN = float("nan")


def labels_of(score, spread=None, raw=None, **meta):
    score = np.array(score, np.float64)
    unknown = np.full(len(score), np.nan)
    keys = tuple(f"D/{row}.jpg" for row in range(len(score)))
    columns = [unknown if values is None else np.array(values, np.float64) for values in (raw, spread)]
    return QualityLabels(score, *columns, keys, {"dataset": "D", "scale": "minmax", **meta})


def test_spread_is_found_by_path_and_stretched_with_a_linear_scale():
    labels = labels_of([10, 20, 50], [1, 2, NAN], scale="none")
    paths = ["/d/1.jpg", "/d/9.jpg", "/d/2.jpg", "/d/0.jpg"]
    for table, factor in ((labels, 1.0), (labels.rescaled("minmax"), 100 / 40), (labels.rescaled("rank"), NAN)):
        spread = table.lookup_spread(paths, root="/d", basenames=False)
        assert spread.dtype == torch.float32
        np.testing.assert_allclose(spread.numpy(), [2 * factor, NAN, NAN, factor])
    assert np.isnan(labels_of([5, 5], [1, 1], scale="none").rescaled("minmax").spread).all()


def test_controls_keep_a_spread_with_its_label():
    score = np.linspace(1, 60, 60)
    score[[3, 40]] = NAN
    labels = labels_of(score, score / 10)
    shuffled = labels.controlled("shuffle", seed=4)
    assert (shuffled.score != labels.score)[np.isfinite(score)].any()
    np.testing.assert_allclose(shuffled.spread, shuffled.score / 10)
    reverse = labels.controlled("reverse", seed=4)
    np.testing.assert_array_equal(reverse.spread, labels.spread)


def test_file_source_finds_the_spread_in_the_file_of_the_label(tmp_path):
    first, second = labels_of([10, 20], [1, 2]), labels_of([30, 40, 50], [3, 4, 5], dataset="E")
    second = QualityLabels(second.score, second.raw, second.spread, ("E/0.jpg", "E/8.jpg", "E/9.jpg"), second.meta)
    first.save(tmp_path / "a.npz")
    second.save(tmp_path / "b.npz")
    source = build_source("file", files=[tmp_path / "a.npz", tmp_path / "b.npz"], roots=["/d", "/e"])
    spread = source.spread(["/e/0.jpg", "/d/0.jpg", "/e/9.jpg", "/x/9.jpg"])
    np.testing.assert_array_equal(spread.numpy(), [3, 1, 5, NAN])


def test_report_counts_what_it_says():
    #         identity a        | b (constant) | c (one image) | no label
    score = [0.5, 40.0, 99.5, 50.0, 50.0, 100.0, NAN]
    spread = [1.0, 30.0, 60.0, 1.0, NAN, 2.0, NAN]
    raw = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, NAN]
    labels = labels_of(score, spread, raw)
    check = check_labels(labels, [f"/d/{row}.jpg" for row in range(8)], list("aaabbcdd"), root="/d")
    assert (check.images, check.covered) == (8, 6)
    assert check.percentiles[50] == pytest.approx(50.0)
    assert check.at_bottom == pytest.approx(1 / 6)
    assert check.at_top == pytest.approx(2 / 6)
    assert check.spread == pytest.approx(2.0)
    assert check.raw_range == pytest.approx((0.125, 0.575))
    # Gaps 39.5, 99.0 and 59.5 against sqrt(1 + 900), sqrt(1 + 3600) and sqrt(900 + 3600); b's pair is not measured.
    assert check.pairs == 4
    assert check.clear_pairs == pytest.approx(2 / 3)
    assert (check.identities, check.constant_identities) == (2, 1)
    (warning,) = check.warnings
    assert warning.startswith("50% of the labels lie within 1% of the scale's ends (saturated)")
    table = check_table({"D": check})
    assert "75.00%" in table
    assert "16.7% / 33.3%" in table
    assert table.splitlines()[-1] == f"WARNING D: {warning}"


def test_report_on_labels_without_spread_raw_values_or_any_match():
    check = check_labels(labels_of([1, 99]), ["/d/0.jpg", "/d/1.jpg"], ["a", "a"], root="/d")
    assert (check.spread, check.raw_range, check.clear_pairs) == (None, None, None)
    nothing = check_labels(labels_of([1, 99]), ["/x/7.jpg"], ["a"], root="/d")
    assert (nothing.covered, nothing.percentiles, nothing.pairs) == (0, {}, 0)
    assert "0.00%" in check_table({"D": nothing})


def test_unscaled_labels_are_saturated_at_their_own_ends():
    assert check_labels(labels_of([200, 300, 400, 400], scale="none"), ["0.jpg"], ["a"]).at_bottom == 1.0
    assert any("75% of the labels" in text for text in label_warnings(labels_of([200, 300, 400, 400], scale="none")))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (labels_of([50] * 4), "All 4 labels are 50: no pair of images has a better and a worse one."),
        (labels_of([NAN, NAN]), "No image has a label."),
        (labels_of(np.linspace(0.2, 0.9, 50)), "The labels span 0.2 to 0.9 of a scale from 0 to 100: are they"),
        (
            labels_of(np.linspace(2, 98, 50), raw=np.linspace(0.95, 0.99, 50), method="SDD-FIQA"),
            "The raw W1 of 90 % of the images lies between 0.952 and 0.988: the network separates its own training",
        ),
    ],
)  # fmt: skip
def test_unfit_labels_are_warned_about(labels, message):
    assert label_warnings(labels)[0].startswith(message)


def test_sound_labels_are_not_warned_about():
    sound = labels_of(np.linspace(2, 98, 50), raw=np.linspace(0.3, 0.9, 50), method="SDD-FIQA")
    assert label_warnings(sound) == []
    require_usable(sound)


def test_equal_labels_cannot_be_trained_with(tmp_path):
    labels_of([50, 50, 50]).save(tmp_path / "a.csv")
    with pytest.raises(
        LabelError, match=r"label file .*a\.csv: all 3 labels are equal: got 50\.0; expected labels that"
    ):
        require_usable(QualityLabels.load(tmp_path / "a.csv"))


def test_labels_off_the_scale_cannot_be_trained_with():
    with pytest.raises(LabelError, match=r"2 of 3 labels out of range, e\.g\. 812; expected labels from 0 to 100"):
        require_usable(labels_of([5, 812, -1], scale="none"))


def test_coverage_does_not_count_basenames_that_the_look_up_will_not_use():
    labels = labels_of([1, 2])
    assert require_coverage(labels, ["/elsewhere/0.jpg"], root="/d") == 1.0
    with pytest.raises(LabelError, match=r"covers 0 of 1 training images"):
        require_coverage(labels, ["/elsewhere/0.jpg"], root="/d", basenames=False)


def test_pairs_are_all_those_of_one_identity():
    identities = np.array(["b", "a", "b", "c", "a", "b"])
    pairs = {
        (int(i), int(j))
        for first, second in same_identity_pairs(identities)
        for i, j in zip(first, second, strict=True)
    }
    expected = {(i, j) for i in range(6) for j in range(i + 1, 6) if identities[i] == identities[j]}
    assert pairs == expected  # fmt: skip


def test_norm_labels_are_norms_on_the_scale():
    features = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]], dtype=torch.float16)
    labels = norm_labels(features, ["a", "a", "b"], keys=["x", "y", "z"])
    np.testing.assert_allclose(labels.raw, [5, 1, 10])
    np.testing.assert_allclose(labels.score, [100 * 4 / 9, 0, 100])
    assert np.isnan(labels.spread).all()
    assert (labels.keys, labels.meta["method"], labels.meta["scale"]) == (("x", "y", "z"), "norm", "minmax")
    with pytest.raises(LabelError, match=r"1 of 2 features are not finite: got 'y'"):
        norm_labels(np.array([[1.0, 2.0], [np.inf, 0.0]]), ["a", "b"], keys=["x", "y"])
