"""The queue of recent embeddings that QGFace contrasts with, moved along with their class centres.

Shapes: n slots, D embedding, C classes, V views of N images of this rank.
Source: Song and Wang, "QGFace", arXiv 2312.17494; the translation is that of BroadFace (Kim et al., ECCV 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsd_plugin.core.distributed import gather_equal_rows, rank, world_size
from qsd_plugin.core.errors import ConfigError

#: Class centres, equal on every rank: all of them, [C, D], or a function from labels [n] to theirs, [n, D], for heads
#: whose classes are spread over the ranks.
Centres = Tensor | Callable[[Tensor], Tensor]


class Negatives(NamedTuple):
    """What a batch is contrasted with."""

    embeddings: Tensor
    """[n, D], not of unit length once a class centre has moved; receives no gradient."""
    labels: Tensor
    """[n] int64."""
    valid: Tensor
    """[n] bool: the slot counts."""


def translated(embeddings: Tensor, snapshots: Tensor, labels: Tensor, weight: Centres) -> Tensor:
    """``e + (|e| / |p|) (w - p)``: stored embeddings moved as their class centres have moved since.

    One temporary of the size of the queue, which is the result.

    Args:
        embeddings: e, as stored, [n, D].
        snapshots: p, the class centres when they were stored, [n, D].
        labels: Of the embeddings, [n] int64; below 0 for an empty slot.
        weight: Class centres now, [C, D] or a function; receives no gradient.

    Returns:
        [n, D]; equal to ``embeddings`` where the centre has not moved.
    """
    moved = centres_of(weight, labels.clamp(min=0)).to(embeddings.dtype).sub_(snapshots)
    lengths = torch.linalg.vector_norm(snapshots, dim=1, keepdim=True)
    ratio = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True) / lengths.clamp(
        min=torch.finfo(lengths.dtype).tiny
    )
    return moved.mul_(ratio).add_(embeddings)


def centres_of(weight: Centres, labels: Tensor) -> Tensor:
    """The centres of classes, [n, D], detached; a tensor of its own. Every rank must ask for the same labels [n]."""
    if isinstance(weight, Tensor):
        return weight.detach().index_select(0, labels)
    return weight(labels).detach()


def check_queue_size(size: int, images: int, ranks: int = 1, views: int = 2) -> None:
    """Refuse a queue that the embeddings of one step do not fit into.

    Args:
        size: Slots of the queue.
        images: Source images per rank and step.
        ranks: Number of ranks.
        views: Embeddings of each image that go into the queue.

    Raises:
        ConfigError: ``size`` is below ``views x images x ranks``.
    """
    if size < views * images * ranks:
        raise ConfigError(
            "QGFace queue size",
            value=size,
            expected=f"at least {views * images * ranks} = {views} views x {images} images x {ranks} ranks",
            remedy="Make the queue larger or the batch smaller.",
        )


class ProxyQueue(nn.Module):
    """A ring of embeddings, labels and the class centres they had, of which each step overwrites the oldest.

    Use: enqueue the embeddings of the step, both views, then contrast with :meth:`negatives`, then back-propagate and
    let the optimizer move the class centres. The step's own embeddings are among its negatives; the mask of
    :class:`~.contrast.QGContrast` takes them out.

    A read costs one temporary [n, D], or none with ``compensate=False``; then :meth:`negatives` returns the buffer
    itself, and the loss must be back-propagated before the next :meth:`enqueue`.

    State: everything is in buffers of fixed size, so that a run goes on exactly from a checkpoint of any fill. Across
    ranks: gathers; the queue is the same on every rank, in the order of one process on the joined batch (the first
    views of all ranks, then the second views), so data-parallel training need not broadcast it
    (``broadcast_buffers=False`` saves that) and a checkpoint serves any number of ranks. Every rank must enqueue the
    same number of images. Nothing waits for the device.

    Args:
        size: n >= 1; at least the embeddings of all ranks in one step.
        dim: D >= 1.
        compensate: Move entries along with their class centres; ``False`` is a plain first-in-first-out queue, for
            comparison and for keys of a momentum encoder, without the memory for the snapshots.
        renormalise: Bring moved entries back to unit length; the authors do not.

    Raises:
        ConfigError: An argument is out of range; on call, shapes do not fit or the queue is too small.
    """

    embeddings: Tensor
    """[n, D] float32, as they came; zero where nothing has been."""
    labels: Tensor
    """[n] int64; -1 where nothing has been."""
    snapshots: Tensor
    """[n, D] float32: class centres at the time; only with ``compensate``."""
    filled: Tensor
    """0-d int64: how many of the newest entries count."""
    pointer: Tensor
    """0-d int64: the slot that is written next; the newest entry is in the one before."""

    def __init__(self, size: int, dim: int, *, compensate: bool = True, renormalise: bool = False) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ConfigError("QGFace queue size and dimension", value=(size, dim), expected="at least 1 each")
        self.size, self.compensate, self.renormalise = size, compensate, renormalise
        self.limit = size
        self.register_buffer("embeddings", torch.zeros(size, dim))
        self.register_buffer("labels", torch.full((size,), -1))
        if compensate:
            self.register_buffer("snapshots", torch.zeros(size, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @property
    def limit(self) -> int:
        """How many of the newest entries may count, 1 to n, for a queue that grows; never fewer than one step's."""
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        if not 1 <= value <= self.size:
            raise ConfigError("QGFace queue limit", value=value, expected=f"1 to the queue's size {self.size}")
        self._limit = value

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor, weight: Centres | None = None) -> Tensor:
        """Write the embeddings of all ranks over the oldest entries.

        Args:
            embeddings: Unit embeddings of this rank, [V, N, D]: the clean view first, by the authors' order.
            labels: Of the images, [N] int64.
            weight: Class centres, [C, D] or a function, equal on every rank; needed with ``compensate``.

        Returns:
            [N, V] int64: the slots that this rank's images went to, for a mask of instances.
        """
        dim = self.embeddings.shape[1]
        if embeddings.dim() != 3 or embeddings.shape[2] != dim or labels.shape != embeddings.shape[1:2]:
            raise ConfigError(
                "QGFace queue: embeddings and labels",
                value=(tuple(embeddings.shape), tuple(labels.shape)),
                expected=f"[V, N, {dim}] and [N]",
            )
        views, images, _ = embeddings.shape
        ranks = world_size()
        check_queue_size(self.size, images, ranks, views)
        rows = views * images * ranks
        whole = gather_equal_rows(embeddings.to(self.embeddings)).view(ranks, views, images, dim).transpose(0, 1)
        whole_labels = gather_equal_rows(labels).repeat(views)
        # Backwards, so that read from the newest slot on the first row of a step comes first and its last goes first.
        slots = (self.pointer + torch.arange(rows - 1, -1, -1, device=labels.device)) % self.size
        self.embeddings.index_copy_(0, slots, whole.reshape(rows, dim))
        self.labels.index_copy_(0, slots, whole_labels)
        if self.compensate:
            self.snapshots.index_copy_(0, slots, centres_of(self._needed(weight), whole_labels).to(self.snapshots))
        self.pointer.add_(rows).remainder_(self.size)
        self.filled.add_(rows).clamp_(max=max(self.limit, rows))
        return slots.view(views, ranks, images)[:, rank()].T

    @torch.no_grad()
    def negatives(self, weight: Centres | None = None) -> Negatives:
        """The entries as they are to be contrasted with now, in the order of the slots.

        Args:
            weight: Class centres now, [C, D] or a function, before the optimizer's step; needed with ``compensate``.
        """
        entries = self.embeddings
        if self.compensate:
            entries = translated(entries, self.snapshots, self.labels, self._needed(weight))
            if self.renormalise:
                lengths = torch.linalg.vector_norm(entries, dim=1, keepdim=True)
                entries.div_(lengths.clamp(min=torch.finfo(lengths.dtype).tiny))
        age = (self.pointer - 1 - torch.arange(self.size, device=entries.device)) % self.size
        return Negatives(entries, self.labels, age < self.filled)

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        dim = self.embeddings.shape[1]
        return f"size={self.size}, dim={dim}, compensate={self.compensate}, renormalise={self.renormalise}"

    def _needed(self, weight: Centres | None) -> Centres:
        dim = self.embeddings.shape[1]
        if weight is None or (isinstance(weight, Tensor) and (weight.dim() != 2 or weight.shape[1] != dim)):
            raise ConfigError(
                "QGFace queue: weight",
                value=None if weight is None else tuple(weight.shape),
                expected=f"class centres [C, {dim}] of the head, because the queue moves its entries along with them",
                remedy="Pass head.weight, or build the queue with compensate=False.",
            )
        return weight
