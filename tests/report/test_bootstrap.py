"""The bootstrap over identities against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from qsd_plugin.core.errors import DataError
from qsd_plugin.report.bootstrap import DETECTABLE, IdentityBootstrap


def names(count: int, repeats: int = 1, start: int = 0) -> np.ndarray:
    return np.repeat([f"{number:04d}" for number in range(start, start + count)], repeats)


def column(values: object) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(-1, 1)


def test_constant_difference_has_an_interval_of_no_width() -> None:
    found = IdentityBootstrap([names(30, 3), names(20, 2, start=100)]).intervals(
        [column(np.full(90, 1.5)), column(np.full(40, 1.5))]
    )[0]
    assert found.value == 1.5
    assert (found.low, found.high) == pytest.approx((1.5, 1.5), abs=1e-12)
    assert found.standard_error == pytest.approx(0, abs=1e-12)
    assert found.excludes_zero
    assert found.identities == 50


def test_two_identities_give_three_means_at_one_to_two_to_one() -> None:
    # Means 0 and 1: a draw holds the first twice (0), each once (1/2) or the second twice (1); variance 1/8.
    found = IdentityBootstrap([names(2)]).intervals([column([0.0, 1.0])])[0]
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    assert found.standard_error == pytest.approx(np.sqrt(1 / 8), rel=0.02)
    assert not found.excludes_zero


def test_standard_error_is_that_of_a_mean_over_identities_not_over_queries() -> None:
    # 200 identities whose four queries agree: the mean varies as one of 200 values, sqrt(var / 200), not of 800.
    per_identity = np.random.default_rng(3).normal(0.3, 2.0, 200)
    found = IdentityBootstrap([names(200, 4)]).intervals([column(np.repeat(per_identity, 4))])[0]
    expected = per_identity.std() / np.sqrt(200)
    assert found.standard_error == pytest.approx(expected, rel=0.03)
    assert found.high - found.low == pytest.approx(2 * 1.96 * expected, rel=0.04)
    assert found.detectable == pytest.approx(2.8016 * found.standard_error, rel=1e-4)
    assert pytest.approx(2.8016, abs=1e-4) == DETECTABLE


def test_value_is_the_mean_over_queries_then_over_splits() -> None:
    values = [column([1.0, 1.0, 1.0, 4.0]), column([10.0])]
    identities = [np.array(["a", "a", "a", "b"]), np.array(["c"])]
    assert IdentityBootstrap(identities).intervals(values)[0].value == pytest.approx((7 / 4 + 10) / 2)


def test_separate_splits_add_up_and_the_same_people_twice_do_not() -> None:
    values = np.random.default_rng(4).normal(size=150)
    alone = IdentityBootstrap([names(150)]).intervals([column(values)])[0].standard_error
    others = IdentityBootstrap([names(150), names(150, start=500)]).intervals([column(values), column(values)])[0]
    again = IdentityBootstrap([names(150), names(150)]).intervals([column(values), column(values)])[0]
    assert others.standard_error == pytest.approx(alone / np.sqrt(2), rel=0.04)
    assert again.standard_error == pytest.approx(alone, rel=1e-9)


def test_swapping_the_arms_mirrors_the_interval_and_the_order_of_queries_does_not_matter() -> None:
    generator = np.random.default_rng(5)
    identities, values = names(40, 3), column(generator.normal(size=120))
    bootstrap = IdentityBootstrap([identities])
    forth, back = bootstrap.intervals([values])[0], bootstrap.intervals([-values])[0]
    assert (back.value, back.low, back.high) == pytest.approx((-forth.value, -forth.high, -forth.low), abs=1e-12)
    order = generator.permutation(120)
    shuffled = IdentityBootstrap([identities[order]]).intervals([values[order]])[0]
    assert (shuffled.low, shuffled.high) == pytest.approx((forth.low, forth.high), abs=1e-12)


def test_kinds_of_values_are_bootstrapped_as_if_alone_and_the_seed_decides_the_draws() -> None:
    values = np.random.default_rng(6).normal(size=(60, 2))
    both = IdentityBootstrap([names(60)], seed=1).intervals([values])
    alone = IdentityBootstrap([names(60)], seed=1).intervals([values[:, 1:]])[0]
    assert both[1].low == pytest.approx(alone.low, abs=1e-12)
    assert IdentityBootstrap([names(60)], seed=2).intervals([values])[1].low != both[1].low


def test_no_queries_is_an_error() -> None:
    with pytest.raises(DataError, match="without queries"):
        IdentityBootstrap([names(3), names(0)])
