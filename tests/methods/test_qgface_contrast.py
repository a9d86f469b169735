"""The contrastive branch: options beside the recorded ones, gradients by differences, weights, schedules, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.qgface import (
    PROFILES,
    ContrastResult,
    Negatives,
    QGContrast,
    contrast_options,
    contrast_weight,
    contrast_weight_at,
    pair_quality,
    queue_limit_at,
    threshold_at,
)

PAIRS, DIM, SLOTS = 5, 8, 12
LABELS = torch.tensor([0, 1, 2, 2, 3])


def draw(*shape: int, name: str) -> Tensor:
    return torch.randn(*shape, generator=torch_stream(3, name), dtype=torch.float64)


def negatives(valid: int = SLOTS) -> Negatives:
    labels = torch.tensor([0, 1, 2, 2, 3, 0, 1, 4, 5, 6, 7, 8])
    return Negatives(F.normalize(draw(SLOTS, DIM, name="queue"), dim=1) * 1.1, labels, torch.arange(SLOTS) < valid)


def call(
    module: QGContrast, entries: Negatives | None = None, own: Tensor | None = None
) -> tuple[ContrastResult, Tensor, Tensor]:
    """Pairs 0 and 1 are of low quality."""
    anchor, positive = (draw(PAIRS, DIM, name=name).requires_grad_() for name in ("anchor", "positive"))
    scalers = torch.tensor([[-0.9], [-0.7], [0.2], [0.5], [0.1]]), torch.tensor([[0.4], [0.9], [0.3], [-0.1], [0.8]])
    result = module.double()(anchor, positive, entries or negatives(), LABELS, *(x.double() for x in scalers), own)
    return result, anchor, positive


def test_slots_that_do_not_count_change_nothing() -> None:
    """A queue of twelve with seven filled is a queue of seven."""
    full = negatives()
    cut = Negatives(full.embeddings[:7], full.labels[:7], full.valid[:7])
    for options in ({"margin_method": "dynamic"}, {"mask_fill": "exclude", "coupling": "double"}):
        partly, anchor, _ = call(QGContrast(**options), negatives(7))
        whole, expected, _ = call(QGContrast(**options), cut)
        torch.testing.assert_close(partly.loss, whole.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(partly.logits[:, :8], whole.logits, rtol=1e-12, atol=0)
        assert (partly.logits[:, 8:] == -math.inf).all()
        for result, leaf in ((partly, anchor), (whole, expected)):
            result.loss.backward()
            assert leaf.grad.any()
        torch.testing.assert_close(anchor.grad, expected.grad, rtol=1e-10, atol=1e-12)
        assert partly.stats["negatives"] == 7


def test_excluded_negatives_count_nothing() -> None:
    module = QGContrast(threshold=0.0, mask_fill="exclude", rescale=False, scale=3.0)
    result, *leaves = call(module)
    anchor, positive = (leaf.detach() for leaf in leaves)
    entries = negatives()
    total = 0.0
    for index in range(PAIRS):
        row = F.normalize(anchor[index], dim=0)
        others = entries.embeddings[entries.labels != LABELS[index]] @ row
        target = row @ F.normalize(positive[index], dim=0)
        total += float(torch.logsumexp(3 * torch.cat([target[None], others.clamp(-1, 1)]), 0) - 3 * target)
    assert result.loss.item() == pytest.approx(total / PAIRS, rel=1e-12)


def test_the_instance_mask_takes_out_every_view_of_the_own_image_only() -> None:
    own = torch.tensor([[0, 5], [1, 6], [2, 7], [3, 8], [4, 9]])
    result, _, _ = call(QGContrast(threshold=0.0, coupling="double", mask="instance"), own=own)
    zero = result.logits[:, 1:] == 0
    expected = torch.zeros(PAIRS, SLOTS, dtype=torch.bool).scatter(1, own, True).repeat(2, 1)
    assert torch.equal(zero, expected)


def test_no_gradient_reaches_the_queue() -> None:
    entries = negatives()
    entries.embeddings.requires_grad_()
    result, anchor, positive = call(QGContrast(coupling="double", detach_positive=False), entries)
    result.loss.backward()
    assert entries.embeddings.grad is None
    # Only pairs of low quality learn.
    for leaf in (anchor, positive):
        assert leaf.grad[:2].abs().min() > 0
        assert not leaf.grad[2:].any()


def test_the_active_mean_goes_over_rows_with_a_weight() -> None:
    results = {reduction: call(QGContrast(reduction=reduction, rescale=False))[0] for reduction in ("all", "active")}
    rows = torch.logsumexp(results["all"].logits, dim=1) - results["all"].logits[:, 0]
    torch.testing.assert_close(results["all"].loss, rows.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(results["active"].loss, rows[:2].mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(rows[2:], torch.full((3,), math.log(SLOTS + 1)).double())
    assert results["all"].stats["active"].item() == pytest.approx(0.4)


def test_the_moving_gap_stands_still_outside_training() -> None:
    module = QGContrast(margin_method="dynamic")
    call(module)
    gap = module.gap.clone()
    with torch.no_grad():
        call(module)
    call(module.eval())
    assert torch.equal(module.gap, gap)
    call(module.train())
    assert not torch.equal(module.gap, gap)


def test_the_gap_is_to_a_negative_of_at_least_zero() -> None:
    """With nothing masked and all negatives opposite to the anchors, the hardest one counts as cosine 0."""
    direction = F.normalize(draw(1, DIM, name="direction"), dim=1)
    module = QGContrast(momentum=1.0).double()
    entries = Negatives(-direction.repeat(3, 1), torch.tensor([7, 8, 9]), torch.ones(3, dtype=torch.bool))
    rows, scaler = direction.repeat(2, 1), torch.zeros(2, 1).double()
    module(rows, rows, entries, LABELS[:2], scaler, scaler)
    assert module.gap.item() == pytest.approx(1.0)


@pytest.mark.parametrize("coupling", ["single", "double"])
@pytest.mark.parametrize("margin_method", ["none", "dynamic"])
def test_gradients_by_differences(coupling: str, margin_method: str) -> None:
    module = QGContrast(
        threshold=0.6,
        coupling=coupling,
        detach_positive=False,
        weighting="cos",
        weight_range="whole",
        select="mean",
        margin_method=margin_method,
        scale=5.0,
    ).double()
    module.gap.fill_(0.1)
    module.eval()
    scalers = torch.linspace(-0.9, 0.9, PAIRS, dtype=torch.float64)[:, None]

    def loss(anchor: Tensor, positive: Tensor) -> Tensor:
        return module(anchor, positive, negatives(9), LABELS, scalers, -0.5 * scalers).loss

    leaves = tuple(draw(PAIRS, DIM, name=name).requires_grad_() for name in ("anchor", "positive"))
    assert torch.autograd.gradcheck(loss, leaves)


def test_weights_meet_at_the_threshold_and_vanish_at_the_ends() -> None:
    quality = torch.tensor([0.0, 0.3 - 1e-9, 0.3, 1.0], dtype=torch.float64)
    for weighting in ("cos", "linear"):
        whole = contrast_weight(quality, 0.3, weighting=weighting, weight_range="whole")
        assert whole.tolist() == pytest.approx([0, 1, 1, 0], abs=5e-3)
        half = contrast_weight(quality, 0.3, weighting=weighting)
        assert half.tolist() == pytest.approx([0, 1, 0, 0], abs=5e-3)
        assert contrast_weight(quality, 0.0, weighting=weighting).tolist() == [1] * 4
    assert contrast_weight(quality, 0.3).tolist() == [1, 1, 0, 0]
    assert contrast_weight(quality, 0.999, weighting="linear", weight_range="whole").isfinite().all()


def test_quality_of_a_pair() -> None:
    first, second = torch.tensor([0.25, 1.0]), torch.tensor([0.75, 0.5])
    assert pair_quality(first, second).tolist() == [0.25, 0.5]
    assert pair_quality(first, second, "mean").tolist() == [0.5, 0.75]
    assert pair_quality(first, second, "high").tolist() == [0.75, 1.0]


def test_full_precision_under_autocast() -> None:
    module = QGContrast().float().eval()
    entries = Negatives(negatives().embeddings.float(), *negatives()[1:])
    parts = [draw(PAIRS, DIM, name=name).float() for name in ("anchor", "positive")]
    scalers = torch.full((PAIRS, 1), -0.9)
    plain = module(*parts, entries, LABELS, scalers, scalers)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(*parts, entries, LABELS, scalers, scalers)
    assert torch.equal(plain.logits, mixed.logits)


def test_profiles() -> None:
    assert PROFILES == ("figure", "code_default")
    figure, default = (QGContrast(**contrast_options(name)) for name in PROFILES)
    assert (figure.coupling, figure.detach_positive) == ("single", True)
    assert (default.coupling, default.detach_positive) == ("double", False)
    with pytest.raises(ConfigError, match=r"QGFace profile: got 'figures'\. Did you mean 'figure'"):
        contrast_options("figures")


def test_schedules() -> None:
    assert [threshold_at(e, threshold=0.2, warmup_epochs=4) for e in range(6)] == pytest.approx(
        [0, 0.05, 0.1, 0.15, 0.2, 0.2]
    )
    assert threshold_at(0, threshold=0.2) == 0.2  # the authors' program divides by 0 here
    assert [contrast_weight_at(e, weight=0.5, start_epoch=1, stop_epoch=3) for e in range(4)] == [0, 0.5, 0.5, 0]
    assert contrast_weight_at(0, stop_epoch=0) == 0
    assert [queue_limit_at(e, size=100, smallest=20, epochs=5) for e in range(6)] == [20, 40, 60, 80, 100, 100]
    assert queue_limit_at(0, size=100, smallest=20, epochs=1) == 100
    with pytest.raises(ConfigError, match=r"QGFace smallest queue: got 120; expected 1 to the queue's size 100"):
        queue_limit_at(0, size=100, smallest=120, epochs=5)
    with pytest.raises(ConfigError, match=r"QGFace warmup_epochs: got -1; expected >= 0"):
        threshold_at(0, threshold=0.2, warmup_epochs=-1)
    with pytest.raises(ConfigError, match=r"threshold: got 2"):
        threshold_at(0, threshold=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, r"threshold: got -0\.1; expected a number in \[0, 1\]"),
        ({"coupling": "doubl"}, r"coupling: got 'doubl'\. Did you mean 'double'"),
        ({"mask": "identities"}, r"mask: got 'identities'\. Did you mean 'identity'"),
        ({"mask_fill": "inf"}, r"fill of the mask: got 'inf'\. Known names: exclude, zero"),
        ({"weighting": "cosine"}, r"weighting: got 'cosine'"),
        ({"weight_range": "hole"}, r"range of the weighting: got 'hole'\. Did you mean 'whole'"),
        ({"select": "lower"}, r"pair's quality: got 'lower'\. Did you mean 'low'"),
        ({"margin_method": "dynamc"}, r"margin method: got 'dynamc'\. Did you mean 'dynamic'"),
        ({"reduction": "mean"}, r"reduction: got 'mean'"),
        ({"margin": -1}, r"contrastive margin: got -1"),
        ({"momentum": 2}, r"momentum of the gap: got 2"),
        ({"scale": 0}, r"contrastive scale: got 0"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QGContrast(**options)


def test_an_instance_mask_without_slots_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"own; expected the slots .* Pass what ProxyQueue\.enqueue returned"):
        call(QGContrast(mask="instance"))


def test_wrong_shapes_are_named() -> None:
    scaler = torch.zeros(PAIRS, 1).double()
    anchor = draw(PAIRS, DIM, name="anchor")
    message = r"anchor, positive, labels and scalers: .*expected \[N, 8\] twice, \[N\], and \[N, 1\] twice"
    for positive, scalers in ((anchor[:3], scaler), (anchor, scaler[:, 0])):
        with pytest.raises(ConfigError, match=message):
            QGContrast().double()(anchor, positive, negatives(), LABELS, scalers, scaler)
