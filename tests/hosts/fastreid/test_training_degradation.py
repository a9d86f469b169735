"""``INPUT.DEGRADE`` in the train loader: who is degraded, that every draw can be made again, and what is refused."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy import toy_cfg, use_market, write_market

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import ConfigError, RegistryError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.degradations.mixing import parse_mix, replay_steps
from qsd_plugin.hosts.fastreid import feature_caching, loaders, training_stages
from qsd_plugin.hosts.fastreid.compat.images import read_image
from qsd_plugin.hosts.fastreid.training_degradation import training_degradation

SEED = 4
ON = {"INPUT.DEGRADE.ENABLED": True}


@pytest.fixture(autouse=True)
def no_earlier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "_records", {})


@pytest.fixture
def market(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_market(tmp_path / "data", num_ids=6, per_id=4)
    use_market(monkeypatch, root)
    return root


def degraded_cfg(folder: Path, **overrides: Any) -> Any:
    options = {"DATALOADER.SAMPLER_TRAIN": "SeededTrainingSampler", "SOLVER.IMS_PER_BATCH": 4, "SEED": SEED}
    return toy_cfg(folder / "out", **{**options, **overrides})


def batches(cfg: Any, count: int, first: int = 0) -> list[dict[str, Any]]:
    from fastreid.data import build_reid_train_loader

    loader = build_reid_train_loader(cfg)
    if first:
        loader.batch_sampler.sampler.sampler.step = first
    return list(islice(loader, count))


def tensor(image: Image.Image, size: list[int]) -> torch.Tensor:
    pixels = np.array(image.resize(size[::-1], Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_draw_is_degraded_with_the_probability_and_can_be_made_again(
    tmp_path: Path, market: Path, workers: int
) -> None:
    mix = "res+ill+jpg_0.5"
    cfg = degraded_cfg(tmp_path, **ON, **{"INPUT.DEGRADE.MIX": mix, "DATALOADER.NUM_WORKERS": workers})
    size = list(cfg.INPUT.SIZE_TRAIN)
    found = batches(cfg, 6)
    touched = 0
    for number, batch in enumerate(found):
        for row, path in enumerate(batch["img_paths"]):
            stream = numpy_stream(SEED, "training degradation", 0, 4 * number + row)
            image = read_image(path)
            if stream.random() < 0.5:
                touched += 1
                image = Image.fromarray(parse_mix(mix).apply(np.asarray(image), stream)[0])
            assert torch.equal(batch["images"][row], tensor(image, size))
    assert 6 <= touched <= 18
    later = batches(cfg, 2, first=4)
    for own, other in zip(later, found[4:], strict=True):
        assert torch.equal(own["images"], other["images"])


def test_steps_replay_to_the_same_pixels_and_low_resolution_alone_takes_its_ratio(tmp_path: Path, market: Path) -> None:
    keys = {"INPUT.DEGRADE.PROB": 1.0, "INPUT.DEGRADE.RATIO": [4.0, 4.0]}
    degrade = training_degradation(degraded_cfg(tmp_path, **ON, **keys))
    assert degrade is not None
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8))
    (step,) = degrade.steps((64, 32), draw=7)
    assert (step["height"], step["width"]) == (16, 8)
    assert np.array_equal(np.asarray(degrade(image, 7)), replay_steps(np.asarray(image), [step]))
    assert degrade(image, 7, "partner_").size == (8, 16)


def test_off_is_the_host_s_loader_and_no_key_of_a_stage(tmp_path: Path, market: Path) -> None:
    plain, off, on = (
        degraded_cfg(tmp_path, **own)
        for own in ({}, {"INPUT.DEGRADE.PROB": 1.0}, {**ON, "INPUT.DEGRADE.PROB": 0.0, "INPUT.DEGRADE.MIX": "ill"})
    )
    first, second, third = (batches(cfg, 2) for cfg in (plain, off, on))
    for one, two, three in zip(first, second, third, strict=True):
        assert torch.equal(one["images"], two["images"])
        assert torch.equal(one["images"], three["images"])
    assert not any("DEGRADE" in key for key in training_stages.relevant_keys(off, ()))
    assert training_stages.relevant_keys(on, ())["INPUT.DEGRADE.MIX"] == "ill"


def test_mistakes_are_named(tmp_path: Path, market: Path) -> None:
    from fastreid.data import build_reid_train_loader
    from fastreid.data.common import CommDataset

    for keys, error, message in (
        ({"INPUT.DEGRADE.PROB": 1.5}, ConfigError, r"INPUT.DEGRADE.PROB: got 1.5; expected a number in \[0, 1\]"),
        ({"INPUT.DEGRADE.RATIO": [3.0, 2.0]}, ConfigError, r"INPUT.DEGRADE.RATIO: got \[3.0, 2.0\]"),
        ({"INPUT.DEGRADE.MIX": "illl"}, RegistryError, "illl"),
        ({"QGFACE.VIEWS.MODE": "single"}, ConfigError, "expected False with QGFACE.VIEWS.MODE single"),
    ):
        with pytest.raises(error, match=message):
            training_degradation(degraded_cfg(tmp_path, **ON, **keys))
    cfg = degraded_cfg(tmp_path, **ON)
    with pytest.raises(ConfigError, match="False where a training set is passed to build_reid_train_loader"):
        build_reid_train_loader(cfg, train_set=CommDataset([], None, relabel=True), sampler=None)
    with pytest.raises(ConfigError, match=r"INPUT\.DEGRADE\.ENABLED True"):
        feature_caching.check_cacheable(cfg)
