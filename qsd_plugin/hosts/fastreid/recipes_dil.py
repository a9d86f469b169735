"""The recipe ``dil``: [teacher] -> stage1 -> bank -> stage2 -> report. No deploy folder: the host has no such net.

``MODEL.META_ARCHITECTURE`` is ``DILReID``, or a method on top of it: ``QSD`` with ``QSD.BASE DILReID`` and labels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsd_plugin.core.distributed import on_main
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.progress import progress
from qsd_plugin.core.stages import Stage
from qsd_plugin.hosts.fastreid import dil_report, face_tests, mlr_protocol, samplers, training_stages
from qsd_plugin.hosts.fastreid.compat.images import read_image
from qsd_plugin.hosts.fastreid.compose import in_chain
from qsd_plugin.hosts.fastreid.datasets import Item, test_set
from qsd_plugin.hosts.fastreid.dil_files import load_stage1, read_bank, save_bank
from qsd_plugin.hosts.fastreid.dil_pairs import PairDraws
from qsd_plugin.hosts.fastreid.meta_arch import dil_config
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import STAGE1, STAGE2, TEACHER
from qsd_plugin.hosts.fastreid.quality import FILE, label_files, severity_inputs
from qsd_plugin.methods.dil import flip_averaged_codes
from qsd_plugin.methods.dil.stage2 import BRANCHES

logger = logging.getLogger("fastreid.qsd_plugin.dil")

#: File of the bank.
CODES = "codes.npz"
_NO_PATHS = {"DIL__TEACHER": "", "DIL__STAGE1": "", "DIL__BANK": ""}
_CHECKPOINT = "model_final.pth"


class Folders(NamedTuple):
    """Names of the stages' folders below the recipe's root."""

    teacher: str = "teacher"
    stage1: str = "stage1"
    bank: str = "bank"
    stage2: str = "stage2"


FOLDERS = Folders()


def dil_stages(cfg: Any, arguments: Any) -> list[Stage]:
    """The stages; what ``DIL.TEACHER``, ``DIL.STAGE1`` or ``DIL.BANK`` name is used and not made.

    Args:
        cfg: Stage 2's config, with ``RECIPE.DIL`` for the others; ``OUTPUT_DIR`` is the recipe's root.
        arguments: Parsed command line, for the host's log.

    Raises:
        QSDPluginError: Whatever is wrong with a network, the pairs or the data.
    """
    check(cfg)
    root = Path(cfg.OUTPUT_DIR)
    items = training_stages.training_items(cfg)
    data = training_stages.data_digest(items)
    teacher, stage1, stage2 = (make(cfg, root) for make in (teacher_config, stage1_config, stage2_config))
    check_pairs(cfg, items)
    stages = []
    if trains_teacher(cfg):
        stages.append(training_stages.training_stage("teacher", teacher, arguments, data, keys=teacher_keys(teacher)))
    if not cfg.DIL.STAGE1:
        inputs = own_files(stage1, "TEACHER")
        stages.append(
            training_stages.training_stage("stage1", stage1, arguments, data, keys=stage1_keys(stage1), inputs=inputs)
        )
    if wants_bank(cfg):
        stages.append(bank_stage("bank", stage2, items))
    inputs = [*own_files(stage2, "TEACHER", "STAGE1", "BANK"), *label_inputs(stage2)]
    stages.append(
        training_stages.training_stage("stage2", stage2, arguments, data, keys=stage2_keys(stage2), inputs=inputs)
    )
    stages.append(_report_stage(cfg, teacher, stage2))
    return stages + training_stages.deploy_stages(stage2, root / "stage2")


def teacher_config(cfg: Any, root: Path, folders: Folders = FOLDERS) -> Any:
    """The config of the stage ``teacher``: stage 2's with ``RECIPE.DIL.TEACHER``'s length and rate."""
    own = cfg.RECIPE.DIL.TEACHER
    return training_stages.derive(
        cfg,
        root / folders.teacher,
        MODEL__META_ARCHITECTURE=TEACHER,
        SOLVER__MAX_EPOCH=own.MAX_EPOCH,
        SOLVER__BASE_LR=own.BASE_LR,
        SOLVER__STEPS=own.STEPS,
        DATALOADER__SAMPLER_TRAIN=samplers.without_labels(cfg),
        **_NO_PATHS,
    )


def stage1_config(cfg: Any, root: Path, folders: Folders = FOLDERS) -> Any:
    """The config of the stage ``stage1``: the networks and data of stage 2's, and ``RECIPE.DIL.STAGE1``'s solver."""
    own = cfg.RECIPE.DIL.STAGE1
    return training_stages.derive(
        cfg,
        root / folders.stage1,
        MODEL__META_ARCHITECTURE=STAGE1,
        DATALOADER__SAMPLER_TRAIN=samplers.SEEDED,
        INPUT__DEGRADE__ENABLED=False,  # pairs take no notice of it
        SOLVER__OPT="Adam",
        SOLVER__IMS_PER_BATCH=own.IMS_PER_BATCH,
        SOLVER__MAX_EPOCH=own.MAX_EPOCH,
        SOLVER__BASE_LR=own.BASE_LR,
        SOLVER__STEPS=own.STEPS,
        SOLVER__WARMUP_ITERS=0,
        **{**_NO_PATHS, "DIL__TEACHER": _teacher_file(cfg, root, folders) if cfg.RECIPE.DIL.TEACHER_IN_STAGE1 else ""},
    )


def stage2_config(cfg: Any, root: Path, folders: Folders = FOLDERS) -> Any:
    """The config of the last stage, with the files of the ones before."""
    paths: dict[str, Any] = {
        "DIL__TEACHER": _teacher_file(cfg, root, folders),
        "DIL__STAGE1": cfg.DIL.STAGE1 or str(root / folders.stage1 / _CHECKPOINT),
        "DIL__BANK": str(root / folders.bank / CODES) if wants_bank(cfg) else cfg.DIL.BANK,
    }
    if needs_labels(cfg) and cfg.QUALITY.SOURCE == FILE:
        paths["QUALITY__FILES"] = tuple(map(str, label_files(cfg)))
    return training_stages.derive(cfg, root / folders.stage2, **paths)


def teacher_keys(teacher: Any) -> dict[str, Any]:
    """What the stage ``teacher`` depends on, by its config."""
    keys = _keys(teacher, ("DIL.REPLAY.", "DIL.STAGE1_OPTIONS.", "DIL.PAIRS.", "DIL.STAGE2_OPTIONS."))
    return keys | {"DIL.STAGE2_OPTIONS.SEN_LOSS": teacher.DIL.STAGE2_OPTIONS.SEN_LOSS}


def stage1_keys(stage1: Any) -> dict[str, Any]:
    """What the stage ``stage1`` depends on, by its config."""
    return _keys(stage1, ("DIL.REPLAY.", "DIL.STAGE2_OPTIONS."))


def bank_keys(stage2: Any) -> dict[str, Any]:
    """What the bank depends on, by the config of the last stage."""
    return {key: training_stages.flatten(stage2)[key] for key in ("INPUT.SIZE_TEST", "DIL.WIDTH")}


def stage2_keys(stage2: Any) -> dict[str, Any]:
    """What the last stage depends on, by its config."""
    return _keys(stage2, ("DIL.STAGE1_OPTIONS.", "DIL.PAIRS."), labelled=needs_labels(stage2))


def trains_teacher(cfg: Any) -> bool:
    """Whether the recipe has a stage ``teacher``."""
    return bool(cfg.RECIPE.DIL.TEACHER.MAX_EPOCH > 0 and not cfg.DIL.TEACHER)


def wants_bank(cfg: Any) -> bool:
    """Whether the recipe has a stage ``bank``."""
    return bool(cfg.DIL.REPLAY.MODE == "bank" and not cfg.DIL.BANK)


def needs_labels(cfg: Any) -> bool:
    """Whether the last stage reads quality labels."""
    return in_chain(cfg, "QSD") or samplers.needs_labels(cfg)


def label_inputs(stage2: Any) -> list[Path]:
    """The label files that the last stage reads."""
    if not needs_labels(stage2):
        return []
    return label_files(stage2) if stage2.QUALITY.SOURCE == FILE else severity_inputs(stage2)


def own_files(cfg: Any, *keys: str) -> list[Path]:
    """Files that ``DIL.<key>`` name; the authors' folder stands for its files."""
    paths = [Path(cfg.DIL[key]) for key in keys if cfg.DIL[key]]
    return [file for path in paths for file in (sorted(path.glob("*.pt")) if path.is_dir() else [path])]


