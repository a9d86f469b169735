"""QUD's teacher inside fast-reid: from a host config with a checkpoint, or from an ONNX file; never untrained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsd_plugin.core.errors import CheckpointError, ConfigError, did_you_mean
from qsd_plugin.hosts.fastreid.compat.checkpoint_files import read_checkpoint
from qsd_plugin.hosts.fastreid.compose import evaluated_architecture
from qsd_plugin.methods.qud import ModuleTeacher, OnnxTeacher, Teacher
from qsd_plugin.model_zoo import projects_folder

SOURCES = ("network", "onnx", "cache")
#: Name of the submodule. Nothing of it is in the model's state dict.
PREFIX = "qud_teacher."
#: Parts of a training that are no parts of its network; a checkpoint may hold them.
_OF_TRAINING = ("center_loss.", "memory.", "qsd_teacher.", "_qsd_quality.", "qud_queue.", "qud_projector.", "qgface_")


def build_teacher(cfg: Any) -> Teacher | None:
    """The frozen teacher of ``QUD.TEACHER``, on the CPU: images [B, 3, H, W], RGB 0 to 255, to embeddings [B, D].

    Its embeddings are what fast-reid would evaluate for the teacher's own config: images in the INPUT.SIZE_TEST,
    normalised by the MODEL.PIXEL_MEAN and PIXEL_STD written there. No global random stream is drawn from.

    Returns:
        ``None`` where the embeddings come with the batch (``QUD.TEACHER.SOURCE cache``).

    Raises:
        ConfigError: The teacher is not named, or a setting is impossible.
        CheckpointError: Its weights are missing, damaged, or another network's.
    """
    settings = cfg.QUD.TEACHER
    if settings.SOURCE not in SOURCES:
        raise ConfigError("QUD.TEACHER.SOURCE", value=settings.SOURCE, remedy=did_you_mean(settings.SOURCE, SOURCES))
    if settings.SOURCE == "cache":
        return None
    return _from_onnx(cfg) if settings.SOURCE == "onnx" else _from_network(cfg)


def teacher_config(path: str) -> Any:
    """The host config that ``KD.MODEL_CONFIG`` names, not frozen.

    Raises:
        ConfigError: There is no such file.
    """
    from fastreid.config import get_cfg

    file = _config_file(path)
    if not file.is_file():
        raise ConfigError(
            "KD.MODEL_CONFIG",
            value=path,
            expected="a file, or a shipped one as a path below projects/",
            remedy="A training leaves config.yaml in its OUTPUT_DIR.",
        )
    cfg = get_cfg()
    cfg.merge_from_file(str(file))
    cfg.defrost()
    return cfg


def _config_file(path: str) -> Path:
    """The shipped config of that name below ``projects/`` if there is one and no file ``path`` itself."""
    shipped = projects_folder() / path
    return shipped if shipped.is_file() and not Path(path).is_file() else Path(path)


def teacher_files(cfg: Any) -> list[Path]:
    """The files that the teacher of ``cfg`` is made from; none if embeddings come with the batch.

    Raises:
        ConfigError: One is not named.
    """
    settings = cfg.QUD.TEACHER
    if settings.SOURCE == "cache":
        return []
    if settings.SOURCE == "onnx":
        if not settings.ONNX:
            raise ConfigError("QUD.TEACHER.ONNX is empty", expected="the ONNX file of the teacher")
        return [Path(settings.ONNX)]
    configs, weights = list(cfg.KD.MODEL_CONFIG), list(cfg.KD.MODEL_WEIGHTS)
    if not configs:
        raise ConfigError(
            "KD.MODEL_CONFIG is empty",
            expected="the config of the network that teaches QUD",
            remedy="Name the config.yaml of its training here and its checkpoint in KD.MODEL_WEIGHTS; or set "
            "QUD.TEACHER.SOURCE to onnx or cache.",
        )
    if not weights:
        by_recipe = (
            " The recipe's first stage trains it: python tools/train_net.py --config-file CONFIG --stage teacher; then "
            "name OUTPUT_DIR/teacher/config.yaml in KD.MODEL_CONFIG and OUTPUT_DIR/teacher/model_final.pth here."
            if cfg.RECIPE.NAME == "qud"
            else ""
        )
        raise ConfigError(
            "KD.MODEL_WEIGHTS is empty",
            expected=f"the checkpoint of the teacher {configs[0]}",
            remedy=f"An untrained teacher would teach noise.{by_recipe}",
        )
    return [_config_file(configs[0]), Path(weights[0])]


def keep_out_of_checkpoints(model: nn.Module) -> None:
    """Leave the teacher out of the model's state dict, and do not miss it in one that is loaded.

    It is frozen and always comes from its own file: in each of the student's checkpoints it would be a copy, and a
    resumed run could go on with another teacher than its config names.
    """
    model.register_state_dict_post_hook(_drop)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(_do_not_miss)  # type: ignore[no-untyped-call]


def _drop(_model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + PREFIX)]:
        del state[name]


def _do_not_miss(_model: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.startswith(PREFIX)]


def _from_onnx(cfg: Any) -> Teacher:
    settings = cfg.QUD.TEACHER
    (path,) = teacher_files(cfg)
    size = tuple(settings.SIZE)
    if len(size) not in (0, 2):
        raise ConfigError("QUD.TEACHER.SIZE", value=list(size), expected="[height, width], or [] for the model's own")
    return OnnxTeacher(path, size=size or None, mean=settings.MEAN, std=settings.STD, colour=settings.COLOUR)


def _from_network(cfg: Any) -> Teacher:
    from fastreid.modeling.meta_arch import build_model

    config, checkpoint = teacher_files(cfg)
    own = teacher_config(str(config))
    own.MODEL.META_ARCHITECTURE = evaluated_architecture(own)
    own.MODEL.DEVICE = "cpu"
    own.MODEL.BACKBONE.PRETRAIN = False
    own.MODEL.HEADS.NUM_CLASSES = 0
    own.MODEL.LOSSES.NAME = ()
    for part in (own.MODEL.BACKBONE, own.MODEL.HEADS):
        part.NORM = {"syncBN": "BN"}.get(part.NORM, part.NORM)  # the same in eval mode, and on a CPU
    weights = read_checkpoint(checkpoint)["model"]
    with torch.random.fork_rng(devices=[]):  # its initial values are not used
        network = build_model(own)
    size = own.INPUT.CROP.SIZE if own.INPUT.CROP.ENABLED else own.INPUT.SIZE_TEST
    try:
        return ModuleTeacher(
            network,
            _without_classifiers(weights, network),
            # The network normalises by itself, with its own PIXEL_MEAN and PIXEL_STD.
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            size=(int(size[0]), int(size[-1])) if size[0] > 0 else None,
            colour=cfg.QUD.TEACHER.COLOUR,
            unused=_OF_TRAINING,
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"KD.MODEL_WEIGHTS {checkpoint} is not of the network in KD.MODEL_CONFIG {config}",
            value=error.value,
            expected=error.expected,
            remedy="Name the config.yaml that the checkpoint was trained with. A file of arcface_torch or QUD is "
            "converted first, by tools/convert_weights.py.",
        ) from error


def _without_classifiers(weights: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """Weights with the network's empty class layers, whatever the file holds of them: teaching needs no classes."""
    classifiers = {name: value for name, value in network.state_dict().items() if not value.numel()}
    found = {name.removeprefix("module."): value for name, value in weights.items()}
    return {name: torch.as_tensor(value) for name, value in (found | classifiers).items()}
