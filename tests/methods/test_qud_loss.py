"""QUD's losses against plain formulations under autograd, closed forms and limits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.qud import (
    FeatureQueue,
    cosine_loss,
    half_saturation_cosine,
    loss_floor,
    mse_loss,
    qud_loss,
    qud_monitors,
    soft_target_loss,
    temperature_for,
    temperature_note,
)

Loss = Callable[..., Tensor]


def draw(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_stream(3, name), dtype=torch.float64)


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher [5, 7], correlated, and a queue of 9 entries of any length."""
    teacher = draw("teacher", 5, 7)
    return (teacher + draw("noise", 5, 7)).requires_grad_(), teacher, draw("queue", 9, 7) * draw("length", 9, 1)


def all_logits(query: Tensor, teacher: Tensor, queue: Tensor, temperature: float) -> Tensor:
    keys = torch.cat([F.normalize(teacher)[:, None], F.normalize(queue).expand(len(teacher), -1, -1)], dim=1)
    return (F.normalize(query)[:, None] * keys).sum(dim=2) / temperature


def plain_qud(student: Tensor, teacher: Tensor, queue: Tensor, margin: float, mask_above: float | None) -> Tensor:
    logits = all_logits(student, teacher, queue, 0.1)
    logits = logits - F.one_hot(torch.zeros(len(logits), dtype=torch.int64), logits.shape[1]) * margin / 0.1
    if mask_above is not None:
        same = all_logits(teacher, teacher, queue, 1.0) > mask_above
        same[:, 0] = False
        logits = logits.masked_fill(same, -torch.inf)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


@pytest.mark.parametrize("options", [(0.0, None), (0.2, None), (0.0, 0.3), (0.2, -0.99)], ids=str)
def test_qud_is_cross_entropy(rows: Any, options: tuple[float, float | None]) -> None:
    """The last case leaves nothing but the positive in every row."""
    student, teacher, queue = rows
    margin, mask_above = options
    loss = qud_loss(student, teacher, queue, 0.1, margin=margin, mask_above=mask_above)
    expected = plain_qud(student, teacher, queue, margin, mask_above)
    if mask_above == 0.3:
        assert (loss - plain_qud(student, teacher, queue, margin, None)).abs() > 1e-3
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, student)[0]
    if mask_above == -0.99:
        assert loss.item() == 0
        wanted = torch.zeros_like(student)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, student)[0], 3 * wanted)


def test_soft_targets_are_cross_entropy_with_probabilities(rows: Any) -> None:
    student, teacher, queue = rows
    targets = all_logits(teacher, teacher, queue, 0.3).softmax(dim=1)
    expected = F.cross_entropy(all_logits(student, teacher, queue, 0.2), targets)
    loss = soft_target_loss(student, teacher, queue, 0.2, target_temperature=0.3)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(each, student)[0] for each in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_soft_targets_become_qud_as_they_harden(rows: Any) -> None:
    """And no earlier: 0.3 is still far off."""
    student, teacher, queue = rows
    hard = qud_loss(student, teacher, queue, 0.1)
    far, near = (soft_target_loss(student, teacher, queue, 0.1, target_temperature=t) for t in (0.3, 1e-3))
    torch.testing.assert_close(near, hard, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(each, student)[0] for each in (near, hard)]
    torch.testing.assert_close(*gradients)
    assert (far - hard).abs() > 0.1


LOSSES: dict[str, Loss] = {
    "qud": lambda s, t, q: qud_loss(s, t, q, 0.1),
    "qud with options": lambda s, t, q: qud_loss(s, t, q, 0.2, margin=0.1, mask_above=0.3),
    "soft": lambda s, t, q: soft_target_loss(s, t, q, 0.2, target_temperature=0.1),
    "mse mean": lambda s, t, q: mse_loss(s, t),
    "mse sum": lambda s, t, q: mse_loss(s, t, reduction="sum_dim"),
    "cosine": lambda s, t, q: cosine_loss(s, t),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@losses
def test_gradients_are_those_of_finite_differences(rows: Any, loss: Loss) -> None:
    student, teacher, queue = rows
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, queue), student)


@losses
def test_lengths_do_not_matter_and_only_the_student_learns(rows: Any, loss: Loss) -> None:
    student, teacher, queue = (x.detach().clone().requires_grad_() for x in rows)
    value = loss(student, teacher, queue)
    value.backward()
    assert teacher.grad is None
    assert queue.grad is None
    torch.testing.assert_close((student * student.grad).sum(dim=1), torch.zeros(5, dtype=torch.float64))
    scale = torch.tensor([[0.01], [3.0], [1.0], [50.0], [7.0]])
    torch.testing.assert_close(loss(student * scale, teacher / scale, 2 * queue), value)
    torch.testing.assert_close(loss(student, teacher, queue.flip(0)), value)


