"""Scales and controls against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.quality import CONTROLS, SCALES, control, random_direction, rescale
from qsd_plugin.quality.scaling import minmax

NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [3.0, NAN, 1.0, 5.0, 3.0]),
        ("minmax", [50.0, NAN, 0.0, 100.0, 50.0]),
        ("rank", [50.0, NAN, 0.0, 100.0, 50.0]),
    ],
)
def test_closed_forms(kind, expected):
    np.testing.assert_array_equal(rescale([3.0, NAN, 1.0, 5.0, 3.0], kind), expected)


def test_minmax_is_linear_and_rank_only_sees_order():
    scores = np.array([0.0, 1.0, 10.0, 1000.0])
    np.testing.assert_allclose(rescale(scores, "minmax"), scores / 10)
    np.testing.assert_allclose(rescale(scores, "rank"), [0, 100 / 3, 200 / 3, 100])
    np.testing.assert_array_equal(rescale(np.log1p(scores), "rank"), rescale(scores, "rank"))


def test_ties_share_their_mean_rank():
    scores = np.random.default_rng(0).integers(0, 9, size=40).astype(float)
    np.testing.assert_allclose(rescale(scores, "rank"), 100 * (rankdata(scores) - 1) / 39)


@pytest.mark.parametrize("kind", ["minmax", "rank"])
@pytest.mark.parametrize("scores", [[7.0, 7.0, 7.0], [7.0]])
def test_equal_scores_become_the_middle(kind, scores):
    np.testing.assert_array_equal(rescale(scores, kind), 50.0)


@pytest.mark.parametrize("kind", SCALES)
def test_nothing_to_scale(kind):
    assert rescale([], kind).shape == (0,)
    np.testing.assert_array_equal(rescale([NAN], kind), [NAN])


def test_minmax_scales_each_column_by_itself():
    np.testing.assert_array_equal(
        minmax(np.array([[0.0, 5.0, 2.0], [4.0, 1.0, 2.0], [1.0, 1.0, 2.0]])), [[0, 100, 50], [100, 0, 50], [25, 0, 50]]
    )


def test_minmax_never_leaves_the_scale():
    """One rounding error above 100 and the saved file would be refused."""
    columns = np.random.default_rng(0).uniform(0.1, 0.9, size=(20, 2000))
    scaled = minmax(columns)
    np.testing.assert_array_equal(scaled.max(axis=0), 100.0)
    np.testing.assert_array_equal(scaled.min(axis=0), 0.0)


def test_input_is_left_alone():
    scores = np.array([1.0, 2.0, 4.0])
    for kind in SCALES:
        rescale(scores, kind)[:] = 0
    for kind in ("none", "shuffle", "reverse"):
        control(scores, kind, seed=0)[:] = 0
    assert scores.tolist() == [1.0, 2.0, 4.0]


def test_reverse_keeps_gaps_and_turns_directions():
    scores = np.array([10.0, NAN, 80.0, 35.0])
    turned = control(scores, "reverse", seed=0)
    np.testing.assert_array_equal(turned, [90.0, NAN, 20.0, 65.0])
    np.testing.assert_array_equal(control(turned, "reverse", seed=0), scores)


def test_shuffle_keeps_the_distribution_and_nothing_else():
    scores = np.random.default_rng(0).uniform(0, 100, size=2000)
    scores[::10] = NAN
    shuffled = control(scores, "shuffle", seed=4)
    known = ~np.isnan(scores)
    np.testing.assert_array_equal(np.isnan(shuffled), ~known)
    np.testing.assert_array_equal(np.sort(shuffled[known]), np.sort(scores[known]))
    assert abs(np.corrcoef(shuffled[known], scores[known])[0, 1]) < 0.1
    np.testing.assert_array_equal(shuffled, control(scores, "shuffle", seed=4))
    assert not np.array_equal(shuffled[known], control(scores, "shuffle", seed=5)[known])


def test_random_direction_keeps_gaps_and_tosses_a_fair_coin():
    first, second = torch.rand(4000) * 100, torch.rand(4000) * 100
    q_1, q_2 = random_direction(first, second, torch.Generator().manual_seed(1))
    torch.testing.assert_close((q_1 - q_2).abs(), (first - second).abs(), rtol=0, atol=0)
    torch.testing.assert_close(q_1 + q_2, first + second, rtol=0, atol=0)
    kept = (q_1 == first).float().mean().item()
    assert abs(kept - 0.5) < 4 * 0.5 / 4000**0.5
    again = random_direction(first, second, torch.Generator().manual_seed(1))
    assert torch.equal(again[0], q_1)


def test_random_direction_is_not_a_labelling():
    assert "random_direction" in CONTROLS
    with pytest.raises(
        ConfigError, match=r"random_direction acts on pairs.*Call random_direction\(quality_1, quality_2"
    ):
        control([1.0, 2.0], "random_direction", seed=0)


def test_misspelt_names_get_a_hint():
    with pytest.raises(
        ConfigError, match=r"QUALITY\.SCALE: got 'min_max'; expected one of none, minmax, rank\. Did you mean 'minmax'"
    ):
        rescale([1.0], "min_max")
    with pytest.raises(ConfigError, match=r"QUALITY\.CONTROL: got 'reversed'.*Did you mean 'reverse'"):
        control([1.0], "reversed", seed=0)
