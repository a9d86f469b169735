"""Projections of embeddings: closed forms, what is kept, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.errors import CheckpointError, ExportError
from qsd_plugin.export.projection import Projected, fit_pca, pad_with_zeros, read_linear


def cosines(vectors: Tensor) -> Tensor:
    unit = F.normalize(vectors.double())
    return unit @ unit.T


def draw(count: int, dimension: int) -> Tensor:
    """Embeddings around a centre far from the origin, as ReLU features are."""
    scale = torch.logspace(0, -1.5, dimension)
    return 2 + 3 * torch.randn(count, dimension, generator=torch.Generator().manual_seed(0)) * scale


def test_cosines_of_embeddings_in_a_subspace_stay_exactly() -> None:
    basis = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    vectors = draw(40, 5) @ basis
    fitted = fit_pca([vectors[:10], vectors[10:]], 5)
    torch.testing.assert_close(cosines(fitted(vectors)), cosines(vectors), atol=1e-6, rtol=0)
    assert fitted.kept == pytest.approx(1.0)
    assert (fitted.images, fitted.kind, fitted.bias) == (40, "pca", None)


def test_it_is_the_best_map_for_cosines_and_parts_do_not_matter() -> None:
    """Second formulation: the singular vectors of all unit embeddings at once; and centring would be worse."""
    vectors = draw(60, 12)
    fitted = fit_pca([vectors[:1], vectors[1:31], vectors[31:]], 4)
    unit = F.normalize(vectors.double()).numpy()
    _, values, directions = np.linalg.svd(unit, full_matrices=False)
    np.testing.assert_allclose(np.abs(fitted.matrix.double().numpy() @ directions[:4].T), np.eye(4), atol=1e-5)
    assert fitted.kept == pytest.approx((values[:4] ** 2).sum() / (values**2).sum())

    def error(matrix: np.ndarray) -> float:
        projected = unit @ matrix.T
        return float(np.linalg.norm(projected @ projected.T - unit @ unit.T))

    centred = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)[2][:4]
    assert error(fitted.matrix.double().numpy()) < 0.5 * error(centred)
    assert torch.equal(fit_pca([vectors], 4).matrix.sign(), fitted.matrix.sign())  # signs are not left to chance


def test_lengths_do_not_weigh() -> None:
    vectors = draw(30, 8)
    longer = vectors * torch.linspace(1, 100, 30)[:, None]
    torch.testing.assert_close(fit_pca([longer], 3).matrix, fit_pca([vectors], 3).matrix, atol=1e-5, rtol=0)


def test_zeros_behind_short_embeddings_change_no_cosine() -> None:
    projection = pad_with_zeros(6, 9)
    torch.testing.assert_close(cosines(projection(draw(7, 6))), cosines(draw(7, 6)), atol=1e-6, rtol=0)
    assert projection(draw(7, 6)).shape == (7, 9)


def test_network_with_a_projection_is_the_projection_of_its_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, network = nn.Linear(6, 4), nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    torch.save(layer.state_dict(), tmp_path / "layer.pth")
    projection = read_linear(tmp_path / "layer.pth", given=6, dimension=4)
    images = torch.randn(3, 3, 2, 2)
    expected = layer(F.normalize(network(images)))
    torch.testing.assert_close(Projected(network, projection)(images), expected)
    torch.testing.assert_close(projection(network(images)), expected)
    assert projection.describe() == {
        "projection": "linear",
        "projection_sizes": "6 to 4, behind L2 normalisation",
    }


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Images to fit the projection to: got 3; expected at least 4.*--images"):
        fit_pca([draw(3, 8)], 4)
    with pytest.raises(ExportError, match=r"Images to fit the projection to: got 0"):
        fit_pca([], 4)
    with pytest.raises(ExportError, match=r"PCA: got '4 to 4'; expected embeddings longer"):
        fit_pca([draw(9, 4)], 4)
    for value in (0.0, torch.nan):
        with pytest.raises(ExportError, match="zero or not finite"):
            fit_pca([draw(5, 8), torch.full((1, 8), value)], 4)
    for content in (
        {"weight": torch.zeros(4, 5)},
        {"weight": torch.zeros(4, 6), "bias": torch.zeros(5)},
        {"a": torch.zeros(1)},
    ):
        torch.save(content, tmp_path / "layer.pth")
        with pytest.raises(
            CheckpointError, match=r"layer\.pth: got \{.*expected weight \[4, 6\] and perhaps bias \[4\]"
        ):
            read_linear(tmp_path / "layer.pth", given=6, dimension=4)
