"""``MODEL.META_ARCHITECTURE: QUD``: a student learns the embeddings of a frozen teacher, without labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.hosts.fastreid.meta_arch.qud_config import check_config, label_free
from qsd_plugin.hosts.fastreid.meta_arch.qud_teacher import build_teacher, keep_out_of_checkpoints
from qsd_plugin.hosts.fastreid.statistics import Statistics
from qsd_plugin.hosts.fastreid.taps import head_modules
from qsd_plugin.methods.qud import (
    FeatureQueue,
    Teacher,
    cosine_loss,
    mse_loss,
    qud_loss,
    qud_monitors,
    soft_target_loss,
    temperature_note,
)
from qsd_plugin.networks import TapRecorder

logger = logging.getLogger("fastreid.qsd_plugin.qud")

#: Batch key of the teacher's embeddings, [B, D] float16 or float32, with ``QUD.TEACHER.SOURCE cache``.
FEATURES = "teacher_features"

Batch = dict[str, Any]
Losses = dict[str, Tensor]


class QUDMixin(nn.Module):
    """Put in front of a student's architecture: its embedding learns the teacher's of the same augmented image.

    What learns is what evaluation returns, the features behind the neck of every head, with batch norm and dropout in
    training mode. By default that is all: no label is read and no classifier built (``QUD.HOST_LOSSES``). Evaluation is
    the base's.

    The state dict is the base's, the queue (``qud_queue.``) and, where there is one, the projector
    (``qud_projector.``). The teacher is a submodule without gradients, always in eval mode, and not in the state dict.

    Across ranks: the loss is a local mean, the queue gathers.
    """

    qud_queue: FeatureQueue
    qud_teacher: Teacher | None
    qud_projector: nn.Module | None

    def __init__(self, cfg: Any) -> None:
        check_config(cfg)
        free = label_free(cfg)
        super().__init__(_without_classes(cfg) if free else cfg)
        self._qud_label_free = free
        if free:
            for parameter in self.parameters():
                # Class layers of no classes never get a gradient, for which data-parallel training would wait.
                parameter.requires_grad_(parameter.requires_grad and parameter.numel() > 0)
        self._qud_heads = list(head_modules(self).values())
        images = _noise(cfg)
        embedding, pieces = self._probe(images)
        if not free:
            self._qud_pieces = _in_order(embedding, pieces)
            self._qud_recorder = TapRecorder(self, self._qud_pieces)
        teacher = build_teacher(cfg)
        own = embedding.shape[1]
        dim = (cfg.QUD.TEACHER.DIM or own) if teacher is None else teacher(images).shape[1]
        if not own or not dim:
            raise ConfigError(
                "QUD: length of the embeddings of student and teacher",
                value=(own, dim),
                expected="at least 1 each",
                remedy="A head that evaluates as class scores (ClasHead) has no embedding: use EmbeddingHead.",
            )
        seed = max(cfg.SEED, 0)
        self.qud_projector = _projector(cfg.QUD.PROJECTOR, own, dim, seed)
        self.qud_queue = FeatureQueue(cfg.QUD.QUEUE_SIZE, dim, seed=seed)
        self.qud_teacher = teacher
        keep_out_of_checkpoints(self)
        self._qud_weight = float(cfg.QUD.WEIGHT)
        self._qud_loss = build_loss(cfg)
        self._qud_monitors = partial(qud_monitors, temperature=cfg.QUD.TEMPERATURE, mask_above=_mask_above(cfg))
        self._qud_stats = Statistics("qud")
        if cfg.QUD.LOSS == "qud":
            logger.info(temperature_note(cfg.QUD.TEMPERATURE, cfg.QUD.QUEUE_SIZE, dim))

    def forward(self, batched_inputs: Batch) -> Any:
        """``loss_qud`` in training, with the base's losses if they are wanted; the base's output otherwise.

        Under ``no_grad`` (the host's precise-BN pass) the teacher is not asked and nothing but batch norm changes.
        """
        if not self.training:
            return super().forward(batched_inputs)
        learns = torch.is_grad_enabled() and not getattr(self, "_qsd_partners_turn", False)
        teacher = self._teacher_embedding(batched_inputs) if learns else None
        if self._qud_label_free:
            losses: Losses = {}
            with self._evaluating():
                student = super().forward(batched_inputs)
        else:
            with self._qud_recorder as pieces:
                losses = super().forward(batched_inputs)
            student = torch.cat([pieces[name].flatten(1) for name in self._qud_pieces], dim=1)
        if teacher is not None:
            losses["loss_qud"] = self._distil(student, teacher)
        return losses

    def _distil(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.qud_projector is not None:
            student = self.qud_projector(student)
        loss = self._qud_loss(student, teacher, self.qud_queue.features)
        monitors = self._qud_monitors(student, teacher, self.qud_queue.features)
        # Behind the loss, so that no image is its own negative; nothing refers to the old entries any more.
        self.qud_queue.enqueue(teacher)
        self._qud_stats.add(monitors | {"queue_filled": self.qud_queue.filled / len(self.qud_queue.features)})
        return loss * self._qud_weight

    def _teacher_embedding(self, batch: Batch) -> Tensor:
        """The teacher's embeddings of the batch, [B, D] float32, without a graph."""
        if self.qud_teacher is not None:
            embedding: Tensor = self.qud_teacher(batch["images"].to(self.qud_queue.features.device))
            return embedding
        if FEATURES not in batch:
            raise DataError(
                "Training batch without the teacher's embeddings",
                value=sorted(batch),
                expected=f"the key {FEATURES}, because QUD.TEACHER.SOURCE is cache",
                remedy="Let the loader read them from a cache, or set QUD.TEACHER.SOURCE to network or onnx.",
            )
        features = batch[FEATURES]
        expected = (len(batch["images"]), self.qud_queue.features.shape[1])
        if tuple(features.shape) != expected:
            raise DataError(
                f"Batch key {FEATURES}",
                value=tuple(features.shape),
                expected=f"{expected}, one row for each image",
                remedy="Set QUD.TEACHER.DIM to the length of the stored embeddings.",
            )
        stored: Tensor = features.to(self.qud_queue.features, non_blocking=True)
        return stored

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside, architecture and heads return embeddings; the layers in them stay in training mode."""
        modes = [(module, module.training) for module in (self, *self._qud_heads)]
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    @torch.no_grad()
    def _probe(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What evaluation returns for images, and the output of every head's neck by module path."""
        self.eval()
        with TapRecorder(self, [f"{name}.bottleneck" for name in head_modules(self)]) as necks:
            embedding: Tensor = super().forward({"images": images})
        self.train()
        return embedding, {name: neck.flatten(1) for name, neck in necks.items()}


def build_loss(cfg: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of ``QUD.LOSS``: embeddings of student and teacher [B, D] and the queue [n, D] to a 0-d tensor."""
    qud = cfg.QUD
    if qud.LOSS == "qud":
        return partial(qud_loss, temperature=qud.TEMPERATURE, mask_above=_mask_above(cfg))
    if qud.LOSS == "soft":
        return partial(soft_target_loss, temperature=qud.TEMPERATURE, target_temperature=qud.SOFT_TEMPERATURE)
    if qud.LOSS == "mse":
        return lambda student, teacher, queue: mse_loss(student, teacher, reduction=qud.MSE_REDUCTION)
    return lambda student, teacher, queue: cosine_loss(student, teacher)


def _mask_above(cfg: Any) -> float | None:
    return float(cfg.QUD.MASK_ABOVE) if cfg.QUD.MASK_ABOVE < 1 else None


def _noise(cfg: Any) -> Tensor:
    """One image of the size that training feeds, [1, C, H, W], 0 to 255."""
    size = list(cfg.INPUT.CROP.SIZE if cfg.INPUT.CROP.ENABLED else cfg.INPUT.SIZE_TRAIN)
    generator = torch_stream(0, "qud probe")
    return torch.rand(1, len(cfg.MODEL.PIXEL_MEAN), size[0], size[-1], generator=generator) * 255


def _projector(kind: str, own: int, dim: int, seed: int) -> nn.Module | None:
    """A linear layer from the student's embedding to the length of the teacher's, or none."""
    if kind == "none" and own != dim:
        raise ConfigError(
            "QUD.PROJECTOR",
            value=kind,
            expected=f"auto or linear, because the student's embedding has {own} numbers and the teacher's {dim}",
            remedy="Or give the student the teacher's size (MODEL.HEADS.EMBEDDING_DIM; MODEL.BACKBONE.FEAT_DIM of a "
            "face network).",
        )
    if kind == "none" or (kind == "auto" and own == dim):
        return None
    projector: nn.Linear = nn.utils.skip_init(nn.Linear, own, dim, bias=False)  # type: ignore[no-untyped-call]
    nn.init.normal_(projector.weight, std=own**-0.5, generator=torch_stream(seed, "qud projector"))
    return projector


def _in_order(embedding: Tensor, pieces: dict[str, Tensor]) -> list[str]:
    """The necks whose outputs, one beside the other, are the evaluated embedding."""
    order: list[str] = []
    left, rest = dict(pieces), embedding
    while rest.shape[1]:
        name = next((name for name, piece in left.items() if torch.equal(piece, rest[:, : piece.shape[1]])), "")
        if not name:
            raise ConfigError(
                "QUD.HOST_LOSSES",
                value=True,
                expected="a QUD.BASE whose evaluated embedding is made of the outputs of its heads' necks",
                remedy="Use QUD.HOST_LOSSES False, or heads that return what their bottleneck does.",
            )
        order.append(name)
        rest = rest[:, left.pop(name).shape[1] :]
    return order


def _without_classes(cfg: Any) -> Any:
    """The base's config when nothing of it has to do with classes."""
    own = cfg.clone()
    own.defrost()
    own.MODEL.HEADS.NUM_CLASSES = 0
    own.MODEL.LOSSES.NAME = ()
    return own
