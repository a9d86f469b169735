"""The stages behind ``tools/train_net.py``.

``qsd``: baseline -> [folds] -> labels -> [control] -> qsd -> report -> deploy. ``qud``: [teacher] ->
[cache] -> student -> deploy. ``qgface``: qgface -> deploy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsd_plugin.core.distributed import rank, world_size
from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.core.files import write_atomically
from qsd_plugin.core.stages import Stage
from qsd_plugin.hosts.fastreid import deploy, deployed, extract, face_report, face_tests, report, samplers
from qsd_plugin.hosts.fastreid.compose import base_architecture, in_chain
from qsd_plugin.hosts.fastreid.datasets import Item, stored_sizes, test_set, training_set
from qsd_plugin.hosts.fastreid.face_mixed import MIXED
from qsd_plugin.hosts.fastreid.face_tests import host_flips
from qsd_plugin.hosts.fastreid.folds import check_folds
from qsd_plugin.hosts.fastreid.labelling import make_fold_labels, make_labels
from qsd_plugin.hosts.fastreid.quality import label_files
from qsd_plugin.hosts.fastreid.training_views import wants_views

logger = logging.getLogger("fastreid.qsd_plugin.recipes")

#: Config keys that do not change what a training stage produces.
_INDIFFERENT = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "TEST.",
    "EVALUATION.",
    "DATA.CRLFW",
    "DATA.IJBB",
    "DATA.IJBC",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "RECIPE.",
)
#: The training stage whose network a recipe is for.
_FINAL = {"qsd": "qsd", "qud": "student", "qgface": "qgface"}
_NO_QUALITY = ("QSD.", "QUALITY.")
#: Heads that read ``QGFACE``.
QUALITY_HEADS = ("AdaFaceHead", "QGFaceHead")
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
    if cfg.RECIPE.NAME not in _FINAL:
        raise ConfigError("RECIPE.NAME", value=cfg.RECIPE.NAME, remedy=did_you_mean(cfg.RECIPE.NAME, _FINAL))
    if cfg.RECIPE.NAME == "qsd":
        return _qsd_stages(cfg, arguments)
    # Both are made of what is in this module.
    from qsd_plugin.hosts.fastreid.recipes_qgface import qgface_stages
    from qsd_plugin.hosts.fastreid.recipes_qud import qud_stages

    return (qud_stages if cfg.RECIPE.NAME == "qud" else qgface_stages)(cfg, arguments)


def _qsd_stages(cfg: Any, arguments: Any) -> list[Stage]:
    check_final_stage(cfg, faces=True)
    root = Path(cfg.OUTPUT_DIR)
    items = _training_items(cfg)
    data = _digest(items)
    baseline = baseline_config(cfg, root / "baseline")
    given = cfg.RECIPE.BASELINE.WEIGHTS
    checkpoint = Path(given) if given else root / "baseline" / "model_final.pth"
    fine_tune = {"MODEL__WEIGHTS": str(checkpoint), "QUALITY__FILES": tuple(map(str, label_files(cfg)))}
    qsd = derive(cfg, root / "qsd", **fine_tune)
    control = derive(cfg, root / "control", MODEL__META_ARCHITECTURE=cfg.QSD.BASE, **fine_tune)

    stages = []
    if not given:
        stages.append(_training_stage("baseline", baseline, arguments, data, keys=_without(baseline, _NO_QUALITY)))
    folds = fold_stages(cfg, root, arguments, items)
    stages += [*folds, labels_stage(cfg, baseline, checkpoint, items, folds=folds)]
    if cfg.RECIPE.CONTROL:
        # The control differs from qsd in the loss only, so a sampler that reads labels is its sampler too.
        labelled = samplers.needs_labels(cfg)
        keys = _without(control, ("QSD.",) if labelled else _NO_QUALITY)
        used = [checkpoint, *label_files(cfg)] if labelled else [checkpoint]
        stages.append(_training_stage("control", control, arguments, data, keys=keys, inputs=used))
    inputs = [checkpoint, *label_files(cfg)]
    stages.append(_training_stage("qsd", qsd, arguments, data, keys=_without(qsd, ()), inputs=inputs))
    trained = [stage.name for stage in stages if stage.name in ("control", "qsd")]
    arms = {"baseline": checkpoint, **{name: root / name / "model_final.pth" for name in trained}}
    stages.append(report_stage(cfg, baseline, arms))
    return stages + _deploy_stages(qsd, root / "qsd")


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
        data=_digest(items),
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
    mixed = any(name in MIXED for name in cfg.DATASETS.TESTS)
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
        stages.append(_training_stage(name, config, arguments, _digest(items), keys=_without(config, _NO_QUALITY)))
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


def check_model(cfg: Any, **values: Any) -> None:
    """Build the model of ``cfg`` once, on the CPU; ``values`` as for :func:`derive`.

    Raises:
        QSDPluginError: Whatever is wrong with it.
    """
    from fastreid.modeling.meta_arch import build_model

    trial = derive(cfg, Path(cfg.OUTPUT_DIR), MODEL__DEVICE="cpu", MODEL__BACKBONE__PRETRAIN=False, **values)
    trial.defrost()
    trial.MODEL.HEADS.NUM_CLASSES = trial.MODEL.HEADS.NUM_CLASSES or max(2, world_size())
    build_model(trial)


def train(cfg: Any, arguments: Any, *, resume: bool, evaluate: bool = True) -> dict[str, Any]:
    """One training with the host's ``DefaultTrainer``; returns the host's results of the last evaluation.

    Args:
        cfg: Of the training.
        arguments: Parsed command line, for the host's log.
        resume: Go on from the last checkpoint in ``OUTPUT_DIR``.
        evaluate: False: the host never evaluates and the result is empty.
    """
    from fastreid import engine

    class Untested(engine.DefaultTrainer):  # type: ignore[misc]
        @classmethod
        def test(cls, cfg: Any, model: Any) -> dict[str, Any]:
            return {}

    _forget_log_handlers()
    engine.default_setup(cfg, arguments)
    trainer = (engine.DefaultTrainer if evaluate else Untested)(cfg)
    trainer.resume_or_load(resume=resume)
    if trainer.start_epoch >= trainer.max_epoch:
        logger.info("All %d epochs were trained earlier; evaluating.", trainer.max_epoch)
        results = trainer.test(trainer.cfg, trainer.model)
    else:
        results = trainer.train()
    return dict(results or {})


def train_and_deploy(cfg: Any, arguments: Any, *, resume: bool) -> dict[str, Any]:
    """:func:`train`, then the folder ``deploy`` in ``OUTPUT_DIR``, unless the network needs the plugin."""
    results = train(cfg, arguments, resume=resume)
    output = Path(cfg.OUTPUT_DIR)
    try:
        _deploy(cfg, output / "model_final.pth", results, output / deployed.FOLDER)
    except ConfigError as error:
        logger.warning("No deploy folder: %s", error)
    return results


def evaluate(cfg: Any, arguments: Any) -> dict[str, Any]:
    """Evaluate ``MODEL.WEIGHTS`` or, when it is empty, the last training stage of the recipe."""
    from fastreid import engine

    weights = Path(cfg.MODEL.WEIGHTS or Path(cfg.OUTPUT_DIR, _FINAL.get(cfg.RECIPE.NAME, ""), "model_final.pth"))
    engine.default_setup(cfg, arguments)
    plain = derive(cfg, Path(cfg.OUTPUT_DIR), MODEL__META_ARCHITECTURE=base_architecture(cfg))
    return dict(engine.DefaultTrainer.test(cfg, extract.load_model(plain, weights)))


def derive(cfg: Any, output_dir: Path, **values: Any) -> Any:
    """A frozen copy of ``cfg`` for one stage; ``A__B=value`` sets ``A.B``."""
    derived = cfg.clone()
    derived.defrost()
    derived.OUTPUT_DIR = str(output_dir)
    for name, value in values.items():
        *path, last = name.split("__")
        node = derived
        for part in path:
            node = node[part]
        node[last] = value
    derived.freeze()
    return derived


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """All values of a config by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _training_stage(
    name: str, cfg: Any, arguments: Any, data: str, *, keys: dict[str, Any], inputs: Sequence[Path] = ()
) -> Stage:
    def run(folder: Path, resume: bool) -> None:
        results = train(cfg, arguments, resume=resume)
        if rank() == 0:
            write_atomically(folder / "results.json", json.dumps(results, default=float, indent=1).encode())

    return Stage(name, run, keys=keys, inputs=inputs, data=data, outputs=["model_final.pth", "results.json"])


