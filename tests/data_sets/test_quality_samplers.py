"""Quality-aware identity samplers: what groups and batches hold, counted; ranks, workers and state of the family."""

from __future__ import annotations

import itertools
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.samplers import (
    IdentitySampler,
    QualityBalancedSampler,
    QualityIdentitySampler,
    SetWeightedIdentitySampler,
    balanced_counts,
    median_cuts,
    quality_bins,
)

NAN = float("nan")


def people(*sizes: int) -> list[str]:
    return [f"p{number}" for number, size in enumerate(sizes) for _ in range(size)]


def groups(batch: list[int], size: int) -> list[list[int]]:
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def distinct_labels(count: int, seed: int = 0) -> np.ndarray:
    """Skewed labels, all different, 0 to 100."""
    return 100 * np.random.default_rng(seed).beta(2, 6, count)


SIZES = tuple(range(4, 24))  # twenty identities, even and odd numbers of images
IDENTITIES = people(*SIZES)
SCORES = distinct_labels(len(IDENTITIES))
SETS = [int(identity in {f"p{number}" for number in range(0, 20, 2)}) for identity in IDENTITIES]


def family(kind: str, batch: int = 16, instances: int = 4, **options: Any) -> IdentitySampler:
    """One sampler of each kind over the same images."""
    common = {"seed": 3, **options}
    if kind == "set-weighted":
        return SetWeightedIdentitySampler(IDENTITIES, SETS, batch, instances, [1, 1], **common)
    sampler = {"halves": QualityIdentitySampler, "balanced": QualityBalancedSampler}[kind]
    return sampler(IDENTITIES, SCORES, batch, instances, **common)


KINDS = ["halves", "balanced", "set-weighted"]


