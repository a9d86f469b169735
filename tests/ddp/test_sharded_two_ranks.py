"""Class-sharded cross entropy on two gloo ranks equals the plain one on all classes; without reductions it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gloo import run_ranks

from qsd_plugin.core import distributed
from qsd_plugin.core.sharded_cross_entropy import sharded_cross_entropy

DATA = Path(__file__).parents[1] / "data" / "agw_parts.npz"
#: First class of rank 1.
SPLITS = [6, 9, 12]


def recorded() -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(DATA) as golden:
        return torch.tensor(golden["dist_ce/logits"]), torch.tensor(golden["dist_ce/labels"])


def shards(rank: int) -> dict[str, Any]:
    """Loss and gradient of this rank's classes, by first class of rank 1; "alone": without reductions."""
    logits, labels = recorded()
    results: dict[str, Any] = {}
    for split in SPLITS:
        first, end = (0, split) if rank == 0 else (split, 12)
        own = logits[:, first:end].clone().requires_grad_()
        inside = (labels >= first) & (labels < end)
        local = torch.where(inside, labels - first, -1)
        loss = sharded_cross_entropy(own, local)
        loss.backward()
        results[str(split)] = {"loss": loss.detach(), "grad": own.grad}
        if split == 6:
            with mock.patch.object(distributed, "initialised", return_value=False):
                results["alone"] = sharded_cross_entropy(own, local).detach()
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(shards)


@pytest.mark.parametrize("split", SPLITS)
def test_equals_one_process_on_every_rank(ranks: list[dict[str, Any]], split: int) -> None:
    logits, labels = recorded()
    logits.requires_grad_()
    expected = F.cross_entropy(logits, labels)
    expected.backward()
    for rank in ranks:
        torch.testing.assert_close(rank[str(split)]["loss"], expected.detach())
    gradient = torch.cat([rank[str(split)]["grad"] for rank in ranks], dim=1)
    torch.testing.assert_close(gradient, logits.grad)


def test_equals_the_recorded_run_on_two_ranks(ranks: list[dict[str, Any]]) -> None:
    with np.load(DATA) as golden:
        losses = [rank["6"]["loss"].item() for rank in ranks]
        np.testing.assert_allclose(losses, golden["dist_ce/ws2/loss"], rtol=1e-6)
        gradient = torch.cat([rank["6"]["grad"] for rank in ranks], dim=1)
        np.testing.assert_allclose(gradient, golden["dist_ce/ws2/grad"], atol=1e-7)


def test_differs_without_the_reductions(ranks: list[dict[str, Any]]) -> None:
    assert all((rank["alone"] - rank["6"]["loss"]).abs() > 0.1 for rank in ranks)
