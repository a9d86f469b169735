"""The recipe ``dil``: [teacher] -> stage1 -> bank -> stage2 -> report. No deploy folder: the host has no such net."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsd_plugin.core.distributed import on_main
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.progress import progress
from qsd_plugin.core.stages import Stage
from qsd_plugin.hosts.fastreid import dil_report, mlr_protocol, samplers, training_stages
from qsd_plugin.hosts.fastreid.compat.images import read_image
from qsd_plugin.hosts.fastreid.datasets import test_set
from qsd_plugin.hosts.fastreid.dil_files import load_stage1, read_bank, save_bank
from qsd_plugin.hosts.fastreid.dil_pairs import PairDraws
from qsd_plugin.hosts.fastreid.meta_arch import dil_config
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import STAGE1, STAGE2, TEACHER
from qsd_plugin.methods.dil import flip_averaged_codes
from qsd_plugin.methods.dil.stage2 import BRANCHES

logger = logging.getLogger("fastreid.qsd_plugin.dil")

#: File of the bank.
CODES = "codes.npz"
_NO_PATHS = {"DIL__TEACHER": "", "DIL__STAGE1": "", "DIL__BANK": ""}


def dil_stages(cfg: Any, arguments: Any) -> list[Stage]:
    """The stages; what ``DIL.TEACHER``, ``DIL.STAGE1`` or ``DIL.BANK`` name is used and not made.

    Args:
        cfg: Stage 2's config, with ``RECIPE.DIL`` for the others; ``OUTPUT_DIR`` is the recipe's root.
        arguments: Parsed command line, for the host's log.

    Raises:
        QSDPluginError: Whatever is wrong with a network, the pairs or the data.
    """
    if cfg.MODEL.META_ARCHITECTURE != STAGE2:
        raise ConfigError(
            "MODEL.META_ARCHITECTURE", value=cfg.MODEL.META_ARCHITECTURE, expected=f"{STAGE2} with RECIPE.NAME dil"
        )
    root = Path(cfg.OUTPUT_DIR)
    items = training_stages.training_items(cfg)
    data = training_stages.data_digest(items)
    teacher, stage1, stage2 = (make(cfg, root) for make in (teacher_config, stage1_config, _stage2_config))
    _check(cfg, teacher, stage1, stage2)
    if not cfg.DIL.STAGE1:
        every = [item for part in items.values() for item in part]
        PairDraws([camera for _, _, camera in every], stage1, [identity for _, identity, _ in every])
    stages = []
    if _trains_teacher(cfg):
        keys = _keys(teacher, ("DIL.REPLAY.", "DIL.STAGE1_OPTIONS.", "DIL.PAIRS.", "DIL.STAGE2_OPTIONS."))
        keys["DIL.STAGE2_OPTIONS.SEN_LOSS"] = teacher.DIL.STAGE2_OPTIONS.SEN_LOSS
        stages.append(training_stages.training_stage("teacher", teacher, arguments, data, keys=keys))
    if not cfg.DIL.STAGE1:
        inputs = _files(stage1, "TEACHER")
        keys = _keys(stage1, ("DIL.REPLAY.", "DIL.STAGE2_OPTIONS."))
        stages.append(training_stages.training_stage("stage1", stage1, arguments, data, keys=keys, inputs=inputs))
    if _wants_bank(cfg):
        stages.append(_bank_stage(stage2, [path for part in items.values() for path, _, _ in part], data))
    inputs = _files(stage2, "TEACHER", "STAGE1", "BANK")
    keys = _keys(stage2, ("DIL.STAGE1_OPTIONS.", "DIL.PAIRS."))
    stages.append(training_stages.training_stage("stage2", stage2, arguments, data, keys=keys, inputs=inputs))
    stages.append(_report_stage(cfg, teacher, stage2))
    return stages + training_stages.deploy_stages(stage2, root / "stage2")


def teacher_config(cfg: Any, root: Path) -> Any:
    """The config of the stage ``teacher``: stage 2's with ``RECIPE.DIL.TEACHER``'s length and rate."""
    own = cfg.RECIPE.DIL.TEACHER
    return training_stages.derive(
        cfg,
        root / "teacher",
        MODEL__META_ARCHITECTURE=TEACHER,
        SOLVER__MAX_EPOCH=own.MAX_EPOCH,
        SOLVER__BASE_LR=own.BASE_LR,
        SOLVER__STEPS=own.STEPS,
        **_NO_PATHS,
    )


def stage1_config(cfg: Any, root: Path) -> Any:
    """The config of the stage ``stage1``: the networks and data of stage 2's, and ``RECIPE.DIL.STAGE1``'s solver."""
    own = cfg.RECIPE.DIL.STAGE1
    return training_stages.derive(
        cfg,
        root / "stage1",
        MODEL__META_ARCHITECTURE=STAGE1,
        DATALOADER__SAMPLER_TRAIN=samplers.SEEDED,
        SOLVER__OPT="Adam",
        SOLVER__IMS_PER_BATCH=own.IMS_PER_BATCH,
        SOLVER__MAX_EPOCH=own.MAX_EPOCH,
        SOLVER__BASE_LR=own.BASE_LR,
        SOLVER__STEPS=own.STEPS,
        SOLVER__WARMUP_ITERS=0,
        **{**_NO_PATHS, "DIL__TEACHER": _teacher_file(cfg, root) if cfg.RECIPE.DIL.TEACHER_IN_STAGE1 else ""},
    )


def _stage2_config(cfg: Any, root: Path) -> Any:
    paths = {"DIL__TEACHER": _teacher_file(cfg, root), "DIL__STAGE1": cfg.DIL.STAGE1, "DIL__BANK": cfg.DIL.BANK}
    if not cfg.DIL.STAGE1:
        paths["DIL__STAGE1"] = str(root / "stage1" / "model_final.pth")
    if _wants_bank(cfg):
        paths["DIL__BANK"] = str(root / "bank" / CODES)
    return training_stages.derive(cfg, root / "stage2", **paths)


def _trains_teacher(cfg: Any) -> bool:
    return bool(cfg.RECIPE.DIL.TEACHER.MAX_EPOCH > 0 and not cfg.DIL.TEACHER)


def _teacher_file(cfg: Any, root: Path) -> str:
    return str(root / "teacher" / "model_final.pth") if _trains_teacher(cfg) else str(cfg.DIL.TEACHER)


def _wants_bank(cfg: Any) -> bool:
    return bool(cfg.DIL.REPLAY.MODE == "bank" and not cfg.DIL.BANK)


def _files(cfg: Any, *keys: str) -> list[Path]:
    """Files that ``DIL.<key>`` name; the authors' folder stands for its files."""
    paths = [Path(cfg.DIL[key]) for key in keys if cfg.DIL[key]]
    return [file for path in paths for file in (sorted(path.glob("*.pt")) if path.is_dir() else [path])]


