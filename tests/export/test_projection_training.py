"""Trained projections: they keep what tells people apart where the PCA keeps what is large."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsd_plugin.core.errors import ExportError
from qsd_plugin.export.projection import Projection, fit_pca
from qsd_plugin.export.projection_training import train_linear

PEOPLE, EACH, LARGE, SMALL = 12, 40, 6, 3


def embeddings() -> tuple[Tensor, list[str]]:
    """Six large directions of noise, and three small ones in which a person is a person."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(PEOPLE).repeat_interleave(EACH)
    who = torch.randn(PEOPLE, SMALL, generator=generator)[labels]
    noise = 3 * torch.randn(len(labels), LARGE, generator=generator)
    blur = 0.1 * torch.randn(len(labels), SMALL, generator=generator)
    shuffled = torch.randperm(len(labels), generator=generator)
    return torch.cat([noise, who + blur], dim=1)[shuffled], [f"p{one}" for one in labels[shuffled].tolist()]


def nearest_is_right(projection: Projection, vectors: Tensor, names: list[str]) -> float:
    unit = F.normalize(projection(vectors))
    cosines = unit @ unit.T - 2 * torch.eye(len(unit))
    return sum(names[at] == name for at, name in zip(cosines.argmax(dim=1).tolist(), names, strict=True)) / len(names)


def test_it_keeps_what_tells_people_apart() -> None:
    vectors, names = embeddings()
    trained, pca = train_linear(vectors, names, LARGE), fit_pca([vectors], LARGE)
    assert (trained.kind, trained.images, trained.identities) == ("trained", PEOPLE * EACH, PEOPLE)
    assert trained.describe()["projection_trained_on"] == "480 images of 12 people"
    assert trained.matrix.shape == (LARGE, LARGE + SMALL)
    assert not trained.matrix.requires_grad
    before, after = (nearest_is_right(one, vectors, names) for one in (pca, trained))
    assert after > before + 0.1


def test_it_is_repeatable_and_lengths_do_not_weigh() -> None:
    vectors, names = embeddings()
    first = train_linear(vectors, names, 4, seed=1).matrix
    assert torch.equal(train_linear(vectors, names, 4, seed=1).matrix, first)
    assert not torch.equal(train_linear(vectors, names, 4, seed=2).matrix, first)
    longer = vectors * torch.linspace(1, 9, len(vectors))[:, None]
    torch.testing.assert_close(train_linear(longer, names, 4, seed=1).matrix, first, atol=1e-3, rtol=0)


def test_what_cannot_be_trained_is_refused() -> None:
    vectors, names = embeddings()
    with pytest.raises(ExportError, match=r"Identities to train the projection on: got 1; expected at least two"):
        train_linear(vectors, ["p0"] * len(names), 4)
    with pytest.raises(ExportError, match=r"Images to fit the projection to: got 3; expected at least 4"):
        train_linear(vectors[:3], names[:3], 4)
