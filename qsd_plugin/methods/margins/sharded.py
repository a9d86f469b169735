"""Margin softmax over more classes than a rank can hold, or than a step can afford.

Shapes: B rows of a rank, the same number on every rank; W ranks; D embedding size; C classes, C_r of them on rank r.
Source: An et al., "Partial FC", ICCV workshops 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core import distributed
from qsd_plugin.core.distributed import all_reduce_max, all_reduce_sum, gather_equal_rows, gather_with_gradient
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.sharded_cross_entropy import sharded_cross_entropy
from qsd_plugin.methods.margins.class_shard import ClassShard

#: Cosines [B, C] and true classes [B] (-1: none of these) to logits, as the functions of this package.
Margin = Callable[[Tensor, Tensor], Tensor]


class ShardedSoftmax(NamedTuple):
    """What :func:`sharded_margin_softmax` returns; 0-d, the same on every rank."""

    loss: Tensor
    """Mean cross entropy of the whole batch."""
    accuracy: Tensor
    """Share of the whole batch whose true class has the largest cosine among the classes used. Detached."""


def sharded_margin_softmax(
    embedding: Tensor, labels: Tensor, rows: Tensor, shard: ClassShard, margin: Margin, *, step: int | None = None
) -> ShardedSoftmax:
    """Cross entropy of ``margin(cosine of embeddings and class rows)`` over the classes of all ranks.

    Across ranks: gathers embeddings and labels, reduces the softmax. The loss is that of one process on the whole
    batch. The gradient of ``rows`` is exactly this rank's part of that process's gradient, so ``rows`` must be left
    out of data-parallel averaging; that of ``embedding`` is this rank's part times W, so that the parameters below,
    averaged over ranks, get the gradient of that process. Every rank must make the call, with the same B.

    With a sample rate below 1 a step knows only the classes of :meth:`.ClassShard.draw`. The others get a gradient of
    zero, not none: as in InsightFace's PartialFC (version 2), an optimizer still applies its momentum and weight decay
    to them.

    Precision: an fp32 island (autocast off, casts to float32; float64 stays). Nothing waits for the device, unless a
    batch of all ranks has more rows than a rank keeps classes.

    Args:
        embedding: Any length, normalised here, [B, D].
        labels: Classes, 0 to C - 1, [B] int64.
        rows: This rank's class centres, normalised here, [C_r, D].
        shard: The classes of this rank.
        margin: From cosines and local classes to logits.
        step: Number of the training step; needed for a sample rate below 1.

    Raises:
        ConfigError: Shapes or the number of ranks do not fit, or ``step`` is missing.
        DataError: A label is out of range. On a device, where looking would wait for it, the loss is NaN instead.
    """
    _check(embedding, labels, rows, shard, step)
    with torch.autocast(embedding.device.type, enabled=False):
        whole = gather_with_gradient(F.normalize(_precise(embedding)))
        all_labels = gather_equal_rows(labels)
        unknown = ((all_labels < 0) | (all_labels >= shard.num_classes)).any()
        if unknown.device.type == "cpu" and unknown:
            found = sorted({int(all_labels.min()), int(all_labels.max())})
            raise DataError(
                "Class labels of a batch",
                value=found,
                expected=f"0 to {shard.num_classes - 1}, the classes of the head",
            )
        local = shard.local(all_labels)
        if shard.kept < shard.rows:
            assert step is not None
            kept = shard.draw(local, step)
            rows = rows.index_select(0, kept)
            local = torch.where(local >= 0, torch.searchsorted(kept, local), -1)
        cosine = whole @ F.normalize(_precise(rows)).T
        loss = sharded_cross_entropy(margin(cosine, local), local)
        return ShardedSoftmax(torch.where(unknown, torch.nan, loss), _accuracy(cosine.detach(), local))


class ShardedClassifier(nn.Module):
    """The class rows of one rank with :func:`sharded_margin_softmax`.

    ``weight`` belongs to this rank alone: tell ``DistributedDataParallel`` to leave it out
    (``_set_params_and_buffers_to_ignore_for_model``), and store it for every rank. It starts the same for any number
    of ranks, taken together.

    Args:
        embedding_dim: D.
        num_classes: C, on all ranks together; at least one per rank.
        margin: From cosines and local classes to logits, such as :func:`.arcface_logits`.
        sample_rate: Share of a rank's classes that a step uses, above 0, up to 1 (all of them).
        seed: Of initial rows and draws, >= 0; the same on every rank.
        rank: Of this process; ``None``: of the process group.
        world_size: Number of ranks; ``None``: of the process group.

    Raises:
        ConfigError: An argument is out of range.

    Example:
        >>> classifier = ShardedClassifier(512, 93_431, margin=functools.partial(arcface_logits, margin=0.5))
        >>> classifier(embedding, labels).loss.backward()
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        margin: Margin,
        sample_rate: float = 1.0,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        rank = distributed.rank() if rank is None else rank
        world_size = distributed.world_size() if world_size is None else world_size
        self.shard = ClassShard(num_classes, rank, world_size, sample_rate, seed)
        self.margin = margin
        self.weight = nn.Parameter(self.shard.initial_rows(embedding_dim))

    def forward(self, embedding: Tensor, labels: Tensor, *, step: int | None = None) -> ShardedSoftmax:
        """This rank's embeddings [B, D] and labels [B] to loss and accuracy of the whole batch."""
        return sharded_margin_softmax(embedding, labels, self.weight, self.shard, self.margin, step=step)

    def extra_repr(self) -> str:
        """The classes, for ``print(model)``."""
        shard = self.shard
        return f"classes {shard.start} to {shard.stop - 1} of {shard.num_classes}, sample_rate={shard.sample_rate}"


def _check(embedding: Tensor, labels: Tensor, rows: Tensor, shard: ClassShard, step: int | None) -> None:
    shapes = tuple(embedding.shape), tuple(labels.shape), tuple(rows.shape)
    if embedding.dim() != 2 or labels.shape != embedding.shape[:1] or shapes[2] != (shard.rows, embedding.shape[1]):
        raise ConfigError("Sharded softmax", value=shapes, expected=f"[B, D], [B] and [{shard.rows}, D]")
    if (shard.rank, shard.world_size) != (distributed.rank(), distributed.world_size()):
        raise ConfigError(
            "Rank and number of ranks of a class shard",
            value=(shard.rank, shard.world_size),
            expected=f"{(distributed.rank(), distributed.world_size())}, those of the process group",
            remedy="Build it after the process group has been initialised.",
        )
    if shard.kept < shard.rows and step is None:
        raise ConfigError(
            "Sharded softmax: step", expected="the number of the training step, with a sample rate below 1"
        )


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _accuracy(cosine: Tensor, local: Tensor) -> Tensor:
    held = local >= 0
    own = torch.where(held, cosine.gather(1, local.clamp(min=0)[:, None])[:, 0], 0)
    return (all_reduce_sum(own) >= all_reduce_max(cosine.amax(dim=1))).float().mean()