def _keys(cfg: Any, unused: tuple[str, ...]) -> dict[str, Any]:
    """Files count by content and not by name."""
    paths = ("DIL.TEACHER", "DIL.STAGE1", "DIL.BANK")
    keys = training_stages.relevant_keys(cfg, (*training_stages.NO_QUALITY, *unused))
    return {key: value for key, value in keys.items() if key not in paths}


def _check(cfg: Any, *stages: Any) -> None:
    """Build every stage's network once, without files that are not there yet."""
    samplers.check_config(cfg)
    mlr_protocol.check_config(cfg)
    for name in cfg.DATASETS.TESTS:
        test_set(cfg, name)
    teacher, *others = stages
    for own in [*([teacher] if _trains_teacher(cfg) else []), *others]:
        training_stages.check_model(own, **_NO_PATHS)


def _bank_stage(stage2: Any, paths: list[str], data: str) -> Stage:
    def run(folder: Path, resume: bool) -> None:
        on_main(lambda: make_bank(stage2, paths, folder / CODES))

    keys = {key: training_stages.flatten(stage2)[key] for key in ("INPUT.SIZE_TEST", "DIL.WIDTH")}
    return Stage("bank", run, keys=keys, inputs=_files(stage2, "STAGE1"), data=data, outputs=[CODES])


def _report_stage(cfg: Any, teacher: Any, stage2: Any) -> Stage:
    """The teacher, where the recipe trains one, and each feature of stage 2 on the test sets."""
    root = Path(cfg.OUTPUT_DIR)
    arms = {"teacher": (teacher, root / "teacher" / "model_final.pth")} if _trains_teacher(cfg) else {}
    for feature in BRANCHES:
        own = training_stages.derive(stage2, Path(stage2.OUTPUT_DIR), DIL__STAGE2_OPTIONS__FEATURE=feature)
        arms[f"stage 2, {feature}"] = (own, root / "stage2" / "model_final.pth")
    return Stage(
        "report",
        lambda folder, resume: dil_report.write_report(stage2, arms, folder),
        keys={
            "TEST.METRIC": stage2.TEST.METRIC,
            "TEST.FLIP.ENABLED": stage2.TEST.FLIP.ENABLED,
            "DATASETS.TESTS": list(stage2.DATASETS.TESTS),
        },
        inputs=[*dict.fromkeys(checkpoint for _, checkpoint in arms.values()), *_files(stage2, "STAGE1")],
        outputs=["results.json", "results.md"],
    )


def make_bank(cfg: Any, paths: list[str], file: Path) -> None:
    """Write the degradation codes of images under the test transform; damaged images are left out.

    Args:
        cfg: Stage 2's config: ``DIL.STAGE1``, ``INPUT.SIZE_TEST``, ``TEST.IMS_PER_BATCH``, ``MODEL.DEVICE``.
        paths: Of the training images.
        file: Where to.

    Raises:
        CheckpointError: ``DIL.STAGE1`` is missing or something else.
        DataError: No image can be decoded, or a code is not finite.
    """
    from fastreid.data.transforms import build_transforms

    networks = dil_config.build_networks(cfg)
    load_stage1(networks, Path(cfg.DIL.STAGE1), parts=["degradation_encoder"])
    encoder = networks.degradation_encoder.eval().to(cfg.MODEL.DEVICE)
    mean, std = (torch.tensor(cfg.MODEL[key]).view(3, 1, 1) for key in ("PIXEL_MEAN", "PIXEL_STD"))
    transforms, codes = build_transforms(cfg, is_train=False), []
    waiting: list[Tensor] = []
    for place, path in enumerate(progress(paths, "Degradation codes"), 1):
        try:
            waiting.append((transforms(read_image(path)) - mean) / std)
        except DataError as error:
            logger.warning("Image has no degradation code: %s", error)
        if waiting and (len(waiting) == cfg.TEST.IMS_PER_BATCH or place == len(paths)):
            codes.append(flip_averaged_codes(encoder, torch.stack(waiting).to(cfg.MODEL.DEVICE)).cpu())
            waiting = []
    if not codes:
        raise DataError("DIL bank: none of the training images can be decoded", value=len(paths))
    save_bank(file, torch.cat(codes), encoder)
    logger.info("Bank: %s", read_bank(file, encoder).extra_repr())
