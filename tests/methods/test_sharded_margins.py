"""Margin softmax over a shard of the classes in one process; tests/ddp has it on several ranks."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.margins import (
    ClassShard,
    ShardedClassifier,
    arcface_logits,
    class_range,
    combined_margin_logits,
    cosface_logits,
)

CLASSES, DIM = 11, 6
EXACT = functools.partial(combined_margin_logits, m1=1.1, m2=0.3, m3=0.1, scale=8, gradient="exact")
MARGINS = {
    "arcface": functools.partial(arcface_logits, scale=16),
    "cosface": functools.partial(cosface_logits, scale=16),
    "exact": EXACT,
}


def batch(rows: int = 8) -> tuple[Tensor, Tensor]:
    embedding = torch.randn(rows, DIM, generator=torch_stream(1), dtype=torch.float64)
    return embedding.requires_grad_(), torch.randint(CLASSES, (rows,), generator=torch_stream(2))


def classifier(margin: Any = EXACT, **options: Any) -> ShardedClassifier:
    return ShardedClassifier(DIM, CLASSES, margin=margin, seed=3, **options).double()


def drawn(shard: ClassShard, local: Tensor, step: int) -> list[int]:
    """The rule in words: all true classes, then those with the largest random numbers, until enough."""
    seed = torch_stream(shard.seed, "class sample", step, shard.rank).initial_seed()
    number = torch.rand(shard.rows, generator=torch.Generator().manual_seed(seed)).numpy()
    true = sorted({int(label) for label in local if label >= 0})
    others = [row for row in np.argsort(-number, kind="stable").tolist() if row not in true]
    return sorted([*true, *others[: max(shard.kept - len(true), 0)]])


@pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)
def test_one_process_is_the_plain_softmax(margin: Any) -> None:
    embedding, labels = batch()
    head = classifier(margin)
    result = head(embedding, labels)
    gradients = torch.autograd.grad(result.loss, [embedding, head.weight])
    cosine = F.linear(F.normalize(embedding), F.normalize(head.weight))
    expected = F.cross_entropy(margin(cosine, labels), labels)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [embedding, head.weight]))
    assert result.accuracy == (cosine.argmax(1) == labels).double().mean()


@pytest.mark.parametrize("rate", [1.0, 0.6])
def test_gradient_is_the_derivative(rate: float) -> None:
    embedding, labels = batch(4)
    head = classifier(sample_rate=rate)

    def loss(embedding: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"weight": weight}, (embedding, labels), {"step": 5}).loss

    assert torch.autograd.gradcheck(loss, (embedding, head.weight))


def test_accuracy_counts_the_largest_cosine() -> None:
    head = classifier()
    labels = torch.tensor([0, 4, 10, 7])
    towards = torch.tensor([0, 4, 10, 2])
    assert head(3 * head.weight.detach()[towards], labels).accuracy == 0.75


# Which classes.


def test_classes_are_divided_evenly_and_completely() -> None:
    assert [class_range(11, rank, 4) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 11)]
    assert class_range(11, 0, 1) == (0, 11)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_rows_begin_the_same_for_any_number_of_ranks(world_size: int) -> None:
    whole = ClassShard(2500, seed=4).initial_rows(3)
    parts = [ClassShard(2500, rank, world_size, seed=4).initial_rows(3) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.std().item() == pytest.approx(0.01, rel=0.05)
    assert len(whole.unique()) > 7000  # no block is another one's copy
    assert not torch.equal(ClassShard(2500, seed=5).initial_rows(3), whole)


@pytest.mark.parametrize(
    ("rate", "labels"),
    [
        (0.5, [0, 3, 3, -1, 9]),  # kept 5: three true ones and two at random
        (0.5, [0, 1, 2, 3, 4, 5, 6]),  # more true ones than kept
        (0.9, [-1, -1]),  # none
        (0.01, [-1, -1]),  # never less than one
    ],
)
def test_drawn_are_the_true_classes_and_others_at_random(rate: float, labels: list[int]) -> None:
    shard = ClassShard(CLASSES, sample_rate=rate, seed=3)
    local = torch.tensor(labels)
    for step in range(20):
        kept = shard.draw(local, step).tolist()
        assert kept == drawn(shard, local, step)
        assert len(kept) == max(len({label for label in labels if label >= 0}), max(1, int(rate * CLASSES)))


def test_draws_depend_on_seed_step_and_rank_and_touch_no_global_stream() -> None:
    before = torch.get_rng_state()

    def draw(seed: int = 0, step: int = 0, rank: int = 0) -> list[int]:
        return ClassShard(200, rank, 2, 0.2, seed).draw(torch.full((4,), -1), step).tolist()  # type: ignore[no-any-return]

    assert draw() == draw()
    assert len({tuple(draws) for draws in (draw(), draw(seed=1), draw(step=1), draw(rank=1))}) == 4
    assert torch.equal(torch.get_rng_state(), before)
    counts = torch.stack([torch.bincount(torch.tensor(draw(step=step)), minlength=100) for step in range(400)]).sum(0)
    assert counts.min() > 40  # every class, 80 times on average
    assert counts.max() < 130


@pytest.mark.parametrize("rate", [0.6, 0.1])
def test_sampled_softmax_is_the_plain_one_over_the_drawn_classes(rate: float) -> None:
    embedding, labels = batch()
    head = classifier(sample_rate=rate)
    result = head(embedding, labels, step=7)
    gradients = torch.autograd.grad(result.loss, [embedding, head.weight])
    kept = drawn(head.shard, labels, 7)
    assert len(kept) == (6 if rate == 0.6 else len(labels.unique()))
    target = torch.tensor([kept.index(int(label)) for label in labels])
    cosine = F.linear(F.normalize(embedding), F.normalize(head.weight[kept]))
    expected = F.cross_entropy(EXACT(cosine, target), target)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [embedding, head.weight]))
    left_out = [row for row in range(CLASSES) if row not in kept]
    assert torch.equal(gradients[1][left_out], torch.zeros(len(left_out), DIM, dtype=torch.float64))
    assert gradients[1][kept].abs().amin(1).min() > 0


def test_optimizer_moves_rows_left_out_by_momentum_and_decay_only() -> None:
    """As arcface_torch's PartialFC: a gradient of zero, not none."""
    embedding, labels = batch(2)
    head = classifier(sample_rate=0.3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    rows, momentum = head.weight.detach().clone(), torch.zeros_like(head.weight)
    for step in range(4):
        optimizer.zero_grad()
        head(embedding.detach(), labels, step=step).loss.backward()
        optimizer.step()
        kept = drawn(head.shard, labels, step)
        gradient = torch.zeros_like(rows)
        gradient[kept] = head.weight.grad[kept]
        momentum = 0.9 * momentum + gradient + 0.01 * rows
        rows = rows - 0.1 * momentum
        torch.testing.assert_close(head.weight.detach(), rows)


def test_half_precision_is_computed_in_full() -> None:
    embedding, labels = batch()
    head = classifier().float()
    half = embedding.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = head(half, labels)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, head(half.float(), labels).loss)


