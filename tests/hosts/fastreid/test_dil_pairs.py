"""The loader of DIL's stage 1: who is paired with whom, replayable draws, and an exact resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dil_toy import ROWS, dil_cfg
from PIL import Image
from toy import use_market, write_market

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.dil_pairs import PairDraws, degradation_of, pair_sample

host.activate()

CAMERAS = ["market1501_0", "market1501_0", "market1501_1", "market1501_2"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_market(tmp_path / "data", num_ids=4, per_id=3, test_ids=2)
    use_market(monkeypatch, tmp_path / "data")


def test_unsupervised_pairs_are_of_different_cameras_every_other_iteration(tmp_path: Path) -> None:
    draws = PairDraws(CAMERAS, dil_cfg(tmp_path))
    for draw in range(12 * ROWS):
        index = draw % len(CAMERAS)
        better, worse = draws.pair(index, draw)
        assert better == index
        assert draws.iteration(draw) == draw // ROWS + 1
        if draws.iteration(draw) % 2:
            assert worse == index
        else:
            assert CAMERAS[worse] != CAMERAS[index]
    found = {draws.pair(0, draw)[1] for draw in range(ROWS, 40 * ROWS) if draws.iteration(draw) % 2 == 0}
    assert found == {2, 3}


def test_domains_put_the_degraded_camera_second_and_degrade_clean_images_only(tmp_path: Path) -> None:
    options = {"DIL.PAIRS.OTHER": "unpaired", "DIL.PAIRS.DEGRADED_CAMERAS": [0]}
    draws = PairDraws(CAMERAS, dil_cfg(tmp_path, **options))
    for draw in range(12 * ROWS):
        index = draw % len(CAMERAS)
        better, worse = draws.pair(index, draw)
        assert better in (2, 3)
        assert worse == better if draws.iteration(draw) % 2 else worse in (0, 1)
        assert index in (better, worse) or draws.iteration(draw) % 2


@pytest.mark.parametrize(
    ("cameras", "options", "message"),
    [
        (CAMERAS[:2], {}, "at least two cameras"),
        (CAMERAS, {"DIL.PAIRS.OTHER": "unpaired", "DIL.PAIRS.DEGRADED_CAMERAS": [7]}, "images of both domains"),
    ],
)
def test_data_without_partners_is_refused(
    tmp_path: Path, cameras: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        PairDraws(cameras, dil_cfg(tmp_path, **options))
    paired = PairDraws(cameras, dil_cfg(tmp_path, **options, **{"DIL.PAIRS.PAIRED_PROB": 1.0}))
    assert paired.pair(1, 5)[0] == paired.pair(1, 5)[1]


def test_a_draw_degrades_alike_every_time_and_the_ratio_is_kept(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8))
    cfg = dil_cfg(tmp_path, **{"DIL.PAIRS.RATIO": [2.0, 2.0]})
    draws = PairDraws(CAMERAS, cfg)
    assert draws.degrade(image, draws.generator(3)).size == (16, 32)
    noisy = dil_cfg(tmp_path, **{"DIL.PAIRS.MIX": "ill+noise_0.5"})
    degrade = degradation_of(noisy)
    first, again, other = (np.asarray(degrade(image, draws.generator(draw))) for draw in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_batches_hold_both_images_and_are_the_same_for_any_number_of_workers(tmp_path: Path, data: None) -> None:
    from fastreid.data import build_reid_train_loader

    found = []
    for workers in (0, 1):
        loader = build_reid_train_loader(dil_cfg(tmp_path, **{"DATALOADER.NUM_WORKERS": workers}))
        batches = iter(loader)
        found.append([next(batches) for _ in range(2)])
    for plain, spread in zip(*found, strict=True):
        for key in ("images", "worse_images", "targets", "worse_targets", "dil_iteration"):
            assert plain[key].equal(spread[key]), key
    paired, other = found[0]
    assert paired["images"].shape == paired["worse_images"].shape == (ROWS, 3, 32, 32)
    assert paired["dil_iteration"].tolist() == [1] * ROWS
    assert other["dil_iteration"].tolist() == [2] * ROWS
    assert paired["targets"].equal(paired["worse_targets"])
    blur = (paired["images"][:, :, :, 1:] - paired["images"][:, :, :, :-1]).abs().mean()
    assert (paired["worse_images"][:, :, :, 1:] - paired["worse_images"][:, :, :, :-1]).abs().mean() < blur


@pytest.mark.parametrize(("draw", "decoded"), [(0, 1), (ROWS, 2)])
def test_only_what_the_phase_needs_is_decoded(tmp_path: Path, draw: int, decoded: int) -> None:
    """One file of a paired draw, which degrades a copy in memory; two of any other, of which none is degraded."""
    draws, read, degraded = PairDraws(CAMERAS, dil_cfg(tmp_path)), [], []
    image = Image.new("RGB", (32, 64))

    def open_image(index: int) -> tuple[Image.Image, int]:
        read.append(index)
        return image, index

    draws.degrade = lambda picture, generator: degraded.append(picture) or picture
    sample, better = pair_sample(draws, 0, draw, open_image, lambda picture: picture.size, lambda index: index)
    assert (len(read), len(degraded)) == (decoded, 2 - decoded)
    assert better == 0
    assert sample["worse_targets"] == read[-1]


def test_another_sampler_or_data_of_the_caller_is_refused(tmp_path: Path, data: None) -> None:
    from fastreid.data import build_reid_train_loader

    with pytest.raises(ConfigError, match=r"DATALOADER.SAMPLER_TRAIN: got 'TrainingSampler'; expected SeededTraining"):
        build_reid_train_loader(dil_cfg(tmp_path, **{"DATALOADER.SAMPLER_TRAIN": "TrainingSampler"}))
    with pytest.raises(ConfigError, match="sampler passed to build_reid_train_loader"):
        build_reid_train_loader(dil_cfg(tmp_path), sampler=[1, 2])


def test_a_resumed_training_goes_on_exactly(tmp_path: Path, data: None) -> None:
    """Dropout included: three iterations and a checkpoint, three more, against six in one go."""
    from fastreid.engine import DefaultTrainer

    class Untested(DefaultTrainer):  # type: ignore[misc]
        @classmethod
        def test(cls, cfg: Any, model: Any) -> dict[str, Any]:
            return {}

    options = {"SOLVER.MAX_EPOCH": 2, "SOLVER.CHECKPOINT_PERIOD": 1, "TEST.EVAL_PERIOD": 100}
    runs = {name: dil_cfg(tmp_path / name, **options) for name in ("whole", "parts")}
    states = {}
    for name, stops in {"whole": [2], "parts": [1, 2]}.items():
        for part, stop in enumerate(stops):
            torch.manual_seed(0)
            trainer = Untested(runs[name])
            trainer.resume_or_load(resume=part > 0)
            trainer.max_epoch = stop
            torch.manual_seed(part + 17)  # what a new process has
            trainer.train()
        states[name] = trainer.model.state_dict()
    assert int(states["whole"]["stage.adam.steps"]) == 6
    for key, value in states["whole"].items():
        assert value.equal(states["parts"][key]), key
