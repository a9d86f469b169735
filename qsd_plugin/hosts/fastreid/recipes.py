"""The stages behind ``tools/train_net.py``: baseline -> labels -> [control] -> qsd -> report."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsd_plugin.core.distributed import rank
from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.core.files import write_atomically
from qsd_plugin.core.stages import Stage
from qsd_plugin.hosts.fastreid import extract, report
from qsd_plugin.hosts.fastreid.datasets import Item, dataset_folder, test_set, training_set
from qsd_plugin.hosts.fastreid.quality import label_files
from qsd_plugin.quality import sdd_fiqa_labels
from qsd_plugin.quality.labels import label_key

logger = logging.getLogger("fastreid.qsd_plugin.recipes")

#: Config keys that do not change what a training stage produces.
_INDIFFERENT = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "TEST.",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "RECIPE.",
)
_NO_QUALITY = ("QSD.", "QUALITY.")
_LABEL_KEYS = ("QUALITY.POSITIVES", "QUALITY.NEGATIVES", "QUALITY.ROUNDS", "QUALITY.SIGNED", "INPUT.SIZE_TEST", "SEED")


def build_recipe(cfg: Any, arguments: Any) -> list[Stage]:
    """The stages of ``cfg.RECIPE.NAME``.

    Args:
        cfg: The final stage's config; ``OUTPUT_DIR`` is the recipe's root.
        arguments: Parsed command line, for the host's log.

    Raises:
        ConfigError: Unknown recipe.
    """
    if cfg.RECIPE.NAME != "qsd":
        raise ConfigError("RECIPE.NAME", value=cfg.RECIPE.NAME, remedy=did_you_mean(cfg.RECIPE.NAME, ["qsd"]))
    check_final_stage(cfg)
    root = Path(cfg.OUTPUT_DIR)
    items = {name: training_set(cfg, name, combineall=cfg.DATASETS.COMBINEALL)[1] for name in cfg.DATASETS.NAMES}
    data = _digest(items)
    baseline = derive(
        cfg,
        root / "baseline",
        MODEL__META_ARCHITECTURE=cfg.QSD.BASE,
        MODEL__WEIGHTS="",
        SOLVER__MAX_EPOCH=cfg.RECIPE.BASELINE.MAX_EPOCH,
        SOLVER__BASE_LR=cfg.RECIPE.BASELINE.BASE_LR,
        SOLVER__STEPS=cfg.RECIPE.BASELINE.STEPS,
        SOLVER__WARMUP_ITERS=cfg.RECIPE.BASELINE.WARMUP_ITERS,
    )
    given = cfg.RECIPE.BASELINE.WEIGHTS
    checkpoint = Path(given) if given else root / "baseline" / "model_final.pth"
    fine_tune = {"MODEL__WEIGHTS": str(checkpoint), "QUALITY__FILES": tuple(map(str, label_files(cfg)))}
    qsd = derive(cfg, root / "qsd", **fine_tune)
    control = derive(cfg, root / "control", MODEL__META_ARCHITECTURE=cfg.QSD.BASE, **fine_tune)

    stages = []
    if not given:
        stages.append(_training_stage("baseline", baseline, arguments, data, keys=_without(baseline, _NO_QUALITY)))
    stages.append(
        Stage(
            "labels",
            lambda folder, resume: make_labels(baseline, checkpoint, items, folder),
            keys={key: value for key, value in flatten(cfg).items() if key in _LABEL_KEYS},
            inputs=[checkpoint],
            data=data,
            outputs=[] if cfg.QUALITY.FILES else [f"{name}.npz" for name in items],
        )
    )
    if cfg.RECIPE.CONTROL:
        keys = _without(control, _NO_QUALITY)
        stages.append(_training_stage("control", control, arguments, data, keys=keys, inputs=[checkpoint]))
    inputs = [checkpoint, *label_files(cfg)]
    stages.append(_training_stage("qsd", qsd, arguments, data, keys=_without(qsd, ()), inputs=inputs))
    trained = [stage.name for stage in stages if stage.name not in ("baseline", "labels")]
    arms = {"baseline": checkpoint, **{name: root / name / "model_final.pth" for name in trained}}
    stages.append(
        Stage(
            "report",
            lambda folder, resume: report.write_report(baseline, cfg, arms, label_files(cfg), folder),
            keys={"TEST.METRIC": cfg.TEST.METRIC, "DATASETS.TESTS": list(cfg.DATASETS.TESTS)},
            inputs=list(arms.values()),
            outputs=["results.json", "results.md"],
        )
    )
    return stages


def check_final_stage(cfg: Any) -> None:
    """Build the final stage's model once, so that a mistake in it does not come to light after the baseline's hours.

    Raises:
        QSDPluginError: Whatever is wrong with the architecture, its levels or its options.
    """
    from fastreid.modeling.meta_arch import build_model

    for name in cfg.DATASETS.TESTS:
        test_set(cfg, name)
    trial = cfg.clone()
    trial.defrost()
    trial.MODEL.DEVICE = "cpu"
    trial.MODEL.BACKBONE.PRETRAIN = False
    trial.MODEL.HEADS.NUM_CLASSES = trial.MODEL.HEADS.NUM_CLASSES or 2
    build_model(trial)


def train(cfg: Any, arguments: Any, *, resume: bool) -> dict[str, Any]:
    """One training with the host's ``DefaultTrainer``; returns the host's results of the last evaluation."""
    from fastreid import engine

    _forget_log_handlers()
    engine.default_setup(cfg, arguments)
    trainer = engine.DefaultTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    if trainer.start_epoch >= trainer.max_epoch:
        logger.info("All %d epochs were trained earlier; evaluating.", trainer.max_epoch)
        results = trainer.test(trainer.cfg, trainer.model)
    else:
        results = trainer.train()
    return dict(results or {})


def evaluate(cfg: Any, arguments: Any) -> dict[str, Any]:
    """Evaluate ``MODEL.WEIGHTS`` or, when it is empty, the last training stage of the recipe."""
    from fastreid import engine

    weights = Path(cfg.MODEL.WEIGHTS or Path(cfg.OUTPUT_DIR, cfg.RECIPE.NAME, "model_final.pth"))
    engine.default_setup(cfg, arguments)
    plain = derive(cfg, Path(cfg.OUTPUT_DIR), MODEL__META_ARCHITECTURE=deployed_architecture(cfg))
    return dict(engine.DefaultTrainer.test(cfg, extract.load_model(plain, weights)))


def deployed_architecture(cfg: Any) -> str:
    """The host architecture under a composed one; QSD adds nothing to the network that is evaluated."""
    name = str(cfg.MODEL.META_ARCHITECTURE)
    return str(cfg.QSD.BASE) if name == "QSD" else name


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


def make_labels(cfg: Any, checkpoint: Path, items: dict[str, list[Item]], folder: Path) -> None:
    """SDD-FIQA labels of training sets, as ``<folder>/<data set>.npz``.

    Args:
        cfg: Config of the plain network that embeds the images.
        checkpoint: Its weights.
        items: Training items by data-set name.
        folder: Where to write.
    """
    if rank() != 0:
        return
    model = extract.load_model(cfg, checkpoint)
    for name, entries in items.items():
        embeddings = extract.embed(cfg, model, entries, title=f"Embedding {name}")
        root = dataset_folder(cfg, name)
        labels = sdd_fiqa_labels(
            embeddings,
            [pid for _, pid, _ in entries],
            keys=[label_key(path, root=root, dataset=name) for path, _, _ in entries],
            positives=cfg.QUALITY.POSITIVES,
            negatives=cfg.QUALITY.NEGATIVES,
            rounds=cfg.QUALITY.ROUNDS,
            seed=max(cfg.SEED, 0),
            signed=cfg.QUALITY.SIGNED,
        )
        labels = labels.with_meta(dataset=name, extractor=str(checkpoint))
        labels.save(folder / f"{name}.npz")
        logger.info("Labels of %s: %d images, %s", name, len(labels), labels.meta)


def _training_stage(
    name: str, cfg: Any, arguments: Any, data: str, *, keys: dict[str, Any], inputs: Sequence[Path] = ()
) -> Stage:
    def run(folder: Path, resume: bool) -> None:
        results = train(cfg, arguments, resume=resume)
        if rank() == 0:
            write_atomically(folder / "results.json", json.dumps(results, default=float, indent=1).encode())

    return Stage(name, run, keys=keys, inputs=inputs, data=data, outputs=["model_final.pth", "results.json"])


def _without(cfg: Any, more: Sequence[str]) -> dict[str, Any]:
    prefixes = (*_INDIFFERENT, *more)
    return {key: value for key, value in flatten(cfg).items() if not key.startswith(prefixes)}


def _digest(items: dict[str, list[Item]]) -> str:
    digest = hashlib.sha256()
    for name, entries in items.items():
        for path, pid, _ in entries:
            digest.update(f"{name}\t{Path(path).name}\t{pid}\t{Path(path).stat().st_size}\n".encode())
    return digest.hexdigest()


def _forget_log_handlers() -> None:
    """Let the next stage's ``setup_logger`` start afresh; else every line is printed once per stage so far."""
    for handler in list(logging.getLogger("fastreid").handlers):
        logging.getLogger("fastreid").removeHandler(handler)
