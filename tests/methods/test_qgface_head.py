"""Heads and norm statistics: closed forms, invariances, gradients by differences, errors."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.qgface import (
    AdaFaceHead,
    NormStatistics,
    QGFaceHead,
    adaface_logits,
    check_labels,
    classification_gate,
    image_quality,
    norm_moments,
    unit_and_norm,
)
from qsd_plugin.methods.qgface import head as head_module

ROWS, DIM, CLASSES = 10, 8, 6


def batch(step: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Half of the rows are short."""
    generator = torch_stream(1, step)
    raw = torch.randn(ROWS, DIM, generator=generator, dtype=dtype)
    lengths = torch.rand(ROWS, 1, generator=generator, dtype=dtype) * 4 + torch.tensor([[20.0], [8.0]]).repeat(5, 1)
    unit, norm = unit_and_norm(raw / raw.norm(dim=1, keepdim=True) * lengths)
    return unit, norm, torch.randint(CLASSES, (ROWS,), generator=generator)


def filled(head: AdaFaceHead) -> AdaFaceHead:
    head = head.double()
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch_stream(2), dtype=torch.float64))
    return head


@pytest.mark.parametrize(
    ("scaler", "formula"),
    [
        (-1.0, lambda theta: math.cos(theta + 0.4)),
        (0.0, lambda theta: math.cos(theta) - 0.4),
        (1.0, lambda theta: math.cos(theta - 0.4) - 0.8),
    ],
)
def test_margins_at_the_ends_and_in_the_middle(scaler: float, formula: Any) -> None:
    cosine = torch.tensor([[0.5, -0.2, 0.1]], dtype=torch.float64)
    logits = adaface_logits(cosine, torch.tensor([1]), torch.tensor([[scaler]], dtype=torch.float64), scale=10.0)
    assert logits[0].tolist() == pytest.approx([5.0, 10 * formula(math.acos(-0.2)), 1.0], abs=1e-12)


def test_cosines_beyond_the_clamp_have_no_gradient() -> None:
    cosine = torch.tensor([[0.9995, -0.9995, 0.5]], dtype=torch.float64, requires_grad=True)
    logits = adaface_logits(cosine, torch.tensor([0]), torch.zeros(1, 1, dtype=torch.float64))
    logits.sum().backward()
    assert cosine.grad.tolist() == [[0, 0, 64]]
    assert logits[0].tolist() == pytest.approx([64 * (0.999 - 0.4), -64 * 0.999, 32], abs=1e-9)


def test_without_gate_and_with_the_same_start_it_is_adaface() -> None:
    plain, gated = filled(AdaFaceHead(DIM, CLASSES)), filled(QGFaceHead(DIM, CLASSES, threshold=0.0, start="adaface"))
    for step in range(3):
        first, second = plain(*batch(step)), gated(*batch(step))
        assert torch.equal(first.logits, second.logits)
        assert torch.equal(first.loss, second.loss)
        assert second.stats["low_quality"] == 0


def test_a_gated_row_has_the_loss_of_an_even_guess_and_no_gradient() -> None:
    head = filled(QGFaceHead(DIM, CLASSES, threshold=0.5, momentum=1.0, start="zeros"))
    unit, norm, labels = batch()
    unit.requires_grad_()
    result = head(unit, norm, labels)
    result.loss.backward()
    low = image_quality(result.scaler[:, 0]) < 0.4
    assert 0 < low.sum() < ROWS
    assert (torch.logsumexp(result.logits[low], dim=1) - math.log(CLASSES)).abs().max() < 1e-3
    assert unit.grad[low].abs().max() < 1e-4 < unit.grad[~low].abs().max()


def test_the_active_mean_goes_over_rows_of_high_quality() -> None:
    unit, norm, labels = batch()
    results = {
        reduction: filled(QGFaceHead(DIM, CLASSES, threshold=0.5, momentum=1.0, start="zeros", reduction=reduction))(
            unit, norm, labels
        )
        for reduction in ("all", "active")
    }
    rows = torch.nn.functional.cross_entropy(results["all"].logits, labels, reduction="none")
    high = image_quality(results["all"].scaler[:, 0]) >= 0.5
    assert torch.equal(results["all"].loss, rows.mean())
    torch.testing.assert_close(results["active"].loss, rows[high].mean(), rtol=1e-12, atol=0)
    assert results["active"].stats["low_quality"].item() == pytest.approx(1 - high.double().mean().item())


