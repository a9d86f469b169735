"""AdaFace's margin over parts of the classes, and a queue whose class centres come from a function."""

from __future__ import annotations

import pytest
import torch

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.methods.qgface import ProxyQueue, adaface_logits, sharded_adaface_logits

COSINE = torch.linspace(-0.9, 0.9, 24, dtype=torch.float64).view(4, 6).sin()
LABELS = torch.tensor([0, 4, 2, 5])
SCALER = torch.tensor([[-1.0], [0.3], [0.0], [1.0]], dtype=torch.float64)


def parts(gradient: str, cosine: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the classes 0 to 3 and of 4 and 5, side by side."""
    pieces = []
    for start, stop in ((0, 4), (4, 6)):
        local = torch.where((start <= LABELS) & (stop > LABELS), LABELS - start, -1)
        part = cosine[:, start:stop]
        pieces.append(sharded_adaface_logits(part, local, SCALER, gradient=gradient, gate=gate))
    return torch.cat(pieces, dim=1)


def test_parts_side_by_side_are_the_whole_in_value_and_gradient() -> None:
    gate = torch.tensor([[1.0], [0.5], [0.2], [0.0]], dtype=torch.float64)
    one, other = COSINE.clone().requires_grad_(), COSINE.clone().requires_grad_()
    whole = adaface_logits(one, LABELS, SCALER, gate=gate)
    found = parts("exact", other, gate)
    torch.testing.assert_close(found, whole)
    weights = torch.arange(24.0, dtype=torch.float64).view(4, 6).cos()
    torch.testing.assert_close(
        *(torch.autograd.grad((logits * weights).sum(), x)[0] for logits, x in ((found, other), (whole, one)))
    )


def test_straight_through_keeps_the_value_and_takes_the_margin_for_a_constant() -> None:
    cosine = COSINE.clone().requires_grad_()
    found = parts("straight_through", cosine)
    torch.testing.assert_close(found, adaface_logits(COSINE, LABELS, SCALER))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), cosine)[0], torch.full_like(COSINE, 64))


def test_rank_without_classes_and_unknown_gradient() -> None:
    empty = sharded_adaface_logits(COSINE[:, :0], torch.full((4,), -1), SCALER)
    assert empty.shape == (4, 0)
    with pytest.raises(ConfigError, match=r"gradient of the margin: got 'exakt'\. Did you mean 'exact'"):
        sharded_adaface_logits(COSINE, LABELS, SCALER, gradient="exakt")


def test_centres_may_come_from_a_function() -> None:
    weight = torch.arange(12.0).view(4, 3).sin()
    whole, asked = ProxyQueue(6, 3), ProxyQueue(6, 3)
    moved = weight + torch.tensor([0.5, 0.0, -0.2])
    rows = torch.nn.functional.normalize(torch.arange(12.0).view(2, 2, 3).cos(), dim=2)
    labels = torch.tensor([3, 1])
    whole.enqueue(rows, labels, weight)
    asked.enqueue(rows, labels, lambda wanted: weight[wanted])
    found = asked.negatives(lambda wanted: moved[wanted]).embeddings
    assert torch.equal(found, whole.negatives(moved).embeddings)
    assert not torch.equal(found, asked.embeddings)
    assert torch.equal(moved, weight + torch.tensor([0.5, 0.0, -0.2]))  # what was asked for is not written to
