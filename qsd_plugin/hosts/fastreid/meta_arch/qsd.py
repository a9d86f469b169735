"""``MODEL.META_ARCHITECTURE: QSD``: quality self-distillation on top of any other meta-architecture."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qsd_plugin.core import streams
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.hosts.fastreid.quality import ImageQuality
from qsd_plugin.hosts.fastreid.statistics import Statistics
from qsd_plugin.hosts.fastreid.taps import Tap, default_taps, head_name, parse_taps, to_level
from qsd_plugin.methods.qsd import QSDLoss, QSDResult, inbatch_pairs, level_weights, preset
from qsd_plugin.networks.taps import TapRecorder
from qsd_plugin.quality.scaling import random_direction

logger = logging.getLogger("fastreid.qsd_plugin.qsd")

PAIRINGS = ("inbatch", "partner")
PARTNER_FORWARDS = ("separate", "joint")

Batch = dict[str, Any]
Levels = dict[str, torch.Tensor]


class QSDMixin(nn.Module):
    """Adds ``loss_qsd`` to the losses of the architecture it is put in front of.

    Nothing is added to the network: the parameters, the state-dict keys and the evaluation are the base's.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        check_config(cfg)
        self._qsd_weight = float(cfg.QSD.WEIGHT)
        self._qsd_partner = cfg.QSD.PAIRING == "partner"
        # The recipe's last stage always has them; under a host's own script the user must pass them.
        self._qsd_needs_weights = cfg.RECIPE.NAME == "qsd" and not cfg.MODEL.WEIGHTS
        self._qsd_joint = cfg.QSD.PARTNER_FORWARD == "joint"
        self._qsd_taps = resolve_taps(cfg, self)
        names = [tap.name for tap in self._qsd_taps]
        self._qsd_loss = build_loss(cfg, self._qsd_taps)
        self._qsd_quality = ImageQuality(cfg)
        # A source that reads norms needs the features before the BN neck, which sets every norm to about the same.
        self._qsd_pooled = f"{head_name(self)}.pool_layer" if self._qsd_quality.needs_embeddings else None
        extra = [self._qsd_pooled] if self._qsd_pooled and self._qsd_pooled not in names else []
        self._qsd_recorder = TapRecorder(self, [*names, *extra])
        coin_tossed = cfg.QUALITY.CONTROL == "random_direction"
        self._qsd_coin = streams.torch_stream(max(cfg.SEED, 0), "qsd-direction") if coin_tossed else None
        # The host's identity samplers yield blocks of NUM_INSTANCE, for which no index has to be read back from a GPU.
        in_blocks = cfg.DATALOADER.SAMPLER_TRAIN in ("NaiveIdentitySampler", "BalancedIdentitySampler")
        self._qsd_block = int(cfg.DATALOADER.NUM_INSTANCE) if in_blocks else None
        self._qsd_stats = Statistics("qsd")
        self._qsd_host_images: int | None = None
        logger.info("QSD levels: %s", ", ".join(f"{k} x {w:g}" for k, w in self._qsd_loss.level_weights.items()))

    def forward(self, batched_inputs: Batch) -> Any:
        """The base's losses plus ``loss_qsd`` in training; the base's output otherwise.

        Under ``no_grad`` (the host's precise-BN pass) the base runs alone and nothing changes state.
        """
        if not self.training or not torch.is_grad_enabled():
            return super().forward(batched_inputs)
        if self._qsd_needs_weights:
            raise ConfigError(
                "MODEL.WEIGHTS is empty",
                expected="the baseline that QSD fine-tunes, because RECIPE.NAME is qsd",
                remedy="Make it with: python tools/train_net.py --config-file CONFIG --stage baseline, then pass "
                "MODEL.WEIGHTS OUTPUT_DIR/baseline/model_final.pth. To train QSD from scratch set RECIPE.NAME ''.",
            )
        losses, result = (self._with_partners if self._qsd_partner else self._within_batch)(batched_inputs)
        # A mean over steps hides single steps without a pair, hence their share.
        empty = {"steps_without_pairs": result.stats["kept"] == 0}
        self._qsd_stats.add(result.stats | empty | {f"loss/{name}": level for name, level in result.levels.items()})
        losses["loss_qsd"] = result.total * self._qsd_weight
        return losses

    def losses(self, *outputs: Any) -> dict[str, torch.Tensor]:
        """The base's losses, restricted to the images the host trains on (all, none or the anchors)."""
        if self._qsd_host_images is None:
            return super().losses(*outputs)  # type: ignore[misc, no-any-return]
        if self._qsd_host_images == 0:
            return {}
        anchors = _first(outputs, self._qsd_host_images)
        return super().losses(*anchors)  # type: ignore[misc, no-any-return]

    def _within_batch(self, batch: Batch) -> tuple[dict[str, torch.Tensor], QSDResult]:
        identities = batch["targets"]
        losses, levels, pooled = self._recorded_forward(batch, None)
        quality, valid = self._qsd_quality(batch["img_paths"], pooled, identities.device)
        first, second = inbatch_pairs(identities, quality, num_instances=self._qsd_block)
        if self._qsd_coin is None:
            return losses, self._qsd_loss.in_batch(levels, quality, (first, second), valid)
        quality_1, quality_2 = random_direction(quality[first], quality[second], self._qsd_coin)
        levels_1 = {name: level[first] for name, level in levels.items()}
        levels_2 = {name: level[second] for name, level in levels.items()}
        return losses, self._qsd_loss(levels_1, levels_2, quality_1, quality_2, valid[first], valid[second])

    def _with_partners(self, batch: Batch) -> tuple[dict[str, torch.Tensor], QSDResult]:
        if "partner_images" not in batch:
            raise DataError(
                "Training batch without partner images",
                value=sorted(batch),
                expected="the key partner_images when QSD.PAIRING is 'partner'",
                remedy="Let the plugin build the train loader, or use QSD.PAIRING inbatch.",
            )
        device, count = batch["targets"].device, len(batch["targets"])
        if self._qsd_joint:
            joint = dict(batch)
            joint["images"] = torch.cat([batch["images"], batch["partner_images"]])
            joint["targets"] = torch.cat([batch["targets"], batch["targets"]])
            losses, levels, pooled = self._recorded_forward(joint, count)
            pooled_1, pooled_2 = (None, None) if pooled is None else (pooled[:count], pooled[count:])
            levels_1 = {name: level[:count] for name, level in levels.items()}
            levels_2 = {name: level[count:] for name, level in levels.items()}
        else:
            losses, levels_1, pooled_1 = self._recorded_forward(batch, None)
            _, levels_2, pooled_2 = self._recorded_forward({**batch, "images": batch["partner_images"]}, 0)
        quality_1, valid_1 = self._qsd_quality(batch["img_paths"], pooled_1, device)
        quality_2, valid_2 = self._qsd_quality(batch["partner_paths"], pooled_2, device)
        valid_2 = valid_2 & batch["partner_valid"].to(device, torch.bool)
        if self._qsd_coin is not None:
            quality_1, quality_2 = random_direction(quality_1, quality_2, self._qsd_coin)
        return losses, self._qsd_loss(levels_1, levels_2, quality_1, quality_2, valid_1, valid_2)

    def _recorded_forward(self, batch: Batch, host_images: int | None) -> tuple[Any, Levels, torch.Tensor | None]:
        """One training forward of the base, its levels, and the pooled features where the quality source needs them.

        The host's losses see the first ``host_images`` images, or all of them.
        """
        self._qsd_host_images = host_images
        try:
            with self._qsd_recorder as outputs:
                losses = super().forward(batch)
        finally:
            self._qsd_host_images = None
        _require_all_recorded(self._qsd_taps, outputs)
        levels = {tap.name: to_level(outputs[tap.name], self, tap.name, tap.role) for tap in self._qsd_taps}
        return losses, levels, None if self._qsd_pooled is None else outputs[self._qsd_pooled].flatten(1)


