"""S04, S05, S24: data loaders without CUDA, without hangs, with the configured number of workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_cfg, use_market, write_market

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.hosts.fastreid.compat import loading

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="S04 is for machines without CUDA")


@pytest.fixture
def market(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_market(monkeypatch, write_market(tmp_path / "data", num_ids=4, per_id=4))
    return tmp_path


@without_cuda
@pytest.mark.parametrize("workers", [0, 1])
def test_s04_loaders_work_on_the_cpu_and_can_be_iterated_twice(market: Path, workers: int) -> None:
    from fastreid.data import build_reid_test_loader, build_reid_train_loader

    cfg = toy_cfg(market / "out", **{"DATALOADER.NUM_WORKERS": workers, "TEST.IMS_PER_BATCH": 6})
    test_loader, num_query = build_reid_test_loader(cfg, dataset_name="Market1501")
    passes = [[path for batch in test_loader for path in batch["img_paths"]] for _ in range(2)]
    assert num_query == 4
    assert len(passes[0]) == 16
    assert passes[0] == passes[1]

    train_loader = build_reid_train_loader(cfg, combineall=False)
    batch = next(iter(train_loader))
    assert batch["images"].shape == (16, 3, 64, 32)
    assert batch["images"].device.type == "cpu"
    assert not batch["images"].is_pinned()


class Broken(torch.utils.data.Dataset[dict[str, Any]]):
    """Ten items, the seventh of which cannot be read."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 6:
            raise OSError("image 6 is broken")
        return {"images": torch.full((3,), float(index))}


@pytest.mark.timeout(15)
def test_s05_an_error_in_the_prefetch_thread_reaches_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid.data.data_utils import BackgroundGenerator

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    def batches() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("image 6 is broken")

    prefetch = BackgroundGenerator(batches(), local_rank=0)
    assert [next(prefetch), next(prefetch)] == [1, 2]
    for _ in range(2):  # whoever asks again gets the same answer
        with pytest.raises(OSError, match="image 6 is broken"):
            next(prefetch)


@pytest.mark.timeout(15)
def test_s05_a_device_that_cannot_be_set_reaches_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid.data.data_utils import BackgroundGenerator

    def no_device(device: int) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(torch.cuda, "set_device", no_device)
    with pytest.raises(RuntimeError, match="no such device"):
        next(BackgroundGenerator(iter([1]), local_rank=7))


@pytest.mark.timeout(15)
def test_s05_a_prefetch_without_errors_ends_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid.data.data_utils import BackgroundGenerator

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    prefetch = BackgroundGenerator(iter(range(25)), local_rank=0)  # more than the queue holds
    assert list(prefetch) == list(range(25))
    assert list(prefetch) == []


@pytest.mark.gpu
@pytest.mark.timeout(60)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="S05 with a real CUDA stream needs CUDA")
def test_s05_the_cuda_loader_raises_instead_of_hanging() -> None:
    from fastreid.data.data_utils import DataLoaderX

    loader = DataLoaderX(0, dataset=Broken(), batch_size=2, pin_memory=True)
    batches = iter(loader)
    for first in (0.0, 2.0):
        images = next(batches)["images"]
        assert images.is_cuda
        assert images[:, 0].tolist() == [first, first + 1]
    with pytest.raises(OSError, match="image 6 is broken"):  # the loader is one batch ahead
        next(batches)


def test_s24_test_workers_follow_the_config(market: Path) -> None:
    from fastreid.engine import DefaultTrainer

    for configured in (0, 1):
        cfg = toy_cfg(market / "out", **{"DATALOADER.NUM_WORKERS": configured})
        loader, num_query = DefaultTrainer.build_test_loader(cfg, "Market1501")
        assert loader.num_workers == configured
        assert num_query == 4


def test_s24_workers_never_exceed_the_hosts_four_nor_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = set(range(16))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores, raising=False)
    assert [loading.test_workers(count) for count in (0, 3, 4, 8)] == [0, 3, 4, 4]
    cores.clear()
    cores.update({0, 1})
    assert loading.test_workers(8) == 2


def test_s24_explicit_arguments_are_passed_through(market: Path) -> None:
    from fastreid.data import build_reid_test_loader

    loader, num_query = build_reid_test_loader(Broken(), 4, 3, num_workers=2)
    assert loader.num_workers == 2
    assert num_query == 3