def _deploy_stages(cfg: Any, trained: Path) -> list[Stage]:
    """The stage that writes the deploy folder from a finished training stage; none when the network needs the plugin.

    Args:
        cfg: Of the training stage.
        trained: Its folder.
    """
    try:
        plain = deploy.plain_config(cfg)
    except ConfigError as error:
        logger.warning("There will be no deploy folder: %s", error)
        return []
    checkpoint, scores = trained / "model_final.pth", trained / "results.json"

    def run(folder: Path, resume: bool) -> None:
        _deploy(cfg, checkpoint, json.loads(scores.read_text(encoding="utf-8")), folder)

    keys = _without(plain, ()) | {"TEST.METRIC": cfg.TEST.METRIC}
    outputs = [deployed.CONFIG, deployed.WEIGHTS, deployed.CONTRACT, deployed.RESULTS]
    return [Stage(deployed.FOLDER, run, keys=keys, inputs=[checkpoint, scores], outputs=outputs)]


def _deploy(cfg: Any, checkpoint: Path, metrics: dict[str, Any], folder: Path) -> None:
    if rank() != 0:
        return
    settings = json.dumps(_without(cfg, ()), sort_keys=True, default=str)
    digest = hashlib.sha256(settings.encode()).hexdigest()
    deploy.write_deploy(folder, cfg, checkpoint, metrics=metrics, config_hash=digest, command=sys.argv)
    logger.info("The network for use without the plugin: %s", folder)