def check(cfg: Any) -> None:
    """Refuse what cannot be trained or tested: builds every stage's network once, without files that are made later.

    Raises:
        QSDPluginError: Names it.
    """
    if not in_chain(cfg, STAGE2):
        raise ConfigError(
            "MODEL.META_ARCHITECTURE",
            value=cfg.MODEL.META_ARCHITECTURE,
            expected=f"{STAGE2} with RECIPE.NAME dil",
            remedy=f"Another method goes on top with {STAGE2} as its BASE.",
        )
    samplers.check_config(cfg)
    mlr_protocol.check_config(cfg)
    for name in cfg.DATASETS.TESTS:
        if name in face_tests.TESTS:
            face_tests.build_test(cfg, name)
        else:
            test_set(cfg, name)
    root = Path(cfg.OUTPUT_DIR)
    if trains_teacher(cfg):
        training_stages.check_model(teacher_config(cfg, root), **_NO_PATHS)
    training_stages.check_model(stage1_config(cfg, root), **_NO_PATHS)
    training_stages.check_model(stage2_config(cfg, root), **_NO_PATHS)


def check_pairs(cfg: Any, items: Mapping[str, Sequence[Item]]) -> None:
    """Refuse training items of which stage 1 cannot make its pairs.

    Raises:
        ConfigError: Names the key.
    """
    if not cfg.DIL.STAGE1:
        every = [item for part in items.values() for item in part]
        stage1 = stage1_config(cfg, Path(cfg.OUTPUT_DIR))
        PairDraws([camera for _, _, camera in every], stage1, [identity for _, identity, _ in every])


