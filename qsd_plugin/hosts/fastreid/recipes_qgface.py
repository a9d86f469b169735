"""The recipe ``qgface``: one training from scratch -> deploy. Its arms in an experiment share nothing but the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsd_plugin.core.stages import Stage
from qsd_plugin.hosts.fastreid import face_tests, samplers, training_stages
from qsd_plugin.hosts.fastreid.datasets import test_set
from qsd_plugin.hosts.fastreid.training_views import check_config

#: Name of the recipe and of its training stage.
NAME = "qgface"


def qgface_stages(cfg: Any, arguments: Any) -> list[Stage]:
    """The stages of one training of whatever architecture ``cfg`` names: QGFace, or a baseline of it.

    Args:
        cfg: The training's config; ``OUTPUT_DIR`` is the recipe's root.
        arguments: Parsed command line, for the host's log.

    Raises:
        QSDPluginError: Whatever is wrong with the network, its views or its data.
    """
    check(cfg)
    root = Path(cfg.OUTPUT_DIR)
    own = training_stages.derive(cfg, root / NAME)
    data = training_stages.data_digest(training_stages.training_items(cfg))
    keys = training_stages.relevant_keys(own, training_stages.NO_QUALITY)
    inputs = [Path(cfg.MODEL.WEIGHTS)] if cfg.MODEL.WEIGHTS else []
    stage = training_stages.training_stage(NAME, own, arguments, data, keys=keys, inputs=inputs)
    return [stage, *training_stages.deploy_stages(own, root / NAME)]


def check(cfg: Any) -> None:
    """Refuse what cannot be trained or tested, before anything is.

    Raises:
        QSDPluginError: Names it.
    """
    samplers.check_config(cfg)
    check_config(cfg)
    for name in cfg.DATASETS.TESTS:
        if name in face_tests.TESTS:
            face_tests.TESTS[name](cfg)
        else:
            test_set(cfg, name)
    training_stages.check_model(cfg)
