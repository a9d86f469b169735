"""Heads with the contract of arcface_torch's PartialFC: ``head(output of the network, labels) -> 0-d loss``.

With class rows the head is a subclass of the checkout's own ``PartialFC_V2``, which keeps the sharded softmax, the
sampling of classes and the class rows; without (QUD alone) it has buffers only. All state is in the state dict, which
``save_all_states`` stores per process.

Shapes: as in :mod:`.terms`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qsd_plugin.core.distributed import all_reduce_sum, rank, world_size
from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts.insightface.options import Options
from qsd_plugin.hosts.insightface.terms import ExactArcFace, NormMargin, QGFaceTerm, QSDTerm, QUDTerm, Stats
from qsd_plugin.hosts.insightface.wrappers import TrainingOutput


class Terms(nn.Module):
    """The terms that methods add to the softmax, and the log line of their statistics.

    Args:
        options: Of the config.
        config: The host's.
        levels: Of QSD, with their weights.
        embedding_size: D.
    """

    def __init__(
        self, options: Options, config: Mapping[str, Any], levels: dict[str, float], embedding_size: int
    ) -> None:
        super().__init__()
        methods, seed = options.methods, int(config.get("seed") or 0)
        self.qsd = QSDTerm(options.qsd, levels) if "QSD" in methods else None
        self.qud = QUDTerm(options.qud, embedding_size, seed) if "QUD" in methods else None
        self.qgface = QGFaceTerm(options.qgface, embedding_size) if "QGFace" in methods else None
        self.views = 2 if options.paired else 1
        images = int(config["batch_size"]) * world_size()
        for name, needed in (("qud", self.views * images), ("qgface", 2 * images)):
            size = getattr(options, name).queue_size
            if getattr(self, name) is not None and size < needed:
                raise ConfigError(
                    f"config.qsd_plugin {name} queue_size",
                    value=size,
                    expected=f"at least {needed}, the images of a step on all processes",
                )
        self._frequent, self._step = int(config.get("frequent") or 0), 0

    def forward(self, output: TrainingOutput, targets: Tensor) -> tuple[list[Tensor], Stats]:
        """The terms that need no classes."""
        losses: list[Tensor] = []
        stats: Stats = {}
        found = [self.qsd(output, targets)] if self.qsd is not None else []
        found += [self.qud(output, self.views)] if self.qud is not None else []
        for loss, numbers in found:
            losses.append(loss)
            stats.update(numbers)
        return losses, stats

    def log(self, stats: Stats) -> None:
        """A line of this rank's statistics every ``config.frequent`` steps; only then is the device waited for."""
        self._step += 1
        if self._frequent and self._step % self._frequent == 0 and rank() == 0 and stats:
            logging.info("qsd_plugin  %s", "  ".join(f"{name} {float(value):.4g}" for name, value in stats.items()))


class QueueHead(nn.Module):
    """The head of a run without classes; labels are not read.

    Args:
        terms: What the loss is made of.
    """

    def __init__(self, terms: Terms) -> None:
        super().__init__()
        self.terms = terms

    def forward(self, local_embeddings: TrainingOutput, local_labels: Tensor) -> Tensor:
        """The loss of this rank."""
        losses, stats = self.terms(local_embeddings, local_labels)
        self.terms.log(stats)
        return torch.stack(losses).sum()


def build_head(
    host: type[nn.Module],
    options: Options,
    config: Mapping[str, Any],
    levels: dict[str, float],
    arguments: tuple[Any, ...],
    named: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The head of a run.

    Args:
        host: The checkout's ``PartialFC_V2``.
        options: Of the plugin.
        config: The host's.
        levels: Of QSD, with their weights.
        arguments: Of the host's constructor: margin, embedding size, number of classes, sample rate, fp16.
        named: More of them, by name.

    Raises:
        ConfigError: A queue is too small.
    """
    margin, embedding_size, *rest = arguments
    terms = Terms(options, config, levels, embedding_size)
    if not options.classified:
        return QueueHead(terms)
    if "AdaFace" in options.methods:
        margin = NormMargin(options.adaface)
    elif "QGFace" in options.methods:
        margin = NormMargin(options.qgface)
    elif options.margin_gradient == "exact":
        margin = ExactArcFace(margin.s, margin.m2)
    head: nn.Module = _class_head(host)(terms, options, margin, embedding_size, *rest, **(named or {}))
    return head


def _class_head(host: Any) -> Any:
    class ClassHead(host):  # type: ignore[misc]
        """The host's softmax over classes, and the terms of the methods."""

        def __init__(self, terms: Terms, options: Options, margin: nn.Module, *rest: Any, **named: Any) -> None:
            super().__init__(margin, *rest, **named)
            self.terms = terms
            self._both = "QGFace" in options.methods or options.qsd.classify == "both"

        def forward(self, local_embeddings: TrainingOutput | Tensor, local_labels: Tensor) -> Tensor:
            """The loss: the host's of the whole batch, and this rank's part of the terms."""
            output = local_embeddings
            if isinstance(output, Tensor):
                output = TrainingOutput(output, {}, None)
            labels = (local_labels[:, 0] if local_labels.dim() == 2 else local_labels).long()
            losses, stats = self.terms(output, local_labels)
            rows = output.embedding
            if self.terms.views == 2 and not self._both:
                rows = rows.chunk(2)[0]
            repeated = labels.repeat(len(rows) // len(labels))
            if isinstance(self.margin_softmax, NormMargin):
                unit, scaler = self.margin_softmax.observe(rows)
                stats.update(self.margin_softmax.stats())
                if self.terms.qgface is not None:
                    term = self.terms.qgface(unit, scaler, labels, self.centres)
                    losses.append(term[0])
                    stats.update(term[1])
            # A copy: the host reshapes its argument in place.
            softmax: Tensor = super().forward(rows, repeated.clone())
            self.terms.log({"softmax": softmax.detach(), **stats})
            return torch.stack([softmax, *losses]).sum()

        def centres(self, labels: Tensor) -> Tensor:
            """Class rows [n, D] of any classes [n]; across ranks, each gives what it holds."""
            local = labels - self.class_start
            held = (local >= 0) & (local < self.num_local)
            rows = self.weight.detach()[local.clamp(0, self.num_local - 1)] * held[:, None]
            return all_reduce_sum(rows)

    return ClassHead
