"""The queue as a ring: order, start and what it refuses. More ranks: tests/ddp/test_qud_two_ranks.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import numpy_stream, torch_stream
from qsd_plugin.methods.qud import FeatureQueue


@pytest.mark.parametrize(("size", "largest"), [(7, 7), (13, 5), (24, 10), (1, 1)])
def test_it_holds_the_last_keys_in_order(size: int, largest: int) -> None:
    """After any batches, none of which divides the size: the start, then all keys, and of those the last n."""
    queue = FeatureQueue(size, 3, seed=4)
    address = queue.features.data_ptr()
    told = list(queue.features.clone())
    lengths = numpy_stream(0, "lengths", size)
    for step in range(25):
        keys = torch.randn(int(lengths.integers(0, largest + 1)), 3, generator=torch_stream(step))
        queue.enqueue(keys)
        told += list(F.normalize(keys, dim=1))
        pointer = int(queue.pointer)
        assert pointer == (len(told) - size) % size
        assert int(queue.filled) == min(len(told) - size, size)
        oldest_first = torch.cat([queue.features[pointer:], queue.features[:pointer]])
        assert torch.equal(oldest_first, torch.stack(told[-size:]))
    assert len(told) > 3 * size
    assert queue.features.data_ptr() == address


def test_the_start_is_unit_and_depends_on_the_seed_only() -> None:
    torch.manual_seed(1)
    first = FeatureQueue(50, 8, seed=2).features
    torch.manual_seed(2)
    assert torch.equal(FeatureQueue(50, 8, seed=2).features, first)
    assert not torch.equal(FeatureQueue(50, 8, seed=3).features, first)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(50))
    assert first.mean(dim=0).abs().max() < 0.2


def test_initial_and_keys_of_any_length_and_precision_are_copied_as_unit_vectors() -> None:
    initial = torch.full((4, 2), 3.0, dtype=torch.float64)
    queue = FeatureQueue(4, 2, initial=initial)
    keys = torch.tensor([[0.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    queue.enqueue(keys)
    half = 0.5**0.5
    torch.testing.assert_close(queue.features, torch.tensor([[0, 1], [0, 0], [half, half], [half, half]]))
    assert queue.features.dtype == torch.float32
    assert not queue.features.requires_grad
    assert initial[0, 0] == 3
    assert sorted(queue.state_dict()) == ["features", "filled", "pointer"]


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    queue = FeatureQueue(4, 2)
    before = queue.features.clone()
    with pytest.raises(ConfigError, match=r"queue size: got 4; expected at least the 5 images of a step .*larger or"):
        queue.enqueue(torch.ones(5, 2))
    with pytest.raises(ConfigError, match=r"keys: got \(4, 3\); expected \[B, 2\]"):
        queue.enqueue(torch.ones(4, 3))
    assert torch.equal(queue.features, before)
    with pytest.raises(ConfigError, match=r"initial: got \(2, 4\); expected \[4, 2\]"):
        FeatureQueue(4, 2, initial=before.T)
    with pytest.raises(ConfigError, match=r"size and dimension: got \(0, 2\); expected at least 1 each"):
        FeatureQueue(0, 2)
