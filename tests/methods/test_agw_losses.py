"""AGW's host losses against numbers recorded from the authors' program, and against loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.agw import CenterLoss, center_loss, weighted_regularised_triplet

DATA = Path(__file__).parents[1] / "data" / "qsd_loss.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA) as arrays:
        return {name: array for name, array in arrays.items() if not name.startswith("qsd_")}


def loop_triplet(features: torch.Tensor, identities: torch.Tensor) -> torch.Tensor:
    """The definition with softmax weights, anchor by anchor, without the added 1e-6."""
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    terms = []
    for row, identity in zip(distance, identities, strict=True):
        positive, negative = row[identities == identity], row[identities != identity]
        furthest = (positive.softmax(0) * positive).sum()
        closest = ((-negative).softmax(0) * negative).sum()
        terms.append((1 + (furthest - closest).exp()).log())
    return torch.stack(terms).mean()


# --- weighted-regularised triplet


@pytest.mark.parametrize("group", ["wrt", "wrt_uneven", "wrt_far"])
def test_triplet_values_and_gradients(golden, group):
    scale = golden["wrt_far/scale"].astype(np.float32) if group == "wrt_far" else 1
    identities = torch.tensor(golden["wrt_uneven/labels" if group == "wrt_uneven" else "wrt/labels"])
    features = torch.tensor(golden["wrt/feat"] * scale, requires_grad=True)
    loss = weighted_regularised_triplet(features, identities)
    loss.backward()
    assert loss.item() == pytest.approx(golden[f"{group}/loss"], rel=1e-5)
    expected = golden[f"{group}/grad"]
    np.testing.assert_allclose(features.grad, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_stable_triplet_is_the_definition_at_any_distance(golden, scale):
    """At scale 5 the authors' weights of the negatives have vanished (loss 40.8); the definition gives 8.3."""
    features = torch.tensor(golden["wrt/feat"], dtype=torch.float64) * scale
    identities = torch.tensor(golden["wrt/labels"])
    expected = loop_triplet(features, identities)
    stable = weighted_regularised_triplet(features, identities, stable=True)
    assert stable.item() == pytest.approx(expected.item(), rel=1e-4)
    if scale == 5.0:
        assert weighted_regularised_triplet(features, identities).item() > 4 * expected.item()


@pytest.mark.parametrize("stable", [False, True])
def test_triplet_gradcheck(stable):
    features = torch.randn(8, 3, generator=torch_stream(0), dtype=torch.float64, requires_grad=True)
    identities = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])
    assert torch.autograd.gradcheck(lambda x: weighted_regularised_triplet(x, identities, stable=stable), features)


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("identities", [[0, 0, 0, 0], [0, 1, 2, 3]])
def test_triplet_without_negatives_or_positives_is_finite(identities, stable):
    features = torch.randn(4, 6, generator=torch_stream(1), requires_grad=True)
    loss = weighted_regularised_triplet(features, torch.tensor(identities), stable=stable)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


@pytest.mark.parametrize("stable", [False, True])
def test_triplet_with_identical_and_with_very_distant_features_is_finite(stable):
    identities = torch.tensor([0, 0, 1, 1])
    for features in (torch.ones(4, 6), 1e4 * torch.randn(4, 6, generator=torch_stream(2))):
        features.requires_grad_()
        loss = weighted_regularised_triplet(features, identities, stable=stable)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(features.grad).all()


def test_triplet_is_computed_in_float32_under_autocast():
    features = torch.randn(8, 16, generator=torch_stream(3)).bfloat16()
    identities = torch.arange(4).repeat_interleave(2)
    expected = weighted_regularised_triplet(features.float(), identities)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = weighted_regularised_triplet(features, identities)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


# --- centre loss


def recorded_module(golden: dict[str, np.ndarray], **options: float) -> CenterLoss:
    module = CenterLoss(*golden["center/centers"].shape, **options)
    module.centers.copy_(torch.tensor(golden["center/centers"]))
    return module


