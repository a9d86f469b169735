"""Stage 1 of DIL on two gloo ranks is that of one process on the joined batch; a broken rank stops both.

Batch statistics are each rank's own, so the content encoder keeps its running ones here. Control: with the averaging
of gradients taken away the weights must differ.
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

from dil_small import pair, small_trainer

from qsd_plugin.core.errors import TrainingError
from qsd_plugin.methods.dil import Pair, PhaseSchedule, adam

STEPS = 4


def rows(batch: Pair, part: slice) -> Pair:
    labels = (batch.better_labels[part], batch.worse_labels[part])
    return Pair(batch.phase, batch.better[part], batch.worse[part], *labels)


def training(part: slice) -> dict[str, Any]:
    """Both phases twice, in float64: Adam's first steps would show the rounding of float32."""
    torch.set_default_dtype(torch.float64)
    try:
        trainer = small_trainer(PhaseSchedule("unsupervised"), dropout=0.0)
        trainer.stage.content_encoder.eval()
        curve = []
        for index in range(STEPS):
            batch = pair(trainer.next_phase(), 4, seed=index, dtype=torch.float64)
            curve.append(trainer.step(rows(batch, part)))
    finally:
        torch.set_default_dtype(torch.float32)
    return {"weights": dict(trainer.stage.state_dict()), "curve": curve}


def failing(rank: int) -> str:
    """An image of rank 1 is broken; what each rank is told."""
    trainer = small_trainer()
    batch = pair("paired")
    if rank:
        batch.better[0, 0, 0, 0] = torch.nan
    try:
        trainer.step(batch)
    except TrainingError as error:
        return str(error)
    return ""


def worker(rank: int) -> dict[str, Any]:
    part = slice(2 * rank, 2 * rank + 2)
    result = training(part) | {"refusal": failing(rank)}
    with mock.patch.object(adam, "all_reduce_sum", lambda tensor: 2 * tensor.detach()):
        return result | {"control": training(part)["weights"]}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(worker)


def test_weights_and_losses_are_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    alone = training(slice(None))
    for name, value in alone["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-7, atol=1e-9, msg=name)
    for index, whole in enumerate(alone["curve"]):
        for name, value in whole.items():
            if not name.endswith("gradient"):
                both = (ranks[0]["curve"][index][name] + ranks[1]["curve"][index][name]) / 2
                torch.testing.assert_close(both, value, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "part", ["generator", "real_discriminator", "degradation_discriminator", "degradation_encoder"]
)
def test_weights_differ_without_the_averaging(ranks: list[dict[str, Any]], part: str) -> None:
    names = [name for name in ranks[0]["control"] if name.startswith(part)]
    difference = max((ranks[0]["control"][name] - ranks[1]["control"][name]).abs().max().item() for name in names)
    assert difference > 1e-5


def test_a_broken_image_on_one_rank_stops_both(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "DIL stage 1, paired phase, discriminators: discriminator_realness" in rank["refusal"]
