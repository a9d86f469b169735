"""What ``DIL.*`` means: networks, options and phases for the pure part, and refusals of what cannot work."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, TypeVar

from torch import nn

from qsd_plugin.core.distributed import world_size
from qsd_plugin.core.errors import ConfigError
from qsd_plugin.degradations.mixing import Mix, parse_mix
from qsd_plugin.hosts.fastreid.compose import in_chain
from qsd_plugin.hosts.fastreid.mlr_datasets import degraded_cameras
from qsd_plugin.methods.dil import (
    IdentityEncoder,
    Networks,
    PhaseSchedule,
    Stage1Options,
    Stage1Weights,
    Stage2Options,
    dil_networks,
)
from qsd_plugin.methods.dil.bank import REPLAY_MODES
from qsd_plugin.methods.dil.encoders import SMALLEST_SIDE
from qsd_plugin.methods.dil.stage2 import BRANCHES
from qsd_plugin.networks.resnet_stages import ResNetStages

T = TypeVar("T")

#: Names of the three architectures.
STAGE1, STAGE2, TEACHER = "DIL", "DILReID", "DILTeacher"
ARCHITECTURES = (STAGE1, STAGE2, TEACHER)
#: ``DIL.PAIRS.OTHER``: by what is known of the data.
AUTO = "auto"


def is_dil(cfg: Any) -> bool:
    """Whether a training depends on the node ``DIL``."""
    return any(in_chain(cfg, name) for name in ARCHITECTURES)


def mix_of(cfg: Any) -> Mix:
    """What makes the worse image of a paired iteration."""
    return parse_mix(cfg.DIL.PAIRS.MIX)


def resolution_alone(cfg: Any) -> bool:
    """Whether the degradation is low resolution and nothing else."""
    return mix_of(cfg).names == ("dil_res",)


def schedule_of(cfg: Any) -> PhaseSchedule:
    """Which phase comes when."""
    share = float(cfg.DIL.PAIRS.PAIRED_PROB)
    if not (share == -1 or 0 <= share <= 1):
        raise ConfigError("DIL.PAIRS.PAIRED_PROB", value=share, expected="a number in [0, 1], or -1 to alternate")
    return PhaseSchedule(
        other=other_phase(cfg), paired_probability=None if share == -1 else share, seed=max(cfg.SEED, 0)
    )


def other_phase(cfg: Any) -> str:
    """The phase beside the paired one; ``auto`` is ``unpaired`` where a degraded domain is known."""
    other = str(cfg.DIL.PAIRS.OTHER)
    if other != AUTO:
        return other
    return "unpaired" if cfg.DIL.PAIRS.DEGRADED_CAMERAS or degraded_cameras(cfg) else "unsupervised"


def stage1_options(cfg: Any) -> Stage1Options:
    """Options of stage 1 by ``DIL.STAGE1_OPTIONS``."""
    node = cfg.DIL.STAGE1_OPTIONS
    return _from_node(Stage1Options, node, weights=_from_node(Stage1Weights, node), ablate=tuple(node.ABLATE))


def stage2_options(cfg: Any) -> Stage2Options:
    """Options of stage 2 by ``DIL.STAGE2_OPTIONS``."""
    return _from_node(Stage2Options, cfg.DIL.STAGE2_OPTIONS)


def build_networks(cfg: Any) -> Networks:
    """The five networks of stage 1, with random weights."""
    scales = cfg.DIL.STAGE1_OPTIONS.DEGRADATION_SCALES or (1 if resolution_alone(cfg) else 3)
    return dil_networks(
        num_classes(cfg),
        trunk=_resnet(cfg, stages=3),
        width=cfg.DIL.WIDTH,
        degradation_scales=scales,
        ln_scope=cfg.DIL.LN_SCOPE,
        dropout=cfg.DIL.DROPOUT,
    )


def build_identity_encoder(cfg: Any) -> IdentityEncoder:
    """The teacher, with random weights."""
    return IdentityEncoder(
        num_classes(cfg),
        network=_resnet(cfg, stages=4),
        embedding_dim=scaled(cfg, 512),
        dropout=cfg.DIL.DROPOUT,
    )


def num_classes(cfg: Any) -> int:
    """Identities; one where the host builds a network for evaluation and counts none."""
    return max(1, int(cfg.MODEL.HEADS.NUM_CLASSES))


def scaled(cfg: Any, channels: int) -> int:
    """``channels`` at the configured width, as :func:`~qsd_plugin.methods.dil.networks.dil_networks` rounds them."""
    return max(4, round(channels * float(cfg.DIL.WIDTH) / 4) * 4)


def check_config(cfg: Any) -> None:
    """Refuse settings of ``DIL`` that cannot work, for the architecture that ``cfg`` names.

    Raises:
        ConfigError: Names the key, its value and what is accepted.
    """
    blocks = list(cfg.DIL.BLOCKS)
    if len(blocks) != 4 or min(blocks) < 1:
        raise ConfigError("DIL.BLOCKS", value=blocks, expected="four integers >= 1, such as [3, 4, 6, 3]")
    if not cfg.DIL.WIDTH > 0:
        raise ConfigError("DIL.WIDTH", value=cfg.DIL.WIDTH, expected="a number > 0")
    for key in ("SIZE_TRAIN", "SIZE_TEST"):
        size = list(cfg.INPUT[key])
        if any(side % 16 or side < SMALLEST_SIDE for side in size):
            raise ConfigError(f"INPUT.{key}", value=size, expected=f"multiples of 16, at least {SMALLEST_SIDE}")
    if in_chain(cfg, STAGE1):
        if cfg.MODEL.META_ARCHITECTURE != STAGE1:
            raise ConfigError(
                "MODEL.META_ARCHITECTURE",
                value=cfg.MODEL.META_ARCHITECTURE,
                expected=f"{STAGE1} itself: nothing is added to stage 1",
                remedy=f"Other methods go on top of stage 2, {STAGE2}.",
            )
        _check_stage1(cfg)
    elif in_chain(cfg, STAGE2):
        _check_stage2(cfg)


def _check_stage1(cfg: Any) -> None:
    mix_of(cfg)
    low, high = cfg.DIL.PAIRS.RATIO
    if not 1 <= low <= high:
        raise ConfigError("DIL.PAIRS.RATIO", value=[low, high], expected="two ascending numbers >= 1")
    schedule = schedule_of(cfg)
    domains = cfg.DIL.PAIRS.DEGRADED_CAMERAS or degraded_cameras(cfg)
    if schedule.other == "unpaired" and schedule.paired_probability != 1 and not domains:
        raise ConfigError(
            "DIL.PAIRS.DEGRADED_CAMERAS is empty",
            expected="the cameras of the degraded domain, or a data set that names them (MLRMarket1501, ...), for "
            "DIL.PAIRS.OTHER unpaired",
            remedy="Where no camera is known to be worse, set DIL.PAIRS.OTHER unsupervised.",
        )
    if cfg.DIL.PAIRS.STORED and schedule.other != "unpaired":
        raise ConfigError(
            "DIL.PAIRS.OTHER", value=schedule.other, expected="unpaired with DIL.PAIRS.STORED, which needs two domains"
        )
    if cfg.DIL.STAGE1_OPTIONS.SHEET_EVERY < 0:
        raise ConfigError(
            "DIL.STAGE1_OPTIONS.SHEET_EVERY", value=cfg.DIL.STAGE1_OPTIONS.SHEET_EVERY, expected="an integer >= 0"
        )
    if cfg.INPUT.CROP.ENABLED:
        raise ConfigError("INPUT.CROP.ENABLED", value=True, expected="False: DIL pairs are resized to INPUT.SIZE_TRAIN")
    if cfg.SOLVER.OPT != "Adam":
        raise ConfigError("SOLVER.OPT", value=cfg.SOLVER.OPT, expected="Adam, for MODEL.META_ARCHITECTURE DIL")
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise ConfigError(
            "TEST.PRECISE_BN.ENABLED",
            value=True,
            expected="False with MODEL.META_ARCHITECTURE DIL, whose phases leave different batch statistics",
        )
    factor = cfg.DIL.STAGE1_OPTIONS.DISCRIMINATOR_LR_FACTOR
    if not factor > 0:
        raise ConfigError("DIL.STAGE1_OPTIONS.DISCRIMINATOR_LR_FACTOR", value=factor, expected="a number > 0")


def _check_stage2(cfg: Any) -> None:
    for key, value, known in (
        ("DIL.REPLAY.MODE", cfg.DIL.REPLAY.MODE, REPLAY_MODES),
        ("DIL.STAGE2_OPTIONS.FEATURE", cfg.DIL.STAGE2_OPTIONS.FEATURE, BRANCHES),
    ):
        if value not in known:
            raise ConfigError(key, value=value, expected=" or ".join(map(repr, known)))
    triplets = [key for key in ("FUSE_LOSS", "INV_LOSS", "SEN_LOSS") if "tri" in cfg.DIL.STAGE2_OPTIONS[key]]
    if triplets and cfg.DATALOADER.SAMPLER_TRAIN in ("TrainingSampler", "SeededTrainingSampler"):
        raise ConfigError(
            "DATALOADER.SAMPLER_TRAIN",
            value=cfg.DATALOADER.SAMPLER_TRAIN,
            expected=f"one that repeats identities, for the triplets of DIL.STAGE2_OPTIONS.{triplets[0]}",
            remedy="SeededIdentitySampler draws DATALOADER.NUM_INSTANCE images of each identity.",
        )


def images_per_rank(cfg: Any) -> int:
    """Images of a step on this process."""
    return int(cfg.SOLVER.IMS_PER_BATCH) // world_size()


def _from_node(kind: Callable[..., T], node: Any, **given: Any) -> T:
    """An options object whose fields are the node's keys in lower case, but for those that are given."""
    names = {name for name in signature(kind).parameters if name not in given}
    return kind(**{name: node[name.upper()] for name in names}, **given)


def _resnet(cfg: Any, *, stages: int) -> nn.Module:
    return ResNetStages(blocks=tuple(cfg.DIL.BLOCKS)[:stages], block=cfg.DIL.BLOCK, width=scaled(cfg, 64))
