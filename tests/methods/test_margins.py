"""Margins: InsightFace's own numbers, the equation, and the two kinds of gradient."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.margins import arcface_logits, combined_margin_logits, cosface_logits

DATA = Path(__file__).parents[1] / "data" / "face_margins.npz"
COMBINED = {"m1": 1.2, "m2": 0.3, "m3": 0.2}


def cosines(rows: int = 5, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    cosine = torch.rand(rows, classes, generator=torch_stream(0), dtype=torch.float64) * 1.8 - 0.9
    return cosine.requires_grad_(), torch.randint(classes, (rows,), generator=torch_stream(1))


@pytest.mark.parametrize("name", ["arcface", "cosface"])
def test_values_and_gradients_of_arcface_torch(name: str) -> None:
    """Recorded from its CombinedMarginLoss with (1, 0.5, 0) and (1, 0, 0.4), one row without a class."""
    with np.load(DATA) as arrays:
        golden = {key: torch.tensor(arrays[key]) for key in arrays}
    cosine = golden["cosine"].requires_grad_()
    logits = {"arcface": arcface_logits, "cosface": cosface_logits}[name](cosine, golden["labels"])
    torch.testing.assert_close(logits, golden[f"{name}/logits"], rtol=1e-5, atol=2e-5)
    (gradient,) = torch.autograd.grad(logits, cosine, golden["upstream"])
    torch.testing.assert_close(gradient, golden[f"{name}/grad"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_combined_margin_is_the_papers_equation(gradient: str) -> None:
    cosine, labels = cosines()
    logits = combined_margin_logits(cosine, labels, **COMBINED, scale=30, gradient=gradient)
    expected = 30 * cosine.detach().numpy()
    for row, label in enumerate(labels.tolist()):
        angle = math.acos(cosine[row, label].item())
        expected[row, label] = 30 * (math.cos(1.2 * angle + 0.3) - 0.2)
    np.testing.assert_allclose(logits.detach(), expected, rtol=1e-12)


@pytest.mark.parametrize("margins", [{"m2": 0.5}, COMBINED, {"m3": 0.35}])
def test_exact_gradient_is_the_derivative(margins: dict[str, float]) -> None:
    cosine, labels = cosines()
    assert torch.autograd.gradcheck(
        lambda x: F.cross_entropy(combined_margin_logits(x, labels, **margins, scale=8, gradient="exact"), labels),
        (cosine,),
    )


@pytest.mark.parametrize("margins", [{"m2": 0.5}, COMBINED, {"m3": 0.35}])
def test_straight_through_gradient_is_scale_times_p_minus_onehot(margins: dict[str, float]) -> None:
    cosine, labels = cosines()
    logits = combined_margin_logits(cosine, labels, **margins, scale=8)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), cosine)
    torch.testing.assert_close(gradient, 8 * (logits.softmax(dim=1) - F.one_hot(labels, 7)))


def test_the_two_gradients_differ_for_angles_only() -> None:
    cosine, labels = cosines()

    def target_gradients(**margins: float) -> list[torch.Tensor]:
        both = []
        for kind in ("straight_through", "exact"):
            logits = combined_margin_logits(cosine, labels, **margins, scale=1, gradient=kind)
            both.append(torch.autograd.grad(logits.sum(), cosine)[0].gather(1, labels[:, None]))
        return both

    straight, exact = target_gradients(**COMBINED)
    angle = cosine.detach().gather(1, labels[:, None]).acos()
    torch.testing.assert_close(exact, 1.2 * torch.sin(1.2 * angle + 0.3) / torch.sin(angle))
    assert torch.equal(straight, torch.ones_like(straight))
    assert (straight - exact).abs().min() > 0.01
    assert torch.equal(*target_gradients(m3=0.4))


@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_cosines_beyond_one_by_rounding_stay_finite(gradient: str) -> None:
    """arccos of them is not a number, and its derivative at 1 infinite."""
    cosine = torch.tensor([[1.0000001, 0.0], [-1.0000001, 0.0], [1.0, -1.0]], requires_grad=True)
    logits = arcface_logits(cosine, torch.zeros(3, dtype=torch.long), scale=1, gradient=gradient)
    expected = torch.tensor([math.cos(0.5), math.cos(math.pi + 0.5), math.cos(0.5)])
    torch.testing.assert_close(logits[:, 0], expected, rtol=0, atol=2e-3)
    logits.sum().backward()
    assert cosine.grad is not None
    assert cosine.grad.isfinite().all()


def test_rows_of_other_ranks_have_no_margin() -> None:
    cosine, labels = cosines()
    labels[2] = -1
    logits = combined_margin_logits(cosine, labels, **COMBINED, scale=2, gradient="exact")
    assert torch.equal(logits[2], 2 * cosine[2])
    (gradient,) = torch.autograd.grad(logits.sum(), cosine)
    assert torch.equal(gradient[2], torch.full((7,), 2.0, dtype=torch.float64))
    nothing_here = torch.zeros(4, 0, requires_grad=True)
    assert arcface_logits(nothing_here, torch.full((4,), -1)).shape == (4, 0)


def test_half_precision_cosines_get_their_margin_in_full_precision() -> None:
    cosine, labels = cosines()
    half = cosine.detach().half()
    with torch.autocast("cpu", torch.bfloat16):
        logits = arcface_logits(half, labels)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, arcface_logits(half.float(), labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m1": 0}, r"Margin softmax m1: got 0; expected > 0"),
        ({"m2": -0.5}, r"Margin softmax m2: got -0\.5; expected >= 0"),
        ({"m3": -1.0}, r"Margin softmax m3: got -1\.0; expected >= 0"),
        ({"scale": 0}, r"Margin softmax scale: got 0; expected > 0"),
        ({"gradient": "exakt"}, r"Gradient of the margin: got 'exakt'\. Did you mean 'exact'\?"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, float | str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        combined_margin_logits(*cosines(), **options)


def test_labels_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"got \(\(5, 7\), \(5, 1\)\); expected cosines \[B, C\] and labels \[B\]"):
        combined_margin_logits(cosines()[0], cosines()[1][:, None])
