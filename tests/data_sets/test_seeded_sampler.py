"""The sampler of all images in random order: passes, steps, ranks, state."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.samplers import SeededTrainingSampler


def test_every_pass_is_a_new_order_of_all_images_and_nothing_is_left_out() -> None:
    stream = list(islice(SeededTrainingSampler(10, 4, seed=3), 40))
    passes = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    assert stream != list(islice(SeededTrainingSampler(10, 4, seed=4), 40))


def test_a_stream_can_begin_at_any_step_also_with_passes_shorter_than_a_batch() -> None:
    for images in (3, 10):
        whole = list(islice(SeededTrainingSampler(images, 4, seed=3), 80))
        stored = SeededTrainingSampler(images, 4, seed=3)
        stored.step = 7
        other = SeededTrainingSampler(images, 4, seed=99)
        other.batch(5)  # leaves another seed's order of the pass that step 7 begins in
        other.load_state_dict(stored.state_dict())
        assert list(islice(other, 52)) == whole[28:]


def test_ranks_deal_a_step_of_one_process_out_among_them() -> None:
    alone = SeededTrainingSampler(23, 6, seed=3)
    three = [SeededTrainingSampler(23, 2, seed=3, rank=rank, world_size=3) for rank in range(3)]
    for step in range(30):
        assert np.array([sampler.batch(step) for sampler in three]).T.ravel().tolist() == alone.batch(step)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(DataError, match="Training images for a sampler: got 0; expected at least one"):
        SeededTrainingSampler(0, 4, seed=3)
    with pytest.raises(ConfigError, match="Seed of a sampler: got -1"):
        SeededTrainingSampler(8, 4, seed=-1)
    with pytest.raises(ConfigError, match="Rank of a sampler: got 2; expected 0 to 1"):
        SeededTrainingSampler(8, 4, seed=3, rank=2, world_size=2)