def check_config(cfg: Any) -> None:
    """Refuse ``QSD`` settings that cannot work, before anything is built.

    Raises:
        ConfigError: Names the key, its value and what is accepted.
    """
    qsd = cfg.QSD
    for key, allowed in (("PAIRING", PAIRINGS), ("PARTNER_FORWARD", PARTNER_FORWARDS)):
        if qsd[key] not in allowed:
            raise ConfigError(f"QSD.{key}", value=qsd[key], expected=" or ".join(allowed))
    if not qsd.WEIGHT >= 0:
        raise ConfigError("QSD.WEIGHT", value=qsd.WEIGHT, expected="a number >= 0")
    if qsd.PAIRING == "inbatch" and cfg.DATALOADER.SAMPLER_TRAIN in ("TrainingSampler", "ImbalancedDatasetSampler"):
        raise ConfigError(
            "DATALOADER.SAMPLER_TRAIN",
            value=cfg.DATALOADER.SAMPLER_TRAIN,
            expected="an identity sampler, because QSD.PAIRING inbatch needs several images of an identity in a batch",
            remedy="Use NaiveIdentitySampler or QSD.PAIRING partner.",
        )
    if qsd.PAIRING == "inbatch" and cfg.DATALOADER.NUM_INSTANCE < 2:
        raise ConfigError(
            "DATALOADER.NUM_INSTANCE",
            value=cfg.DATALOADER.NUM_INSTANCE,
            expected=">= 2 with QSD.PAIRING inbatch",
            remedy="Raise it, or use QSD.PAIRING partner.",
        )


def resolve_taps(cfg: Any, model: nn.Module) -> list[Tap]:
    """The levels named by ``QSD.TAPS``, or the default ones of the backbone family."""
    return parse_taps(cfg.QSD.TAPS) if cfg.QSD.TAPS else default_taps(model)


def build_loss(cfg: Any, taps: list[Tap]) -> QSDLoss:
    """The loss of ``QSD.PRESET`` with the config's overrides."""
    qsd = cfg.QSD
    settings = preset(qsd.PRESET)
    weights = level_weights(settings, {tap.name: tap.role for tap in taps})
    weights |= {tap.name: tap.weight for tap in taps if tap.weight is not None}
    return QSDLoss(
        weights,
        tau=qsd.TAU,
        map_distance=qsd.MAP_DISTANCE,
        scale_grad=qsd.SCALE_GRAD or settings.scale_grad,
        map_norm=None if qsd.MAP_NORM == "none" else qsd.MAP_NORM,
        missing=qsd.MISSING or settings.missing,
    )


def _require_all_recorded(taps: list[Tap], outputs: Mapping[str, torch.Tensor]) -> None:
    silent = [tap.name for tap in taps if tap.name not in outputs]
    if silent:
        raise ConfigError(
            "QSD.TAPS names a module that produced no output in the forward pass",
            value=silent[0],
            expected="a module that the model calls",
            remedy="fast-reid calls the blocks of a stage one by one: name the last block, e.g. backbone.layer3.5. "
            "tools/doctor.py --taps --config-file CONFIG lists the modules that can be tapped.",
        )


def _first(value: Any, count: int) -> Any:
    """``value`` with every tensor that holds a joint batch of ``2 * count`` rows cut to its first ``count``."""
    if isinstance(value, torch.Tensor):
        return value[:count] if value.dim() and len(value) == 2 * count else value
    if isinstance(value, dict):
        return {key: _first(item, count) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_first(item, count) for item in value)
    return value