@pytest.mark.parametrize("weight", [0.0005, 1.0])
def test_center_loss_gradient_and_step(golden, weight):
    """The step must not spoil the gradient, which flows afterwards, nor depend on the weight."""
    module = recorded_module(golden, weight=weight)
    features = torch.tensor(golden["center/feat"], requires_grad=True)
    loss = module(features, torch.tensor(golden["center/labels"]))
    np.testing.assert_allclose(module.centers, golden["center/centers_after_step"], rtol=1e-5, atol=1e-6)
    loss.backward()
    assert loss.item() == pytest.approx(weight * golden["center/loss"], rel=1e-5)
    expected = golden["center/grad_feat_w0.0005"] * (weight / 0.0005)
    np.testing.assert_allclose(features.grad, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_center_step_is_the_sgd_step_of_the_unweighted_loss():
    module = CenterLoss(5, 3, lr=0.2)
    features = torch.randn(9, 3, generator=torch_stream(4))
    identities = torch.tensor([0, 0, 0, 1, 3, 3, 3, 3, 4])
    centers = module.centers.clone().requires_grad_()
    center_loss(features, centers, identities).backward()
    module(features, identities)
    torch.testing.assert_close(module.centers, centers.detach() - 0.2 * centers.grad)
    assert torch.equal(module.centers[2], centers.detach()[2])  # no image, no step


def test_centers_converge_to_the_class_means():
    module = CenterLoss(2, 3)
    features = torch.randn(8, 3, generator=torch_stream(5))
    identities = torch.arange(2).repeat(4)
    for _ in range(60):
        module(features, identities)
    means = torch.stack([features[identities == c].mean(0) for c in range(2)])
    torch.testing.assert_close(module.centers, means)


def test_centers_rest_without_gradients_and_in_eval_mode():
    module = CenterLoss(3, 4)
    features, identities = torch.randn(6, 4, generator=torch_stream(6)), torch.tensor([0, 0, 1, 1, 2, 2])
    before = module.centers.clone()
    with torch.no_grad():  # e.g. the host recomputing batch-norm statistics in train mode
        module(features, identities)
    module.eval()(features, identities)
    assert torch.equal(module.centers, before)
    module.train()(features, identities)
    assert not torch.equal(module.centers, before)


def test_features_that_are_not_finite_move_no_center():
    module = CenterLoss(3, 2)
    before = module.centers.clone()
    features = torch.tensor([[float("inf"), 0.0], [float("nan"), 0.0], [1e7, 0.0], [1.0, 2.0]])
    module(features, torch.tensor([0, 0, 1, 2]))
    assert torch.equal(module.centers[:2], before[:2])  # the third is beyond the clamp: its loss has no gradient
    expected = before[2] - 0.5 * 2 / 4 * (before[2] - features[3])
    torch.testing.assert_close(module.centers[2], expected)


def test_center_loss_under_autocast():
    features = torch.randn(6, 4, generator=torch_stream(7)).bfloat16()
    identities = torch.tensor([0, 0, 1, 1, 2, 2])
    plain, cast = CenterLoss(3, 4), CenterLoss(3, 4)
    expected = plain(features.float(), identities)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cast(features, identities)
    assert torch.equal(loss, expected)
    assert torch.equal(cast.centers, plain.centers)


def test_centers_are_seeded_and_saved_but_not_trained():
    module = CenterLoss(200, 50, seed=3)
    assert not list(module.parameters())
    assert torch.equal(CenterLoss(200, 50, seed=3).centers, module.centers)
    assert not torch.equal(CenterLoss(200, 50, seed=4).centers, module.centers)
    assert module.centers.std().item() == pytest.approx(1.0, abs=0.03)
    assert list(module.state_dict()) == ["centers"]
    assert CenterLoss(0, 50).centers.shape == (0, 50)


def test_wrong_options_are_named():
    with pytest.raises(ConfigError, match=r"Centre loss lr: got -1\.0; expected a finite number >= 0"):
        CenterLoss(3, 4, lr=-1.0)
    with pytest.raises(ConfigError, match="Centre loss weight: got nan"):
        CenterLoss(3, 4, weight=float("nan"))
    with pytest.raises(ConfigError, match=r"Centre loss features: got \(2, 5\); expected \[B, 4\]"):
        CenterLoss(3, 4)(torch.zeros(2, 5), torch.tensor([0, 1]))
