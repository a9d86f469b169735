"""The stages behind ``tools/train_net.py``.

``qsd``: baseline -> [folds] -> labels -> [control] -> qsd -> report -> deploy. ``qud``: [teacher] ->
[cache] -> student -> deploy. ``qgface``: qgface -> deploy. ``dil``: [teacher] -> stage1 -> bank -> stage2 -> report.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.core.stages import FINAL_STAGES, Stage
from qsd_plugin.hosts.fastreid import face_report, face_tests, report, samplers
from qsd_plugin.hosts.fastreid.compose import base_architecture
from qsd_plugin.hosts.fastreid.datasets import Item, test_set
from qsd_plugin.hosts.fastreid.face_tests import host_flips
from qsd_plugin.hosts.fastreid.folds import check_folds
from qsd_plugin.hosts.fastreid.labelling import make_fold_labels, make_labels
from qsd_plugin.hosts.fastreid.quality import label_files, severity_inputs
from qsd_plugin.hosts.fastreid.training_stages import (
    NO_QUALITY,
    check_model,
    data_digest,
    deploy_stages,
    derive,
    flatten,
    relevant_keys,
    training_items,
    training_stage,
)

logger = logging.getLogger("fastreid.qsd_plugin.recipes")

_LABEL_KEYS = (
    *(f"QUALITY.{key}" for key in ("METHOD", "FOLDS", "POSITIVES", "NEGATIVES", "ROUNDS", "SIGNED")),
    "INPUT.SIZE_TEST",
    "SEED",
)


def build_recipe(cfg: Any, arguments: Any) -> list[Stage]:
    """The stages of ``cfg.RECIPE.NAME``.

    Args:
        cfg: The final stage's config; ``OUTPUT_DIR`` is the recipe's root.
        arguments: Parsed command line, for the host's log.

    Raises:
        ConfigError: Unknown recipe, or one of another method.
    """
    if cfg.RECIPE.NAME not in FINAL_STAGES:
        raise ConfigError("RECIPE.NAME", value=cfg.RECIPE.NAME, remedy=did_you_mean(cfg.RECIPE.NAME, FINAL_STAGES))
    if cfg.RECIPE.NAME == "qsd":
        return _qsd_stages(cfg, arguments)
    # All are made of what is in this module.
    from qsd_plugin.hosts.fastreid.recipes_dil import dil_stages
    from qsd_plugin.hosts.fastreid.recipes_qgface import qgface_stages
    from qsd_plugin.hosts.fastreid.recipes_qud import qud_stages

    return {"qud": qud_stages, "qgface": qgface_stages, "dil": dil_stages}[cfg.RECIPE.NAME](cfg, arguments)


def _qsd_stages(cfg: Any, arguments: Any) -> list[Stage]:
    check_final_stage(cfg, faces=True)
    root = Path(cfg.OUTPUT_DIR)
    items = training_items(cfg)
    data = data_digest(items)
    baseline = baseline_config(cfg, root / "baseline")
    given = cfg.RECIPE.BASELINE.WEIGHTS
    checkpoint = Path(given) if given else root / "baseline" / "model_final.pth"
    fine_tune = {"MODEL__WEIGHTS": str(checkpoint), "QUALITY__FILES": tuple(map(str, label_files(cfg)))}
    qsd = derive(cfg, root / "qsd", **fine_tune)
    control = derive(cfg, root / "control", MODEL__META_ARCHITECTURE=cfg.QSD.BASE, **fine_tune)

    stages = []
    if not given:
        stages.append(
            training_stage(
                "baseline",
                baseline,
                arguments,
                data,
                keys=relevant_keys(baseline, NO_QUALITY),
            )
        )
    folds = fold_stages(cfg, root, arguments, items)
    stages += [*folds, labels_stage(cfg, baseline, checkpoint, items, folds=folds)]
    if cfg.RECIPE.CONTROL:
        # The control differs from qsd in the loss only, so a sampler that reads labels is its sampler too.
        labelled = samplers.needs_labels(cfg)
        keys = relevant_keys(control, ("QSD.",) if labelled else NO_QUALITY)
        used = [checkpoint, *label_files(cfg)] if labelled else [checkpoint]
        stages.append(training_stage("control", control, arguments, data, keys=keys, inputs=used))
    inputs = [checkpoint, *label_files(cfg), *severity_inputs(cfg)]
    stages.append(training_stage("qsd", qsd, arguments, data, keys=relevant_keys(qsd, ()), inputs=inputs))
    trained = [stage.name for stage in stages if stage.name in ("control", "qsd")]
    arms = {"baseline": checkpoint, **{name: root / name / "model_final.pth" for name in trained}}
    stages.append(report_stage(cfg, baseline, arms))
    return stages + deploy_stages(qsd, root / "qsd")


def baseline_config(cfg: Any, output_dir: Path, **values: Any) -> Any:
    """The config of the network that labels the images: ``cfg`` without QSD, trained as ``RECIPE.BASELINE`` says.

    Args:
        cfg: The final stage's config.
        output_dir: The stage's folder.
        values: More settings, as for :func:`derive`.
    """
    return derive(
        cfg,
        output_dir,
        MODEL__META_ARCHITECTURE=base_architecture(cfg),
        MODEL__WEIGHTS="",
        SOLVER__MAX_EPOCH=cfg.RECIPE.BASELINE.MAX_EPOCH,
        SOLVER__BASE_LR=cfg.RECIPE.BASELINE.BASE_LR,
        SOLVER__STEPS=cfg.RECIPE.BASELINE.STEPS,
        SOLVER__WARMUP_ITERS=cfg.RECIPE.BASELINE.WARMUP_ITERS,
        DATALOADER__SAMPLER_TRAIN=samplers.without_labels(cfg),
        **values,
    )


def labels_stage(
    cfg: Any, baseline: Any, checkpoint: Path, items: Mapping[str, list[Item]], *, folds: Sequence[Stage] = ()
) -> Stage:
    """The stage ``labels``: labels of ``items`` by the network of ``baseline``.

    Args:
        cfg: The final stage's config; ``OUTPUT_DIR`` is the recipe's root.
        baseline: Config of the plain network.
        checkpoint: Its weights; not used where there are folds.
        items: Training items by data-set name.
        folds: The stages that train a network per fold, for cross-fitted labels.
    """
    embedders = [Path(cfg.OUTPUT_DIR) / stage.name / "model_final.pth" for stage in folds] or [checkpoint]

    def run(folder: Path, resume: bool) -> None:
        if folds:
            make_fold_labels(baseline, embedders, items, folder)
        else:
            make_labels(baseline, checkpoint, items, folder)

    return Stage(
        "labels",
        run,
        keys={key: value for key, value in flatten(cfg).items() if key in _LABEL_KEYS},
        inputs=embedders,
        data=data_digest(items),
        outputs=[] if cfg.QUALITY.FILES else [f"{name}.npz" for name in items],
    )


def report_stage(cfg: Any, baseline: Any, arms: dict[str, Path], *, name: str = "report") -> Stage:
    """The last stage: every arm's checkpoint on the test sets of ``cfg``, with pictures."""
    of_faces = all(test in face_tests.TESTS for test in cfg.DATASETS.TESTS)
    write = face_report.write_report if of_faces else report.write_report
    return Stage(
        name,
        lambda folder, resume: write(baseline, cfg, arms, label_files(cfg), folder),
        keys={"TEST.METRIC": cfg.TEST.METRIC, "DATASETS.TESTS": list(cfg.DATASETS.TESTS), **evaluation_keys(cfg)},
        inputs=list(arms.values()),
        outputs=["results.json", "results.md"],
    )


