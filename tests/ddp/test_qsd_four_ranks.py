"""QSD on four gloo ranks equals one process on the concatenated batch; the moving average is the same on all of them.

So do class rows spread over them. Control: with the reductions taken away the same comparison must fail.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cases import assert_whole_batch, qsd_case, qsd_difference
from gloo import run_ranks
from sharded_case import CLASSES, DIM, assert_sampled, classifier_case, difference
from torch import Tensor, nn

from qsd_plugin.core import distributed
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.margins import ClassShard
from qsd_plugin.networks import ema_update

RANKS = range(4)
#: The pairs of each rank: uneven, and with one rank that has none and one that has only a tie.
SPLITS = {"uneven": [[0, 3, 7, 9], [1, 2], [4, 5, 8], [6]], "empty": [[0, 1, 2, 3, 5], [], [4], [6, 7, 8, 9]]}
CASES = [
    (split, "l2", scale_grad, options)
    for split in SPLITS
    for scale_grad, options in (("attached", "official"), ("attached", "extended"), ("detached", "extended"))
]
MOMENTUM = 0.75


def rows_of(rank: int, split: str) -> Tensor:
    return torch.tensor(SPLITS[split][rank], dtype=torch.int64)


def student(rank: int, step: int) -> nn.Module:
    """Parameters are equal on all ranks, running statistics are not."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch_stream(step, name)))
        net[1].running_mean.copy_(torch.randn(4, generator=torch_stream(step, "mean", rank)))
        net[1].running_var.copy_(torch.rand(4, generator=torch_stream(step, "var", rank)))
        net[1].num_batches_tracked.fill_(step)
    return net


def average(rank: int) -> dict[str, Tensor]:
    """After two steps."""
    teacher = student(0, 0)
    for step in (1, 2):
        ema_update(teacher, student(rank, step), MOMENTUM)
    return teacher.state_dict()


def worker(rank: int) -> dict[str, Any]:
    def everything() -> dict[str, Any]:
        qsd = {"/".join(case): qsd_case(rows_of(rank, case[0]), *case) for case in CASES}
        return {"qsd": qsd, "average": average(rank)}

    exact = everything()
    classifier = classifier_case(rank, len(RANKS))
    with mock.patch.object(distributed, "_all_reduce", lambda tensor, operation: tensor.detach().clone()):
        return {"exact": exact, "control": everything(), "classifier": classifier}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(worker, world_size=4)


def differences(ranks: list[dict[str, Any]], kind: str, case: tuple[str, ...]) -> float:
    rows = [rows_of(rank, case[0]) for rank in RANKS]
    return qsd_difference([rank[kind]["qsd"]["/".join(case)] for rank in ranks], rows, case)


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_tap_gradients_equal_one_process(ranks, case):
    assert differences(ranks, "exact", case) < 1e-6
    assert differences(ranks, "control", case) > 1e-4


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_values_and_stats_are_those_of_the_whole_batch_on_every_rank(ranks, case):
    for rank in ranks:
        assert_whole_batch(rank["exact"]["qsd"]["/".join(case)], case)


def test_moving_average_is_the_same_on_every_rank(ranks):
    expected = student(0, 0).state_dict()
    for step in (1, 2):
        states = [student(rank, step).state_dict() for rank in RANKS]
        for name, value in expected.items():
            mean = torch.stack([state[name] for state in states]).double().mean(0)
            expected[name] = mean if name == "1.num_batches_tracked" else MOMENTUM * value + (1 - MOMENTUM) * mean
    for rank in ranks:
        for name, value in rank["exact"]["average"].items():
            torch.testing.assert_close(value, expected[name].to(value.dtype), rtol=1e-6, atol=1e-7)
            assert torch.equal(value, ranks[0]["exact"]["average"][name])
    alone = [rank["control"]["average"]["1.running_mean"] for rank in ranks]
    assert (alone[1] - alone[0]).abs().max() > 1e-4


def test_class_rows_equal_one_process_that_has_all_of_them(ranks):
    found = [rank["classifier"] for rank in ranks]
    assert difference(found, "1.0") < 1e-6
    assert difference(found, "control") > 1e-2  # without the gather
    assert_sampled(found)
    shapes = [tuple(rank["1.0"]["rows"].shape) for rank in found]
    assert shapes == [(ClassShard(CLASSES, rank, 4).rows, DIM) for rank in RANKS]


def test_a_wrong_label_is_an_error_on_every_rank(ranks):
    message = "Class labels of a batch: got [0, 11]; expected 0 to 10, the classes of the head."
    assert {rank["classifier"]["error"] for rank in ranks} == {message}