# The family: blocks, ranks, steps, workers, state.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("instances", [2, 4])
def test_every_batch_is_p_different_identities_in_blocks_of_k_different_images(kind: str, instances: int) -> None:
    stream = iter(family(kind, instances=instances))
    for _ in range(200):
        blocks = groups(list(islice(stream, 16)), instances)
        owners = [{IDENTITIES[index] for index in block} for block in blocks]
        assert all(len(owner) == 1 for owner in owners)
        assert len(set.union(*owners)) == 16 // instances
        assert all(len(set(block)) == instances for block in blocks)  # everybody has at least four images


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_a_step_that_is_the_same_however_many_they_are(kind: str) -> None:
    alone = family(kind, batch=32)
    pair = [family(kind, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(50):
        whole, parts = alone.batch(step), [sampler.batch(step) for sampler in pair]
        assert [len(part) for part in parts] == [16, 16]
        owners = [{IDENTITIES[index] for index in part} for part in parts]
        assert owners[0].isdisjoint(owners[1])
        assert owners[0] | owners[1] == {IDENTITIES[index] for index in whole}
        if kind != "balanced":  # balances the batch of its rank
            assert {tuple(block) for part in parts for block in groups(part, 4)} == {*map(tuple, groups(whole, 4))}


@pytest.mark.parametrize("kind", ["halves", "balanced"])
@pytest.mark.parametrize(("count", "ranks", "steps"), [(12, 1, 3), (12, 3, 1), (14, 1, 3), (23, 2, 2)])
def test_a_pass_shows_every_identity_once_but_for_those_that_fill_no_step(
    kind: str, count: int, ranks: int, steps: int
) -> None:
    identities = people(*[4] * count)
    cls = {"halves": QualityIdentitySampler, "balanced": QualityBalancedSampler}[kind]
    samplers = [
        cls(identities, distinct_labels(4 * count), 16, 4, seed=1, rank=rank, world_size=ranks) for rank in range(ranks)
    ]
    orders = []
    for turn in range(20):
        batches = [sampler.batch(turn * steps + place) for place in range(steps) for sampler in samplers]
        shown = [identities[index] for batch in batches for index in batch[::4]]
        assert len(shown) == len(set(shown)) == steps * ranks * 4
        orders.append(tuple(shown))
    assert len(set(orders)) == 20  # each pass in a new order
    if count > steps * ranks * 4:
        assert len({frozenset(order) for order in orders}) > 1  # the ones left out change
    counts = Counter(itertools.chain.from_iterable(orders))
    assert set(counts) == set(identities)


@pytest.mark.parametrize("kind", KINDS)
def test_stream_depends_on_seed_and_step_only(kind: str) -> None:
    first, second = (list(islice(family(kind), 160)) for _ in range(2))
    assert first == second
    assert family(kind).batch(7) == first[7 * 16 : 8 * 16]
    assert list(islice(family(kind, seed=4), 160)) != first


class Numbers(torch.utils.data.Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("kind", KINDS)
def test_loader_yields_the_same_batches_for_any_number_of_workers(kind: str) -> None:
    expected = [family(kind).batch(step) for step in range(8)]
    for workers in (0, 1, 2):
        batches = BatchSampler(family(kind), 16, drop_last=True)
        loader = DataLoader(Numbers(), batch_sampler=batches, num_workers=workers)
        assert [batch.tolist() for batch in islice(loader, 8)] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_on_where_the_training_loop_says(kind: str) -> None:
    stream = list(islice(family(kind), 160))
    before = family(kind)
    list(islice(before, 96))  # a loader that read ahead
    before.step = 4
    assert before.state_dict() == {"seed": 3, "step": 4}
    after = family(kind, seed=99)
    after.batch(4)
    after.load_state_dict(before.state_dict())
    assert list(islice(after, 96)) == stream[4 * 16 :]


# Halves of each identity.


@pytest.mark.parametrize("instances", [2, 4, 6])
def test_half_of_each_group_comes_from_either_side_of_the_median(instances: int) -> None:
    identities = people(*SIZES[instances:])
    scores = distinct_labels(len(identities))
    sampler = QualityIdentitySampler(identities, scores, 4 * instances, instances, seed=0)
    own = {name: scores[[owner == name for owner in identities]] for name in set(identities)}
    sides = set()
    for step in range(300):
        for block in groups(sampler.batch(step), instances):
            labels, median = scores[block], np.median(own[identities[block[0]]])
            assert (labels > median).sum() <= instances // 2 <= (labels >= median).sum()
            assert labels[: instances // 2].min() > labels[instances // 2 :].max()
            sides.update(np.sign(labels - median)[np.argsort(-labels)[[instances // 2 - 1, instances // 2]]])
    assert sides == {-1, 0, 1}  # the median image of an odd number is drawn, too


def test_odd_k_gives_the_odd_image_to_either_half() -> None:
    identities = people(*[10] * 8)
    scores = distinct_labels(80)
    sampler = QualityIdentitySampler(identities, scores, 12, 3, seed=0)
    above = Counter()
    for step in range(400):
        for block in groups(sampler.batch(step), 3):
            own = scores[[owner == identities[block[0]] for owner in identities]]
            above[int((scores[block] > np.median(own)).sum())] += 1
    assert set(above) == {1, 2}
    assert abs(above[1] - 800) < 80  # four standard deviations of 1600 coins


def test_images_of_a_half_are_drawn_equally_often() -> None:
    scores = distinct_labels(16)
    sampler = QualityIdentitySampler(people(8, 8), scores, 8, 4, seed=0)
    counts = Counter(index for step in range(1000) for index in sampler.batch(step))
    # Two of four images per group: 500 each, and every group holds exactly two of each half.
    assert all(abs(count - 500) < 4 * np.sqrt(1000 * 0.25) for count in counts.values())
    for start in (0, 8):
        order = start + np.argsort(scores[start : start + 8])
        assert sum(counts[index] for index in order[:4]) == sum(counts[index] for index in order[4:]) == 2000


@pytest.mark.parametrize(
    ("labels", "cuts"),
    [
        ([1, 2, 3, 4], [2]),
        ([1, 2, 3], [1, 2]),
        ([1, 5, 5, 5, 5, 9], [1, 5]),  # ties in the middle: as near from either side
        ([1, 5, 5, 5, 5, 5], [1]),
        ([1, 1, 2, 3, 3, 3], [3]),
        ([1, 1, 1, 2, 2], [3]),
        ([4, 4, 4], []),
        ([4], []),
        ([], []),
    ],
)
def test_cuts_between_different_labels_nearest_to_the_middle(labels: list[float], cuts: list[int]) -> None:
    assert median_cuts(labels) == cuts


def test_tied_labels_always_leave_a_gap() -> None:
    generator = np.random.default_rng(5)
    identities = people(*[9] * 30)
    scores = np.array([generator.choice([0.0, 40.0, 40.0, 40.0, 40.0, 90.0]) for _ in identities])
    flat = {name for name in set(identities) if len({*scores[[owner == name for owner in identities]]}) == 1}
    sampler = QualityIdentitySampler(identities, scores, 16, 4, seed=0)
    assert sampler.without_gap == len(flat)
    for step in range(200):
        for block in groups(sampler.batch(step), 4):
            assert len(set(block)) == 4
            assert (len(set(scores[block])) > 1) is (identities[block[0]] not in flat)


def blocks_of(scores: list[float], instances: int, count: int = 60) -> list[list[int]]:
    """Groups of the first identity, whose images have these labels; a second one makes up the batch."""
    others = [1.0, 2.0, 3.0, 4.0]
    identities = people(len(scores), 4)
    sampler = QualityIdentitySampler(identities, [*scores, *others], 2 * instances, instances, seed=2)
    return [
        block for step in range(count) for block in groups(sampler.batch(step), instances) if block[0] < len(scores)
    ]


def test_small_half_gives_all_it_has_and_the_other_gives_more() -> None:
    blocks = blocks_of([3.0, 9.0, 9.0, 9.0, 9.0, 9.0], 4)
    assert all(block[-1] == 0 and len(set(block)) == 4 for block in blocks)
    assert len({frozenset(block) for block in blocks}) == 10  # any three of the five others


@pytest.mark.parametrize(
    ("scores", "instances", "allowed"),
    [
        ([5.0, 7.0], 4, {(2, 2)}),
        ([5.0, 7.0, 9.0], 4, {(2, 1, 1), (1, 1, 2)}),  # the middle one on either side
        ([5.0, 7.0], 5, {(2, 3), (3, 2)}),
        ([5.0, 7.0, 7.0], 6, {(3, 1, 2), (3, 2, 1)}),
    ],
)
def test_few_images_repeat_within_their_half(
    scores: list[float], instances: int, allowed: set[tuple[int, ...]]
) -> None:
    found = {tuple(Counter(block)[index] for index in range(len(scores))) for block in blocks_of(scores, instances)}
    assert found == allowed


@pytest.mark.parametrize(
    ("scores", "labelled", "unlabelled"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0, NAN, NAN], 4, 0),
        ([1.0, 2.0, 3.0, NAN, NAN], 3, 1),
        ([1.0, 2.0, NAN, NAN, NAN], 2, 2),
        ([1.0, 2.0, NAN], 3, 1),  # not enough either: one labelled image twice
        ([1.0, NAN, NAN, NAN, NAN], None, None),  # nothing to compare: any four
        ([NAN, NAN, NAN, NAN, NAN], None, None),
    ],
)
def test_unlabelled_images_only_fill_up(scores: list[float], labelled: int | None, unlabelled: int | None) -> None:
    blocks = blocks_of(scores, 4)
    missing = np.isnan(scores)
    for block in blocks:
        if labelled is None:
            assert len(set(block)) == 4
        else:
            assert (missing[block].sum(), (~missing[block]).sum()) == (unlabelled, labelled)
            assert len(set(block)) == min(4, len(scores))
    if labelled is None:
        assert {index for block in blocks for index in block} == set(range(5))


def test_single_image_is_repeated() -> None:
    assert {tuple(block) for block in blocks_of([6.0], 4)} == {(0, 0, 0, 0)}


# Batches balanced over the range of quality.


def test_balanced_counts_are_the_best_there_are() -> None:
    generator = np.random.default_rng(0)
    greedy_was_not_enough = 0
    for _ in range(150):
        available = generator.integers(0, 3, size=(3, 3))
        wanted = np.array([generator.integers(0, min(row.sum(), 3) + 1) for row in available])
        options = [
            [take for take in itertools.product(*(range(most + 1) for most in row)) if sum(take) == number]
            for row, number in zip(available, wanted, strict=True)
        ]
        best = min(np.square(np.sum(choice, axis=0)).sum() for choice in itertools.product(*options))
        counts = balanced_counts(available, wanted)
        assert (counts.sum(axis=1) == wanted).all()
        assert (counts <= available).all()
        assert np.square(counts.sum(axis=0)).sum() == best
        greedy_was_not_enough += int(np.square(greedy(available, wanted).sum(axis=0)).sum() > best)
    assert greedy_was_not_enough > 5


def greedy(available: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    counts = np.zeros_like(available)
    for row, number in enumerate(wanted):
        for _ in range(number):
            free = [place for place in range(available.shape[1]) if counts[row, place] < available[row, place]]
            counts[row, min(free, key=lambda place: counts[:, place].sum())] += 1
    return counts


def test_an_image_moves_along_a_chain_of_identities() -> None:
    available = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]])
    assert greedy(available, np.ones(4, int)).sum(axis=0).tolist() == [2, 1, 1, 0]
    assert balanced_counts(available, np.ones(4, int)).tolist() == np.roll(np.eye(4, dtype=int), 1, axis=1).tolist()


def test_quantile_bins_hold_equal_numbers_and_width_bins_equal_ranges() -> None:
    scores = distinct_labels(101)
    bins = quality_bins(scores, 8, "quantile")
    assert sorted(np.bincount(bins).tolist()) == [12, 12, 12, 13, 13, 13, 13, 13]
    assert (np.diff(bins[np.argsort(scores)]) >= 0).all()
    low, high = scores.min(), scores.max()
    expected = np.minimum((8 * (scores - low) / (high - low)).astype(int), 7)
    assert quality_bins(scores, 8, "width").tolist() == expected.tolist()


@pytest.mark.parametrize("edges", ["quantile", "width"])
def test_equal_labels_share_a_bin_and_missing_ones_have_none(edges: str) -> None:
    bins = quality_bins([5.0, NAN, 5.0, 5.0, 1.0, 9.0, 5.0], 3, edges)
    assert bins[1] == -1
    assert len(set(bins[[0, 2, 3, 6]])) == 1
    assert bins[4] < bins[0] <= bins[5]
    assert quality_bins([], 3, edges).tolist() == []


def test_batches_hold_every_quantile_bin_equally_often() -> None:
    identities = people(*[12] * 40)
    scores = distinct_labels(480)
    sampler = QualityBalancedSampler(identities, scores, 32, 4, seed=0, num_bins=4)
    rank = np.argsort(np.argsort(scores))
    for step in range(200):
        assert np.bincount(rank[sampler.batch(step)] * 4 // 480, minlength=4).tolist() == [8, 8, 8, 8]
    halves = QualityIdentitySampler(identities, scores, 32, 4, seed=0)  # whose batches are left to chance
    assert max(np.ptp(np.bincount(rank[halves.batch(step)] * 4 // 480, minlength=4)) for step in range(20)) > 2


def test_width_bins_show_rare_qualities_as_often_as_frequent_ones() -> None:
    # Everybody has nine bad images, one good one and one of either step between: one of each per group is possible.
    scores = np.tile([*np.linspace(0, 20, 9), 35.0, 60.0, 100.0], 8)
    sampler = QualityBalancedSampler(people(*[12] * 8), scores, 16, 4, seed=0, num_bins=4, edges="width")
    for step in range(50):
        batch = sampler.batch(step)
        assert np.bincount((scores[batch] / 25.001).astype(int)).tolist() == [4, 4, 4, 4]
    assert len({index for step in range(200) for index in sampler.batch(step)}) == 96  # all bad images have their turn


def test_odd_images_go_to_all_bins_alike() -> None:
    sampler = QualityBalancedSampler(people(*[12] * 10), distinct_labels(120), 10, 2, seed=0, num_bins=4)
    rank = np.argsort(np.argsort(distinct_labels(120)))
    totals = np.zeros(4, int)
    for step in range(400):
        counts = np.bincount(rank[sampler.batch(step)] * 4 // 120, minlength=4)
        assert sorted(counts.tolist()) == [2, 2, 3, 3]
        totals += counts
    assert abs(totals - 1000).max() < 4 * np.sqrt(400 * 0.25)


def test_each_data_set_is_balanced_over_its_own_labels() -> None:
    identities = [f"{name}{owner}" for name in "ab" for owner in people(*[12] * 12)]
    scores = np.concatenate([distinct_labels(144) / 100, 50 + distinct_labels(144, seed=1)])
    sets = [0] * 144 + [1] * 144
    sampler = QualityBalancedSampler(identities, scores, 48, 4, seed=0, num_bins=4, sets=sets)
    rank = np.concatenate([np.argsort(np.argsort(part)) for part in np.split(scores, 2)])
    shares = set()
    for step in range(100):
        batch = np.array(sampler.batch(step))
        for own in (batch[batch < 144], batch[batch >= 144]):
            assert np.ptp(np.bincount(rank[own] * 4 // 144, minlength=4)) <= 1
            shares.add(len(own))
    assert len(shares) > 3  # identities come from both sets as it happens


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([5.0, 7.0], [2, 2]),
        ([5.0, 7.0, NAN], [[1, 2], [1, 2], 1]),
        ([5.0, 7.0, 9.0, NAN], [1, 1, 1, 1]),
        ([NAN, NAN], [2, 2]),
        ([1.0, 2.0, 3.0, 4.0, NAN], [1, 1, 1, 1, 0]),
    ],
)
def test_balanced_groups_of_few_images_repeat_evenly_and_fill_up(scores: list[float], expected: list[Any]) -> None:
    identities = people(len(scores), 6)
    sampler = QualityBalancedSampler(identities, [*scores, 1, 2, 3, 4, 5, 6], 8, 4, seed=0, num_bins=3)
    for step in range(30):
        block = next(block for block in groups(sampler.batch(step), 4) if block[0] < len(scores))
        for index, times in enumerate(expected):
            assert Counter(block)[index] in (times if isinstance(times, list) else [times])


# Mistakes.


@pytest.mark.parametrize("cls", [QualityIdentitySampler, QualityBalancedSampler])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"scores": SCORES[:5]},
            DataError,
            r"Quality scores for a sampler: got \(5,\); expected one for each of the 2",
        ),
        ({"scores": [*SCORES[:-1], np.inf]}, DataError, r"image number 269: got inf; expected a finite number, or NaN"),
        ({"scores": [NAN] * 270}, DataError, "no label|no identity with two different labels"),
        ({"batch_size": 18}, ConfigError, "expected a multiple of the 4 images per identity"),
        ({"batch_size": 84}, DataError, "Too few training identities"),
        ({"rank": 2, "world_size": 2}, ConfigError, "Rank of a sampler: got 2; expected 0 to 1"),
        ({"seed": -1}, ConfigError, "Seed of a sampler: got -1"),
    ],
)
def test_impossible_settings_are_refused(
    cls: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"scores": SCORES, "batch_size": 16, "num_instances": 4, "seed": 0, **change}
    with pytest.raises(error, match=message):
        cls(IDENTITIES, given.pop("scores"), given.pop("batch_size"), given.pop("num_instances"), **given)


def test_what_only_one_sampler_needs_is_refused_by_it() -> None:
    with pytest.raises(ConfigError, match=r"got 1; expected at least 2, one from each part.*NUM_INSTANCE"):
        QualityIdentitySampler(IDENTITIES, SCORES, 16, 1, seed=0)
    with pytest.raises(
        DataError,
        match=r"for QualityIdentitySampler: .*no identity with two different labels among 20.*Check the label",
    ):
        QualityIdentitySampler(IDENTITIES, np.full(270, 50.0), 16, 4, seed=0)
    with pytest.raises(DataError, match=r"QualityBalancedSampler: .*no label for any of 270 images.*Check the label"):
        QualityBalancedSampler(IDENTITIES, np.full(270, NAN), 16, 4, seed=0)
    with pytest.raises(ConfigError, match=r"QUALITY\.BALANCE\.BINS\): got 1; expected at least 2"):
        QualityBalancedSampler(IDENTITIES, SCORES, 16, 4, seed=0, num_bins=1)
    with pytest.raises(ConfigError, match=r"QUALITY\.BALANCE\.EDGES\): got 'quantiles'\. Did you mean 'quantile'"):
        QualityBalancedSampler(IDENTITIES, SCORES, 16, 4, seed=0, edges="quantiles")
    with pytest.raises(DataError, match=r"Data sets of the images.*got \(3,\); expected an index from 0 for each of"):
        QualityBalancedSampler(IDENTITIES, SCORES, 16, 4, seed=0, sets=[0, 1, 0])
    with pytest.raises(DataError, match=r"Data sets of the images.*got -1"):
        SetWeightedIdentitySampler(IDENTITIES, [-1] * 270, 16, 4, [1], seed=0)


def test_scores_may_be_a_tensor() -> None:
    as_tensor = QualityIdentitySampler(IDENTITIES, torch.from_numpy(SCORES), 16, 4, seed=3)
    assert as_tensor.batch(5) == family("halves").batch(5)