# Mistakes.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0, "world_size": 12}, r"Number of classes: got 11; expected at least 12, one for each process"),
        ({"rank": 2, "world_size": 2}, r"Rank: got 2; expected 0 to 1"),
        ({"sample_rate": 0.0}, r"Sample rate of the classes: got 0\.0; expected above 0, up to 1"),
        ({"sample_rate": 1.5}, r"Sample rate of the classes: got 1\.5"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classifier(**options)
    with pytest.raises(ConfigError, match=r"Seed of the classes: got -1; expected >= 0"):
        ClassShard(CLASSES, seed=-1)


@pytest.mark.parametrize(("label", "found"), [(11, r"\[\d+, 11\]"), (-1, r"\[-1, \d+\]")])
def test_labels_out_of_range_are_named(label: int, found: str) -> None:
    embedding, labels = batch()
    labels[3] = label
    with pytest.raises(DataError, match=rf"Class labels of a batch: got {found}; expected 0 to 10"):
        classifier()(embedding, labels)


def test_calls_that_do_not_fit_are_named() -> None:
    embedding, labels = batch()
    with pytest.raises(ConfigError, match=r"Sharded softmax: got \(\(8, 6\), \(7,\), \(11, 6\)\); expected \[B, D\]"):
        classifier()(embedding, labels[1:])
    with pytest.raises(ConfigError, match=r"step; expected the number of the training step, with a sample rate below"):
        classifier(sample_rate=0.5)(embedding, labels)
    with pytest.raises(ConfigError, match=r"got \(1, 2\); expected \(0, 1\), those of the process group\. Build it"):
        classifier(rank=1, world_size=2)(embedding, labels)


def test_shard_is_told_by_print() -> None:
    assert "classes 6 to 10 of 11, sample_rate=0.5" in repr(classifier(sample_rate=0.5, rank=1, world_size=2))
    assert isinstance(classifier().weight, nn.Parameter)
