"""A fixed share of every batch from each of several data sets."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.samplers.base import IdentitySampler, checked_sets, take


class SetWeightedIdentitySampler(IdentitySampler):
    """Identity sampler that takes a fixed share of every batch's identities from each data set.

    Of a batch's P identities, set s gives ``P * weights[s] / sum(weights)``, drawn without replacement with chances
    proportional to their numbers of images, not in passes; one that has images in several sets may be drawn for each of
    them. Of each identity K images follow; one with fewer shows every image once before any comes again.

    Args:
        identities: Identity of every image.
        sets: Index of every image's data set, from 0.
        batch_size: Images per batch and rank, P x K.
        num_instances: K.
        weights: Relative share of each set, positive integers.
        seed: Equal on all ranks, >= 0.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ConfigError: ``weights`` do not belong to the sets or do not divide P.
        DataError: A set has fewer identities than a step takes from it, or ``sets`` do not belong to the images.
    """

    def __init__(
        self,
        identities: Sequence[Hashable],
        sets: Sequence[int],
        batch_size: int,
        num_instances: int,
        weights: Sequence[int],
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(identities, batch_size, num_instances, seed=seed, rank=rank, world_size=world_size)
        count = int(checked_sets(sets, len(identities)).max()) + 1
        if len(weights) != count or any(weight != int(weight) or weight < 1 for weight in weights):
            raise ConfigError(
                "DATALOADER.SET_WEIGHT",
                value=list(weights),
                expected=f"a positive integer for each of the {count} training sets, in the order of DATASETS.NAMES",
            )
        per_batch = batch_size // num_instances
        total = int(sum(weights))
        if per_batch % total:
            raise ConfigError(
                "DATALOADER.SET_WEIGHT",
                value=list(weights),
                expected=f"weights whose sum divides the {per_batch} identities of a batch",
                remedy="Change the weights, SOLVER.IMS_PER_BATCH or DATALOADER.NUM_INSTANCE.",
            )
        self._members: list[dict[int, int]] = [{} for _ in range(count)]
        for number, images in enumerate(self._images):
            for index in images:
                members = self._members[sets[index]]
                members[number] = members.get(number, 0) + 1
        self._per_rank = [per_batch // total * int(weight) for weight in weights]
        for which, (members, share) in enumerate(zip(self._members, self._per_rank, strict=True)):
            if len(members) < share * world_size:
                raise DataError(
                    f"Too few identities in training set number {which + 1} for its share of a batch",
                    value=len(members),
                    expected=f"at least {share * world_size}",
                    remedy="Lower its weight in DATALOADER.SET_WEIGHT or SOLVER.IMS_PER_BATCH.",
                )

    def _identities(self, step: int) -> list[int]:
        generator = numpy_stream(self.seed, "set-weighted", step)
        chosen: list[int] = []
        for members, share in zip(self._members, self._per_rank, strict=True):
            chances = np.array(list(members.values()), dtype=np.float64)
            size = share * self._world_size
            drawn = generator.choice(list(members), size=size, replace=False, p=chances / chances.sum())
            drawn = generator.permutation(drawn)  # large identities tend to be drawn first, that is for the first rank
            chosen += drawn[self._rank * share : (self._rank + 1) * share].tolist()
        return chosen

    def _draw(self, step: int, numbers: Sequence[int]) -> list[int]:
        return [
            image
            for number in numbers
            for image in take(self._stream(step, number), self._images[number], self.num_instances)
        ]
