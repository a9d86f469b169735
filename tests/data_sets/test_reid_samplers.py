from collections import Counter
from itertools import islice

import pytest

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.samplers import SetWeightedIdentitySampler, check_batch_fits, check_identity_sampling


def people(count, per_person, prefix="p"):
    return [f"{prefix}{number}" for number in range(count) for _ in range(per_person)]


@pytest.mark.parametrize(
    ("count", "per_person", "batch", "instances", "ranks", "shared"),
    [
        (4, 4, 16, 4, 1, False),
        (4, 1, 16, 4, 1, False),  # single images are repeated
        (8, 4, 16, 4, 2, False),
        (4, 8, 16, 4, 2, True),  # each identity has two groups of four, one per rank
        (8, 4, 16, 4, 2, True),
    ],
)
def test_batches_that_can_be_filled_pass(count, per_person, batch, instances, ranks, shared):
    check_identity_sampling(people(count, per_person), batch, instances, world_size=ranks, shared_by_ranks=shared)


@pytest.mark.parametrize(
    ("count", "per_person", "ranks", "shared", "message"),
    [
        (3, 40, 1, True, r"got 3; expected 4 \(16 images, 4 of each identity\)\. Lower SOLVER\.IMS_PER_BATCH"),
        (7, 40, 2, False, r"got 7; expected 4 on each of 2 processes"),
        (4, 7, 2, True, r"got 4; expected 4 on each of 2 processes"),
        (0, 0, 1, True, r"got 0; expected 4"),
    ],
)
def test_too_few_identities_are_refused(count, per_person, ranks, shared, message):
    with pytest.raises(DataError, match=message):
        check_identity_sampling(people(count, per_person), 16, 4, world_size=ranks, shared_by_ranks=shared)


@pytest.mark.parametrize(("batch", "instances"), [(18, 4), (2, 4), (0, 4), (16, 0)])
def test_batch_that_k_does_not_divide_is_refused(batch, instances):
    with pytest.raises(ConfigError, match=rf"got {batch}; expected a multiple of the {instances} images.*NUM_INSTANCE"):
        check_identity_sampling(people(9, 9), batch, instances)


def test_set_smaller_than_a_batch_is_refused():
    check_batch_fits(64, 64)
    with pytest.raises(DataError, match=r"smaller than one batch: got 63; expected at least 64 images \(SOLVER"):
        check_batch_fits(63, 64)


def weighted(weights, batch=24, instances=4, **options):
    identities = people(20, 6, "a") + people(30, 2, "b")
    sets = [0] * 120 + [1] * 60
    return SetWeightedIdentitySampler(identities, sets, batch, instances, weights, seed=3, **options), identities, sets


def test_every_batch_holds_the_shares_and_k_images_of_each_identity():
    sampler, identities, sets = weighted([2, 1])
    stream = iter(sampler)
    for _ in range(20):
        batch = list(islice(stream, 24))
        assert Counter(sets[index] for index in batch) == {0: 16, 1: 8}
        groups = [batch[start : start + 4] for start in range(0, 24, 4)]
        assert [len({identities[index] for index in group}) for group in groups] == [1] * 6
        assert len({identities[group[0]] for group in groups}) == 6
        # Six images: no repeats. Two images: each twice.
        assert all(set(Counter(group).values()) == {1 if sets[group[0]] == 0 else 2} for group in groups)


def test_ranks_draw_different_identities_in_a_step():
    ranks = [weighted([2, 1], rank=rank, world_size=3)[0] for rank in range(3)]
    _, identities, sets = weighted([2, 1])
    for step in range(10):
        batches = [sampler.batch(step) for sampler in ranks]
        assert all(Counter(sets[index] for index in batch) == {0: 16, 1: 8} for batch in batches)
        assert len({identities[index] for batch in batches for index in batch}) == 18


def test_stream_depends_on_the_seed_and_the_step_only():
    first, second = (list(islice(weighted([1, 1])[0], 240)) for _ in range(2))
    assert first == second
    assert weighted([1, 1])[0].batch(7) == first[7 * 24 : 8 * 24]


def test_identities_are_drawn_in_proportion_to_their_images():
    identities = ["small"] * 4 + ["large"] * 12 + ["other"] * 4
    sampler = SetWeightedIdentitySampler(identities, [0] * 16 + [1] * 4, 8, 4, [1, 1], seed=0)
    drawn = Counter(identities[index] for step in range(2000) for index in sampler.batch(step)[::4])
    assert drawn["other"] == 2000
    assert abs(drawn["large"] / 2000 - 0.75) < 0.04


@pytest.mark.parametrize("weights", [[1], [1, 1, 1], [1, 0], [1, -1], [1.5, 1]])
def test_weights_that_do_not_belong_to_the_sets_are_refused(weights):
    with pytest.raises(ConfigError, match=r"SET_WEIGHT: got .* positive integer for each of the 2 training sets"):
        weighted(weights)


def test_weights_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ConfigError, match="sum divides the 6 identities of a batch"):
        weighted([3, 1])


def test_set_without_enough_identities_is_refused():
    with pytest.raises(DataError, match="training set number 1 for its share of a batch: got 20; expected at least 30"):
        weighted([5, 1], world_size=6)
