"""S14, S15, S23: samplers that never yield, cannot start, or leave an epoch without a step."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from toy import toy_cfg, use_market, write_market

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import ConfigError, DataError

Items = list[tuple[str, str, str]]


def items(num_ids: int, per_id: int, data_set: str = "market1501", cameras: int = 2) -> Items:
    return [
        (f"{data_set}/{pid}_{index}.jpg", f"{data_set}_{pid}", f"{data_set}_{index % cameras}")
        for pid in range(num_ids)
        for index in range(per_id)
    ]


def host_sampler(name: str) -> Any:
    from fastreid.data import samplers

    return getattr(samplers, name)


@pytest.mark.timeout(15)
def test_s14_refuses_what_never_fills_a_batch() -> None:
    with pytest.raises(DataError, match="Too few training identities for a batch: got 3; expected 4"):
        next(iter(host_sampler("NaiveIdentitySampler")(items(3, 6), 16, 4, seed=0)))  # the host never returns


@pytest.mark.parametrize("name", ["NaiveIdentitySampler", "BalancedIdentitySampler"])
@pytest.mark.parametrize(
    ("num_ids", "batch", "instances", "error", "message"),
    [
        (3, 16, 4, DataError, r"Too few training identities for a batch: got 3; expected 4 \(16 images, 4 of each"),
        (8, 10, 4, ConfigError, r"Images per batch and process: got 10; expected a multiple of the 4 images"),
        (8, 2, 4, ConfigError, r"got 2; expected a multiple of the 4"),
        (0, 16, 4, DataError, "got 0; expected 4"),
    ],
)
def test_unfillable_batches_are_refused_when_the_sampler_is_made(
    name: str, num_ids: int, batch: int, instances: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        host_sampler(name)(items(num_ids, 6), batch, instances, seed=0)


@pytest.mark.parametrize("name", ["NaiveIdentitySampler", "BalancedIdentitySampler"])
@pytest.mark.parametrize("per_id", [1, 3, 9])
def test_the_smallest_set_that_fills_a_batch_still_works(name: str, per_id: int) -> None:
    data = items(4, per_id)
    batch = list(islice(host_sampler(name)(data, 16, 4, seed=0), 16))
    assert Counter(data[index][1] for index in batch) == {f"market1501_{pid}": 4 for pid in range(4)}


def test_s14_speaks_through_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid.data import build_reid_train_loader

    use_market(monkeypatch, write_market(tmp_path, num_ids=3))
    cfg = toy_cfg(tmp_path / "out", **{"DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler"})
    with pytest.raises(DataError, match="Too few training identities"):
        build_reid_train_loader(cfg)


def test_s15_weights_two_data_sets() -> None:
    data = items(6, 5, "dukemtmc", cameras=8) + items(40, 5, "market1501", cameras=6)
    sampler = host_sampler("SetReWeightSampler")(data, 24, 4, [1, 2], seed=0)
    for _ in range(10):
        batch = [data[index] for index in islice(sampler, 24)]
        assert Counter(pid.partition("_")[0] for _, pid, _ in batch) == {"dukemtmc": 8, "market1501": 16}
        assert set(Counter(pid for _, pid, _ in batch).values()) == {4}


def test_s15_takes_numbered_cameras_for_the_sets() -> None:
    data = [(f"{pid}_{index}.jpg", f"{pid}", pid % 2) for pid in (5, 2, 1, 4) for index in range(4)]
    sampler = host_sampler("SetReWeightSampler")(data, 12, 4, [2, 1], seed=0)
    batch = [data[index] for index in islice(sampler, 12)]
    assert Counter(camera for _, _, camera in batch) == {0: 8, 1: 4}


def test_s15_is_found_by_its_config_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid.data import build_reid_train_loader

    use_market(monkeypatch, write_market(tmp_path))
    sampler = {"DATALOADER.SAMPLER_TRAIN": "SetReWeightSampler", "DATALOADER.SET_WEIGHT": [1]}
    batch = next(iter(build_reid_train_loader(toy_cfg(tmp_path / "out", **sampler))))
    assert set(Counter(batch["targets"].tolist()).values()) == {4}
    sampler["DATALOADER.SET_WEIGHT"] = [1, 1]
    with pytest.raises(ConfigError, match=r"SET_WEIGHT: got \[1, 1\]; expected .* each of the 1 training sets"):
        build_reid_train_loader(toy_cfg(tmp_path / "out", **sampler))


def test_s23_refuses_set_smaller_than_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid.engine import DefaultTrainer

    use_market(monkeypatch, write_market(tmp_path, num_ids=3, per_id=5))
    with pytest.raises(DataError, match=r"Training set smaller than one batch: got 15; expected at least 16 images"):
        DefaultTrainer(toy_cfg(tmp_path / "out"))
