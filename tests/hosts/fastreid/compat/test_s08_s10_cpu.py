"""S08, S10: mixed precision and synchronised batch norm on a machine without CUDA."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="S08 and S10 are for machines without CUDA")


@pytest.fixture
def host_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    # setup_logger, if an earlier test ran it, keeps the host's messages from the root logger that caplog watches.
    monkeypatch.setattr(logging.getLogger("fastreid"), "propagate", True)
    return caplog


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        output = self.layer(batch["x"])
        assert output.dtype == torch.float32
        return {"loss": output.square().mean()}


def test_s08_amp_without_cuda_trains_in_full_precision(host_log: pytest.LogCaptureFixture) -> None:
    import fastreid.engine.defaults as defaults
    from fastreid.utils.events import EventStorage

    model = Tiny()
    before = model.layer.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = defaults.AMPTrainer(model, [{"x": torch.ones(2, 3)}], optimizer, None)
    with EventStorage(0):
        trainer.iter = 0
        trainer.run_step()
    assert not model.layer.weight.equal(before)
    # The LR hook asks the trainer's scaler, if it has one, whether a step was skipped.
    assert getattr(trainer, "grad_scaler", None) is None
    assert "AMP.ENABLED is ignored without CUDA" in host_log.text


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("gloo")
def test_s10_syncbn_becomes_bn_without_cuda() -> None:
    from fastreid.layers import get_norm

    norm = get_norm("syncBN", 4)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 4, 1), norm))
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert norm.state_dict().keys() == nn.SyncBatchNorm(4).state_dict().keys()


def test_s10_arguments_reach_the_layer() -> None:
    from fastreid.layers import get_norm

    norm = get_norm("syncBN", 4, bias_freeze=True, weight_init=0.5)
    assert not norm.bias.requires_grad
    assert norm.weight.tolist() == [0.5] * 4
