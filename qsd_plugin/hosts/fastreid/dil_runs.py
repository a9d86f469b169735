"""Stage 2 of DIL as a network to export. Its finished runs have no deploy folder: the plain host cannot build it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import CheckpointError
from qsd_plugin.core.stages import FINAL_STAGES
from qsd_plugin.hosts.fastreid import deploy, deployed
from qsd_plugin.hosts.fastreid.compat.checkpoint_files import read_checkpoint
from qsd_plugin.hosts.fastreid.compose import base_architecture
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import STAGE2

CONFIG, CHECKPOINT = "config.yaml", "model_final.pth"

#: Has as many rows as there were identities; the host counts them itself and leaves no number in the config.
_CLASSIFIER = "reid.content_encoder.classifier.classifier.0.weight"


def is_dil_run(folder: Path) -> bool:
    """Whether ``folder`` is that of a finished stage 2, or of a recipe that finished with one."""
    stage = _stage(folder)
    if not all((stage / name).is_file() for name in (CONFIG, CHECKPOINT)):
        return False
    return base_architecture(_config(stage)) == STAGE2


def load(folder: Path, options: list[str]) -> deployed.Deployed:
    """The network of a finished stage 2, without what methods on top of it and replay added to train it.

    Args:
        folder: Of stage 2 or of its recipe.
        options: ``KEY VALUE`` pairs for the config; ``DIL.STAGE2_OPTIONS.FEATURE`` (``fuse``, ``inv`` or ``sen``) says
            what is exported, the run's own choice unless given.

    Raises:
        CheckpointError: The checkpoint is damaged or not of this network.
        ConfigError: An unknown feature.
    """
    stage = _stage(folder)
    cfg = _config(stage)
    cfg.merge_from_list(options)
    cfg.MODEL.META_ARCHITECTURE = STAGE2
    cfg.MODEL.BACKBONE.PRETRAIN = False
    cfg.DIL.TEACHER = cfg.DIL.STAGE1 = cfg.DIL.BANK = ""  # files that a training starts from
    checkpoint = stage / CHECKPOINT
    state = read_checkpoint(checkpoint)["model"]
    if _CLASSIFIER not in state:
        raise CheckpointError(f"Weights {checkpoint}", value=list(state)[:3], expected=f"those of {STAGE2}")
    cfg.MODEL.HEADS.NUM_CLASSES = len(state[_CLASSIFIER])
    model = deployed.build(cfg)
    known = model.state_dict()
    # Methods on top of stage 2 keep tensors of their own in its checkpoint.
    deployed.load_strictly(model, {name: state[name] for name in known if name in state}, source=str(checkpoint))
    contract = deploy.contract(cfg, model)
    contract["embedding"]["tensor"] = f"feature {cfg.DIL.STAGE2_OPTIONS.FEATURE!r} of {STAGE2} in eval mode"
    sets = {"trained_on": list(cfg.DATASETS.NAMES), "tested_on": list(cfg.DATASETS.TESTS)}
    return deployed.Deployed(cfg, model, contract, sets)


def _stage(folder: Path) -> Path:
    stage = folder / FINAL_STAGES["dil"]
    return stage if stage.is_dir() else folder


def _config(folder: Path) -> Any:
    from fastreid.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(folder / CONFIG))
    return cfg
