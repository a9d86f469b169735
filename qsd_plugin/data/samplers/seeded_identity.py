"""Groups of an identity's images without regard to quality, from a stream that can begin at any step."""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Sequence

import numpy as np

from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.samplers.base import StepSampler, images_by_identity
from qsd_plugin.data.samplers.checks import check_identity_sampling


class SeededIdentitySampler(StepSampler):
    """A batch is P x K images, the K of an identity in a row, drawn as by the host's ``NaiveIdentitySampler``.

    In a pass the images of every identity are shuffled and cut into groups of K; what is left over waits for the next
    pass, and of an identity with fewer than K images K are drawn with replacement. A batch takes a group of each of P
    identities, drawn among those that have one left, and the pass ends when there are fewer than P. So identities come
    as often as they have images.

    Batches are dealt out to the ranks in turn: those of a step are the same however many ranks share it.

    Args:
        identities: Identity of every image.
        batch_size: Images per batch and rank, P x K.
        num_instances: K.
        seed: Equal on all ranks, >= 0.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ConfigError: K does not divide ``batch_size``, or there is no such seed or rank.
        DataError: Fewer identities than a batch takes.
    """

    def __init__(
        self,
        identities: Sequence[Hashable],
        batch_size: int,
        num_instances: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_identity_sampling(identities, batch_size, num_instances)
        super().__init__(batch_size, seed=seed, rank=rank, world_size=world_size)
        self.num_instances = num_instances
        self._images = [np.array(images) for images in images_by_identity(identities)]
        self._pass: tuple[tuple[int, int], list[list[int]]] | None = None
        #: The seed that the following are of, and the number of batches up to the end of each pass so far.
        self._ends: tuple[int, list[int]] = (seed, [])

    def batch(self, step: int) -> list[int]:
        """This rank's image indices of one step, [P x K], the K images of an identity in a row."""
        number = step * self._world_size + self._rank
        if self._ends[0] != self.seed:
            self._ends = (self.seed, [])
        ends = self._ends[1]
        while not ends or ends[-1] <= number:  # a pass is of no fixed length
            ends.append((ends[-1] if ends else 0) + len(self._batches(len(ends))))
        turn = bisect.bisect_right(ends, number)
        return self._batches(turn)[number - (ends[turn - 1] if turn else 0)]

    def _batches(self, turn: int) -> list[list[int]]:
        """All batches of a pass; those of the last one asked for are kept."""
        if self._pass is None or self._pass[0] != (self.seed, turn):
            self._pass = (self.seed, turn), self._drawn(turn)
        return self._pass[1]

    def _drawn(self, turn: int) -> list[list[int]]:
        generator, size = numpy_stream(self.seed, "identity groups", turn), self.num_instances
        orders = [
            generator.permutation(images) if len(images) >= size else generator.choice(images, size)
            for images in self._images
        ]
        left = np.array([len(order) // size for order in orders])
        batches = []
        while len(available := np.flatnonzero(left)) >= self.batch_size // size:
            chosen = generator.choice(available, self.batch_size // size, replace=False)
            left[chosen] -= 1
            groups = [orders[number][left[number] * size : (left[number] + 1) * size] for number in chosen]
            batches.append([int(image) for image in np.concatenate(groups)])
        return batches
