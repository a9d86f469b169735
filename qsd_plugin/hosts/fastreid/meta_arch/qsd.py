"""``MODEL.META_ARCHITECTURE: QSD``: quality self-distillation on top of any other meta-architecture."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qsd_plugin.core import streams
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.erasing import erase
from qsd_plugin.hosts.fastreid.meta_arch.qsd_pairs import (
    BatchLabels,
    ImageLabels,
    PairLabels,
    halves,
    host_outputs,
    pair_labels,
    teaching_images,
)
from qsd_plugin.hosts.fastreid.meta_arch.qsd_teacher import EMATeacher, build_teacher, fill_missing_teacher
from qsd_plugin.hosts.fastreid.meta_arch.qud_config import label_free
from qsd_plugin.hosts.fastreid.quality import FILE, NETWORK, STORED, ImageQuality
from qsd_plugin.hosts.fastreid.samplers import IN_BLOCKS, SEEDED
from qsd_plugin.hosts.fastreid.statistics import Statistics
from qsd_plugin.hosts.fastreid.taps import Tap, default_taps, head_name, parse_taps, to_level
from qsd_plugin.methods.qsd import PairWatch, QSDLoss, QSDResult, inbatch_pairs, level_weights, preset
from qsd_plugin.networks import TapRecorder, ema_update

logger = logging.getLogger("fastreid.qsd_plugin.qsd")

PAIRINGS = ("inbatch", "partner")
PARTNER_FORWARDS = ("separate", "joint")
CLS_ON = ("anchor", "teacher", "both")
PAIR_FLIPS = ("independent", "shared")

Batch = dict[str, Any]
Losses = dict[str, torch.Tensor]
Levels = dict[str, torch.Tensor]


class QSDMixin(nn.Module):
    """Adds ``loss_qsd`` to the losses of the architecture it is put in front of.

    Nothing is added to the network: the parameters, the state-dict keys and the evaluation are the base's. With
    ``QSD.EMA`` the moving average lies beside it, under keys that begin with ``qsd_teacher.``.
    """

    qsd_teacher: nn.Module
    _qsd_erased: torch.Tensor

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        check_config(cfg)
        self._qsd_weight = float(cfg.QSD.WEIGHT)
        self._qsd_partner = cfg.QSD.PAIRING == "partner"
        # The recipe's last stage always has them; under a host's own script the user must pass them.
        self._qsd_needs_weights = cfg.RECIPE.NAME == "qsd" and not cfg.MODEL.WEIGHTS
        self._qsd_joint = cfg.QSD.PARTNER_FORWARD == "joint"
        self._qsd_cls_on = str(cfg.QSD.CLS_ON)
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
        # Identity samplers yield blocks of NUM_INSTANCE, for which no index has to be read back from a GPU.
        in_blocks = cfg.DATALOADER.SAMPLER_TRAIN in IN_BLOCKS
        self._qsd_block = int(cfg.DATALOADER.NUM_INSTANCE) if in_blocks else None
        self._qsd_stats = Statistics("qsd", watch=PairWatch(self._qsd_loss.q_max).update)
        self._qsd_captured: list[tuple[Any, ...]] | None = None
        self._qsd_partners_turn = False
        if not cfg.QSD.TEACHER_ERASE:
            self.register_buffer("_qsd_erased", torch.tensor(list(cfg.INPUT.REA.VALUE)), persistent=False)
        self._qsd_momentum = float(cfg.QSD.EMA.MOMENTUM)
        self._qsd_average: EMATeacher | None = None
        if cfg.QSD.EMA.ENABLED:
            self.qsd_teacher = build_teacher(cfg, self)
            self._qsd_average = EMATeacher(self.qsd_teacher, names)
            self.register_load_state_dict_post_hook(fill_missing_teacher)  # type: ignore[no-untyped-call]
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
        if self._qsd_average is not None:
            ema_update(self.qsd_teacher, self, self._qsd_momentum)
        losses, result = (self._with_partners if self._qsd_partner else self._within_batch)(batched_inputs)
        self._qsd_stats.add(result.stats | {f"loss/{name}": level for name, level in result.levels.items()})
        losses["loss_qsd"] = result.total * self._qsd_weight
        return losses

    def losses(self, *outputs: Any) -> Losses:
        """The base's losses, unless they wait for the outputs of the partners."""
        if self._qsd_captured is None:
            return super().losses(*outputs)  # type: ignore[misc, no-any-return]
        self._qsd_captured.append(outputs)
        return {}

    def _momentum_update_key_encoder(self, *args: Any) -> None:
        """The moving average of the host's Distiller: one update per step, also where a step has two forwards."""
        if not self._qsd_partners_turn:
            super()._momentum_update_key_encoder(*args)  # type: ignore[misc]

    def _within_batch(self, batch: Batch) -> tuple[Losses, QSDResult]:
        labels = None if self._qsd_quality.needs_embeddings else self._batch_labels(batch, None)
        shown = batch
        if "erase_boxes" in batch:
            teaches = None if labels is None else teaching_images(labels.pairs, labels.of_pairs, len(batch["targets"]))
            shown = {**batch, "images": self._erased(batch, "", teaches)}
        losses, levels, pooled = self._recorded_forward(shown)
        labels = self._batch_labels(batch, pooled) if labels is None else labels
        images, pairs = labels.images, labels.pairs
        taught = self._averaged_levels(batch)
        if self._qsd_coin is None:
            return losses, self._qsd_loss.in_batch(levels, images.quality, pairs, images.valid, images.spread, taught)
        # The coin is tossed for each pair, so the same image may win one and lose another: rows are taken out here.
        (levels_1, levels_2), (taught_1, taught_2) = (_rows(of, pairs) for of in (levels, taught))
        result = self._qsd_loss(levels_1, levels_2, *labels.of_pairs, teacher_taps_1=taught_1, teacher_taps_2=taught_2)
        return losses, result

    def _with_partners(self, batch: Batch) -> tuple[Losses, QSDResult]:
        if "partner_images" not in batch:
            raise DataError(
                "Training batch without partner images",
                value=sorted(batch),
                expected="the key partner_images when QSD.PAIRING is 'partner'",
                remedy="Let the plugin build the train loader, or use QSD.PAIRING inbatch.",
            )
        count = len(batch["targets"])
        labels = None if self._qsd_quality.needs_embeddings else self._partner_labels(batch, None, None)
        first, second = batch["images"], batch["partner_images"]
        if "erase_boxes" in batch:
            teaches_1, teaches_2 = (None, None) if labels is None else labels.better()
            first, second = self._erased(batch, "", teaches_1), self._erased(batch, "partner_", teaches_2)
        # The base computes its losses in the forward where that already sees what QSD.CLS_ON asks for.
        at_once = self._qsd_cls_on == ("both" if self._qsd_joint else "anchor")
        captured: list[tuple[Any, ...]] = []
        if self._qsd_joint:
            joint = {**batch, "images": torch.cat([first, second]), "targets": batch["targets"].repeat(2)}
            losses, levels, pooled = self._recorded_forward(joint, None if at_once else captured)
            (levels_1, levels_2), (pooled_1, pooled_2) = halves(levels, count), halves(pooled, count)
            captured = list(halves(captured[0], count)) if captured else []
        else:
            losses, levels_1, pooled_1 = self._recorded_forward(
                {**batch, "images": first}, None if at_once else captured
            )
            self._qsd_partners_turn = True
            try:
                _, levels_2, pooled_2 = self._recorded_forward({**batch, "images": second}, captured)
            finally:
                self._qsd_partners_turn = False
        if labels is None:
            labels = self._partner_labels(batch, pooled_1, pooled_2)
        if not at_once:
            losses |= self._host_losses(captured, count, labels)
        taught_1 = self._averaged_levels(batch)
        taught_2 = self._averaged_levels({**batch, "images": batch["partner_images"]})
        result = self._qsd_loss(levels_1, levels_2, *labels, teacher_taps_1=taught_1, teacher_taps_2=taught_2)
        return losses, result

    def _host_losses(self, captured: list[tuple[Any, ...]], count: int, labels: PairLabels) -> Losses:
        """The base's losses on the images that ``QSD.CLS_ON`` names."""
        if len(captured) != 2:
            raise ConfigError(
                "QSD.CLS_ON",
                value=self._qsd_cls_on,
                expected="a QSD.BASE that calls its losses() once in a training forward, to choose the images it sees",
                remedy="Use QSD.CLS_ON anchor with QSD.PARTNER_FORWARD separate, or QSD.PAIRING inbatch.",
            )
        first, second = captured
        outputs = host_outputs(self._qsd_cls_on, first, second, count, labels)
        return super().losses(*outputs)  # type: ignore[misc, no-any-return]

    def _batch_labels(self, batch: Batch, pooled: torch.Tensor | None) -> BatchLabels:
        images = self._image_labels(batch, "img_paths", "images", pooled)
        pairs = inbatch_pairs(batch["targets"], images.quality, num_instances=self._qsd_block)
        return BatchLabels(images, pairs, self._qsd_coin)

    def _partner_labels(self, batch: Batch, pooled_1: torch.Tensor | None, pooled_2: torch.Tensor | None) -> PairLabels:
        first = self._image_labels(batch, "img_paths", "images", pooled_1)
        second = self._image_labels(batch, "partner_paths", "partner_images", pooled_2)
        other_image = batch["partner_valid"].to(second.valid.device, torch.bool)
        return pair_labels(first, second._replace(valid=second.valid & other_image), self._qsd_coin)

    def _image_labels(self, batch: Batch, paths: str, images: str, pooled: torch.Tensor | None) -> ImageLabels:
        device = batch["targets"].device
        quality, valid = self._qsd_quality(batch[paths], pooled, device, batch[images])
        spread = self._qsd_quality.spread(batch[paths], device) if self._qsd_loss.confidence > 0 else None
        return ImageLabels(quality, valid, spread)

    def _erased(self, batch: Batch, prefix: str, teaches: torch.Tensor | None) -> torch.Tensor:
        """Images with their boxes filled, except those that teach; all of them if another network does."""
        students = None if self._qsd_average is not None or teaches is None else ~teaches
        return erase(batch[f"{prefix}images"], batch[f"{prefix}erase_boxes"], self._qsd_erased, students)

    def _averaged_levels(self, batch: Batch) -> Levels | None:
        """What the moving average makes of the images, without erasing if that was left to the training step."""
        return None if self._qsd_average is None else self._levels(self._qsd_average(batch))

    def _recorded_forward(
        self, batch: Batch, captured: list[tuple[Any, ...]] | None = None
    ) -> tuple[Losses, Levels, torch.Tensor | None]:
        """One training forward of the base, its levels, and the pooled features where the quality source needs them.

        With ``captured`` the base computes no losses: the arguments they would have had are appended to it.
        """
        self._qsd_captured = captured
        try:
            with self._qsd_recorder as outputs:
                losses = super().forward(batch)
        finally:
            self._qsd_captured = None
        _require_all_recorded(self._qsd_taps, outputs)
        images = len(batch["targets"])  # QGFace shows the base their degraded views too, behind them
        levels = {name: level[:images] for name, level in self._levels(outputs).items()}
        return losses, levels, None if self._qsd_pooled is None else outputs[self._qsd_pooled][:images].flatten(1)

    def _levels(self, outputs: Mapping[str, torch.Tensor]) -> Levels:
        return {tap.name: to_level(outputs[tap.name], self, tap.name, tap.role) for tap in self._qsd_taps}


