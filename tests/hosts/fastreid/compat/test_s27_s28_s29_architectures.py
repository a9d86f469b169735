"""S27-S29: what a resumed training remembers, and settings of MoCo and Distiller that cannot work."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_cfg

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import ConfigError

FREEZE = {"MODEL.FREEZE_LAYERS": ["backbone"], "SOLVER.FREEZE_ITERS": 2, "MODEL.HEADS.NUM_CLASSES": 3}


def build(cfg: Any, seed: int = 0) -> Any:
    from fastreid.modeling.meta_arch.build import build_model

    torch.manual_seed(seed)
    return build_model(cfg)


def optimizer_of(cfg: Any, model: Any) -> Any:
    from fastreid.solver import build_optimizer

    return build_optimizer(cfg, model)[0]


def moved(model: Any, optimizer: Any) -> set[str]:
    """Top-level modules of which a parameter changes in one step with gradients of 1."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.zero_grad()
    sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad).backward()
    optimizer.step()
    return {n.partition(".")[0] for n, parameter in model.named_parameters() if not torch.equal(parameter, before[n])}


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_s27_frozen_steps_survive_a_resume(tmp_path: Path, name: str) -> None:
    cfg = toy_cfg(tmp_path, **FREEZE, **{"SOLVER.OPT": name})
    model = build(cfg)
    optimizer = optimizer_of(cfg, model)
    assert [moved(model, optimizer) for _ in range(3)] == [{"heads"}, {"heads"}, {"backbone", "heads"}]
    resumed = optimizer_of(cfg, model)
    resumed.load_state_dict(optimizer.state_dict())
    assert moved(model, resumed) == {"backbone", "heads"}


def test_s27_interrupted_while_frozen_stays_frozen_for_the_rest(tmp_path: Path) -> None:
    cfg = toy_cfg(tmp_path, **FREEZE)
    model = build(cfg)
    optimizer = optimizer_of(cfg, model)
    moved(model, optimizer)
    resumed = optimizer_of(cfg, model)
    resumed.load_state_dict(optimizer.state_dict())
    assert [moved(model, resumed) for _ in range(2)] == [{"heads"}, {"backbone", "heads"}]


def distiller_cfg(folder: Path, **overrides: Any) -> Any:
    options = {"MODEL.META_ARCHITECTURE": "Distiller", "MODEL.HEADS.NUM_CLASSES": 3, "KD.EMA.ENABLED": True}
    return toy_cfg(folder, **{**options, **overrides})


def teacher_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.model_ts[0].state_dict().items()}


def test_s28_moving_average_teacher_survives_a_resume(tmp_path: Path) -> None:
    from fastreid.utils.checkpoint import Checkpointer

    cfg = distiller_cfg(tmp_path)
    model = build(cfg)
    for tensor in model.model_ts[0].state_dict().values():
        tensor.add_(1)
    expected = teacher_state(model)
    Checkpointer(model, str(tmp_path)).save("model_0", epoch=0)
    stored = torch.load(tmp_path / "model_0.pth", weights_only=True)
    assert stored["model"].keys() == build(toy_cfg(tmp_path, **{"MODEL.HEADS.NUM_CLASSES": 3})).state_dict().keys()
    resumed = build(cfg, seed=1)
    Checkpointer(resumed, str(tmp_path)).resume_or_load("", resume=True)
    for name, value in teacher_state(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_s28_checkpoint_without_the_teacher_starts_it_from_the_student(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from fastreid.utils.checkpoint import Checkpointer

    plain = build(toy_cfg(tmp_path, **{"MODEL.HEADS.NUM_CLASSES": 3}), seed=1)
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    model = build(distiller_cfg(tmp_path))
    with caplog.at_level(logging.WARNING):
        logging.getLogger("fastreid").addHandler(caplog.handler)
        Checkpointer(model).load(str(tmp_path / "plain.pth"))
        logging.getLogger("fastreid").removeHandler(caplog.handler)
    assert "holds no moving-average teacher" in caplog.text
    for name, value in teacher_state(model).items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_s29_settings_that_fail_in_the_first_step_are_refused(tmp_path: Path) -> None:
    moco = toy_cfg(tmp_path, **{"MODEL.META_ARCHITECTURE": "MoCo", "MODEL.QUEUE_SIZE": 24})
    with pytest.raises(ConfigError, match=r"QUEUE_SIZE: got 24; expected a multiple of SOLVER.IMS_PER_BATCH 16"):
        build(moco)
    with pytest.raises(ConfigError, match=r"KD.MODEL_CONFIG.*at least one teacher.*KD.EMA.ENABLED True"):
        build(distiller_cfg(tmp_path, **{"KD.EMA.ENABLED": False}))
    with pytest.raises(ConfigError, match=r"KD.MODEL_WEIGHTS: got \[\]; expected one checkpoint for each"):
        build(distiller_cfg(tmp_path, **{"KD.MODEL_CONFIG": ["teacher.yaml"]}))


def test_s29_teacher_of_another_training_set_is_refused(tmp_path: Path) -> None:
    teacher = toy_cfg(tmp_path, **{"MODEL.HEADS.NUM_CLASSES": 5})
    (tmp_path / "teacher.yaml").write_text(teacher.dump())
    torch.save({"model": build(teacher).state_dict()}, tmp_path / "teacher.pth")
    files = {"KD.MODEL_CONFIG": [str(tmp_path / "teacher.yaml")], "KD.MODEL_WEIGHTS": [str(tmp_path / "teacher.pth")]}
    with pytest.raises(ConfigError, match=r"NUM_CLASSES of the teacher.*got 5; expected 3"):
        build(distiller_cfg(tmp_path, **files))
    build(distiller_cfg(tmp_path, **files, **{"MODEL.HEADS.NUM_CLASSES": 0}))  # as for an evaluation
