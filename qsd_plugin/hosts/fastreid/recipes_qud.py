"""The recipe ``qud``: [teacher] -> student -> deploy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.stages import Stage
from qsd_plugin.hosts.fastreid import face_tests, recipes, samplers
from qsd_plugin.hosts.fastreid.compose import in_chain
from qsd_plugin.hosts.fastreid.datasets import test_set
from qsd_plugin.hosts.fastreid.meta_arch.qud_teacher import teacher_config, teacher_files


def qud_stages(cfg: Any, arguments: Any) -> list[Stage]:
    """The stages; a teacher is trained where ``KD.MODEL_CONFIG`` names its config and ``KD.MODEL_WEIGHTS`` nothing.

    Args:
        cfg: The student's config; ``OUTPUT_DIR`` is the recipe's root.
        arguments: Parsed command line, for the host's log.

    Raises:
        QSDPluginError: Whatever is wrong with the student, its teacher or their data.
    """
    if not in_chain(cfg, "QUD"):
        raise ConfigError(
            "MODEL.META_ARCHITECTURE", value=cfg.MODEL.META_ARCHITECTURE, expected="QUD with RECIPE.NAME qud"
        )
    samplers.check_config(cfg)
    for name in cfg.DATASETS.TESTS:
        if name not in face_tests.TESTS:
            test_set(cfg, name)
    root = Path(cfg.OUTPUT_DIR)
    student = recipes.derive(cfg, root / "student")
    stages = []
    if cfg.QUD.TEACHER.SOURCE != "onnx" and cfg.KD.MODEL_CONFIG and not cfg.KD.MODEL_WEIGHTS:
        stages.append(_teacher_stage(cfg, root / "teacher", arguments))
        recipes.check_model(student, QUD__TEACHER__SOURCE="cache")  # all but the teacher, which is not there yet
        made = {"CONFIG": "config.yaml", "WEIGHTS": "model_final.pth"}
        trained = {f"KD__MODEL_{key}": [str(root / "teacher" / name)] for key, name in made.items()}
        student = recipes.derive(student, root / "student", **trained)
    else:
        recipes.check_model(student)
    # From here on student names the teacher's files: a stage that makes something of them goes in between.
    inputs = [*teacher_files(student), *([Path(cfg.MODEL.WEIGHTS)] if cfg.MODEL.WEIGHTS else [])]
    labelled = in_chain(cfg, "QSD") or samplers.needs_labels(cfg)
    keys = recipes._without(student, () if labelled else recipes._NO_QUALITY)
    data = recipes._digest(recipes._training_items(cfg))
    stages.append(recipes._training_stage("student", student, arguments, data, keys=keys, inputs=inputs))
    return stages + recipes._deploy_stages(student, root / "student")


def _teacher_stage(cfg: Any, folder: Path, arguments: Any) -> Stage:
    teacher = teacher_stage_config(cfg, folder)
    recipes.check_model(teacher)
    data = recipes._digest(recipes._training_items(teacher))
    keys = recipes._without(teacher, recipes._NO_QUALITY)
    return recipes._training_stage("teacher", teacher, arguments, data, keys=keys)


def teacher_stage_config(cfg: Any, output_dir: Path) -> Any:
    """The config that ``KD.MODEL_CONFIG`` names, with the seed, the device and the data folders of the student's.

    Raises:
        ConfigError: There is no such file, or it is a recipe of its own.
    """
    path = cfg.KD.MODEL_CONFIG[0]
    teacher = teacher_config(path)
    if teacher.RECIPE.NAME:
        raise ConfigError(
            f"RECIPE.NAME in KD.MODEL_CONFIG {path}",
            value=teacher.RECIPE.NAME,
            expected="a plain training, for a teacher that this recipe trains",
            remedy="Run that recipe first and name its last checkpoint in KD.MODEL_WEIGHTS.",
        )
    folders = {f"DATA__{key}": cfg.DATA[key] for key in ("ROOT", "CACHE") if cfg.DATA[key]}
    return recipes.derive(teacher, output_dir, SEED=cfg.SEED, MODEL__DEVICE=cfg.MODEL.DEVICE, **folders)