def test_no_active_row_gives_a_zero_that_can_be_trained_on() -> None:
    head = filled(QGFaceHead(DIM, CLASSES, threshold=1.0, momentum=1.0, start=(90.0, 1.0), reduction="active")).eval()
    unit, norm, labels = batch()
    result = head(unit.requires_grad_(), norm, labels)
    result.loss.backward()
    assert result.loss == 0
    assert not unit.grad.any()


def test_statistics_follow_the_batches() -> None:
    norms = [batch(step)[1] for step in range(4)]
    statistics = NormStatistics(momentum=0.3, mean_init=5.0, std_init=2.0).double()
    mean, std = 5.0, 2.0
    for norm in norms:
        statistics.update(norm)
        mean, std = 0.3 * norm.mean() + 0.7 * mean, 0.3 * norm.std() + 0.7 * std
    torch.testing.assert_close(torch.stack(statistics.current()), torch.stack([mean, std]), rtol=1e-12, atol=0)


def test_debiased_statistics_are_a_weighted_mean_of_the_batches_seen() -> None:
    norms = [batch(step)[1] for step in range(5)]
    statistics = NormStatistics(momentum=0.1, debias=True).double()
    for count, norm in enumerate(norms, start=1):
        statistics.update(norm)
        weights = torch.tensor([0.9 ** (count - 1 - index) for index in range(count)], dtype=torch.float64)
        seen = torch.tensor([[past.mean(), past.std()] for past in norms[:count]], dtype=torch.float64)
        expected = (weights[:, None] * seen).sum(0) / weights.sum()
        torch.testing.assert_close(torch.stack(statistics.current()), expected, rtol=1e-12, atol=0)


def test_before_the_first_batch_debiased_statistics_are_finite() -> None:
    assert NormStatistics(debias=True).scaler(torch.tensor([[5.0]])).tolist() == [[1.0]]


def test_moments_are_clipped_and_unbiased() -> None:
    mean, std = norm_moments(torch.tensor([[130.0], [1e-5], [20.0]]))
    clipped = torch.tensor([100.0, 1e-3, 20.0], dtype=torch.float64)
    torch.testing.assert_close(mean, clipped.mean(), rtol=1e-8, atol=0)
    torch.testing.assert_close(std, clipped.std(), rtol=1e-8, atol=0)
    assert norm_moments(torch.tensor([[20.0]]))[1] == 0


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_statistics_stand_still_outside_training(how: str) -> None:
    head = filled(QGFaceHead(DIM, CLASSES))
    head(*batch())
    before = {name: value.clone() for name, value in head.state_dict().items()}
    with torch.set_grad_enabled(how != "no_grad"):
        head.train(how != "eval")(*batch(1))
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name]), name
    head.train()(*batch(1))
    assert head.statistics.updates.item() == 2


