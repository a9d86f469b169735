"""The queue of a teacher's recent embeddings.

Shapes: n slots, D embedding size, B rows of a rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.distributed import gather_rows
from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream

#: Rows whose length is this close to 1 are of unit length up to rounding.
UNIT_TOLERANCE = 1e-6


class FeatureQueue(nn.Module):
    """A ring of unit vectors: each call of :meth:`enqueue` overwrites the oldest ones.

    It starts with random directions, equal on every rank, and all slots count from the first step on. Everything is in
    persistent buffers, so a resumed run goes on exactly. The queue is global, hence the same on every rank: a
    checkpoint of one rank serves a run with any number of ranks.

    Use: compute the loss from ``features``, then enqueue the keys of the same step, so that no image is its own
    negative. The losses of this package do not refer to ``features`` afterwards, so this may come before or after
    ``backward``, and no copy is needed. A loss that leaves ``features`` to autograd must be back-propagated first;
    autograd refuses otherwise.

    Across ranks: gathers. Every rank must enqueue in every step, if only an empty batch.

    Args:
        size: n >= 1; at least the rows of all ranks in one step; it need not be a multiple of them.
        dim: D >= 1.
        seed: Of the random start, >= 0; the same on every rank.
        initial: Start from these [n, D] instead, normalised here; the same on every rank.

    Raises:
        ConfigError: An argument is out of range, or ``initial`` has another shape.

    Source: Kolf et al., "QUD", BMVC 2024. The authors' program starts each rank differently.

    Example:
        >>> loss = qud_loss(student, teacher, queue.features, temperature=0.1)
        >>> queue.enqueue(teacher)
        >>> loss.backward()
    """

    features: Tensor
    """[n, D] float32, unit rows (or zero, where a key was)."""
    filled: Tensor
    """0-d int64: how many slots hold keys, at most n; the others still hold the start."""
    pointer: Tensor
    """0-d int64: the slot that the next key goes to, which holds the oldest entry."""

    def __init__(self, size: int, dim: int, *, seed: int = 0, initial: Tensor | None = None) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ConfigError("QUD queue size and dimension", value=(size, dim), expected="at least 1 each")
        if initial is None:
            initial = torch.randn(size, dim, generator=torch_stream(seed, "qud queue"))
        elif tuple(initial.shape) != (size, dim):
            raise ConfigError("QUD queue: initial", value=tuple(initial.shape), expected=f"[{size}, {dim}]")
        start = initial.detach().float()
        lengths = torch.linalg.vector_norm(start, dim=1, keepdim=True)
        # What is a unit vector already, such as another queue's entry, is taken over to the last bit.
        start = torch.where((lengths - 1).abs() < UNIT_TOLERANCE, start, F.normalize(start, dim=1))
        self.register_buffer("features", start.clone(memory_format=torch.contiguous_format))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write the keys of all ranks over the oldest entries: by rank, then in the order given.

        Args:
            keys: This rank's teacher embeddings, [B, D], normalised here; B may differ between ranks and be 0.

        Raises:
            ConfigError: Another D, or more keys on all ranks together than slots.
        """
        size, dim = self.features.shape
        if keys.dim() != 2 or keys.shape[1] != dim:
            raise ConfigError("QUD queue: keys", value=tuple(keys.shape), expected=f"[B, {dim}]")
        whole = F.normalize(gather_rows(keys.to(self.features)), dim=1)
        if len(whole) > size:
            raise ConfigError(
                "QUD queue size",
                value=size,
                expected=f"at least the {len(whole)} images of a step on all ranks together",
                remedy="Make the queue larger or the batch smaller.",
            )
        # Up to the end of the ring, then from its start; indices instead of slices, which would read the pointer back.
        slots = (self.pointer + torch.arange(len(whole), device=whole.device)) % size
        self.features.index_copy_(0, slots, whole)
        self.pointer.add_(len(whole)).remainder_(size)
        self.filled.add_(len(whole)).clamp_(max=size)

    def extra_repr(self) -> str:
        """The size, for ``print(model)``."""
        return f"size={self.features.shape[0]}, dim={self.features.shape[1]}"