def _without(cfg: Any, more: Sequence[str]) -> dict[str, Any]:
    unused = [f"{node}." for node, used in (("QUD", in_chain(cfg, "QUD")), ("QGFACE", reads_qgface(cfg))) if not used]
    prefixes = (*_INDIFFERENT, *more, *unused)
    return {key: value for key, value in flatten(cfg).items() if not key.startswith(prefixes)}


def reads_qgface(cfg: Any) -> bool:
    """Whether a training depends on the node ``QGFACE``: by its architecture, its head or its views."""
    if "QGFACE" not in cfg:  # the host's own keys
        return False
    return in_chain(cfg, "QGFace") or cfg.MODEL.HEADS.NAME in QUALITY_HEADS or wants_views(cfg)


def _training_items(cfg: Any) -> dict[str, list[Item]]:
    return {name: training_set(cfg, name, combineall=cfg.DATASETS.COMBINEALL)[1] for name in cfg.DATASETS.NAMES}


def _digest(items: Mapping[str, list[Item]]) -> str:
    digest = hashlib.sha256()
    for name, entries in items.items():
        sizes = stored_sizes(path for path, _, _ in entries)
        for (path, pid, _), size in zip(entries, sizes, strict=True):
            digest.update(f"{name}\t{Path(path).name}\t{pid}\t{size}\n".encode())
    return digest.hexdigest()


def _forget_log_handlers() -> None:
    """Let the next stage's ``setup_logger`` start afresh; else every line is printed once per stage so far."""
    for handler in list(logging.getLogger("fastreid").handlers):
        logging.getLogger("fastreid").removeHandler(handler)
