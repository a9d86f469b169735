"""``MODEL.META_ARCHITECTURE: DIL``: stage 1, content and degradation told apart by exchanging them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsd_plugin.core.errors import DataError
from qsd_plugin.hosts.fastreid.dil_files import start_trunk
from qsd_plugin.hosts.fastreid.meta_arch.dil_base import Batch, DILArchitecture, Losses, images_of
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import build_networks, schedule_of, stage1_options
from qsd_plugin.hosts.fastreid.meta_arch.dil_sheets import TrainingSheets
from qsd_plugin.hosts.fastreid.statistics import Statistics
from qsd_plugin.methods.dil import Pair, Stage1

#: Batch keys of the worse images [B, 3, H, W], their identities [B] and the iteration the batch was made for [B].
WORSE_IMAGES, WORSE_TARGETS, ITERATION = "worse_images", "worse_targets", "dil_iteration"


class DIL(DILArchitecture):
    """Stage 1 inside the host.

    A training forward renders a pair, lets the discriminators take a step of their own Adam, whose moments are buffers,
    and returns the weighted terms of encoders and generator, ``loss_dil_*``, for the host's optimizer. That one is
    built by :mod:`qsd_plugin.hosts.fastreid.dil_optimizer`. In evaluation the robust feature behind its bottleneck,
    [B, D].

    Everything random depends on (seed, rank, iteration), and the iteration is the loader's: a resumed training goes on
    exactly. Across ranks: as :class:`~qsd_plugin.methods.dil.Stage1`; parameters that a phase does not reach get a
    gradient of zero, which the optimizer drops.

    Args:
        cfg: The host's config.

    Raises:
        ConfigError: Settings that cannot work.
        CheckpointError: The first weights are missing or of another network.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        options = cfg.DIL.STAGE1_OPTIONS
        networks = build_networks(cfg)
        start_trunk(cfg, networks.content_encoder.model)
        self._schedule = schedule_of(cfg)
        self._lr_factor = float(options.DISCRIMINATOR_LR_FACTOR)
        self.stage = Stage1(
            networks,
            options=stage1_options(cfg),
            lr=float(cfg.SOLVER.BASE_LR) * self._lr_factor,
            betas=(float(options.BETAS[0]), float(options.BETAS[1])),
            weight_decay=float(options.DISCRIMINATOR_WEIGHT_DECAY),
            milestones=(),  # the rate follows the host's optimizer
            seed=self._seed,
        )
        self._optimizer: torch.optim.Optimizer | None = None
        self._stats = Statistics("dil")
        self._sheets = TrainingSheets(cfg)

    def forward(self, batched_inputs: Batch) -> Any:
        """Terms of a step in training, the robust feature otherwise; under ``no_grad`` no discriminator learns."""
        if not self.training:
            return self.embed(self.normalised(images_of(batched_inputs)))
        iteration, pair = self._pair(batched_inputs)
        if self._optimizer is not None:
            self.stage.adam.lr = float(self._optimizer.param_groups[0]["lr"]) * self._lr_factor
        if torch.is_grad_enabled() and self._sheets.due(iteration):
            self._sheets.draw(self.stage, pair, iteration)
        with self.repeatable("dil stage 1", iteration):
            result = self.stage(pair, iteration)
        losses: Losses = {f"loss_dil_{name}": term for name, term in result.terms.items()}
        if torch.is_grad_enabled():
            self._stats.add(result.stats)
        return self.reached(losses)

    def embed(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to the robust feature behind its bottleneck, [B, D]."""
        encoder = self.stage.content_encoder
        embedding: Tensor = encoder.classifier.embed(encoder(images, want_content=False).identity)
        return embedding

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the discriminators' learning rate be that of the host's optimizer, times the configured factor."""
        self._optimizer = optimizer

    def _pair(self, batch: Batch) -> tuple[int, Pair]:
        """The iteration that a batch was made for, from 1, and its pairs."""
        missing = [key for key in (WORSE_IMAGES, WORSE_TARGETS, ITERATION) if key not in batch]
        if missing:
            raise DataError(
                "Training batch without pairs",
                value=sorted(batch),
                expected=f"the keys {', '.join(missing)}, for MODEL.META_ARCHITECTURE DIL",
                remedy="Let the plugin's train loader make the pairs; it takes no data set or sampler of the caller's.",
            )
        iteration = int(batch[ITERATION][0])
        phase = self._schedule.phase(iteration)
        better, worse = (self.normalised(batch[key]) for key in ("images", WORSE_IMAGES))
        if phase == "paired":
            return iteration, Pair(phase, better, worse)
        labels = (batch[key].to(self.device) for key in ("targets", WORSE_TARGETS))
        return iteration, Pair(phase, better, worse, *labels)
