"""The files that DIL's stages hand on: teacher, stage 1 and bank. Each is checked for being what its key says."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsd_plugin.core.errors import CheckpointError, ConfigError, DataError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.export.dil_weights import STAGE1, read_dil_weights
from qsd_plugin.hosts.fastreid.compat.checkpoint_files import read_checkpoint
from qsd_plugin.methods.dil import DegradationBank, DegradationEncoder, IdentityEncoder, Networks

logger = logging.getLogger("fastreid.qsd_plugin.dil")

#: Names in front of the tensors of the three architectures.
STAGE1_PREFIX, STAGE2_PREFIX, TEACHER_PREFIX = "stage.", "reid.", "teacher."
#: Rows of a class layer, which another number of identities does not have.
_CLASS_LAYER = "classifier.classifier.0."
#: What the host needs of stage 1's networks; the discriminators have done their work.
PARTS = ("content_encoder", "degradation_encoder", "generator")


def load_stage1(networks: Networks, path: Path, *, parts: Sequence[str] = PARTS) -> None:
    """Give encoders and generator the weights of a trained stage 1.

    Args:
        networks: Of the sizes that the weights were trained with; discriminators are left as they are.
        path: Checkpoint of ``MODEL.META_ARCHITECTURE DIL``, or a folder with the authors' files.
        parts: Fields of ``networks`` that are loaded.

    Raises:
        CheckpointError: It is missing, or of another architecture, stage or size.
    """
    load_parts(networks, read_stage1(path), f"DIL.STAGE1 {path}", parts=parts)


def read_stage1(path: Path) -> dict[str, Tensor]:
    """Tensors of a trained stage 1, named as the state of ``MODEL.META_ARCHITECTURE DIL`` names them.

    Raises:
        CheckpointError: The file is missing, or of another architecture or stage.
    """
    if path.is_dir():
        return {STAGE1_PREFIX + name: tensor for name, tensor in read_dil_weights(path, STAGE1)[0].items()}
    weights = _tensors(path)
    _require(path, weights, "DIL.STAGE1", "a trained stage 1 (MODEL.META_ARCHITECTURE DIL)", STAGE1_PREFIX)
    return weights


def load_parts(networks: Networks, weights: Mapping[str, Tensor], source: str, *, parts: Sequence[str] = PARTS) -> None:
    """Give parts of ``networks`` what :func:`read_stage1` found in ``source``, which messages name.

    Raises:
        CheckpointError: It is of another size.
    """
    for name in parts:
        _load(getattr(networks, name), weights, f"{STAGE1_PREFIX}{name}.", source)


def classes_of(weights: Mapping[str, Tensor]) -> int:
    """Identities that a stage 1 was trained with."""
    return len(weights[f"{STAGE1_PREFIX}content_encoder.{_CLASS_LAYER}weight"])


def read_teacher(path: Path) -> dict[str, Tensor]:
    """Tensors of a teacher as ``model.`` and ``classifier.``, from a ``DILTeacher`` or a file of the authors' layout.

    Raises:
        CheckpointError: It is missing, or something else.
    """
    weights = _tensors(path)
    if any(name.startswith("model.layer4.") for name in weights):
        return weights
    _require(path, weights, "DIL.TEACHER", "a trained teacher (MODEL.META_ARCHITECTURE DILTeacher)", TEACHER_PREFIX)
    return {
        name.removeprefix(TEACHER_PREFIX): tensor for name, tensor in weights.items() if name.startswith(TEACHER_PREFIX)
    }


def load_teacher(encoder: IdentityEncoder, path: Path) -> None:
    """Give an identity encoder the teacher's weights; see :func:`read_teacher`."""
    _load(encoder, read_teacher(path), "", f"DIL.TEACHER {path}")