def check_config(cfg: Any) -> None:
    """Refuse ``QSD`` settings that cannot work, before anything is built.

    Raises:
        ConfigError: Names the key, its value and what is accepted.
    """
    qsd = cfg.QSD
    choices = {"PAIRING": PAIRINGS, "PARTNER_FORWARD": PARTNER_FORWARDS, "CLS_ON": CLS_ON, "PAIR_FLIP": PAIR_FLIPS}
    for key, allowed in choices.items():
        if qsd[key] not in allowed:
            raise ConfigError(f"QSD.{key}", value=qsd[key], expected=" or ".join(allowed))
    if not qsd.WEIGHT >= 0:
        raise ConfigError("QSD.WEIGHT", value=qsd.WEIGHT, expected="a number >= 0")
    unpaired = (SEEDED, "TrainingSampler", "ImbalancedDatasetSampler")
    if qsd.PAIRING == "inbatch" and cfg.DATALOADER.SAMPLER_TRAIN in unpaired:
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
    if qsd.PAIRING == "inbatch" and qsd.CLS_ON == "teacher":
        raise ConfigError(
            "QSD.CLS_ON",
            value=qsd.CLS_ON,
            expected="anchor or both with QSD.PAIRING inbatch, where every image is an anchor",
            remedy="An image teaches one of its pairs and learns in another, and the host's losses need whole "
            "identities. Use QSD.PAIRING partner to choose.",
        )
    if not 0 <= qsd.EMA.MOMENTUM <= 1:
        raise ConfigError("QSD.EMA.MOMENTUM", value=qsd.EMA.MOMENTUM, expected="a number from 0 to 1")
    source = cfg.QUALITY.SOURCE
    if not qsd.TEACHER_ERASE and not qsd.EMA.ENABLED and source not in (*STORED, NETWORK):
        raise ConfigError(
            "QSD.TEACHER_ERASE",
            value=False,
            expected=f"True with QUALITY.SOURCE {source}, which says who teaches only after the images went through",
            remedy="Use QUALITY.SOURCE file or network, or a teacher of its own (QSD.EMA.ENABLED True).",
        )
    if not qsd.TEACHER_ERASE and not all(isinstance(value, (int, float)) for value in cfg.INPUT.REA.VALUE):
        raise ConfigError(
            "INPUT.REA.VALUE", value=cfg.INPUT.REA.VALUE, expected="numbers, with QSD.TEACHER_ERASE False"
        )
    if qsd.CONFIDENCE > 0 and source != FILE:
        logger.warning("QSD.CONFIDENCE drops no pair: QUALITY.SOURCE %s knows no spread of its scores.", source)


def resolve_taps(cfg: Any, model: nn.Module) -> list[Tap]:
    """The levels named by ``QSD.TAPS``, or the backbone family's default ones; a QUD without labels has no logits."""
    if cfg.QSD.TAPS:
        return parse_taps(cfg.QSD.TAPS)
    return [tap for tap in default_taps(model) if tap.role != "logits" or not label_free(cfg)]


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
        map_norm={"": settings.map_norm, "none": None}.get(qsd.MAP_NORM, qsd.MAP_NORM),
        missing=qsd.MISSING or settings.missing,
        gap_power=qsd.GAP_POWER,
        confidence=qsd.CONFIDENCE,
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


def _rows(levels: Levels | None, pairs: tuple[torch.Tensor, torch.Tensor]) -> list[Levels | None]:
    return [None if levels is None else {name: level[index] for name, level in levels.items()} for index in pairs]
