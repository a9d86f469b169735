"""Warnings about labels and pairs: what is said, when, and how often."""

from __future__ import annotations

import pytest
import torch

from qsd_plugin.core.errors import LabelError
from qsd_plugin.methods.qsd import PairWatch, QSDLoss


def means(**changes: float) -> dict[str, float]:
    """Of healthy steps with 12 pairs each."""
    sound = {"pairs": 12.0, "kept": 9.0, "dropped_low": 3.0, "mean_gap": 12.0}
    others = dict.fromkeys(("dropped_high", "dropped_unsure", "ties", "unlabelled", "out_of_range", "empty"), 0.0)
    return {**sound, **others, **changes}


def test_the_losss_statistics_are_what_it_reads():
    taps = {"embedding": torch.eye(4)}
    stats = QSDLoss({"embedding": 1.0})(taps, taps, torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 2, 3, 4])).stats
    said = PairWatch().update({name: value.item() for name, value in stats.items()}, 5)
    assert len(said) == 2
    assert "labels of all 20 labelled pairs of the last 5 steps are tied" in said[0]
    assert "5 of 5 steps (100.0%) had no pair to learn from. Of 20 pairs 0 were kept" in said[1]
    assert "20 tied" in said[1]


def test_healthy_training_is_left_alone():
    watch = PairWatch()
    assert not any(watch.update(means(), 20) for _ in range(50))


def test_empty_steps_are_warned_of_once_with_the_numbers():
    watch = PairWatch()
    assert watch.update(means(empty=4 / 200, kept=8.0, dropped_unsure=1.0), 200) == []  # 2 %, but only four of them
    (said,) = watch.update(means(empty=0.01, unlabelled=2.0), 100)
    assert (
        "5 of 300 steps (1.7%) had no pair to learn from. Of 3600 pairs 2500 were kept; 900 below the lower bound"
        in said
    )
    assert "200 within the labels' own spread, 0 tied, 200 unlabelled" in said
    assert "QSD.TAU" in said
    assert watch.update(means(empty=1.0), 100) == []  # once


def test_a_hundredth_of_empty_steps_is_let_pass():
    watch = PairWatch()
    assert watch.update(means(empty=0.01), 1000) == []
    assert len(watch.update(means(empty=0.02), 1000)) == 1


def test_upper_bound_that_drops_much_is_warned_of_once():
    watch = PairWatch()
    assert watch.update(means(dropped_high=0.6), 20) == []  # exactly 5 %
    (said,) = watch.update(means(dropped_high=0.9), 20)
    assert "upper bound drops 30 of 480 pairs (6.2%)" in said
    assert watch.update(means(dropped_high=6.0), 20) == []


def test_labels_on_another_scale():
    assert PairWatch().update(means(mean_gap=1.0), 20) == []
    (said,) = PairWatch().update(means(mean_gap=0.2), 20)
    assert "mean label gap is 0.2 on a scale from 0 to 100" in said
    assert PairWatch(q_max=1.0).update(means(mean_gap=0.2), 20) == []
    with pytest.raises(
        LabelError, match=r"40 of 240 pairs of the last 20 steps .*out of range; expected labels in \[0, 1"
    ):
        PairWatch().update(means(out_of_range=2.0), 20)