def bank_stage(name: str, stage2: Any, items: Mapping[str, Sequence[Item]]) -> Stage:
    """The stage that writes the degradation codes of all training images.

    Args:
        name: Of its folder.
        stage2: Config of the last stage.
        items: Training items by data-set name.
    """
    paths = [path for part in items.values() for path, _, _ in part]

    def run(folder: Path, resume: bool) -> None:
        on_main(lambda: make_bank(stage2, paths, folder / CODES))

    data = training_stages.data_digest({key: list(part) for key, part in items.items()})
    return Stage(name, run, keys=bank_keys(stage2), inputs=own_files(stage2, "STAGE1"), data=data, outputs=[CODES])


def _teacher_file(cfg: Any, root: Path, folders: Folders) -> str:
    return str(root / folders.teacher / _CHECKPOINT) if trains_teacher(cfg) else str(cfg.DIL.TEACHER)


def _keys(cfg: Any, unused: tuple[str, ...], *, labelled: bool = False) -> dict[str, Any]:
    """Files count by content and not by name."""
    more = unused if labelled else (*training_stages.NO_QUALITY, *unused)
    paths = ("DIL.TEACHER", "DIL.STAGE1", "DIL.BANK", "QUALITY.FILES")
    return {key: value for key, value in training_stages.relevant_keys(cfg, more).items() if key not in paths}


def _report_stage(cfg: Any, teacher: Any, stage2: Any) -> Stage:
    """The teacher, where the recipe trains one, and each feature of stage 2 on the test sets."""
    root = Path(cfg.OUTPUT_DIR)
    arms = {"teacher": (teacher, root / "teacher" / "model_final.pth")} if trains_teacher(cfg) else {}
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
        inputs=[*dict.fromkeys(checkpoint for _, checkpoint in arms.values()), *own_files(stage2, "STAGE1")],
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