@losses
def test_zero_rows_and_empty_batches_are_harmless(rows: Any, loss: Loss) -> None:
    student, teacher, queue = (x.detach().float() for x in rows)
    student[0], teacher[1], queue[2] = 0, 0, 0
    student.requires_grad_()
    value = loss(student, teacher, queue)
    value.backward()
    assert value.isfinite()
    assert student.grad.abs().max() < 100  # not 1 / EPS
    assert student.grad[0].abs().max() == 0
    assert student.grad[2].abs().max() > 0

    empty = student[:0].detach().requires_grad_()
    nothing = loss(empty, teacher[:0], queue)
    nothing.backward()
    assert nothing.item() == 0
    assert empty.grad.shape == (0, 7)


@losses
def test_mixed_precision_is_left_to_the_network(rows: Any, loss: Loss) -> None:
    student, teacher, queue = (x.detach().float() for x in rows)
    network = torch.nn.Linear(7, 7, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.eye(7))
    with torch.autocast("cpu", torch.bfloat16):
        raw = network(student)
        value = loss(raw, teacher, queue)
    assert raw.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    value.backward()
    twin = raw.detach().float().requires_grad_()
    expected = loss(twin, teacher, queue)
    assert torch.equal(value, expected)
    assert (value - loss(student, teacher, queue)).abs() < 1e-2
    expected.backward()
    wanted = twin.grad.bfloat16().T @ student.bfloat16()
    torch.testing.assert_close(network.weight.grad, wanted.float(), rtol=0.02, atol=1e-3)


def test_cosine_mse_and_their_factors(rows: Any) -> None:
    student, teacher, _ = (x.detach() for x in rows)
    cosine = F.cosine_similarity(student, teacher)
    torch.testing.assert_close(cosine_loss(student, teacher), (1 - cosine).mean())
    torch.testing.assert_close(mse_loss(student, teacher), (2 - 2 * cosine).mean() / 7)
    torch.testing.assert_close(mse_loss(student, teacher, reduction="sum_dim"), (2 - 2 * cosine).mean())


def test_the_queue_may_be_overwritten_before_backward() -> None:
    teacher, student = draw("keys", 6, 16).float(), draw("rows", 6, 16).float().requires_grad_()

    def gradient(loss: Loss, *, enqueue_first: bool) -> Tensor:
        queue = FeatureQueue(9, 16)
        value = loss(student, teacher, queue.features)
        if enqueue_first:
            queue.enqueue(teacher)
        return torch.autograd.grad(value, student)[0]

    for loss in (LOSSES["qud"], LOSSES["soft"]):
        assert torch.equal(gradient(loss, enqueue_first=True), gradient(loss, enqueue_first=False))

    def plain(s: Tensor, t: Tensor, q: Tensor) -> Tensor:
        return plain_qud(s, t, q, 0.0, None) + (s @ q.T).sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(plain, enqueue_first=True)


def test_monitors_by_hand() -> None:
    student = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    queue = torch.tensor([[0.0, 4.0], [-1.0, 0.0]])
    # Cosines with the teacher 1, 0, r = 0.707; with the queue (0, -1), (1, 0), (r, -r): the last row ties.
    monitors = qud_monitors(student, teacher, queue, 0.5)
    r = 0.5**0.5
    logits = torch.tensor([[1, 0, -1], [0, 1, 0], [r, r, -r]]) / 0.5
    assert monitors["mean_cosine"].item() == pytest.approx((1 + r) / 3)
    assert monitors["p_positive"].item() == pytest.approx(logits.softmax(dim=1)[:, 0].mean().item())
    assert monitors["top_1"].item() == pytest.approx(1 / 3)
    # Without the entry that equals the third teacher embedding, that row is closest to its own.
    masked = qud_monitors(student, teacher, queue, 0.5, mask_above=0.9)
    assert masked["top_1"].item() == pytest.approx(2 / 3)
    assert masked["p_positive"] > monitors["p_positive"]
    assert qud_monitors(student, teacher, queue, 0.5, margin=0.3)["p_positive"] < monitors["p_positive"]