def evaluation_keys(cfg: Any) -> dict[str, Any]:
    """Settings that change what face test sets of ``cfg`` measure and nothing else; none of sets that have none."""
    mixed = any(name in face_tests.WITH_LEVELS for name in cfg.DATASETS.TESTS)
    keys = {key: value for key, value in flatten(cfg).items() if mixed and key.startswith("EVALUATION.")}
    return keys if host_flips(cfg) or not cfg.TEST.FLIP.ENABLED else {**keys, "TEST.FUSION": cfg.TEST.FUSION}


def fold_stages(cfg: Any, root: Path, arguments: Any, items: Mapping[str, list[Item]]) -> list[Stage]:
    """One baseline per fold of ``QUALITY.FOLDS``, trained without that fold's identities; none when that is 0.

    Raises:
        ConfigError: The identities cannot be divided into so many folds.
    """
    count = cfg.QUALITY.FOLDS
    if not count:
        return []
    check_folds(cfg, items)
    stages = []
    for fold in range(1, count + 1):
        name = f"fold{fold}"
        config = baseline_config(cfg, root / name, DATA__FOLDS=count, DATA__FOLD=fold)
        stages.append(
            training_stage(
                name,
                config,
                arguments,
                data_digest(items),
                keys=relevant_keys(config, NO_QUALITY),
            )
        )
    return stages


def check_final_stage(cfg: Any, *, faces: bool = False) -> None:
    """Build the final stage's model once, so that a mistake in it does not come to light after the baseline's hours.

    Args:
        cfg: The final stage's config.
        faces: Whether face test sets will do.

    Raises:
        QSDPluginError: Whatever is wrong with the architecture, its levels or its options.
    """
    samplers.check_config(cfg)
    of_faces = [name for name in cfg.DATASETS.TESTS if name in face_tests.TESTS]
    if of_faces and not faces:
        raise ConfigError(
            "DATASETS.TESTS of an experiment",
            value=of_faces,
            expected="person re-identification sets, which are compared query by query",
            remedy="Train with tools/train_net.py, whose report does not need queries.",
        )
    if of_faces and len(of_faces) < len(cfg.DATASETS.TESTS):
        raise ConfigError(
            "DATASETS.TESTS of a recipe",
            value=list(cfg.DATASETS.TESTS),
            expected="either face test sets or person re-identification sets, which differ in their reports",
            remedy="Evaluate the others afterwards with --eval-only.",
        )
    for name in cfg.DATASETS.TESTS:
        if name in face_tests.TESTS:
            face_tests.build_test(cfg, name)
        else:
            test_set(cfg, name)
    check_model(cfg)