def test_the_order_of_the_rows_does_not_matter() -> None:
    order = torch.tensor([3, 9, 0, 1, 8, 2, 7, 4, 6, 5])
    one, other = filled(QGFaceHead(DIM, CLASSES, threshold=0.4)), filled(QGFaceHead(DIM, CLASSES, threshold=0.4))
    first, second = one(*batch()), other(*(part[order] for part in batch()))
    torch.testing.assert_close(first.logits[order], second.logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(first.loss, second.loss, rtol=1e-12, atol=0)


def test_gradients_by_differences() -> None:
    head = filled(QGFaceHead(DIM, CLASSES, threshold=0.3, start=(16.0, 6.0), scale=4.0)).eval()
    unit, norm, labels = batch()

    def loss(embedding: Tensor, weight: Tensor) -> Tensor:
        result = torch.func.functional_call(head, {"weight": weight}, (embedding, norm, labels))
        return result.loss

    assert torch.autograd.gradcheck(loss, (unit.requires_grad_(), head.weight.detach().requires_grad_()))


def test_the_norm_gets_no_gradient() -> None:
    unit, norm, labels = batch()
    result = filled(QGFaceHead(DIM, CLASSES))(unit, norm.requires_grad_(), labels)
    result.loss.backward()
    assert norm.grad is None
    assert not result.scaler.requires_grad


def test_full_precision_under_autocast() -> None:
    unit, norm, labels = batch(dtype=torch.float32)
    head = QGFaceHead(DIM, CLASSES, threshold=0.3, start=(16.0, 6.0)).eval()
    plain = head(unit, norm, labels)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(unit, norm, labels)
        direction, length = unit_and_norm((unit * norm).bfloat16())
    assert torch.equal(plain.logits, mixed.logits)
    assert direction.dtype == length.dtype == torch.float32
    torch.testing.assert_close(length, norm, rtol=1e-2, atol=0)


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have no data: reading a value raises. (Labels are checked on the CPU only.)"""
    with FakeTensorMode(), mock.patch.object(head_module, "check_labels"):
        for head in (AdaFaceHead(DIM, CLASSES), QGFaceHead(DIM, CLASSES, threshold=0.3, reduction="active")):
            unit, norm = unit_and_norm(torch.empty(ROWS, DIM, requires_grad=True))
            result = head(unit, norm, torch.empty(ROWS, dtype=torch.int64))
            result.loss.backward()
            with pytest.raises(RuntimeError):
                result.loss.item()


def test_the_start_of_the_classes_is_of_unit_length() -> None:
    weight = AdaFaceHead(DIM, 50).weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(50))
    assert weight.min() < -0.2 < 0.2 < weight.max()


def test_a_threshold_of_zero_is_no_gate() -> None:
    assert classification_gate(torch.tensor([[-1.0], [0.3]]), 0.0).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: QGFaceHead(4, 3, threshold=1.2), r"threshold: got 1\.2; expected a number in \[0, 1\]\. .*0 switches"),
        (lambda: QGFaceHead(4, 3, threshold=float("nan")), r"threshold: got nan"),
        (lambda: setattr(QGFaceHead(4, 3), "threshold", -0.1), r"threshold: got -0\.1"),
        (
            lambda: QGFaceHead(4, 3, start="adaface_init"),
            r"start of the norm statistics: got 'adaface_init'.*'adaface'",
        ),
        (lambda: QGFaceHead(4, 3, reduction="al"), r"reduction: got 'al'\. Did you mean 'all'"),
        (lambda: AdaFaceHead(4, 0), r"num_classes: got \(4, 0\); expected at least 1 each"),
        (lambda: AdaFaceHead(4, 3, scale=0), r"AdaFace scale: got 0; expected a finite number > 0"),
        (lambda: AdaFaceHead(4, 3, h=-1), r"AdaFace h: got -1"),
        (lambda: AdaFaceHead(4, 3, margin=-0.1), r"AdaFace margin: got -0\.1"),
        (lambda: AdaFaceHead(4, 3, momentum=0), r"momentum: got 0; expected a number in \(0, 1\]"),
        (lambda: AdaFaceHead(4, 3, std_init=-1), r"std_init: got -1"),
    ],
)
def test_impossible_settings_are_named(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_labels_beyond_the_head_are_named() -> None:
    unit, norm, labels = batch()
    labels[3], labels[7] = CLASSES, -1
    message = r"Labels of a head of 6 classes: 2 of 10 beyond it, e\.g\. 6, -1; expected 0 to 5\. Build the head with"
    with pytest.raises(DataError, match=message):
        filled(QGFaceHead(DIM, CLASSES))(unit, norm, labels)
    check_labels(torch.tensor([0, 5]), 6)


def test_wrong_shapes_are_named() -> None:
    unit, norm, labels = batch()
    for parts in ((unit, norm[:, 0], labels), (unit[:, :4], norm, labels), (unit, norm, labels[:3])):
        with pytest.raises(
            ConfigError, match=r"AdaFaceHead: embedding, norm and labels: .* \[B, 8\], \[B, 1\] and \[B\]"
        ):
            filled(AdaFaceHead(DIM, CLASSES))(*parts)
