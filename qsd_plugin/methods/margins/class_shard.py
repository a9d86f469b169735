"""Which classes a rank holds, how their rows begin, and which of them a step uses.

Shapes: C classes on all ranks, C_r of them on rank r, B rows of the whole batch.
Source: An et al., "Partial FC: Training 10 Million Identities on a Single Machine", ICCV workshops 2021. What is kept
(number, positives first) is what InsightFace's PartialFC keeps; the random numbers are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream

# Initial rows are drawn in blocks of so many classes, so that a row does not depend on the rank that holds it, and a
# rank draws little beside its own.
_BLOCK = 1024


def class_range(num_classes: int, rank: int, world_size: int) -> tuple[int, int]:
    """First class of a rank and the one behind its last: equal parts, the first ranks hold one more if need be."""
    part, more = divmod(num_classes, world_size)
    start = part * rank + min(rank, more)
    return start, start + part + (rank < more)


@dataclass(frozen=True)
class ClassShard:
    """The classes of one rank.

    Args:
        num_classes: C, on all ranks together; at least one per rank.
        rank: Of this process, from 0.
        world_size: Number of ranks.
        sample_rate: Share of a rank's classes that a step uses, above 0, up to 1 (all of them).
        seed: Of initial rows and draws, >= 0; the same on every rank.

    Raises:
        ConfigError: An argument is out of range.
    """

    num_classes: int
    rank: int = 0
    world_size: int = 1
    sample_rate: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError("Rank", value=self.rank, expected=f"0 to {self.world_size - 1}")
        if self.num_classes < self.world_size:
            raise ConfigError(
                "Number of classes",
                value=self.num_classes,
                expected=f"at least {self.world_size}, one for each process",
                remedy="Use fewer processes, or a head that is not sharded.",
            )
        if not 0 < self.sample_rate <= 1:
            raise ConfigError("Sample rate of the classes", value=self.sample_rate, expected="above 0, up to 1")
        if self.seed < 0:
            raise ConfigError("Seed of the classes", value=self.seed, expected=">= 0")

    @property
    def start(self) -> int:
        """First class of this rank."""
        return class_range(self.num_classes, self.rank, self.world_size)[0]

    @property
    def stop(self) -> int:
        """The class behind this rank's last one."""
        return class_range(self.num_classes, self.rank, self.world_size)[1]

    @property
    def rows(self) -> int:
        """C_r."""
        return self.stop - self.start

    @property
    def kept(self) -> int:
        """Classes of this rank that a step uses, unless it has more true ones: ``int(sample_rate * C_r)``, >= 1."""
        return max(1, int(self.sample_rate * self.rows))

    def initial_rows(self, dim: int, *, std: float = 0.01) -> Tensor:
        """Normal rows [C_r, dim] of this rank; together those of all ranks are the same for any number of ranks."""
        return torch.cat(list(self._initial_blocks(dim))) * std

    def local(self, labels: Tensor) -> Tensor:
        """Classes of all ranks to indices among this rank's rows, -1 where another rank holds the class."""
        return torch.where((labels >= self.start) & (labels < self.stop), labels - self.start, -1)

    def draw(self, local: Tensor, step: int) -> Tensor:
        """The rows that a step uses: every true class of the batch, and others at random up to :attr:`kept`.

        The draw depends on (seed, step, rank) and the kind of device, on nothing else.

        Args:
            local: From :meth:`local`, [B] int64.
            step: Number of the training step, >= 0.

        Returns:
            Ascending, [K] int64; K is :attr:`kept`, or the number of true classes if that is larger. Only where the
            batch has more rows than ``kept`` that can be, and the host waits for the device to count them.
        """
        source = torch_stream(self.seed, "class sample", step, self.rank)
        generator = torch.Generator(local.device).manual_seed(source.initial_seed())
        priority = torch.rand(self.rows, generator=generator, device=local.device)
        # One place more than rows, for the labels of other ranks.
        is_true = torch.zeros(self.rows + 1, device=local.device)
        is_true = is_true.index_fill_(0, torch.where(local >= 0, local, self.rows), 1)[: self.rows]
        count = self.kept
        if len(local) > count:
            count = max(count, int(is_true.sum()))
        return (priority + 2 * is_true).topk(count).indices.sort().values

    def _initial_blocks(self, dim: int) -> Iterator[Tensor]:
        for block in range(self.start // _BLOCK, (self.stop - 1) // _BLOCK + 1):
            first = block * _BLOCK
            rows = torch.randn(_BLOCK, dim, generator=torch_stream(self.seed, "class rows", block))
            yield rows[max(self.start - first, 0) : self.stop - first]
