"""The sampler of identities in groups: passes as the host's, any first step, ranks, state."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.samplers import SeededIdentitySampler

#: Two images of the first identity, then 4, 9, 12, 8 and 5.
PEOPLE = [name for name, count in zip("abcdef", (2, 4, 9, 12, 8, 5), strict=True) for _ in range(count)]
#: Groups of 4 that each has in a pass.
GROUPS = {"a": 1, "b": 1, "c": 2, "d": 3, "e": 2, "f": 1}


def made(*, batch_size: int = 8, seed: int = 3, rank: int = 0, world_size: int = 1) -> SeededIdentitySampler:
    return SeededIdentitySampler(PEOPLE, batch_size, 4, seed=seed, rank=rank, world_size=world_size)


def groups(batch: list[int]) -> list[list[int]]:
    return [batch[start : start + 4] for start in range(0, len(batch), 4)]


def passes(sampler: SeededIdentitySampler, count: int) -> list[list[list[int]]]:
    """Batches cut into passes by what the host's sampler does: none has a group left for less than two identities."""
    found: list[list[list[int]]] = []
    step = 0
    for _ in range(count):
        left, own = Counter(GROUPS), []
        while len(+left) >= 2:
            own.append(sampler.batch(step))
            left.subtract(PEOPLE[group[0]] for group in groups(own[-1]))
            assert min(left.values()) >= 0
            step += 1
        found.append(own)
    return found


def test_a_pass_deals_the_groups_of_all_identities_out_as_long_as_a_batch_can_be_filled() -> None:
    lengths, orders, left_out = set(), set(), Counter()
    for own in passes(made(), 40):
        shown = Counter(image for batch in own for image in batch)
        assert all(shown[image] == 1 for image in shown if PEOPLE[image] != "a")
        for batch in own:
            names = [{PEOPLE[image] for image in group} for group in groups(batch)]
            assert all(len(name) == 1 for name in names)
            assert names[0] != names[1]
        lengths.add(len(own))
        orders.add(tuple(own[0]))
        left_out.update(set(range(len(PEOPLE))) - set(shown))
    assert len(lengths) > 1  # of no fixed length
    assert len(orders) == 40
    # Of nine images one is left over in each pass, and not always the same.
    assert len([image for image in left_out if PEOPLE[image] == "c"]) == 9


def test_an_identity_of_few_images_repeats_them() -> None:
    few = [group for own in passes(made(), 60) for batch in own for group in groups(batch) if PEOPLE[group[0]] == "a"]
    assert {len(set(group)) for group in few} == {1, 2}  # with replacement, as the host


def test_a_stream_can_begin_at_any_step() -> None:
    whole = list(islice(made(), 8 * 60))
    stored = made()
    stored.step = 23
    other = made(seed=99)
    other.batch(40)  # leaves another seed's passes
    other.load_state_dict(stored.state_dict())
    assert list(islice(other, 8 * 37)) == whole[8 * 23 :]
    assert whole != list(islice(made(seed=4), 8 * 60))
    backwards = made()
    assert [backwards.batch(step) for step in (50, 2)] == [whole[400:408], whole[16:24]]


def test_ranks_deal_the_batches_of_one_process_out_among_them() -> None:
    alone, three = made(), [made(rank=rank, world_size=3) for rank in range(3)]
    for step in range(20):
        assert [sampler.batch(step) for sampler in three] == [alone.batch(3 * step + rank) for rank in range(3)]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="Images per batch and process: got 6; expected a multiple of the 4"):
        made(batch_size=6)
    with pytest.raises(DataError, match="Too few training identities for a batch: got 6; expected 7"):
        made(batch_size=28)
    with pytest.raises(ConfigError, match="Rank of a sampler: got 2; expected 0 to 1"):
        made(rank=2, world_size=2)
