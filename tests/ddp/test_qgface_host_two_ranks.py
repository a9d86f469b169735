"""QGFace inside fast-reid on two gloo ranks is one process on the whole batch: losses, state and weights.

Controls: with the queue, or the statistics of norms, of each rank alone the same comparison must fail.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from gloo import run_ranks
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

from qsd_plugin.methods.qgface import queue, statistics

STEPS = 4
#: What a control takes away, as (module, function, what stands in for it).
CONTROLS: dict[str, tuple[Any, str, Any]] = {
    "queue": (queue, "gather_equal_rows", lambda tensor: torch.cat([tensor.detach()] * 2)),
    "statistics": (statistics, "all_reduce_sum", lambda tensor: tensor.detach().clone()),
}
#: With the proxy queue and all anchors, and with a momentum encoder.
QUEUES = ("proxy", "moco")


def training(folder: str, kind: str, rank: int | None) -> dict[str, Any]:
    """Steps of a network without batch statistics on its rank's half of each batch, or on all of it."""
    from qgface_toy import ROWS, batch, build, qgface_cfg, sgd, train

    options = {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.BACKBONE.DEPTH": "18x",
        "MODEL.BACKBONE.NORM": "GN",
        "MODEL.BACKBONE.FEAT_DIM": 512,
        "MODEL.HEADS.POOL_LAYER": "GlobalAvgPool",
        "QGFACE.THRESHOLD": 0.5,
        "QGFACE.CONTRAST.QUEUE": kind,
        "QGFACE.CONTRAST.COUPLING": "double",
        "QGFACE.CONTRAST.MARGIN_METHOD": "dynamic",
        "QGFACE.CONTRAST.KEY_MOMENTUM": 0.9,
    }
    # Ranks begin differently; data-parallel training brings them together, the momentum encoder too.
    model = build(qgface_cfg(Path(folder), **options), seed=0 if rank is None else rank).double()
    network = model if rank is None else nn.parallel.DistributedDataParallel(model)
    half = slice(None) if rank is None else slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    batches = []
    for index in range(STEPS):
        whole = batch(index, size=(16, 16))
        images = {key: whole[key][half].double() for key in ("images", "degraded_images")}
        batches.append({**images, "targets": whole["targets"][half]})
    curve = train(network, sgd(model), batches)
    return {"curve": curve, "model": dict(model.state_dict()), "shares": model.qgface_shares()}


def worker(rank: int, folder: str) -> dict[str, Any]:
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    result: dict[str, Any] = {kind: training(folder, kind, rank) for kind in QUEUES}
    for control, patch in CONTROLS.items():
        with mock.patch.object(*patch):
            result[control] = training(folder, "proxy", rank)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("qgface"))


@pytest.fixture(scope="module")
def ranks(folder: str) -> list[dict[str, Any]]:
    return run_ranks(worker, folder)


@pytest.fixture(scope="module")
def alone(folder: str) -> dict[str, dict[str, Any]]:
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    return {kind: training(folder, kind, None) for kind in QUEUES}


def worst(own: dict[str, Any], other: dict[str, Any], prefix: str) -> float:
    """Largest difference of state, relative to the size of the tensor."""
    names = [name for name in other["model"] if name.startswith(prefix)]
    pairs = [(own["model"][name].double(), other["model"][name].double()) for name in names]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


@pytest.mark.parametrize("kind", QUEUES)
def test_two_ranks_are_one_process(ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]], kind: str) -> None:
    first, second, whole = ranks[0][kind], ranks[1][kind], alone[kind]
    for step in range(STEPS):
        assert (first["curve"][step] + second["curve"][step]) / 2 == pytest.approx(whole["curve"][step], rel=1e-9)
    for rank in (first, second):
        assert worst(rank, whole, "") < 1e-7
    for name, value in first["model"].items():
        if name.startswith(("qgface_queue", "qgface_contrast", "heads.statistics")):
            assert torch.equal(value, second["model"][name]), name
    assert whole["shares"]["contrasted"] > 0
    for name, share in whole["shares"].items():
        assert (first["shares"][name] + second["shares"][name]) / 2 == pytest.approx(float(share), abs=1e-6), name


@pytest.mark.parametrize(("control", "state"), [("queue", "qgface_queue.embeddings"), ("statistics", "heads.stat")])
def test_ranks_by_themselves_are_not(
    ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]], control: str, state: str
) -> None:
    for rank in ranks:
        assert worst(rank[control], alone["proxy"], state) > 1e-2
