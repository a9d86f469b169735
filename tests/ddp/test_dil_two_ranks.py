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


def failing(rank: int, side: str) -> dict[str, Any]:
    """An image or a weight of rank 1 is broken; what each rank is told, and whether anything of the side moved."""
    trainer = small_trainer(PhaseSchedule(paired_probability=1.0 if side == "discriminators" else 0.0))
    batch, stage = pair(trainer.next_phase()), trainer.stage
    if rank and side == "discriminators":
        batch.better[0, 0, 0, 0] = torch.nan
    elif rank:
        stage.content_encoder.classifier.classifier[0].bias.data[0] = torch.nan
    watched = stage.real_discriminator if side == "discriminators" else stage.generator
    before = [part.clone() for part in watched.parameters()]
    try:
        trainer.step(batch)
    except TrainingError as error:
        moved = any(not part.equal(then) for part, then in zip(watched.parameters(), before, strict=True))
        return {"text": str(error), "moved": moved}
    return {"text": "", "moved": True}


def worker(rank: int) -> dict[str, Any]:
    part = slice(2 * rank, 2 * rank + 2)
    result = training(part) | {side: failing(rank, side) for side in ("discriminators", "generator")}
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


@pytest.mark.parametrize(
    ("side", "text"),
    [
        ("discriminators", "DIL stage 1, paired phase, discriminators: discriminator_realness, discriminator_deg"),
        ("generator", "DIL stage 1, unpaired phase, generator: identity not finite (identity = "),
    ],
)
def test_what_is_not_finite_on_one_rank_is_named_and_stops_both_before_it_reaches_a_weight(
    ranks: list[dict[str, Any]], side: str, text: str
) -> None:
    for rank in ranks:
        assert text in rank[side]["text"]
        assert not rank[side]["moved"]
