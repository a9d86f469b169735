"""The stages of one block of an experiment: what its arms share, and the arms themselves.

``qsd``: baseline -> labels -> arms that fine-tune it. ``qud``: teacher -> [cache] -> arms that learn from it, or
without it. ``qgface``: arms from scratch, which share no stage. Training stages end with the results of the last epoch:
on every query (:class:`~qsd_plugin.report.per_query.PerQuery`) or, on face test sets, on every trial
(:class:`~qsd_plugin.report.per_trial.PerTrial`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.core.stages import Stage
from qsd_plugin.hosts.fastreid import (
    face_tests,
    face_trials,
    recipes,
    recipes_qgface,
    recipes_qud,
    report,
    report_frame,
    samplers,
    training_stages,
)
from qsd_plugin.hosts.fastreid.cached_features import features_folder
from qsd_plugin.hosts.fastreid.compose import evaluated_architecture, in_chain
from qsd_plugin.hosts.fastreid.datasets import dataset_folder, training_set
from qsd_plugin.hosts.fastreid.feature_caching import wants_cache
from qsd_plugin.hosts.fastreid.meta_arch.qud_teacher import teacher_config, teacher_files
from qsd_plugin.hosts.fastreid.quality import label_files
from qsd_plugin.report import per_query, per_trial
from qsd_plugin.report.experiment import BASELINE, CACHE, LABELS, PICTURES, TEACHER
from qsd_plugin.report.per_query import PerQuery
from qsd_plugin.report.per_trial import PerTrial
from qsd_plugin.report.run_doctor import StageFolder

#: Recipes that an experiment can have arms of.
RECIPES = ("qsd", "qud", "qgface")

#: Figures of a training that its ``results.json`` repeats.
SHARES = tuple(f"qgface/{name}" for name in ("low_quality", "low_quality_clean", "low_quality_degraded", "contrasted"))

_ARGUMENTS = argparse.Namespace(config_file="", eval_only=False)  # for the host's log


@dataclass(frozen=True)
class Trained:
    """A network to train, or one that is given, and how it is evaluated.

    Args:
        cfg: Of its training.
        plain: Of its evaluation, without what training adds.
        given: Its checkpoint where it is not trained.
        teacher: The stage folder of the network whose embeddings it is compared with, on face test sets.
    """

    cfg: Any
    plain: Any
    given: Path | None = None
    teacher: Path | None = None


def shared_stages(arms: Sequence[Any]) -> list[str]:
    """Names of the stages that come before the arms of these configs."""
    if arms[0].RECIPE.NAME == "qud":
        return [TEACHER, *([CACHE] if any(map(_makes_cache, arms)) else [])]
    return [] if arms[0].RECIPE.NAME == recipes_qgface.NAME else [BASELINE, LABELS]


def check_arm(cfg: Any) -> None:
    """Refuse an arm that cannot be run or compared, before anything is trained.

    Raises:
        QSDPluginError: Whatever is wrong with its architecture or its test sets.
    """
    faces = [name for name in cfg.DATASETS.TESTS if name in face_tests.TESTS]
    if len(cfg.DATASETS.TESTS) != 1 and len(faces) < len(cfg.DATASETS.TESTS):
        raise ConfigError(
            "DATASETS.TESTS",
            value=list(cfg.DATASETS.TESTS),
            expected="one person re-identification set, or face test sets, in an experiment",
        )
    for name in faces:
        face_trials.check(name)
    if cfg.RECIPE.NAME == "qsd":
        recipes.check_final_stage(cfg, faces=True)
    elif cfg.RECIPE.NAME == recipes_qgface.NAME:
        recipes_qgface.check(cfg)
    else:
        if not cfg.KD.MODEL_CONFIG or cfg.QUD.TEACHER.SOURCE == "onnx":
            raise ConfigError(
                "Teacher of an experiment",
                value=f"KD.MODEL_CONFIG {list(cfg.KD.MODEL_CONFIG)}, QUD.TEACHER.SOURCE {cfg.QUD.TEACHER.SOURCE}",
                expected="KD.MODEL_CONFIG, the config of a network, which is trained or evaluated like the arms",
                remedy="Name it under overrides, with QUD.TEACHER.SOURCE network or cache.",
            )
        # The teacher may not be there yet; an arm without one is an ordinary training.
        training_stages.check_model(cfg, **({"QUD__TEACHER__SOURCE": "cache"} if in_chain(cfg, "QUD") else {}))


def stages_of_block(cfg: Any, arms: Mapping[str, Any], *, pictures: bool) -> list[Stage]:
    """The stages of a block.

    Args:
        cfg: What all arms have in common; ``OUTPUT_DIR`` is the block's folder.
        arms: Config of each arm, by name.
        pictures: Whether the last stage draws the recipe's pictures.
    """
    if cfg.RECIPE.NAME == "qsd":
        return _qsd_block(cfg, arms, pictures)
    if pictures:
        expected = f"false with RECIPE.NAME {cfg.RECIPE.NAME}"
        raise ConfigError("pictures of an experiment", value=True, expected=expected)
    return (_qud_block if cfg.RECIPE.NAME == "qud" else _qgface_block)(cfg, arms)


def _qsd_block(cfg: Any, arms: Mapping[str, Any], pictures: bool) -> list[Stage]:
    root = Path(cfg.OUTPUT_DIR)
    items = training_stages.training_items(cfg)
    data = training_stages.data_digest(items)
    plain = recipes.baseline_config(cfg, root / BASELINE)
    given = Path(cfg.RECIPE.BASELINE.WEIGHTS) if cfg.RECIPE.BASELINE.WEIGHTS else None
    checkpoint = given or root / BASELINE / "model_final.pth"
    own_keys = training_stages.relevant_keys(plain, training_stages.NO_QUALITY)
    stages = [_training_stage(BASELINE, Trained(plain, plain, given), data, own_keys)]
    folds = recipes.fold_stages(cfg, root, _ARGUMENTS, items)
    stages += [*folds, recipes.labels_stage(cfg, plain, checkpoint, items, folds=folds)]
    for arm, own in arms.items():
        tuned = training_stages.derive(
            own, root / arm, MODEL__WEIGHTS=str(checkpoint), QUALITY__FILES=tuple(map(str, label_files(own)))
        )
        with_quality = tuned.MODEL.META_ARCHITECTURE != tuned.QSD.BASE or samplers.needs_labels(tuned)
        keys = training_stages.relevant_keys(tuned, () if with_quality else training_stages.NO_QUALITY)
        inputs = [checkpoint, *(label_files(own) if with_quality else [])]
        stages.append(_training_stage(arm, Trained(tuned, plain), data, keys, inputs))
    if pictures:
        checkpoints = {BASELINE: checkpoint, **{arm: root / arm / "model_final.pth" for arm in arms}}
        stages.append(recipes.report_stage(cfg, plain, checkpoints, name=PICTURES))
    return stages


def _qud_block(cfg: Any, arms: Mapping[str, Any]) -> list[Stage]:
    root = Path(cfg.OUTPUT_DIR)
    teacher, files = _teacher(cfg, root / TEACHER)
    items = training_stages.training_items(cfg)
    data = training_stages.data_digest(items)
    keys = training_stages.relevant_keys(teacher.cfg, training_stages.NO_QUALITY)
    stages = [
        _training_stage(
            TEACHER, teacher, training_stages.data_digest(training_stages.training_items(teacher.cfg)), keys
        )
    ]
    named = {"KD__MODEL_CONFIG": [str(files[0])], "KD__MODEL_WEIGHTS": [str(files[1])]}
    for arm, own in arms.items():
        student = training_stages.derive(own, root / arm)
        inputs: list[Path] = []
        if in_chain(own, "QUD"):
            student = training_stages.derive(student, root / arm, **named)
            inputs = teacher_files(student)
            if wants_cache(student):
                if _makes_cache(own):
                    if CACHE not in (stage.name for stage in stages):
                        stages += recipes_qud.cache_of_teacher(training_stages.derive(student, root / CACHE), items)
                    student = training_stages.derive(student, root / arm, QUD__CACHE__FOLDER=str(root / CACHE))
                inputs = [features_folder(student) / "cache.json"]
        plain = training_stages.derive(student, root / arm, MODEL__META_ARCHITECTURE=evaluated_architecture(student))
        own_keys = training_stages.relevant_keys(student, training_stages.NO_QUALITY)
        run = Trained(student, plain, teacher=root / TEACHER)
        stages.append(_training_stage(arm, run, data, own_keys, [*inputs, root / TEACHER / "results.json"]))
    return stages


def _qgface_block(cfg: Any, arms: Mapping[str, Any]) -> list[Stage]:
    root = Path(cfg.OUTPUT_DIR)
    data = training_stages.data_digest(training_stages.training_items(cfg))
    stages = []
    for arm, own in arms.items():
        trained = training_stages.derive(own, root / arm)
        plain = training_stages.derive(trained, root / arm, MODEL__META_ARCHITECTURE=evaluated_architecture(trained))
        keys = training_stages.relevant_keys(trained, training_stages.NO_QUALITY)
        stages.append(_training_stage(arm, Trained(trained, plain), data, keys))
    return stages


def _teacher(cfg: Any, folder: Path) -> tuple[Trained, tuple[Path, Path]]:
    """The teacher of all arms, trained or given, and the files that name it: config and checkpoint."""
    tests = {"DATASETS__TESTS": cfg.DATASETS.TESTS}
    if cfg.KD.MODEL_WEIGHTS:
        files = Path(cfg.KD.MODEL_CONFIG[0]), Path(cfg.KD.MODEL_WEIGHTS[0])
        theirs = training_stages.derive(teacher_config(str(files[0])), folder, MODEL__DEVICE=cfg.MODEL.DEVICE, **tests)
    else:
        files = folder / "config.yaml", folder / "model_final.pth"
        theirs = training_stages.derive(recipes_qud.teacher_stage_config(cfg, folder), folder, **tests)
    plain = training_stages.derive(theirs, folder, MODEL__META_ARCHITECTURE=evaluated_architecture(theirs))
    return Trained(theirs, plain, files[1] if cfg.KD.MODEL_WEIGHTS else None, teacher=folder), files


def _makes_cache(cfg: Any) -> bool:
    return wants_cache(cfg) and not cfg.QUD.CACHE.FOLDER


def _training_stage(name: str, run: Trained, data: str, keys: dict[str, Any], inputs: Sequence[Path] = ()) -> Stage:
    """Train a network, or take the one that is given, and evaluate it."""
    plain, given = run.plain, run.given
    faces = plain.DATASETS.TESTS[0] in face_tests.TESTS

    def work(folder: Path, resume: bool) -> None:
        if given is None:
            training_stages.train(run.cfg, _ARGUMENTS, resume=resume, evaluate=False)
            # Later stages read the last epoch only, and a study would fill the disk with the others.
            for file in folder.glob("model_*.pth"):
                if file.name != "model_final.pth":
                    file.unlink()
        checkpoint = given or folder / "model_final.pth"
        title = f"Evaluating {name}"
        if faces:
            trials, about = face_trials.evaluate(plain, checkpoint, folder, teacher=run.teacher, title=title)
            trials.save(folder / per_trial.FILE)
            _summarise(folder, run, trials, about)
        else:
            test_name = plain.DATASETS.TESTS[0]
            test = report.load_test(plain, test_name)
            root = dataset_folder(plain, test_name)
            queries = report.evaluate_per_query(plain, checkpoint, test, root, title=title)
            queries.save(folder / per_query.FILE)
            _summarise(folder, run, queries, test.quality_name)

    file = per_trial.FILE if faces else per_query.FILE
    outputs = [file, "results.json", *(["model_final.pth"] if given is None else [])]
    keys = {
        **keys,
        "TEST.METRIC": plain.TEST.METRIC,
        **({"DATASETS.TESTS": list(plain.DATASETS.TESTS), **recipes.evaluation_keys(plain)} if faces else {}),
    }
    return Stage(name, work, keys=keys, inputs=[*inputs, *([given] if given else [])], data=data, outputs=outputs)


def _summarise(folder: Path, run: Trained, outcome: PerQuery | PerTrial, quality: str) -> None:
    means = np.nanmean(outcome.metrics(), axis=0)
    summary = {
        "test": ", ".join(run.plain.DATASETS.TESTS),
        "quality": quality,
        "training_images": sum(len(training_set(run.cfg, each)[1]) for each in run.cfg.DATASETS.NAMES),
        **dict(zip(outcome.metric_names, means.tolist(), strict=True)),
        **_last_shares(folder),
        "environment": report_frame.environment(),
        "settings": training_stages.flatten(run.cfg),
    }
    write_atomically(folder / "results.json", json.dumps(summary, indent=1, default=str).encode())


def _last_shares(folder: Path) -> dict[str, float]:
    """QGFace's shares of low quality in the last epoch that wrote them, by their names in ``metrics.json``."""
    found: dict[str, float] = {}
    for event in StageFolder(folder).events:
        found |= {name: float(value) for name, value in event.items() if name in SHARES}
    return found
