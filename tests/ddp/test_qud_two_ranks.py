"""QUD's queue on two gloo ranks is that of one process on the concatenated batch, and so is a student trained with it,
alone and inside fast-reid.

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
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

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


def host_training(folder: str, rank: int | None) -> dict[str, Any]:
    """Three steps of a student without batch statistics on its rank's half of each batch, or on all of it."""
    from qud_toy import batch, build, qud_cfg, sgd, train

    options = {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.BACKBONE.DEPTH": "18x",
        "MODEL.BACKBONE.NORM": "GN",
        "MODEL.BACKBONE.FEAT_DIM": 512,
        "MODEL.HEADS.POOL_LAYER": "GlobalAvgPool",
    }
    model = build(qud_cfg(Path(folder), **options), seed=0 if rank is None else rank)
    network = model if rank is None else nn.parallel.DistributedDataParallel(model)
    half = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    batches = [{"images": batch(index)["images"][half]} for index in range(3)]
    start = model.qud_queue.features.clone()
    curve = train(network, sgd(model), batches)
    return {"start": start, "curve": curve, "model": dict(model.state_dict())}


def worker(rank: int, folder: str) -> dict[str, Any]:
    from qsd_plugin.hosts import fastreid as host

    host.activate()
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
    exact = training(rank) | {"host": host_training(folder, rank)}
    with mock.patch.object(queue, "gather_rows", lambda rows: rows.detach()):
        return {
            **exact,
            "start": start,
            "ragged": own.state_dict(),
            "refusal": refusal,
            "control": training(rank)["steps"],
            "host control": host_training(folder, rank),
        }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder with the files of fast-reid's teacher."""
    from qud_toy import write_teacher

    from qsd_plugin.hosts import fastreid as host

    host.activate()
    folder = tmp_path_factory.mktemp("teacher")
    write_teacher(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ranks(teacher: str) -> list[dict[str, Any]]:
    return run_ranks(worker, teacher)


def test_fast_reid_s_student_is_that_of_one_process(ranks: list[dict[str, Any]], teacher: str) -> None:
    alone = host_training(teacher, None)
    first, second = (rank["host"] for rank in ranks)
    assert torch.equal(first["start"], alone["start"])
    assert torch.equal(second["start"], alone["start"])
    for name, value in alone["model"].items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        torch.testing.assert_close(first["model"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    both = [(a + b) / 2 for a, b in zip(first["curve"], second["curve"], strict=True)]
    assert both == pytest.approx(alone["curve"], rel=1e-5)
    queues = [rank["host control"]["model"]["qud_queue.features"] for rank in ranks]
    assert (queues[0] - queues[1]).abs().max() > 0.1  # without the gathering


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
