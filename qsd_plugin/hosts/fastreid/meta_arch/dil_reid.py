"""``MODEL.META_ARCHITECTURE: DILReID``: stage 2, re-identification kept robust by replayed degradations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.hosts.fastreid.dil_files import load_stage1, load_teacher, read_bank, start_trunk
from qsd_plugin.hosts.fastreid.meta_arch.dil_base import Batch, DILArchitecture, Losses, images_of
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import (
    build_identity_encoder,
    build_networks,
    num_classes,
    scaled,
    stage2_options,
)
from qsd_plugin.hosts.fastreid.meta_arch.dil_margin import margin_head, margin_loss, without_classifier
from qsd_plugin.hosts.fastreid.statistics import Statistics
from qsd_plugin.methods.dil import (
    ClassBlock,
    DegradationAttention,
    DualBranchReID,
    Networks,
    ReplayAugmenter,
    SensitiveBranch,
    stage2_terms,
)

#: Name of the frozen submodule. Nothing of it is in the model's state dict: it always comes from its own files.
REPLAY = "dil_replay."


class DILReID(DILArchitecture):
    """Stage 2 inside the host.

    Trunk, head and classifier start from stage 1, the last stage and its classifier from the teacher. A training
    forward renders the batch with replayed degradations and returns ``loss_dil_*``; evaluation returns
    ``DIL.STAGE2_OPTIONS.FEATURE``, [B, D]. With ``MODEL.HEADS.NAME QGFaceHead`` that head classifies the joined
    feature.

    Which codes are replayed depends on (seed, step), dropout on the rank, too, and the step is a buffer: a resumed
    training goes on exactly. Across ranks: local means, and triplets and draws as those of one process.

    Args:
        cfg: The host's config.

    Raises:
        ConfigError: Settings that cannot work.
        CheckpointError: A file that it starts from is missing, or of another stage or size.
        DataError: The bank is missing or of another encoder.
    """

    steps: Tensor
    """Training steps so far, 0-d int64."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        options, replay = cfg.DIL.STAGE2_OPTIONS, cfg.DIL.REPLAY
        networks, teacher = build_networks(cfg), build_identity_encoder(cfg)
        start_trunk(cfg, networks.content_encoder.model)
        if cfg.DIL.TEACHER:
            load_teacher(teacher, Path(cfg.DIL.TEACHER))
        else:
            start_trunk(cfg, teacher.model)
        self.dil_replay = _replay(cfg, networks) if cfg.DIL.STAGE1 else None
        channels: tuple[int, ...] = teacher.model.channels  # type: ignore[assignment]
        encoder = networks.content_encoder
        self.reid = DualBranchReID(
            encoder,
            SensitiveBranch(teacher.model.get_submodule("layer4"), teacher.classifier),
            ClassBlock(
                channels[-1] + encoder.identity_dim,
                num_classes(cfg),
                embedding_dim=scaled(cfg, 512),
                dropout=cfg.DIL.DROPOUT,
            ),
            attention=_attention(cfg, channels[-1]) if options.ATTENTION else None,
        )
        self.margin_head = margin_head(cfg, channels[-1] + encoder.identity_dim)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._options, self._feature = stage2_options(cfg), str(options.FEATURE)
        if self.margin_head is not None:
            self._options = without_classifier(self._options)
        self._mode, self._repeats = str(replay.MODE), int(replay.REPEATS)
        self._stats = Statistics("dil")
        self.register_state_dict_post_hook(_drop_replay)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_do_not_miss_replay)  # type: ignore[no-untyped-call]

    def forward(self, batched_inputs: Batch) -> Any:
        """Terms of a step in training, features otherwise; under ``no_grad`` no step is counted."""
        images = self.normalised(images_of(batched_inputs))
        if not self.training:
            return self.reid.embed(images, self._feature)
        labels = batched_inputs["targets"].to(self.device)
        step = int(self.steps)
        images, rendered = self._replayed(images, step)
        if len(images) > len(labels):
            labels = labels.repeat_interleave(self._repeats)
        with self.repeatable("dil stage 2", step):
            outputs = self.reid(images)
            logits = None if rendered is None else self.reid.robust_logits(rendered)
        losses: Losses = {
            f"loss_dil_{name}": term for name, term in stage2_terms(outputs, logits, labels, self._options).items()
        }
        if self.margin_head is not None:
            margin = margin_loss(self.margin_head, outputs.features["fuse"], labels)
            losses["loss_dil_margin"] = self._options.fuse_weight * margin
        if torch.is_grad_enabled():
            self.steps.add_(1)
            self._stats.add(_accuracies(outputs.logits, logits, labels))
        return self.reached(losses)

    def _replayed(self, images: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        if self._mode == "none":
            return images, None
        if self.dil_replay is None:
            raise ConfigError(
                "DIL.STAGE1 is empty",
                expected=f"the checkpoint of stage 1, for DIL.REPLAY.MODE {self._mode}",
                remedy="RECIPE.NAME dil trains it first (--stage stage1); without stage 1 set DIL.REPLAY.MODE none.",
            )
        replayed: tuple[Tensor, Tensor | None] = self.dil_replay(images, torch_stream(self._seed, "dil replay", step))
        return replayed


def _replay(cfg: Any, networks: Networks) -> ReplayAugmenter | None:
    """Loads stage 1 into ``networks``; the augmenter has copies of them, and the bank where it draws from one."""
    load_stage1(networks, Path(cfg.DIL.STAGE1))
    settings = cfg.DIL.REPLAY
    if settings.MODE == "none":
        return None
    bank = read_bank(Path(cfg.DIL.BANK), networks.degradation_encoder) if settings.MODE == "bank" else None
    return ReplayAugmenter(
        networks.content_encoder,
        networks.degradation_encoder,
        networks.generator,
        bank,
        mode=settings.MODE,
        repeats=settings.REPEATS,
        swap=settings.SWAP,
    )


def _attention(cfg: Any, feature_dim: int) -> DegradationAttention:
    return DegradationAttention(
        feature_dim=feature_dim, code_dim=scaled(cfg, 128), hidden=max(1, round(256 * cfg.DIL.WIDTH))
    )


@torch.no_grad()
def _accuracies(logits: dict[str, Tensor], replayed: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    """Share of the batch that each feature's classifier gets right, and that the robust one does on renderings."""
    shown = logits if replayed is None else {**logits, "replay": replayed}
    return {f"accuracy_{name}": (values.argmax(dim=1) == labels).float().mean() for name, values in shown.items()}


def _drop_replay(_model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + REPLAY)]:
        del state[name]


def _do_not_miss_replay(_model: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.startswith(REPLAY)]