def start_trunk(cfg: Any, trunk: nn.Module) -> None:
    """First weights of a ResNet: of ``DIL.TEACHER`` or, if wanted, of ``MODEL.BACKBONE.PRETRAIN_PATH``.

    Args:
        cfg: The config.
        trunk: A ``ResNetStages`` of three or four stages.

    Raises:
        ConfigError: Pretrained weights are wanted and no file is named.
        CheckpointError: The file is missing or of another network.
    """
    if cfg.DIL.TEACHER:
        _load(trunk, read_teacher(Path(cfg.DIL.TEACHER)), "model.", f"DIL.TEACHER {cfg.DIL.TEACHER}")
    elif cfg.MODEL.BACKBONE.PRETRAIN:
        path = cfg.MODEL.BACKBONE.PRETRAIN_PATH
        if not path:
            raise ConfigError(
                "MODEL.BACKBONE.PRETRAIN_PATH is empty",
                expected="torchvision's weights of the ResNet in DIL.BLOCKS, such as resnet50-*.pth",
                remedy="Name the file, or set MODEL.BACKBONE.PRETRAIN False.",
            )
        _load(trunk, _tensors(Path(path)), "", f"MODEL.BACKBONE.PRETRAIN_PATH {path}")


def encoder_digest(encoder: DegradationEncoder) -> str:
    """SHA-256 of the encoder's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_bank(path: Path, codes: Tensor, encoder: DegradationEncoder) -> None:
    """Write codes [N, K] with the digest of the encoder that made them."""
    stream = io.BytesIO()
    np.savez_compressed(stream, codes=codes.cpu().float().numpy(), encoder=np.array(encoder_digest(encoder)))
    write_atomically(path, stream.getvalue())


def read_bank(path: Path, encoder: DegradationEncoder) -> DegradationBank:
    """The bank of a file.

    Args:
        path: As :func:`save_bank` wrote it.
        encoder: That of stage 1.

    Raises:
        DataError: The file is missing, something else, or its codes are another encoder's.
    """
    if not path.is_file():
        raise DataError(
            "DIL.BANK",
            value=str(path),
            expected="the codes of the training images",
            remedy="The recipe's stage makes them: --stage bank.",
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            codes, made_by = torch.from_numpy(archive["codes"]), str(archive["encoder"])
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"DIL.BANK {path}", value=str(error), expected="a file of the recipe's stage bank") from error
    if made_by != encoder_digest(encoder):
        raise DataError(
            f"DIL.BANK {path} holds codes of another degradation encoder",
            value=made_by[:12],
            expected=f"{encoder_digest(encoder)[:12]}, that of DIL.STAGE1",
            remedy="Make the bank again with this stage 1: --from-stage bank.",
        )
    return DegradationBank(codes)


def _tensors(path: Path) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): torch.as_tensor(value) for name, value in read_checkpoint(path)["model"].items()
    }


def _require(path: Path, weights: Mapping[str, Tensor], key: str, expected: str, prefix: str) -> None:
    """Refuse a checkpoint of another of DIL's architectures, or of none of them."""
    if any(name.startswith(prefix) for name in weights):
        return
    kinds = {
        STAGE1_PREFIX: "a checkpoint of stage 1 (DIL)",
        STAGE2_PREFIX: "a checkpoint of stage 2 (DILReID)",
        TEACHER_PREFIX: "a checkpoint of the teacher (DILTeacher)",
    }
    found = next((text for own, text in kinds.items() if any(name.startswith(own) for name in weights)), "")
    raise CheckpointError(
        f"{key} {path}",
        value=found or f"another network, with {next(iter(weights), 'nothing')}",
        expected=expected,
        remedy="The recipe's stages are teacher, stage1, bank and stage2, each in its folder with model_final.pth.",
    )


def _load(module: nn.Module, weights: Mapping[str, Tensor], prefix: str, source: str) -> None:
    """Load what ``module`` has; class layers of other identities and counters of batch norm may be missing."""
    expected = module.state_dict()
    found = {
        name: weights[prefix + name]
        for name, tensor in expected.items()
        if prefix + name in weights and weights[prefix + name].shape == tensor.shape
    }
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    wrong = [name for name in missing if not name.startswith(_CLASS_LAYER)]
    if wrong:
        stored = weights.get(prefix + wrong[0])
        raise CheckpointError(
            source,
            value=f"{wrong[0]} {'absent' if stored is None else tuple(stored.shape)}",
            expected=f"{tuple(expected[wrong[0]].shape)}, as DIL.WIDTH, DIL.BLOCKS and DIL.BLOCK make it",
            remedy="Set them as in the config.yaml it was trained with.",
        )
    # A network with a single class was built to embed.
    if any(len(expected[name]) > 1 for name in missing):
        logger.warning("%s is of other identities: the class layer keeps its initial values.", source)
    module.load_state_dict(found, strict=False)
