"""A training that stops leaves a checkpoint to go on from; damaged images are replaced, listed, and limited."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_cfg, use_market, write_market

from qsd_plugin.core.errors import DataError
from qsd_plugin.hosts import fastreid as host

host.activate()


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    root = write_market(tmp_path / "data", num_ids=8, per_id=8)
    use_market(monkeypatch, root)
    return sorted(root.glob("*/bounding_box_train/*.jpg"))


def trainer(folder: Path, **overrides: Any) -> Any:
    from fastreid.engine import DefaultTrainer

    sampler = {"DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler", "DATALOADER.NUM_INSTANCE": 4}
    return DefaultTrainer(toy_cfg(folder / "out", **sampler, **overrides))


def damage(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(path.read_bytes()[:100])


def test_few_damaged_images_are_replaced_and_listed_at_the_end(
    tmp_path: Path, images: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(images[0], images[9])
    running = trainer(tmp_path, **{"DATA.MAX_CORRUPT": 0.1, "SOLVER.MAX_EPOCH": 3})
    monkeypatch.setattr(logging.getLogger("fastreid"), "propagate", True)
    running.resume_or_load(resume=False)
    running.train()
    (summary,) = {record.getMessage() for record in caplog.records if "could not be decoded" in record.getMessage()}
    assert "2 of 64 training images" in summary
    assert images[0].name in summary
    assert images[9].name in summary


def test_too_many_damaged_images_stop_the_run_with_the_list_and_a_checkpoint(
    tmp_path: Path, images: list[Path]
) -> None:
    running = trainer(tmp_path, **{"SOLVER.MAX_EPOCH": 6})
    damage(*images[:24:3])
    running.resume_or_load(resume=False)
    with pytest.raises(DataError, match=r"Too many damaged training images: \d+ of 64 .*\.jpg"):
        running.train()
    saved = torch.load(tmp_path / "out" / "model_interrupted.pth", weights_only=True)
    assert saved["epoch"] == running.epoch - 1
    for name, value in running.model.state_dict().items():
        assert torch.equal(saved["model"][name], value), name
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_interrupted.pth"


def test_interrupted_epoch_is_repeated_on_resume(tmp_path: Path, images: list[Path]) -> None:
    running = trainer(tmp_path, **{"SOLVER.MAX_EPOCH": 3})
    running.resume_or_load(resume=False)
    steps = 0
    step = running._trainer.run_step

    def fail_in_second_epoch() -> None:
        nonlocal steps
        steps += 1
        if steps == running.iters_per_epoch + 2:
            raise RuntimeError("power cut")
        step()

    running._trainer.run_step = fail_in_second_epoch
    with pytest.raises(RuntimeError, match="power cut"):
        running.train()
    again = trainer(tmp_path, **{"SOLVER.MAX_EPOCH": 3})
    again.resume_or_load(resume=True)
    assert again.start_epoch == 1


def test_a_run_that_ends_well_leaves_no_interrupted_checkpoint(tmp_path: Path, images: list[Path]) -> None:
    running = trainer(tmp_path)
    running.resume_or_load(resume=False)
    running.train()
    assert (tmp_path / "out" / "model_final.pth").exists()
    assert not (tmp_path / "out" / "model_interrupted.pth").exists()
