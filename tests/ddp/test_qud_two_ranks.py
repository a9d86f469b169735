"""QUD's queue on two gloo ranks is that of one process on the concatenated batch, and so is a student trained with it.

Control: with the gathering taken away the queue must differ.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from gloo import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))

from qud_recorded import Distillation, normal, recorded, same_queue

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.methods.qud import FeatureQueue, queue

STEPS = range(7)
#: Rows of both ranks in consecutive steps, of a queue that none of their sums divides.
RAGGED = [(4, 3), (0, 5), (6, 0), (1, 8), (0, 0), (8, 3)]
SIZE = 13


def ragged_keys(step: int) -> torch.Tensor:
    return normal(5, step, shape=(sum(RAGGED[step]), 16))


def training(rank: int) -> dict[str, Any]:
    run = Distillation(recorded(), "C", 0.1, parallel=True)
    states = []
    steps = []
    for index in STEPS:
        steps.append(run.step(index, slice(4 * rank, 4 * rank + 4)))
        states.append(run.saved())
    return {"steps": steps, "state": states[2]}


def worker(rank: int) -> dict[str, Any]:
    own = FeatureQueue(SIZE, 16, seed=8)
    start = own.features.clone()
    for step, (first, _) in enumerate(RAGGED):
        keys = ragged_keys(step)
        own.enqueue(keys[first:] if rank else keys[:first])
    small = FeatureQueue(7, 16)
    try:
        small.enqueue(torch.ones(4, 16))
        refusal = ""
    except ConfigError as error:
        refusal = str(error)
    exact = training(rank)
    with mock.patch.object(queue, "gather_rows", lambda rows: rows.detach()):
        return {
            **exact,
            "start": start,
            "ragged": own.state_dict(),
            "refusal": refusal,
            "control": training(rank)["steps"],
        }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(worker)


def test_training_is_that_of_one_process_and_of_the_recorded_ranks(ranks: list[dict[str, Any]]) -> None:
    golden = recorded()
    alone = Distillation(golden, "C", 0.1)
    for index in STEPS:
        whole = alone.step(index)
        np.testing.assert_allclose(whole["loss"], golden["C/loss"][index], atol=2e-6)
        for number, rank in enumerate(ranks):
            part = rank["steps"][index]
            assert torch.equal(part["queue"], whole["queue"])
            assert torch.equal(part["pointer"], whole["pointer"])
            assert torch.equal(part["weight"], ranks[0]["steps"][index]["weight"])
            torch.testing.assert_close(part["weight"], whole["weight"], rtol=0, atol=1e-6)
            np.testing.assert_allclose(part["weight"], golden["C/w_after"][index], atol=1e-6)
            np.testing.assert_allclose(part["loss"], golden[f"Bsame_rank{number}/loss"][index], atol=2e-6)
            expected = golden[f"Bsame_rank{number}/grad_student_raw"][index]
            np.testing.assert_allclose(part["gradient"], expected, atol=2e-6)
        same_queue(whole["queue"], golden["C/queue_after"][index])


def test_the_queue_differs_without_the_gathering(ranks: list[dict[str, Any]]) -> None:
    golden = recorded()
    for rank in ranks:
        assert all(
            np.abs(rank["control"][index]["queue"].T.numpy() - golden["C/queue_after"][index]).max() > 0.1
            for index in STEPS
        )
    assert not torch.equal(*(rank["control"][6]["queue"] for rank in ranks))


def test_a_run_on_two_ranks_goes_on_with_one(ranks: list[dict[str, Any]]) -> None:
    golden = recorded()
    alone = Distillation(golden, "C", 0.1)
    alone.load(ranks[1]["state"])
    for index in STEPS[3:]:
        left = alone.step(index)
        np.testing.assert_allclose(left["weight"], golden["C/w_after"][index], atol=1e-6)
        same_queue(left["queue"], golden["C/queue_after"][index])


def test_uneven_and_empty_batches(ranks: list[dict[str, Any]]) -> None:
    alone = FeatureQueue(SIZE, 16, seed=8)
    start = alone.features.clone()
    for step in range(len(RAGGED)):
        alone.enqueue(ragged_keys(step))
    for rank in ranks:
        assert torch.equal(rank["start"], start)
        for name, value in alone.state_dict().items():
            assert torch.equal(rank["ragged"][name], value), name


def test_a_queue_smaller_than_the_batch_of_all_ranks_is_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "queue size: got 7; expected at least the 8 images of a step on all ranks together" in rank["refusal"]
