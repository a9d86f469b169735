"""Writing ``deploy/``: a finished run as the plain host can use it, without the plugin.

``config.yaml`` holds keys and names of the host only, ``model.pth`` the base architecture's tensors only,
``contract.json`` what goes into the network and what comes out, ``results.json`` what it scored and how it was made.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.core.files import check_writable
from qsd_plugin.hosts.fastreid import deployed, face_tests, report_frame
from qsd_plugin.hosts.fastreid.baseline_losses import PLUGIN_LOSSES
from qsd_plugin.hosts.fastreid.compat.checkpoint_files import read_checkpoint
from qsd_plugin.hosts.fastreid.compose import evaluated_architecture
from qsd_plugin.hosts.fastreid.registries import host_registries, is_plugins
from qsd_plugin.hosts.fastreid.sharded_checkpoints import ROWS, SHARDS
from qsd_plugin.hosts.fastreid.sharded_head import ShardedEmbeddingHead
from qsd_plugin.report.installation import version

#: Keys that concern the training alone; the deployed config has the host's defaults, which name no file.
_OF_TRAINING = ("MODEL.WEIGHTS", "MODEL.BACKBONE.PRETRAIN", "MODEL.BACKBONE.PRETRAIN_PATH", "KD", "OUTPUT_DIR")

_CHECKPOINTS_REMAIN = "The run's own checkpoints remain; load them with the plugin."


def write_deploy(
    folder: Path, cfg: Any, checkpoint: Path, *, metrics: Mapping[str, Any], config_hash: str, command: list[str]
) -> None:
    """Write the deploy folder of a finished run, complete or not at all; an older one is replaced.

    The files are loaded back before the folder gets its name.

    Args:
        folder: Where to; its parent is the run's folder.
        cfg: Config of the training.
        checkpoint: The weights it ended with.
        metrics: Of the last evaluation.
        config_hash: Digest of the settings that the result depends on.
        command: The command line of the run.

    Raises:
        ConfigError: The plain host cannot build the network, see :func:`plain_config`.
        CheckpointError: The checkpoint lacks tensors of the network.
        DataError: The folder cannot be written.
    """
    plain = plain_config(cfg)
    state, classes = _weights(cfg, plain, read_checkpoint(checkpoint))
    plain.MODEL.HEADS.NUM_CLASSES = _rows(plain, state)
    model = deployed.build(_with_plugin_keys(plain))
    names = model.state_dict().keys()
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(
            f"Checkpoint {checkpoint}", value=f"no {missing[0]}", expected=f"all tensors of {type(model).__name__}"
        )
    state = {name: state[name] for name in names}
    deployed.load_strictly(model, state, source=str(checkpoint))
    if any(plain.MODEL.HEADS[key] != cfg.MODEL.HEADS[key] for key in ("NAME", "CLS_LAYER")):
        _require_same_embedding(cfg, plain, model, state)
    check_writable(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".deploy-") as temporary:
        written = Path(temporary) / folder.name
        written.mkdir()
        (written / deployed.CONFIG).write_text(plain.dump(), encoding="utf-8")
        torch.save({"model": state}, written / deployed.WEIGHTS)
        _write_json(written / deployed.CONTRACT, contract(plain, model) | {"classes": classes})
        _write_json(written / deployed.RESULTS, results(cfg, metrics, config_hash, command))
        deployed.load(written)
        _move(written, folder)


def plain_config(cfg: Any) -> Any:
    """``cfg`` for the host without the plugin: a config node with the host's own keys and names only.

    * The plugin's nodes and keys are left out, and so are its losses: evaluation has none.
    * ``MODEL.META_ARCHITECTURE`` is the base at the end of the chain of composed architectures; MoCo and Distiller
      become Baseline, which is what they evaluate as.
    * A head of the plugin becomes the host's class it extends, a class layer of the plugin the host's ``Linear``.
    * Data sets and face test sets of the plugin (ReIDFolder, IJB, ...) are left out of ``DATASETS``; when none remains,
      name one to evaluate on, as in ``DATASETS.TESTS "('Market1501',)"``. ``results.json`` keeps the names.
    * What concerns the training alone (initial weights, teachers, output folder) is the host's default.

    Raises:
        ConfigError: The network needs a part that only the plugin has, or its input size is not fixed.
    """
    from fastreid.layers import any_softmax, pooling

    parts = host_registries()
    data_sets = parts["DATASETS.NAMES"]
    plain = _copy(cfg, host_defaults().clone(), "")
    model, heads = plain.MODEL, plain.MODEL.HEADS
    model.META_ARCHITECTURE = evaluated_architecture(cfg)
    model.LOSSES.NAME = tuple(name for name in model.LOSSES.NAME if name not in PLUGIN_LOSSES)
    heads.NAME = _host_head(parts["MODEL.HEADS.NAME"], heads.NAME)
    if is_plugins(getattr(any_softmax, heads.CLS_LAYER)):
        heads.CLS_LAYER = "Linear"
    for key in ("NAMES", "TESTS"):
        # Face test sets are no data sets of the host's registry, and the plugin's too.
        known = [name for name in plain.DATASETS[key] if name not in face_tests.TESTS]
        plain.DATASETS[key] = tuple(name for name in known if not is_plugins(data_sets[name]))
    for key, name, entry in (
        ("META_ARCHITECTURE", model.META_ARCHITECTURE, parts["MODEL.META_ARCHITECTURE"][model.META_ARCHITECTURE]),
        ("BACKBONE.NAME", model.BACKBONE.NAME, parts["MODEL.BACKBONE.NAME"][model.BACKBONE.NAME]),
        ("HEADS.POOL_LAYER", heads.POOL_LAYER, getattr(pooling, heads.POOL_LAYER)),
    ):
        if is_plugins(entry):
            raise ConfigError(
                f"MODEL.{key}",
                value=name,
                expected="a part of the plain host, for a network that runs without the plugin",
                remedy=_CHECKPOINTS_REMAIN,
            )
    input_size(plain)
    return plain


@functools.cache
def host_defaults() -> Any:
    """The default config as the host's source has it, without what was added to the one in memory."""
    from fastreid.config import defaults

    spec = importlib.util.spec_from_file_location("fastreid.config.defaults_as_shipped", defaults.__file__)
    if spec is None or spec.loader is None:
        raise ConfigError("The host's default config", value=defaults.__file__, expected="a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._C


def contract(plain: Any, model: nn.Module) -> dict[str, Any]:
    """What the network takes and returns.

    Sizes are in pixels. Pixels run from 0 to 255; the network in ``model.pth`` subtracts ``mean`` and divides by
    ``std`` itself. ``metric`` compares embeddings (``cosine`` normalises them), ``flip`` tells whether the run's
    evaluation averaged with the mirrored image, ``classes`` is the number of training identities.

    Args:
        plain: The deployed config.
        model: The deployed network in eval mode.
    """
    height, width = input_size(plain)
    mean, std = list(plain.MODEL.PIXEL_MEAN), list(plain.MODEL.PIXEL_STD)
    with torch.no_grad():
        dimension = model(torch.zeros(1, len(mean), height, width)).shape[1]
    return {
        "input": {
            "height": height,
            "width": width,
            "resize": "bicubic",
            "layout": "batch, channel, height, width",
            "colour_order": "RGB",
            "range": [0, 255],
            "mean": mean,
            "std": std,
        },
        "embedding": {
            "tensor": f"output of {type(model).__name__} with {plain.MODEL.HEADS.NAME} in eval mode"
            + (", after the BN neck" if plain.MODEL.HEADS.WITH_BNNECK else ""),
            "dimension": dimension,
            "normalised": False,
        },
        "metric": plain.TEST.METRIC,
        "flip": plain.TEST.FLIP.ENABLED,
        "classes": plain.MODEL.HEADS.NUM_CLASSES,
    }


def results(cfg: Any, metrics: Mapping[str, Any], config_hash: str, command: list[str]) -> dict[str, Any]:
    """What the run scored, on what, and how it was made. Seed -1: drawn anew, see the log."""
    environment = report_frame.environment()
    device = environment.pop("device")
    packages = {name: version(name) for name in ("fastreid", "torchvision", "numpy")}
    return {
        "metrics": dict(metrics),
        "trained_on": list(cfg.DATASETS.NAMES),
        "tested_on": list(cfg.DATASETS.TESTS),
        "method": cfg.MODEL.META_ARCHITECTURE,
        "config_hash": config_hash,
        "seed": cfg.SEED,
        "versions": environment | packages,
        "hardware": {"device": device, "machine": platform.machine(), "cpus": os.cpu_count()},
        "command": shlex.join(command),
    }


def input_size(cfg: Any) -> tuple[int, int]:
    """Height and width in pixels of the images that evaluation feeds.

    Raises:
        ConfigError: Images keep their own size.
    """
    size = tuple(cfg.INPUT.CROP.SIZE if cfg.INPUT.CROP.ENABLED else cfg.INPUT.SIZE_TEST)
    if size[0] <= 0:
        raise ConfigError("INPUT.SIZE_TEST", value=size, expected="a fixed size, for a network that is deployed")
    return int(size[0]), int(size[-1])


def _copy(cfg: Any, plain: Any, prefix: str) -> Any:
    """``plain`` with the values of ``cfg`` under every key it has, except those of the training."""
    for key in plain:
        if f"{prefix}{key}" in _OF_TRAINING:
            continue
        if isinstance(plain[key], dict):
            _copy(cfg[key], plain[key], f"{prefix}{key}.")
        else:
            plain[key] = cfg[key]
    return plain


def _with_plugin_keys(plain: Any) -> Any:
    """The plain config as this process needs it, where the host's classes read the plugin's keys, too."""
    from fastreid.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_other_cfg(plain)
    return cfg


def _host_head(heads: Mapping[str, Any], name: str) -> str:
    """``name``, or for a head of the plugin the nearest class above it that the host registered."""
    if not is_plugins(heads[name]):
        return name
    bases = [base.__name__ for base in heads[name].__mro__[1:]]
    host: str | None = next((base for base in bases if base in heads and not is_plugins(heads[base])), None)
    if host is None:
        raise ConfigError("MODEL.HEADS.NAME", value=name, expected="a head that extends one of the host's")
    return host


@torch.no_grad()
def _require_same_embedding(cfg: Any, plain: Any, model: nn.Module, state: dict[str, Any]) -> None:
    """The plugin's head must evaluate as the parts of the host do that take its place."""
    own = _with_plugin_keys(plain)
    own.MODEL.HEADS.NAME, own.MODEL.HEADS.CLS_LAYER = cfg.MODEL.HEADS.NAME, cfg.MODEL.HEADS.CLS_LAYER
    trained = deployed.build(own)
    trained.load_state_dict(state, strict=False)
    images = deployed.noise(len(plain.MODEL.PIXEL_MEAN), input_size(plain))
    if not torch.allclose(trained(images.clone()), model(images.clone()), rtol=1e-4, atol=1e-4):
        raise ConfigError(
            "MODEL.HEADS.NAME",
            value=cfg.MODEL.HEADS.NAME,
            expected=f"a head that evaluates as the host's {plain.MODEL.HEADS.NAME}",
            remedy=_CHECKPOINTS_REMAIN,
        )


def _weights(cfg: Any, plain: Any, checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The tensors of a checkpoint, without the class rows of a sharded head, and the number of classes."""
    state, shards = checkpoint["model"], checkpoint.get(SHARDS)
    classes = shards["num_classes"] if shards else _rows(plain, state)
    head = host_registries()["MODEL.HEADS.NAME"][cfg.MODEL.HEADS.NAME]
    if isinstance(head, type) and issubclass(head, ShardedEmbeddingHead) and ROWS in state:
        # Millions of rows that evaluation has no use for; the host wants a tensor of that name.
        state = {**state, ROWS: state[ROWS].new_empty((0, state[ROWS].shape[1]))}
    return state, classes


def _rows(plain: Any, state: Mapping[str, Any]) -> int:
    """Rows of the class layer; the host counts the identities itself and leaves no number in the config."""
    heads = ("b1_head.weight", "heads.weight")
    weight = next((state[name] for name in heads if name in state), None)
    return int(plain.MODEL.HEADS.NUM_CLASSES if weight is None else weight.shape[0])


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, default=float), encoding="utf-8")


def _move(written: Path, folder: Path) -> None:
    """Give the folder its name; what had it goes with the temporary folder."""
    if folder.exists():
        folder.rename(written.parent / "replaced")
    written.rename(folder)
