"""The proxy queue against a list that is prepended to and cut, and what moving class centres do to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.qgface import ProxyQueue, QGContrast, check_queue_size, translated

DIM, CLASSES = 6, 9


def weight(step: int) -> Tensor:
    return torch.randn(CLASSES, DIM, generator=torch_stream(4, step))


def views(step: int, images: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch_stream(5, step)
    rows = F.normalize(torch.randn(2, images, DIM, generator=generator), dim=2)
    return rows, torch.randint(CLASSES, (images,), generator=generator)


def newest(queue: ProxyQueue) -> Tensor:
    order = (queue.pointer - 1 - torch.arange(queue.size)) % queue.size
    return order[: int(queue.filled)]


class Prepended:
    """Rows of a step in front, cut to the size, moved by loops."""

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, int, Tensor]] = []

    def step(self, size: int, step: int, images: int = 3) -> None:
        embeddings, labels = views(step, images)
        fresh = [
            (row, int(label), weight(step)[label])
            for view in embeddings
            for row, label in zip(view, labels, strict=True)
        ]
        self.rows = [*fresh, *self.rows][:size]

    def moved(self, step: int) -> Tensor:
        now = weight(step)
        return torch.stack([e + e.norm() / p.norm() * (now[label] - p) for e, label, p in self.rows])


@pytest.mark.parametrize("size", [6, 13, 20, 64])
def test_newest_first_cut_at_the_tail_and_moved(size: int) -> None:
    queue, expected = ProxyQueue(size, DIM), Prepended()
    for step in range(7):
        rows, labels = views(step)
        own = queue.enqueue(rows, labels, weight(step))
        expected.step(size, step)
        found = queue.negatives(weight(step))
        order = newest(queue)
        torch.testing.assert_close(found.embeddings[order], expected.moved(step), rtol=1e-5, atol=1e-6)
        assert found.labels[order].tolist() == [label for _, label, _ in expected.rows]
        assert sorted(order.tolist()) == found.valid.nonzero()[:, 0].tolist()
        # Both views of each image lie where the call says, unmoved.
        torch.testing.assert_close(found.embeddings[own], rows.transpose(0, 1), rtol=1e-6, atol=1e-7)
        assert torch.equal(found.labels[own], labels[:, None].expand(-1, 2))


def test_a_limit_that_grows_is_a_queue_that_grows() -> None:
    queue, expected = ProxyQueue(20, DIM), Prepended()
    for step, limit in enumerate([1, 6, 9, 9, 14, 20, 20, 7]):
        queue.limit = limit
        queue.enqueue(*views(step), weight(step))
        expected.step(max(limit, 6), step)  # never cut below the rows of the step
        order = newest(queue)
        torch.testing.assert_close(
            queue.negatives(weight(step)).embeddings[order], expected.moved(step), rtol=1e-5, atol=1e-6
        )
        assert int(queue.filled) == int(queue.negatives(weight(step)).valid.sum()) == len(expected.rows)


def test_entries_stay_while_their_class_centres_do() -> None:
    queue = ProxyQueue(20, DIM)
    for step in range(3):
        queue.enqueue(*views(step), weight(0))
    assert torch.equal(queue.negatives(weight(0)).embeddings, queue.embeddings)


def test_moving_is_by_the_displacement_relative_to_the_centre() -> None:
    stored, then, now = (torch.tensor([row]) for row in ([0.6, 0.8], [0.0, 2.0], [1.0, 2.0]))
    assert translated(stored, then, torch.tensor([0]), now).tolist() == [pytest.approx([1.1, 0.8])]
    assert stored.tolist() == [pytest.approx([0.6, 0.8])]


def test_options() -> None:
    plain, unit = ProxyQueue(13, DIM, compensate=False), ProxyQueue(13, DIM, renormalise=True)
    for step in range(2):
        plain.enqueue(*views(step))
        unit.enqueue(*views(step), weight(step))
    assert "snapshots" not in plain.state_dict()
    assert plain.negatives().embeddings is plain.embeddings
    found, moved = unit.negatives(weight(5)), translated(unit.embeddings, unit.snapshots, unit.labels, weight(5))
    torch.testing.assert_close(found.embeddings, F.normalize(moved, dim=1))
    assert found.embeddings[~found.valid].tolist() == [[0.0] * DIM]


def test_the_memory_is_two_rows_per_slot() -> None:
    numbers = sum(buffer.numel() for buffer in ProxyQueue(32, DIM).buffers() if buffer.is_floating_point())
    assert numbers == 2 * 32 * DIM


@pytest.mark.parametrize("fill", [1, 2, 3])
def test_a_loaded_queue_goes_on_exactly(fill: int) -> None:
    whole, loaded = ProxyQueue(13, DIM), ProxyQueue(13, DIM)
    for step in range(fill):
        whole.enqueue(*views(step), weight(step))
    loaded.load_state_dict(whole.state_dict())
    for step in range(fill, fill + 3):
        assert torch.equal(whole.enqueue(*views(step), weight(step)), loaded.enqueue(*views(step), weight(step)))
        for one, other in zip(whole.negatives(weight(step)), loaded.negatives(weight(step)), strict=True):
            assert torch.equal(one, other)


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have no data: reading a value, or a shape that depends on one, raises."""
    with FakeTensorMode():
        queue, contrast = ProxyQueue(20, DIM), QGContrast(margin_method="dynamic", reduction="active")
        rows, labels, centres = torch.empty(2, 3, DIM), torch.empty(3, dtype=torch.int64), torch.empty(CLASSES, DIM)
        own = queue.enqueue(rows, labels, centres)
        poor, clean = (row.clone().requires_grad_() for row in rows)
        scaler = torch.empty(3, 1)
        result = contrast(clean, poor, queue.negatives(centres), labels, scaler, scaler, own)
        result.loss.backward()
        with pytest.raises(RuntimeError):
            result.stats["negatives"].item()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: ProxyQueue(5, DIM).enqueue(*views(0), weight(0)),
            r"queue size: got 5; expected at least 6 = 2 views x 3 images x 1 ranks\. Make the queue larger",
        ),
        (lambda: check_queue_size(100, 32, 2), r"queue size: got 100; expected at least 128 = 2 views x 32 images x 2"),
        (lambda: ProxyQueue(0, DIM), r"size and dimension: got \(0, 6\)"),
        (lambda: setattr(ProxyQueue(8, DIM), "limit", 9), r"limit: got 9; expected 1 to the queue's size 8"),
        (lambda: ProxyQueue(8, DIM).enqueue(*views(0)), r"weight; expected class centres .*compensate=False"),
        (
            lambda: ProxyQueue(8, DIM).negatives(torch.ones(3, 4)),
            r"weight: got \(3, 4\); expected class centres \[C, 6\]",
        ),
        (
            lambda: ProxyQueue(8, DIM).enqueue(views(0)[0][0], views(0)[1], weight(0)),
            r"embeddings and labels: got \(\(3, 6\), \(3,\)\); expected \[V, N, 6\] and \[N\]",
        ),
    ],
)
def test_impossible_uses_are_named(act: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        act()
