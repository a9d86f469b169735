"""One training as a stage of a recipe or of an experiment: what it depends on, how it runs, what it leaves."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsd_plugin.core.distributed import rank, world_size
from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.core.stages import FINAL_STAGES, Stage
from qsd_plugin.hosts.fastreid import deploy, deployed, extract
from qsd_plugin.hosts.fastreid.compose import base_architecture, in_chain
from qsd_plugin.hosts.fastreid.datasets import Item, stored_sizes, training_set
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import is_dil
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
    "DIL.STAGE1_OPTIONS.SHEET_EVERY",
    "RECIPE.",
)
#: Nodes that a training without quality labels does not depend on.
NO_QUALITY = ("QSD.", "QUALITY.")
#: Heads that read ``QGFACE``.
QUALITY_HEADS = ("AdaFaceHead", "QGFaceHead")


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

    weights = Path(cfg.MODEL.WEIGHTS or Path(cfg.OUTPUT_DIR, FINAL_STAGES.get(cfg.RECIPE.NAME, ""), "model_final.pth"))
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


def training_stage(
    name: str, cfg: Any, arguments: Any, data: str, *, keys: dict[str, Any], inputs: Sequence[Path] = ()
) -> Stage:
    def run(folder: Path, resume: bool) -> None:
        results = train(cfg, arguments, resume=resume)
        if rank() == 0:
            write_atomically(folder / "results.json", json.dumps(results, default=float, indent=1).encode())

    return Stage(name, run, keys=keys, inputs=inputs, data=data, outputs=["model_final.pth", "results.json"])


def deploy_stages(cfg: Any, trained: Path) -> list[Stage]:
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

    keys = relevant_keys(plain, ()) | {"TEST.METRIC": cfg.TEST.METRIC}
    outputs = [deployed.CONFIG, deployed.WEIGHTS, deployed.CONTRACT, deployed.RESULTS]
    return [Stage(deployed.FOLDER, run, keys=keys, inputs=[checkpoint, scores], outputs=outputs)]


def _deploy(cfg: Any, checkpoint: Path, metrics: dict[str, Any], folder: Path) -> None:
    if rank() != 0:
        return
    settings = json.dumps(relevant_keys(cfg, ()), sort_keys=True, default=str)
    digest = hashlib.sha256(settings.encode()).hexdigest()
    deploy.write_deploy(folder, cfg, checkpoint, metrics=metrics, config_hash=digest, command=sys.argv)
    logger.info("The network for use without the plugin: %s", folder)


def relevant_keys(cfg: Any, more: Sequence[str]) -> dict[str, Any]:
    nodes = {
        "QUD": in_chain(cfg, "QUD"),
        "QGFACE": reads_qgface(cfg),
        "DIL": is_dil(cfg) or ("QUALITY" in cfg and cfg.QUALITY.SOURCE == "dil_severity"),
        "INPUT.DEGRADE": "DEGRADE" in cfg.INPUT and cfg.INPUT.DEGRADE.ENABLED,
    }
    unused = [f"{node}." for node, used in nodes.items() if not used]
    prefixes = (*_INDIFFERENT, *more, *unused)
    return {key: value for key, value in flatten(cfg).items() if not key.startswith(prefixes)}


def reads_qgface(cfg: Any) -> bool:
    """Whether a training depends on the node ``QGFACE``: by its architecture, its head or its views."""
    if "QGFACE" not in cfg:  # the host's own keys
        return False
    return in_chain(cfg, "QGFace") or cfg.MODEL.HEADS.NAME in QUALITY_HEADS or wants_views(cfg)


def training_items(cfg: Any) -> dict[str, list[Item]]:
    return {name: training_set(cfg, name, combineall=cfg.DATASETS.COMBINEALL)[1] for name in cfg.DATASETS.NAMES}


def data_digest(items: Mapping[str, list[Item]]) -> str:
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
