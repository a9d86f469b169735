"""QSD and the centre loss on two gloo ranks equal one process on the concatenated batch.

Control: with the reductions taken away the same comparison must fail.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cases import (
    OPTIONS,
    PAIRS,
    QUALITY_1,
    QUALITY_2,
    WEIGHTS,
    assert_whole_batch,
    largest_difference,
    qsd_case,
    qsd_difference,
)
from gloo import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qsd_plugin.core import distributed
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.agw import CenterLoss
from qsd_plugin.methods.qsd import QSDLoss
from qsd_plugin.networks import TapRecorder

#: The pairs of rank 1; rank 0 has the others. In "none kept" it holds only pair 4, whose labels tie; in "shared" both
#: ranks own a largest and a smallest energy of the batch.
SECOND = {"equal": [5, 6, 7, 8, 9], "uneven": [7, 8, 9], "shared": [7, 8, 9], "none kept": [4], "empty": []}
CASES = [
    (split, distance, scale_grad, options)
    for options in OPTIONS
    for split in ("uneven", "shared", "none kept", "empty")
    for distance in ("l2", "l1")
    for scale_grad in ("attached", "detached")
]


def rows_of(rank: int, split: str) -> Tensor:
    second = SECOND[split]
    rows = second if rank else [row for row in range(PAIRS) if row not in second]
    return torch.tensor(rows, dtype=torch.int64)


class SmallNet(nn.Module):
    """Both streams in one forward, as data-parallel training wants it; no batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, 6, 3, padding=1)
        self.embedding = nn.Linear(6, 8)
        self.logits = nn.Linear(8, 5)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=torch_stream(9, name)))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.embedding(torch.relu(self.stage(images)).mean((2, 3))))


def train_step(rows: Tensor, parallel: bool) -> dict[str, Tensor]:
    """Parameter gradients of one QSD step over some pairs, averaged over ranks by DDP if ``parallel``."""
    net = SmallNet()
    wrapped = DistributedDataParallel(net) if parallel else net
    images = torch.randn(2, PAIRS, 3, 6, 5, generator=torch_stream(10))[:, rows]
    with TapRecorder(wrapped, list(WEIGHTS)) as taps:
        wrapped(images.flatten(0, 1))
    streams = [{level: tap.chunk(2)[stream] for level, tap in taps.items()} for stream in (0, 1)]
    QSDLoss(WEIGHTS)(*streams, QUALITY_1[rows], QUALITY_2[rows]).total.backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def center_steps(rows: Tensor) -> dict[str, Any]:
    """Three steps of the centre loss on some rows: feature gradients and centres."""
    module = CenterLoss(6, 8, weight=1.0)
    gradients = []
    for step in range(3):
        features = torch.randn(PAIRS, 8, generator=torch_stream(11, step))[rows].requires_grad_()
        identities = torch.tensor([0, 0, 0, 1, 1, 2, 2, 4, 4, 4])[rows]
        module(features, identities).backward()
        gradients.append(features.grad)
    return {"gradients": gradients, "centers": module.centers}


def worker(rank: int) -> dict[str, Any]:
    def everything() -> dict[str, Any]:
        uneven, equal = rows_of(rank, "uneven"), rows_of(rank, "equal")
        return {
            "qsd": {"/".join(case): qsd_case(rows_of(rank, case[0]), *case) for case in CASES},
            "train": train_step(uneven, parallel=True),
            "center": center_steps(equal),
            "center uneven": center_steps(uneven),
        }

    exact = everything()
    with mock.patch.object(distributed, "_all_reduce", lambda tensor, operation: tensor.detach().clone()):
        return {"exact": exact, "control": everything()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(worker)


def differences(ranks: list[dict[str, Any]], kind: str, case: tuple[str, ...]) -> float:
    rows = [rows_of(rank, case[0]) for rank in (0, 1)]
    return qsd_difference([rank[kind]["qsd"]["/".join(case)] for rank in ranks], rows, case)


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_tap_gradients_equal_one_process(ranks, case):
    assert differences(ranks, "exact", case) < 1e-6


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "uneven"], ids="/".join)
def test_tap_gradients_differ_without_the_reductions(ranks, case):
    assert differences(ranks, "control", case) > 1e-4


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_values_and_stats_are_those_of_the_whole_batch_on_every_rank(ranks, case):
    for rank in ranks:
        assert_whole_batch(rank["exact"]["qsd"]["/".join(case)], case)


@pytest.mark.parametrize(("kind", "equal"), [("exact", True), ("control", False)])
def test_parameter_gradients_of_a_data_parallel_model(ranks, kind, equal):
    whole = train_step(torch.arange(PAIRS), parallel=False)
    for rank in ranks:
        difference = max((rank[kind]["train"][name] - gradient).abs().max().item() for name, gradient in whole.items())
        assert difference < 1e-6 if equal else difference > 1e-4


@pytest.mark.parametrize("split", ["center", "center uneven"])
def test_centers_equal_one_process(ranks, split):
    whole = center_steps(torch.arange(PAIRS))
    for rank in ranks:
        assert (rank["exact"][split]["centers"] - whole["centers"]).abs().max() < 1e-6
        assert (rank["control"][split]["centers"] - whole["centers"]).abs().max() > 1e-4
    assert torch.equal(ranks[0]["exact"][split]["centers"], ranks[1]["exact"][split]["centers"])


def test_center_gradients_of_equal_parts_equal_one_process(ranks):
    whole = center_steps(torch.arange(PAIRS))["gradients"]
    rows = [rows_of(rank, "equal") for rank in (0, 1)]
    for step, gradient in enumerate(whole):
        for kind, equal in (("exact", True), ("control", step == 0)):  # the control's centres are off from step 1
            difference = largest_difference([r[kind]["center"]["gradients"][step] for r in ranks], rows, gradient)
            assert difference < 1e-6 if equal else difference > 1e-4