TABLE = [
    # temperature, n, floor of the loss, half-saturation cosine (None: above 1); D = 512
    (0.06, 1024, 8e-5, 0.43),
    (0.07, 1024, 8e-4, 0.50),
    (0.08, 1024, 0.004, 0.57),
    (0.1, 1024, 0.050, 0.70),
    (0.2, 1024, 2.09, None),
    (0.4, 1024, 4.45, None),
    (0.6, 1024, 5.27, None),
    (0.1, 512, 0.025, 0.63),
    (0.1, 4096, 0.19, 0.84),
    (0.1, 8192, 0.34, 0.91),
    (0.1, 16384, 0.60, 0.98),
]


@pytest.mark.parametrize(("temperature", "size", "floor", "cosine"), TABLE)
def test_closed_forms_of_the_paper_s_settings(
    temperature: float, size: int, floor: float, cosine: float | None
) -> None:
    found = half_saturation_cosine(temperature, size, 512)
    assert found > 1 if cosine is None else found == pytest.approx(cosine, abs=0.006)
    assert loss_floor(temperature, size, 512) == pytest.approx(floor, rel=0.12 if floor < 0.01 else 0.03)
    assert temperature_for(found, size, 512) == pytest.approx(temperature)


@pytest.mark.parametrize("temperature", [0.08, 0.1, 0.2])
def test_closed_forms_are_what_random_negatives_do(temperature: float) -> None:
    teacher, sideways = (F.normalize(draw(name, 64, 256)) for name in ("anchors", "sideways"))
    queue = FeatureQueue(512, 256, seed=1).features.double()
    assert qud_loss(teacher, teacher, queue, temperature).item() == pytest.approx(
        loss_floor(temperature, 512, 256), rel=0.05
    )
    cosine = half_saturation_cosine(temperature, 512, 256)
    if cosine < 1:
        orthogonal = F.normalize(sideways - (sideways * teacher).sum(dim=1, keepdim=True) * teacher)
        student = cosine * teacher + (1 - cosine**2) ** 0.5 * orthogonal
        assert qud_monitors(student, teacher, queue, temperature)["p_positive"].item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 1024, 512), r"^QUD: temperature 0\.1, queue 1024 x 512: half-saturation cosine 0\.70\.$"),
        ((0.06, 1024, 512), r"cosine 0\.43: the pull fades while .*has 0\.70, here that is temperature 0\.0996\.$"),
        ((0.2, 1024, 512), r"cosine 1\.39: the pull towards the teacher never fades.*temperature 0\.0996\.$"),
        ((0.4, 24, 4), r"cosine 1\.58: the pull towards the teacher never fades, much like a plain cosine loss\.$"),
    ],
)
def test_the_note_names_the_cosine_and_a_better_temperature(arguments: Any, message: str) -> None:
    assert re.search(message, temperature_note(*arguments))


def good() -> dict[str, Any]:
    return {"student": torch.ones(2, 4), "teacher": torch.ones(2, 4), "queue": torch.ones(3, 4), "temperature": 0.1}


@pytest.mark.parametrize("function", [qud_loss, qud_monitors, soft_target_loss])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, r"QUD temperature: got 0\.0; expected a finite number above 0\."),
        (
            {"student": torch.ones(2, 5)},
            r"got \(\(2, 5\), \(2, 4\)\); expected \[B, D\] both\. Give the student .*size",
        ),
        ({"queue": torch.ones(3, 5)}, r"QUD queue: got \(3, 5\); expected \[n, 4\], entries as long as"),
        ({"queue": torch.ones(0, 4)}, r"QUD queue: got \(0, 4\); .*at least one of them"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(function: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        function(**{**good(), **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: qud_loss(**good(), mask_above=1.5), r"mask_above: got 1\.5; expected a cosine in \(-1, 1\), or None"),
        (lambda: qud_monitors(**good(), mask_above=1.5), r"mask_above: got 1\.5"),
        (lambda: soft_target_loss(**good(), target_temperature=0), r"QUD target temperature: got 0; expected a finite"),
        (
            lambda: mse_loss(torch.ones(2, 4), torch.ones(2, 4), reduction="sumdim"),
            r"reduction: got 'sumdim'; expected 'mean' or 'sum_dim'\. Did you mean 'sum_dim'\?",
        ),
        (lambda: cosine_loss(torch.ones(4), torch.ones(4)), r"got \(\(4,\), \(4,\)\); expected \[B, D\] both"),
        (lambda: temperature_for(0.1, 1024, 512), r"1024 entries of 512 numbers: got 0\.1; expected at least 0\.165"),
        (lambda: temperature_for(0.7, 1, 512), r"size and dimension: got \(1, 512\); expected at least 2 and 1"),
        (lambda: loss_floor(0.1, 0, 512), r"size and dimension: got \(0, 512\); expected at least 1 and 1"),
    ],
)
def test_impossible_options_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
