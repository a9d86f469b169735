"""The registered heads in fast-reid's ``Baseline`` on two gloo ranks are those of one process on the whole batch.

Control: with the norm statistics of each rank alone the same comparison must fail.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from gloo import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.qgface import statistics

sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

from toy import toy_config

#: Head, reduction and length of the reduced embedding.
CASES = {"adaface": ("AdaFaceHead", "all", 0), "all": ("QGFaceHead", "all", 6), "active": ("QGFaceHead", "active", 6)}
CONTROL = "control"
STEPS, ROWS, CLASSES = 4, 8, 5
TARGETS = torch.tensor([0, 1, 2, 3, 4, 4, 2, 0])


def build(name: str) -> Any:
    """A network without batch statistics: the neck's batch norm stays as it is."""
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from fastreid.config import get_cfg
    from fastreid.modeling.meta_arch import build_model

    head, reduction, reduced = CASES[name]
    options = {
        "MODEL.HEADS.NAME": head,
        "MODEL.HEADS.NUM_CLASSES": CLASSES,
        "MODEL.HEADS.EMBEDDING_DIM": reduced,
        "MODEL.HEADS.SCALE": 8,
        "MODEL.HEADS.MARGIN": 0.3,
        "MODEL.LOSSES.NAME": ("CrossEntropyLoss",),
        "QGFACE.REDUCTION": reduction,
        "QGFACE.THRESHOLD": 0.4,
        "QGFACE.MOMENTUM": 0.3,
        "QGFACE.START": "debiased",
    }
    cfg = get_cfg()
    cfg.merge_from_list(toy_config(Path(), **options))
    torch.manual_seed(0)
    model = build_model(cfg)
    model.backbone = nn.Conv2d(3, 512, 4, stride=4)
    model = model.double().train()
    model.heads.bottleneck[-1].eval()
    return model


def training(name: str, rows: slice, *, parallel: bool) -> dict[str, Any]:
    """Losses of some steps on these rows, the parameters and statistics after them."""
    model = build(name)
    network: nn.Module = DistributedDataParallel(model, broadcast_buffers=False) if parallel else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    from fastreid.utils.events import EventStorage

    losses = []
    for step in range(STEPS):
        contrast = torch.linspace(0.1, 1, ROWS).view(ROWS, 1, 1, 1)
        images = ((torch.rand(ROWS, 3, 8, 4, generator=torch_stream(6, step)) - 0.5) * 255 * contrast + 127.5).double()
        with EventStorage(step):
            loss = network({"images": images[rows], "targets": TARGETS[rows].clone()})["loss_cls"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "state": dict(model.state_dict())}


def worker(rank: int) -> dict[str, Any]:
    own = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    results = {name: training(name, own, parallel=True) for name in CASES}
    with mock.patch.object(statistics, "all_reduce_sum", lambda tensor: tensor.detach().clone()):
        results[CONTROL] = training("all", own, parallel=True)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(worker)


def difference(ranks: list[dict[str, Any]], kind: str, name: str) -> dict[str, float]:
    """Largest difference to one process, of the mean loss and of each part of the state dict."""
    whole = training(name, slice(None), parallel=False)
    mean: Tensor = sum(rank[kind]["losses"] for rank in ranks) / 2
    found = {"loss": (mean - whole["losses"]).abs().max().item()}
    for key, value in whole["state"].items():
        found[key] = max((rank[kind]["state"][key] - value).abs().max().item() for rank in ranks)
    return found


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    found = difference(ranks, name, name)
    assert {"heads.statistics.mean", "heads.weight", "backbone.weight"} < found.keys()
    assert {key: value for key, value in found.items() if not value < 1e-9} == {}
    for key, value in ranks[0][name]["state"].items():
        assert torch.equal(value, ranks[1][name]["state"][key]), key


def test_training_differs_with_the_statistics_of_each_rank_alone(ranks: list[dict[str, Any]]) -> None:
    found = difference(ranks, CONTROL, "all")
    for key in ("loss", "heads.statistics.mean", "heads.statistics.std", "heads.weight", "backbone.weight"):
        assert found[key] > 1e-5, key
    mean = "heads.statistics.mean"
    assert not torch.equal(ranks[0][CONTROL]["state"][mean], ranks[1][CONTROL]["state"][mean])
