"""The recipe ``qud``: [teacher] -> [cache] -> student -> deploy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.stages import Stage
from qsd_plugin.hosts.fastreid import face_tests, samplers, training_stages
from qsd_plugin.hosts.fastreid.cached_features import features_folder
from qsd_plugin.hosts.fastreid.compose import in_chain
from qsd_plugin.hosts.fastreid.datasets import Item, test_set
from qsd_plugin.hosts.fastreid.feature_caching import cache_stages, wants_cache
from qsd_plugin.hosts.fastreid.meta_arch.qud_teacher import build_teacher, teacher_config, teacher_files
from qsd_plugin.methods.qud import Teacher


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
        if name in face_tests.TESTS:
            face_tests.TESTS[name](cfg)
        else:
            test_set(cfg, name)
    root = Path(cfg.OUTPUT_DIR)
    student = training_stages.derive(cfg, root / "student")
    stages = []
    if _trains_teacher(cfg):
        stages.append(_teacher_stage(cfg, root / "teacher", arguments))
        training_stages.check_model(
            student, QUD__TEACHER__SOURCE="cache"
        )  # all but the teacher, which is not there yet
        made = {"CONFIG": "config.yaml", "WEIGHTS": "model_final.pth"}
        trained = {f"KD__MODEL_{key}": [str(root / "teacher" / name)] for key, name in made.items()}
        student = training_stages.derive(student, root / "student", **trained)
    else:
        training_stages.check_model(student)
    inputs = [*teacher_files(student), *([Path(cfg.MODEL.WEIGHTS)] if cfg.MODEL.WEIGHTS else [])]
    items = training_stages.training_items(cfg)
    if wants_cache(student):
        if not student.QUD.CACHE.FOLDER:
            stages += cache_of_teacher(student, items)
            student = training_stages.derive(student, root / "student", QUD__CACHE__FOLDER=str(root / "cache"))
        inputs.append(features_folder(student) / "cache.json")
    labelled = in_chain(cfg, "QSD") or samplers.needs_labels(cfg)
    keys = training_stages.relevant_keys(student, () if labelled else training_stages.NO_QUALITY)
    data = training_stages.data_digest(items)
    stages.append(training_stages.training_stage("student", student, arguments, data, keys=keys, inputs=inputs))
    return stages + training_stages.deploy_stages(student, root / "student")


def _trains_teacher(cfg: Any) -> bool:
    """Whether there is a teacher's config without weights, and somebody to ask the teacher."""
    given = wants_cache(cfg) and (cfg.QUD.CACHE.FOLDER or cfg.QUD.TEACHER.ONNX)
    return bool(cfg.QUD.TEACHER.SOURCE != "onnx" and cfg.KD.MODEL_CONFIG and not cfg.KD.MODEL_WEIGHTS and not given)


def cache_of_teacher(student: Any, items: Mapping[str, list[Item]]) -> list[Stage]:
    """The stage that asks the teacher once per image: an ONNX file if one is named, else the network."""
    source = "onnx" if student.QUD.TEACHER.ONNX else "network"
    asked = training_stages.derive(student, Path(student.OUTPUT_DIR), QUD__TEACHER__SOURCE=source)

    def teacher() -> Teacher:
        built = build_teacher(asked)
        assert built is not None  # only the source cache has none
        return built

    return cache_stages(student, teacher, items, inputs=teacher_files(asked))


def _teacher_stage(cfg: Any, folder: Path, arguments: Any) -> Stage:
    teacher = teacher_stage_config(cfg, folder)
    training_stages.check_model(teacher)
    data = training_stages.data_digest(training_stages.training_items(teacher))
    keys = training_stages.relevant_keys(teacher, training_stages.NO_QUALITY)
    return training_stages.training_stage("teacher", teacher, arguments, data, keys=keys)


def teacher_stage_config(cfg: Any, output_dir: Path) -> Any:
    """The config that ``KD.MODEL_CONFIG`` names, with the seed, the device and the data of the student's.

    Of the paths in ``DATA``, folders are the student's wherever it names one, files and the like where the teacher's
    own config does not.

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
    paths = {f"DATA__{key}": cfg.DATA[key] for key in ("ROOT", "CACHE") if cfg.DATA[key]}
    own = ("FOLDER", "LIST", "RECORD", "VERIFICATION", "PAIRS")
    paths |= {f"DATA__{key}": cfg.DATA[key] for key in own if cfg.DATA[key] and not teacher.DATA[key]}
    return training_stages.derive(teacher, output_dir, SEED=cfg.SEED, MODEL__DEVICE=cfg.MODEL.DEVICE, **paths)
