"""The authors' folder of DIL's networks as a checkpoint of stage 1 or stage 2, complete or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qsd_plugin.core.errors import CheckpointError
from qsd_plugin.export.dil_weights import OPTIONAL, STAGE1, STAGES, dil_num_classes, read_dil_weights, stages_in
from qsd_plugin.export.weights import Fit, fit
from qsd_plugin.hosts.fastreid.dil_files import STAGE1_PREFIX, STAGE2_PREFIX
from qsd_plugin.hosts.fastreid.meta_arch import dil_config

_PREFIXES = {1: STAGE1_PREFIX, 2: STAGE2_PREFIX}
_ARCHITECTURES = {1: dil_config.STAGE1, 2: dil_config.STAGE2}
_KEYS = {1: "DIL.STAGE1", 2: "MODEL.WEIGHTS"}
#: Names of a model that no file of the authors has: counters and moments of a training.
_OWN = ("stage.adam.", "steps", "pixel_")
_NOTES = (
    "Colour order: RGB, ImageNet's mean and deviation, 256 x 128 pixels.",
    "The authors trained in float16, where the generator's layer norm spans the whole batch: DIL.LN_SCOPE batch.",
)


@dataclass(frozen=True)
class ConvertedDIL:
    """A folder's weights beside the model that takes them.

    Args:
        stage: 1 or 2.
        state: Under the names of the host's model.
        files: The file of each network.
        fit: How they fit the model.
        key: The config key that takes the checkpoint.
        notes: What else a user must know.
    """

    stage: int
    state: dict[str, torch.Tensor]
    files: dict[str, Path]
    fit: Fit
    key: str
    notes: tuple[str, ...]


def convert_folder(cfg: Any, folder: Path, stage: int | None = None) -> ConvertedDIL:
    """Convert the authors' ``<network>_<iteration>.pt``.

    Args:
        cfg: Of the network's size; number of classes, discriminator scales and attention are the files'.
        folder: With the files.
        stage: 1 or 2; ``None``: the one that all networks are there of.

    Raises:
        CheckpointError: Files are missing, of both stages, of different iterations, of other networks or sizes.
    """
    stage = _stage_of(folder) if stage is None else stage
    weights, files = read_dil_weights(folder, STAGES[stage])
    model = _model(cfg, stage, weights)
    prefix = _PREFIXES[stage]
    state = {prefix + name: tensor for name, tensor in weights.items()}
    absent = tuple(f"{prefix}{STAGES[stage][network]}." for network in OPTIONAL if network in STAGES[stage])
    absent = tuple(name for name in absent if not any(given.startswith(name) for given in state))
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith((*_OWN, *absent)) and (name in state or not name.endswith("num_batches_tracked"))
    }
    result = fit(state, own)
    wrong = {
        "missing": result.missing,
        "unexpected": result.unexpected,
        "of another shape": list(result.reshaped),
    }
    problems = [f"{len(names)} {kind} (first {names[0]})" for kind, names in wrong.items() if names]
    if problems:
        raise CheckpointError(
            f"DIL weights {folder} do not fill stage {stage}",
            value=", ".join(problems),
            expected="every entry of the networks, in the shapes of DIL.WIDTH, DIL.BLOCKS and DIL.BLOCK",
            remedy="The authors' have DIL.WIDTH 1.0 on a ResNet-50: configs/Base-DIL.yml.",
        )
    missing = [name.removeprefix(prefix).rstrip(".") for name in absent if "attention" not in name]
    notes = (*_NOTES, *(f"No file of the {name.replace('_', ' ')}: not needed for stage 2." for name in missing))
    return ConvertedDIL(stage, state, files, result, _KEYS[stage], notes)


def _stage_of(folder: Path) -> int:
    found = stages_in(folder)
    if len(found) != 1:
        raise CheckpointError(
            f"DIL weights {folder}",
            value="files of both stages" if found else "no stage whose networks are all there",
            expected="E_con, E_deg and G of stage 1, or E_con, E_id and C of stage 2",
            remedy="Pass --stage 1 or --stage 2." if found else "Pass --stage to see what is missing.",
        )
    return found[0]


def _model(cfg: Any, stage: int, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The model that the files are for, on the CPU, with random weights."""
    from fastreid.modeling.meta_arch import build_model

    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = _ARCHITECTURES[stage], "cpu"
    cfg.MODEL.BACKBONE.PRETRAIN = False
    cfg.MODEL.HEADS.NUM_CLASSES = dil_num_classes(weights)
    cfg.DIL.TEACHER = cfg.DIL.STAGE1 = cfg.DIL.BANK = ""
    cfg.DIL.REPLAY.MODE = "none"
    cfg.DIL.PAIRS.OTHER = "unsupervised"  # asks for no data set
    cfg.DIL.STAGE2_OPTIONS.ATTENTION = any(name.startswith("attention.") for name in weights)
    prefix = f"{STAGE1['D_deg']}.nets."
    scales = {name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)}
    cfg.DIL.STAGE1_OPTIONS.DEGRADATION_SCALES = len(scales)
    model: torch.nn.Module = build_model(cfg)
    return model
