"""CONFIG, REGISTRY, OPT, LOSSES: what the host answers to a misspelt or unusable name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy import toy_cfg

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import ConfigError, RegistryError
from qsd_plugin.hosts.fastreid.compat.messages import UNUSABLE_OPTIMIZERS, require_known_losses


def fresh() -> Any:
    from fastreid.config import get_cfg

    return get_cfg()


def test_config_a_misspelt_key_suggests_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"key on the command line: got 'SOLVER\.BASE_LRR'.*'SOLVER\.BASE_LR'"):
        fresh().merge_from_list(["SOLVER.BASE_LRR", 0.1])
    config = tmp_path / "typo.yml"
    config.write_text("MODEL:\n  BAKBONE:\n    DEPTH: 18x\n")
    with pytest.raises(ConfigError, match=r"key in .*typo\.yml: got 'MODEL\.BAKBONE'.*'MODEL\.BACKBONE'"):
        fresh().merge_from_file(str(config))


def test_config_a_key_in_the_wrong_section_is_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got 'SOLVER\.NUM_WORKERS'.*'DATALOADER\.NUM_WORKERS'"):
        fresh().merge_from_list(["SOLVER.NUM_WORKERS", 2])


def test_config_other_errors_are_the_hosts() -> None:
    with pytest.raises(ValueError, match="Type mismatch"):
        fresh().merge_from_list(["SOLVER.MAX_EPOCH", "many"])
    with pytest.raises(AssertionError, match="odd length"):
        fresh().merge_from_list(["SOLVER.MAX_EPOCH"])
    cfg = fresh()
    cfg.merge_from_list(["SOLVER.MAX_EPOCH", 7])
    assert cfg.SOLVER.MAX_EPOCH == 7


@pytest.mark.parametrize(
    ("registry", "key", "wrong", "right"),
    [
        ("fastreid.modeling.meta_arch.build:META_ARCH_REGISTRY", "MODEL.META_ARCHITECTURE", "Baselin", "Baseline"),
        (
            "fastreid.modeling.backbones.build:BACKBONE_REGISTRY",
            "MODEL.BACKBONE.NAME",
            "resnet",
            "build_resnet_backbone",
        ),
        ("fastreid.modeling.heads.build:REID_HEADS_REGISTRY", "MODEL.HEADS.NAME", "EmbedingHead", "EmbeddingHead"),
        ("fastreid.data.datasets:DATASET_REGISTRY", "DATASETS.NAMES", "Market1502", "Market1501"),
    ],
)
def test_registry_an_unknown_name_lists_the_nearest(registry: str, key: str, wrong: str, right: str) -> None:
    import importlib

    module, _, name = registry.partition(":")
    host = getattr(importlib.import_module(module), name)
    with pytest.raises(RegistryError, match=rf"{key}.*got '{wrong}'.*{right}"):
        host.get(wrong)
    assert host.get(right) is host._obj_map[right]


def test_opt_unknown_and_unusable_solvers_are_refused(tmp_path: Path) -> None:
    from fastreid.engine import DefaultTrainer

    model = nn.Linear(2, 2)

    def build(name: str) -> Any:
        return DefaultTrainer.build_optimizer(toy_cfg(tmp_path, **{"SOLVER.OPT": name}), model)

    with pytest.raises(ConfigError, match=r"SOLVER\.OPT: got 'Admw'.*'AdamW'"):
        build("Admw")
    for absent in ("Lamb", "SWA"):
        with pytest.raises(ConfigError, match=rf"SOLVER\.OPT: got '{absent}'.*optimizer of torch\.optim"):
            build(absent)
    for name, reason in UNUSABLE_OPTIMIZERS.items():
        with pytest.raises(ConfigError, match=rf"torch\.optim\.{name} cannot be used.*{reason}.*AdamW"):
            build(name)


def test_opt_every_other_optimizer_of_torch_steps(tmp_path: Path) -> None:
    from fastreid.solver import build_optimizer

    from qsd_plugin.hosts.fastreid.compat.messages import _optimizers

    assert len(_optimizers()) >= 12
    for name in _optimizers():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer, _ = build_optimizer(toy_cfg(tmp_path, **{"SOLVER.OPT": name, "SOLVER.BASE_LR": 0.01}), model)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        moved = [not now.equal(then) for now, then in zip(model.parameters(), before, strict=True)]
        assert all(moved), name


def test_opt_unknown_schedules_are_refused(tmp_path: Path) -> None:
    from fastreid.engine import DefaultTrainer

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)

    def build(name: str) -> Any:
        return DefaultTrainer.build_lr_scheduler(toy_cfg(tmp_path, **{"SOLVER.SCHED": name}), optimizer, 10)

    with pytest.raises(ConfigError, match=r"SOLVER\.SCHED: got 'CosineAnealingLR'.*'CosineAnnealingLR'"):
        build("CosineAnealingLR")
    with pytest.raises(ConfigError, match=r"SOLVER\.SCHED: got 'StepLR'"):  # torch has it, the host no settings
        build("StepLR")
    assert set(build("MultiStepLR")) == {"lr_sched"}


@pytest.mark.parametrize("architecture", ["Baseline", "MGN", "MoCo"])
def test_losses_a_misspelt_name_is_refused(architecture: str, tmp_path: Path) -> None:
    from fastreid.modeling import build_model

    overrides = {"MODEL.META_ARCHITECTURE": architecture, "MODEL.LOSSES.NAME": ("CrossEntropyLoss", "TripletLos")}
    with pytest.raises(ConfigError, match=r"MODEL\.LOSSES\.NAME: got 'TripletLos'.*'TripletLoss'"):
        build_model(toy_cfg(tmp_path, **overrides))


def test_losses_the_hosts_names_and_those_of_subclasses_are_known() -> None:
    from fastreid.modeling.meta_arch import Baseline

    class Extended(Baseline):
        def losses(self, outputs: Any, gt_labels: Any) -> Any:
            terms = super().losses(outputs, gt_labels)
            if "AttributeLoss" in self.loss_kwargs["loss_names"]:
                terms["loss_attribute"] = outputs["attributes"].sum()
            return terms

    host = ("CrossEntropyLoss", "TripletLoss", "CircleLoss", "Cosface")
    require_known_losses(Baseline, host)
    require_known_losses(Extended, (*host, "AttributeLoss"))
    with pytest.raises(ConfigError, match=r"losses of Baseline: .*CircleLoss"):
        require_known_losses(Baseline, ("AttributeLoss",))


def test_losses_an_architecture_that_asks_for_no_name_is_left_alone() -> None:
    class Silent(nn.Module):
        def losses(self) -> dict[str, Any]:
            return {"loss_total": 0}

    require_known_losses(Silent, ("Anything",))
