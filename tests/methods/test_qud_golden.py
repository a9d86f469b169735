"""QUD against numbers recorded from the authors' program: losses, gradients, queue, and training with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qud_recorded import Distillation, Golden, normal, recorded, same_queue

from qsd_plugin.methods.qud import FeatureQueue, mse_loss, qud_loss, qud_monitors


@pytest.fixture(scope="module")
def golden() -> Golden:
    return recorded()


def close(actual: torch.Tensor, expected: np.ndarray, atol: float = 2e-6) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=atol)


def test_nine_training_steps(golden: Golden) -> None:
    run = Distillation(golden, "A", 0.1)
    for index in range(9):
        student = run.student(normal(11, index, shape=(6, 20))).detach()
        monitors = qud_monitors(student, run.keys[index], run.queue.features, 0.1)
        logits = torch.tensor(golden["A/logits"][index])
        close(monitors["p_positive"], logits.softmax(dim=1)[:, 0].mean().numpy())
        close(monitors["mean_cosine"], logits[:, 0].mean().numpy() / 10)
        assert monitors["top_1"].item() == pytest.approx((logits.argmax(dim=1) == 0).float().mean().item())

        left = run.step(index)
        close(left["loss"], golden["A/loss"][index])
        close(left["gradient"], golden["A/grad_student_raw"][index])
        close(left["norm"], golden["A/grad_norm_before_clip"][index])
        close(left["weight"], golden["A/w_after"][index])
        same_queue(left["queue"], golden["A/queue_after"][index])
        assert left["pointer"].item() == golden["A/ptr_after"][index] == (6 * (index + 1)) % 24
        assert run.queue.filled.item() == min(6 * (index + 1), 24)


@pytest.mark.parametrize("temperature", [0.06, 0.07, 0.08, 0.2, 0.4, 0.6])
def test_temperatures(golden: Golden, temperature: float) -> None:
    run = Distillation(golden, "A", temperature)
    for index in range(6):
        left = run.step(index, train=False)
        close(left["loss"], golden[f"A_T{temperature}/loss"][index])
        close(left["gradient"], golden[f"A_T{temperature}/grad_student_raw"][index])


def test_margin(golden: Golden) -> None:
    run = Distillation(golden, "A", 0.1, margin=0.1)
    assert golden["A_margin0.1/loss"][0] == pytest.approx(5.149170, abs=1e-6)
    for index in range(9):
        close(run.step(index, train=False)["loss"], golden["A_margin0.1/loss"][index])


def test_the_queue_of_a_step_is_what_earlier_steps_left(golden: Golden) -> None:
    """The queue is as large as the batch: enqueued first, every key would be among its own negatives."""
    run = Distillation(golden, "D_KeqB", 0.1)
    for index in range(4):
        left = run.step(index)
        close(left["loss"], golden["D_KeqB/loss"][index])
        close(left["gradient"], golden["D_KeqB/grad_student_raw"][index])


def test_training_with_active_clipping(golden: Golden) -> None:
    run = Distillation(golden, "E_clip", 0.03)
    for index in range(6):
        left = run.step(index)
        assert left["norm"] > 5
        close(left["loss"], golden["E_clip/loss"][index], atol=1e-5)
        close(left["norm"], golden["E_clip/grad_norm_before_clip"][index], atol=5e-5)
        close(left["weight"], golden["E_clip/w_after"][index])


def test_the_paper_s_size(golden: Golden) -> None:
    """512 rows of 512 numbers, 1024 entries."""
    columns = normal(52, 0, shape=(512, 1024))
    queue = FeatureQueue(1024, 512, initial=columns.T)
    for index in range(5):
        teacher, noise = (normal(51, index, part, shape=(512, 512)) for part in (0, 1))
        student = (0.6 * teacher + 0.8 * noise).requires_grad_()
        for temperature in (0.06, 0.07, 0.08, 0.1, 0.2, 0.4, 0.6):
            student.grad = None
            loss = qud_loss(student, teacher, queue.features, temperature)
            loss.backward()
            close(loss.detach(), golden[f"L/T{temperature}/loss"][index], atol=2e-5)
            expected = golden[f"L/T{temperature}/grad_norm"][index]
            np.testing.assert_allclose(student.grad.norm(), expected, rtol=1e-5)
            if index == 0 and temperature == 0.1:
                close(student.grad[0], golden["L/grad_student_raw_row0"], atol=2e-9)
        queue.enqueue(teacher)
        if index in (0, 4):
            kept = queue.features[[0, 511, 512, 1023]].T
            close(kept, golden["L/queue_cols"][index // 4], atol=1e-7)


def test_mse(golden: Golden) -> None:
    student = torch.tensor(golden["MSE/student_raw"], requires_grad=True)
    teacher = torch.tensor(golden["MSE/teacher_raw"])
    loss = mse_loss(student, teacher)
    loss.backward()
    close(loss.detach(), golden["MSE/loss"], atol=1e-8)
    close(student.grad, golden["MSE/grad_student_raw"], atol=1e-8)
    cosine = torch.cosine_similarity(student.detach(), teacher)
    torch.testing.assert_close(loss.detach(), (2 - 2 * cosine).mean() / 16)


@pytest.mark.parametrize("cut", [1, 5])
def test_a_resumed_run_goes_on_exactly(golden: Golden, cut: int) -> None:
    """Cut while the queue still holds part of its start, and after the first wrap."""
    whole = Distillation(golden, "A", 0.1)
    expected = [whole.step(index) for index in range(9)]
    first = Distillation(golden, "A", 0.1)
    for index in range(cut):
        first.step(index)
    second = Distillation(golden, "A", 0.1)
    second.queue = FeatureQueue(24, 16, seed=5)
    second.load(first.saved())
    for index in range(cut, 9):
        left = second.step(index)
        for name, value in expected[index].items():
            assert torch.equal(left[name], value), (index, name)
    assert torch.equal(second.queue.filled, whole.queue.filled)
