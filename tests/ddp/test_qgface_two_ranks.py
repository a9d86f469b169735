"""QGFace's joint steps on two gloo ranks are those of one process on the whole batch, and so is its queue.

Controls: with the norm statistics, the moving gap or the queue of each rank alone the same comparison must fail.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from gloo import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))

from qgface_recorded import STEPS, JointRun, recorded

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.methods.qgface import ProxyQueue, QGContrast, QGFaceHead, contrast, head, queue, statistics

#: Runs with the proxy queue and all views, with a moving margin, and with a momentum encoder.
RUNS = ("C_proxy_codedefault", "C_proxy_dyn_cos", "C_moco")
#: What a control takes away, as (module, function, what stands in for it).
CONTROLS: dict[str, tuple[Any, str, Any]] = {
    "statistics": (statistics, "all_reduce_sum", lambda tensor: tensor.detach().clone()),
    "gap": (contrast, "all_reduce_sum", lambda tensor: tensor.detach().clone()),
    "queue": (queue, "gather_equal_rows", lambda tensor: torch.cat([tensor.detach()] * 2)),
}
PER_RANK = {"loss", "loss_cla", "loss_con", "cls_logits", "con_logits", "g_fc_w", "g_fc_b", "g_kernel"}


def training(name: str, rank: int) -> dict[str, Any]:
    """Eight steps on the first or second half of each batch; state after the second, while the queue is filling."""
    run = JointRun(recorded(), name, parallel=True)
    steps, states = [], []
    for index in STEPS:
        steps.append(run.step(index, slice(3 * rank, 3 * rank + 3)))
        states.append(run.saved())
    return {"steps": steps, "state": states[1]}


def active_means(rows: slice) -> dict[str, torch.Tensor]:
    """Loss and gradient of both branches over active rows, which the ranks have different numbers of."""
    unit = torch.eye(8, dtype=torch.float64)[:6].requires_grad_()
    norms = torch.tensor([[4.0], [5.0], [24.0], [25.0], [26.0], [27.0]], dtype=torch.float64)
    labels = torch.arange(6)
    classifier = QGFaceHead(8, 6, threshold=0.4, momentum=1.0, start="zeros", reduction="active").double()
    with torch.no_grad():
        classifier.weight.copy_(torch.arange(48.0).view(6, 8).sin())
    own = unit[rows]
    result = classifier(own, norms[rows], labels[rows])
    ring = ProxyQueue(12, 8).double()
    ring.enqueue(torch.stack([own, own.roll(1, 1)]), labels[rows], classifier.weight)
    branch = QGContrast(threshold=0.4, reduction="active").double()
    entries = ring.negatives(classifier.weight)
    pairs = branch(own.roll(1, 1), own, entries, labels[rows], result.scaler, result.scaler)
    (result.loss + pairs.loss).backward()
    return {"loss": (result.loss + pairs.loss).detach(), "gradient": unit.grad}


def worker(rank: int) -> dict[str, Any]:
    try:
        ProxyQueue(11, 8).enqueue(torch.ones(2, 3, 8), torch.arange(3), torch.ones(3, 8))
        refusal = ""
    except ConfigError as error:
        refusal = str(error)
    result: dict[str, Any] = {"refusal": refusal, "exact": {name: training(name, rank) for name in RUNS}}
    result["active"] = active_means(slice(3 * rank, 3 * rank + 3))
    for control, patch in CONTROLS.items():
        with mock.patch.object(*patch):
            result[control] = training("C_proxy_dyn_cos", rank)["steps"]
    with mock.patch.object(head, "all_reduce_sum", CONTROLS["statistics"][2]):
        result["active control"] = active_means(slice(3 * rank, 3 * rank + 3))
    return result


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(worker)


@pytest.fixture(scope="module")
def alone() -> dict[str, list[dict[str, torch.Tensor]]]:
    golden = recorded()
    runs = {name: JointRun(golden, name) for name in RUNS}
    return {name: [run.step(index) for index in STEPS] for name, run in runs.items()}


@pytest.mark.parametrize("name", RUNS)
def test_joint_steps_are_those_of_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, list[dict[str, torch.Tensor]]], name: str
) -> None:
    for index in STEPS:
        whole = alone[name][index]
        parts = [rank["exact"][name]["steps"][index] for rank in ranks]
        for key, value in whole.items():
            if key not in PER_RANK:
                for part in parts:
                    torch.testing.assert_close(part[key], value, rtol=1e-9, atol=1e-9, msg=f"{key} of step {index}")
                assert torch.equal(parts[0][key], parts[1][key]), (key, index)
        for key in ("loss", "loss_cla", "loss_con"):
            mean = (parts[0][key] + parts[1][key]) / 2
            torch.testing.assert_close(mean, whole[key], rtol=1e-9, atol=1e-9, msg=f"{key} of step {index}")
        for key in ("g_fc_w", "g_fc_b", "g_kernel"):  # averaged by data-parallel training
            for part in parts:
                torch.testing.assert_close(part[key], whole[key], rtol=1e-8, atol=1e-8, msg=f"{key} of step {index}")


def largest_difference(steps: list[dict[str, torch.Tensor]], whole: list[dict[str, torch.Tensor]], key: str) -> float:
    return max((step[key] - other[key]).abs().max().item() for step, other in zip(steps, whole, strict=True))


@pytest.mark.parametrize(
    ("control", "key"), [("statistics", "batch_mean"), ("gap", "margin_ema"), ("queue", "queue_corrected")]
)
def test_joint_steps_differ_with_what_each_rank_has_alone(
    ranks: list[dict[str, Any]], alone: dict[str, list[dict[str, torch.Tensor]]], control: str, key: str
) -> None:
    for rank in ranks:
        assert largest_difference(rank[control], alone["C_proxy_dyn_cos"], key) > 1e-5
        assert largest_difference(rank[control], alone["C_proxy_dyn_cos"], "fc_w") > 1e-7
    assert not torch.equal(ranks[0][control][3][key], ranks[1][control][3][key])


def test_a_run_on_two_ranks_goes_on_with_one(
    ranks: list[dict[str, Any]], alone: dict[str, list[dict[str, torch.Tensor]]]
) -> None:
    run = JointRun(recorded(), "C_proxy_dyn_cos")
    run.load(ranks[1]["exact"]["C_proxy_dyn_cos"]["state"])
    for index in STEPS[2:]:
        left = run.step(index)
        for key, value in alone["C_proxy_dyn_cos"][index].items():
            torch.testing.assert_close(left[key], value, rtol=1e-8, atol=1e-8, msg=f"{key} of step {index}")


@pytest.mark.parametrize(("kind", "equal"), [("active", True), ("active control", False)])
def test_means_over_active_rows_are_those_of_the_whole_batch(
    ranks: list[dict[str, Any]], kind: str, equal: bool
) -> None:
    whole = active_means(slice(None))
    loss = (ranks[0][kind]["loss"] + ranks[1][kind]["loss"]) / 2
    gradient = (ranks[0][kind]["gradient"] + ranks[1][kind]["gradient"]) / 2
    difference = max((loss - whole["loss"]).abs().item(), (gradient - whole["gradient"]).abs().max().item())
    assert difference < 1e-9 if equal else difference > 1e-3


def test_a_queue_smaller_than_the_views_of_all_ranks_is_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "queue size: got 11; expected at least 12 = 2 views x 3 images x 2 ranks" in rank["refusal"]
