"""A term of DIL's stage 1 that is not finite: it is named, the state before it is saved, and training resumes there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dil_toy import dil_cfg
from toy import use_market, write_market

from qsd_plugin.core.errors import TrainingError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.methods.dil import Stage1

host.activate()

STEPS = 4  # of an epoch: 16 images


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    use_market(monkeypatch, write_market(tmp_path / "data", num_ids=4, per_id=4, test_ids=2))
    return dil_cfg(tmp_path, **{"SOLVER.MAX_EPOCH": 2, "DATASETS.TESTS": (), "SOLVER.CHECKPOINT_PERIOD": 9})


def trainer(cfg: Any, *, resume: bool) -> Any:
    from fastreid.engine import DefaultTrainer

    running = DefaultTrainer(cfg)
    running.resume_or_load(resume=resume)
    return running


@pytest.mark.parametrize(("side", "judged"), [("generator_terms", 6), ("discriminator_terms", 5)])
def test_it_is_named_and_saved_and_the_epoch_is_repeated(
    cfg: Any, monkeypatch: pytest.MonkeyPatch, side: str, judged: int
) -> None:
    made = getattr(Stage1, side)

    def broken(self: Stage1, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        terms = made(self, *args, **options)
        last = next(reversed(terms))
        return {**terms, last: terms[last] * float("nan")} if self.iteration == judged else terms

    with monkeypatch.context() as patch:
        patch.setattr(Stage1, side, broken)
        expected = "generator: identity" if side == "generator_terms" else "discriminators: discriminator_degradation"
        with pytest.raises(TrainingError, match=f"DIL stage 1, unsupervised phase, {expected}.* not finite"):
            trainer(cfg, resume=False).train()
    saved = torch.load(Path(cfg.OUTPUT_DIR) / "model_interrupted.pth", weights_only=True)
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert int(saved["model"]["stage.adam.steps"]) == judged
    again = trainer(cfg, resume=True)
    assert again.start_epoch == 1
    again.train()
    assert again.model.stage.iteration == judged + STEPS  # the second epoch from its beginning
