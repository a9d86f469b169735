"""Face networks of finished fast-reid runs, which have no deploy folder because the plain host cannot build them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import ExportError
from qsd_plugin.export.face_networks import FaceModel, face_model
from qsd_plugin.hosts.fastreid.compat.checkpoint_files import read_checkpoint

CONFIG, CHECKPOINT = "config.yaml", "model_final.pth"

_BACKBONES = ("build_iresnet_backbone", "build_ir_backbone", "build_mobilefacenet_backbone")
_PREFIX = "backbone."

#: Settings of a head that adds nothing to the network's embedding, as ``configs/Base-Face.yml`` has them.
_PLAIN_HEAD = {"POOL_LAYER": "Identity", "EMBEDDING_DIM": 0, "WITH_BNNECK": False}


def is_face_run(folder: Path) -> bool:
    """Whether ``folder`` is that of a training that finished with a face network."""
    if not all((folder / name).is_file() for name in (CONFIG, CHECKPOINT)):
        return False
    return config(folder).MODEL.BACKBONE.NAME in _BACKBONES


def load(folder: Path) -> FaceModel:
    """The network of a finished training, under the names of its published files.

    Args:
        folder: Holds ``config.yaml`` and ``model_final.pth``; in a recipe's output that is a stage's folder.

    Raises:
        ExportError: The head adds something to the embedding.
        CheckpointError: The checkpoint is damaged or not of this network.
    """
    cfg = config(folder)
    heads = cfg.MODEL.HEADS
    for key, expected in _PLAIN_HEAD.items():
        if heads[key] != expected:
            raise ExportError(
                f"MODEL.HEADS.{key} of {folder / CONFIG}",
                value=heads[key],
                expected=f"{expected!r}, as in configs/Base-Face.yml: the exported embedding is the network's own",
            )
    state = read_checkpoint(folder / CHECKPOINT)["model"]
    weights = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
    return face_model(
        weights,
        title=str(folder / CHECKPOINT),
        input_size=(int(cfg.INPUT.SIZE_TEST[0]), int(cfg.INPUT.SIZE_TEST[-1])),
        mean=tuple(map(float, cfg.MODEL.PIXEL_MEAN)),
        std=tuple(map(float, cfg.MODEL.PIXEL_STD)),
    )


def config(folder: Path) -> Any:
    """The config of a finished training."""
    from fastreid.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(folder / CONFIG))
    return cfg
