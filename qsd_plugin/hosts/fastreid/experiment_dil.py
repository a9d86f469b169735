"""Arms of the recipe ``dil`` in a block of an experiment: [teacher] -> stage 1 -> [bank] -> stage 2 -> evaluation.

Arms whose settings agree in all that a stage depends on share it: those that differ in ``DIL.REPLAY`` share teacher and
stage 1, those that differ in ``DIL.STAGE2_OPTIONS.FEATURE`` the whole training. A stage is ``dil_stage1`` for the first
arm that needs it; another one of its kind has the name of its first arm behind it, as in ``dil_stage1-narrow``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.stages import Stage
from qsd_plugin.hosts.fastreid import recipes_dil, training_stages
from qsd_plugin.hosts.fastreid.compose import evaluated_architecture
from qsd_plugin.hosts.fastreid.experiment_recipes import Needs
from qsd_plugin.hosts.fastreid.experiment_training import Trained, trained_stage, training_alone
from qsd_plugin.hosts.fastreid.quality import FILE
from qsd_plugin.hosts.fastreid.recipes_dil import Folders
from qsd_plugin.report.experiment import DIL_STAGES, LABELS

#: What evaluation reads and training does not.
_FEATURE = "DIL.STAGE2_OPTIONS.FEATURE"


def dil_folders(arms: Mapping[str, Any]) -> dict[str, Folders]:
    """The stages that each arm is made from; an empty name: a file is given, or none is needed.

    Args:
        arms: Config of every arm of the recipe in the experiment, also of those that are not run this time.
    """
    names: dict[str, dict[str, str]] = {kind: {} for kind in DIL_STAGES}
    folders = {}
    for arm, cfg in arms.items():
        root = Path(cfg.OUTPUT_DIR)

        def stage(kind: str, *facts: Any, arm: str = arm) -> str:
            own = names[kind]
            text = json.dumps(facts, sort_keys=True, default=str)
            return own.setdefault(text, f"{kind}-{arm}" if own else kind)

        of_teacher, of_stage1, of_bank, of_stage2 = DIL_STAGES
        teacher = stage1 = bank = ""
        if recipes_dil.trains_teacher(cfg):
            teacher = stage(of_teacher, recipes_dil.teacher_keys(recipes_dil.teacher_config(cfg, root)))
        if not cfg.DIL.STAGE1:
            keys = recipes_dil.stage1_keys(recipes_dil.stage1_config(cfg, root))
            stage1 = stage(of_stage1, cfg.RECIPE.DIL.TEACHER_IN_STAGE1 and [teacher, cfg.DIL.TEACHER], keys)
        if recipes_dil.wants_bank(cfg):
            bank = stage(of_bank, stage1, cfg.DIL.STAGE1, recipes_dil.bank_keys(cfg))
        given = [cfg.DIL.TEACHER, cfg.DIL.STAGE1, cfg.DIL.BANK, list(cfg.QUALITY.FILES)]
        stage2 = stage(of_stage2, teacher, stage1, bank, given, _training_keys(cfg))
        folders[arm] = Folders(teacher, stage1, bank, stage2)
    return folders


def dil_needs(arms: Mapping[str, Any], folders: Mapping[str, Folders]) -> Needs:
    """Stages in order, each with those that it is made from.

    Args:
        arms: Config of each arm that is run.
        folders: As :func:`dil_folders` found them.
    """
    kinds: list[Needs] = [{}, {}, {}, {}]
    for arm, cfg in arms.items():
        own = folders[arm]
        first = own.teacher if cfg.RECIPE.DIL.TEACHER_IN_STAGE1 else ""
        labels = LABELS if wants_labels(cfg) else ""
        before = ((), (first,), (own.stage1,), (own.teacher, own.stage1, own.bank, labels))
        for kind, name, needed in zip(kinds, own, before, strict=True):
            if name:
                kind[name] = tuple(filter(None, needed))
    needs = {name: needed for kind in kinds for name, needed in kind.items()}
    return needs | {arm: (folders[arm].stage2,) for arm in arms}


def wants_labels(cfg: Any) -> bool:
    """Whether stage 2 reads the labels that the experiment's baseline makes."""
    return recipes_dil.needs_labels(cfg) and cfg.QUALITY.SOURCE == FILE and not cfg.QUALITY.FILES


def check_labels(arms: Mapping[str, Any], shared: Needs) -> None:
    """Refuse an arm that reads labels which no stage makes.

    Raises:
        ConfigError: Names the arm.
    """
    for arm, cfg in arms.items():
        if wants_labels(cfg) and LABELS not in shared:
            raise ConfigError(
                f"QUALITY.FILES of arm {arm}",
                value=(),
                expected="label files, or an arm of the recipe qsd in the experiment, whose baseline makes some",
                remedy="Labels of DIL's own stage 1: QUALITY.SOURCE dil_severity.",
            )


def dil_block(arms: Mapping[str, Any], folders: Mapping[str, Folders]) -> list[Stage]:
    """The stages of :func:`dil_needs`; ``OUTPUT_DIR`` of all configs is the block's folder."""
    stages: dict[str, Stage] = {}
    for arm, cfg in arms.items():
        root, own = Path(cfg.OUTPUT_DIR), folders[arm]
        items = training_stages.training_items(cfg)
        data = training_stages.data_digest(items)
        recipes_dil.check_pairs(cfg, items)
        if own.teacher and own.teacher not in stages:
            teacher = recipes_dil.teacher_config(cfg, root, own)
            run = Trained(teacher, teacher)
            stages[own.teacher] = trained_stage(own.teacher, run, data, recipes_dil.teacher_keys(teacher))
        if own.stage1 and own.stage1 not in stages:
            stage1 = recipes_dil.stage1_config(cfg, root, own)
            inputs = recipes_dil.own_files(stage1, "TEACHER")
            stages[own.stage1] = training_alone(own.stage1, stage1, data, recipes_dil.stage1_keys(stage1), inputs)
        stage2 = recipes_dil.stage2_config(cfg, root, own)
        if own.bank and own.bank not in stages:
            stages[own.bank] = recipes_dil.bank_stage(own.bank, stage2, items)
        if own.stage2 not in stages:
            inputs = recipes_dil.own_files(stage2, "TEACHER", "STAGE1", "BANK") + recipes_dil.label_inputs(stage2)
            stages[own.stage2] = training_alone(own.stage2, stage2, data, _training_keys(stage2), inputs)
        plain = training_stages.derive(stage2, root / arm, MODEL__META_ARCHITECTURE=evaluated_architecture(stage2))
        before = [root / name for name in (own.teacher, own.stage1, own.stage2) if name]
        run = Trained(stage2, plain, root / own.stage2 / "model_final.pth", before=before)
        stages[arm] = trained_stage(arm, run, data, {_FEATURE: cfg.DIL.STAGE2_OPTIONS.FEATURE})
    return list(stages.values())


def _training_keys(stage2: Any) -> dict[str, Any]:
    return {key: value for key, value in recipes_dil.stage2_keys(stage2).items() if key != _FEATURE}
