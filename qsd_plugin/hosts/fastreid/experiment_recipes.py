"""Arms of the recipes ``qsd``, ``qud`` and ``qgface`` in a block of an experiment, and the stages that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.stages import Stage
from qsd_plugin.hosts.fastreid import recipes, recipes_qud, samplers, training_stages
from qsd_plugin.hosts.fastreid.cached_features import features_folder
from qsd_plugin.hosts.fastreid.compose import evaluated_architecture, in_chain
from qsd_plugin.hosts.fastreid.experiment_training import ARGUMENTS, Trained, trained_stage
from qsd_plugin.hosts.fastreid.feature_caching import wants_cache
from qsd_plugin.hosts.fastreid.meta_arch.qud_teacher import teacher_config, teacher_files
from qsd_plugin.hosts.fastreid.quality import label_files, severity_inputs
from qsd_plugin.report.experiment import BASELINE, CACHE, LABELS, TEACHER

#: Names of stages, and of those that each is made from.
Needs = dict[str, tuple[str, ...]]


def qsd_needs(cfg: Any, arms: Mapping[str, Any]) -> Needs:
    """Baseline -> [folds] -> labels -> arms that fine-tune the baseline.

    Args:
        cfg: What all arms have in common.
        arms: Config of each arm; with none there are the shared stages alone.
    """
    folds = [f"fold{number}" for number in range(1, cfg.QUALITY.FOLDS + 1)]
    needs: Needs = {BASELINE: (), **dict.fromkeys(folds, ()), LABELS: (BASELINE, *folds)}
    return needs | {arm: (BASELINE, LABELS) if _with_quality(own) else (BASELINE,) for arm, own in arms.items()}


def qsd_block(cfg: Any, arms: Mapping[str, Any]) -> list[Stage]:
    """The stages of :func:`qsd_needs`; ``OUTPUT_DIR`` of all configs is the block's folder."""
    root = Path(cfg.OUTPUT_DIR)
    items = training_stages.training_items(cfg)
    data = training_stages.data_digest(items)
    plain = recipes.baseline_config(cfg, root / BASELINE)
    given = given_baseline(cfg)
    checkpoint = baseline_checkpoint(cfg)
    own_keys = training_stages.relevant_keys(plain, training_stages.NO_QUALITY)
    stages = [trained_stage(BASELINE, Trained(plain, plain, given), data, own_keys)]
    folds = recipes.fold_stages(cfg, root, ARGUMENTS, items)
    stages += [*folds, recipes.labels_stage(cfg, plain, checkpoint, items, folds=folds)]
    for arm, own in arms.items():
        tuned = training_stages.derive(
            own, root / arm, MODEL__WEIGHTS=str(checkpoint), QUALITY__FILES=tuple(map(str, label_files(own)))
        )
        with_quality = _with_quality(tuned)
        keys = training_stages.relevant_keys(tuned, () if with_quality else training_stages.NO_QUALITY)
        inputs = [checkpoint, *([*label_files(own), *severity_inputs(own)] if with_quality else [])]
        run = Trained(tuned, plain, before=[] if given else [root / BASELINE])
        stages.append(trained_stage(arm, run, data, keys, inputs))
    return stages


def given_baseline(cfg: Any) -> Path | None:
    """The checkpoint that is the baseline, where none is trained."""
    return Path(cfg.RECIPE.BASELINE.WEIGHTS) if cfg.RECIPE.BASELINE.WEIGHTS else None


def baseline_checkpoint(cfg: Any) -> Path:
    """Where a block's baseline lies."""
    return given_baseline(cfg) or Path(cfg.OUTPUT_DIR) / BASELINE / "model_final.pth"


def qud_needs(arms: Mapping[str, Any]) -> Needs:
    """Teacher -> [cache] -> arms that learn from it, or without it."""
    cached = {arm: in_chain(own, "QUD") and _makes_cache(own) for arm, own in arms.items()}
    needs: Needs = {TEACHER: ()}
    if any(cached.values()):
        needs[CACHE] = (TEACHER,)
    return needs | {arm: (TEACHER, CACHE) if cached[arm] else (TEACHER,) for arm in arms}


def qud_block(arms: Mapping[str, Any]) -> list[Stage]:
    """The stages of :func:`qud_needs`; ``OUTPUT_DIR`` of all configs is the block's folder."""
    cfg = next(iter(arms.values()))
    root = Path(cfg.OUTPUT_DIR)
    teacher, files = _teacher(cfg, root / TEACHER)
    items = training_stages.training_items(cfg)
    data = training_stages.data_digest(items)
    keys = training_stages.relevant_keys(teacher.cfg, training_stages.NO_QUALITY)
    theirs = training_stages.data_digest(training_stages.training_items(teacher.cfg))
    stages = [trained_stage(TEACHER, teacher, theirs, keys)]
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
        stages.append(trained_stage(arm, run, data, own_keys, [*inputs, root / TEACHER / "results.json"]))
    return stages


def check_teachers(arms: Mapping[str, Any]) -> None:
    """Refuse students of different teachers: a block has one.

    Raises:
        ConfigError: Names the arm.
    """
    first, *others = arms
    for key in ("MODEL_CONFIG", "MODEL_WEIGHTS"):
        for arm in others:
            if list(arms[arm].KD[key]) != list(arms[first].KD[key]):
                raise ConfigError(
                    f"KD.{key} of arm {arm}", value=list(arms[arm].KD[key]), expected=f"that of {first}: one teacher"
                )


def scratch_block(arms: Mapping[str, Any]) -> list[Stage]:
    """Arms from scratch, which share nothing but the data; ``OUTPUT_DIR`` of their configs is the block's folder."""
    stages = []
    for arm, own in arms.items():
        root = Path(own.OUTPUT_DIR)
        data = training_stages.data_digest(training_stages.training_items(own))
        trained = training_stages.derive(own, root / arm)
        plain = training_stages.derive(trained, root / arm, MODEL__META_ARCHITECTURE=evaluated_architecture(trained))
        keys = training_stages.relevant_keys(trained, training_stages.NO_QUALITY)
        stages.append(trained_stage(arm, Trained(trained, plain), data, keys))
    return stages


def in_order(stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """The stages of these names, in their order."""
    by_name = {stage.name: stage for stage in stages}
    return [by_name[name] for name in names]


def _with_quality(cfg: Any) -> bool:
    return bool(cfg.MODEL.META_ARCHITECTURE != cfg.QSD.BASE) or samplers.needs_labels(cfg)


def _teacher(cfg: Any, folder: Path) -> tuple[Trained, tuple[Path, Path]]:
    """The teacher of all arms, trained or given, and the files that name it: config and checkpoint."""
    levels = {f"EVALUATION__MIXED__{key}": value for key, value in cfg.EVALUATION.MIXED.items()}
    tests = {"DATASETS__TESTS": cfg.DATASETS.TESTS, **levels}
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
