"""Identity samplers, and the checks that keep them from running for ever.

P identities per batch, K images per identity; a batch is that of one rank unless said otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import numpy_stream


def check_identity_sampling(
    identities: Sequence[Hashable],
    batch_size: int,
    num_instances: int,
    *,
    world_size: int = 1,
    shared_by_ranks: bool = False,
) -> None:
    """Refuse a batch of P identities with K images each that can never be filled.

    Args:
        identities: The identity of every training image.
        batch_size: Images per batch and rank, P x K.
        num_instances: K.
        world_size: Number of ranks that draw from one pass over the identities.
        shared_by_ranks: Whether an identity with images for several groups of K may serve several ranks in one step.

    Raises:
        ConfigError: ``batch_size`` is not a positive multiple of ``num_instances``.
        DataError: No images, or fewer identities than the batch needs.
    """
    if num_instances < 1 or batch_size < 1 or batch_size % num_instances:
        raise ConfigError(
            "Images per batch and process",
            value=batch_size,
            expected=f"a multiple of the {num_instances} images per identity",
            remedy="Change SOLVER.IMS_PER_BATCH (shared by all processes) or DATALOADER.NUM_INSTANCE.",
        )
    images = Counter(identities)
    wanted = batch_size // num_instances
    groups = [max(1, count // num_instances) if shared_by_ranks else 1 for count in images.values()]
    if sum(min(group, world_size) for group in groups) < wanted * world_size:
        ranks = f" on each of {world_size} processes" if world_size > 1 else ""
        raise DataError(
            "Too few training identities for a batch",
            value=len(images),
            expected=f"{wanted}{ranks} ({batch_size} images, {num_instances} of each identity)",
            remedy="Lower SOLVER.IMS_PER_BATCH, raise DATALOADER.NUM_INSTANCE, or train on more identities.",
        )


def check_batch_fits(num_images: int, batch_size: int) -> None:
    """Refuse a training set that is smaller than one batch: an epoch over it would have no step.

    Args:
        num_images: Size of the training set.
        batch_size: Images per batch over all ranks.

    Raises:
        DataError: ``num_images < batch_size``.
    """
    if num_images < batch_size:
        raise DataError(
            "Training set smaller than one batch",
            value=num_images,
            expected=f"at least {batch_size} images (SOLVER.IMS_PER_BATCH)",
            remedy="Lower SOLVER.IMS_PER_BATCH, or check that DATASETS.NAMES and the data folder are the right ones.",
        )


class SetWeightedIdentitySampler(Sampler[int]):
    """Endless identity sampler that takes a fixed share of every batch's identities from each data set.

    Of a batch's P identities, set s gives ``P * weights[s] / sum(weights)``, drawn without replacement with chances
    proportional to their numbers of images; of each identity K images follow, without replacement where it has enough.
    The identities of a step are distinct over all ranks, and a step's draws depend on (seed, step) only.

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
        DataError: A set has fewer identities than a step takes from it.
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
        check_identity_sampling(identities, batch_size, num_instances, world_size=world_size)
        count = max(sets) + 1
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
        self._num_instances, self._seed, self._rank, self._world_size = num_instances, seed, rank, world_size
        self._images: dict[Hashable, list[int]] = {}
        self._members: list[dict[Hashable, int]] = [{} for _ in range(count)]
        for index, (identity, which) in enumerate(zip(identities, sets, strict=True)):
            self._images.setdefault(identity, []).append(index)
            self._members[which][identity] = self._members[which].get(identity, 0) + 1
        self._per_rank = [per_batch // total * int(weight) for weight in weights]
        for which, (members, share) in enumerate(zip(self._members, self._per_rank, strict=True)):
            if len(members) < share * world_size:
                raise DataError(
                    f"Too few identities in training set number {which + 1} for its share of a batch",
                    value=len(members),
                    expected=f"at least {share * world_size}",
                    remedy="Lower its weight in DATALOADER.SET_WEIGHT or SOLVER.IMS_PER_BATCH.",
                )

    def __iter__(self) -> Iterator[int]:
        step = 0
        while True:
            yield from self.batch(step)
            step += 1

    def batch(self, step: int) -> list[int]:
        """This rank's image indices of one step, [P x K], the K images of an identity in a row."""
        generator = numpy_stream(self._seed, "set-weighted", step)
        chosen: list[Hashable] = []
        for members, share in zip(self._members, self._per_rank, strict=True):
            names = list(members)
            chances = np.array([members[name] for name in names], dtype=np.float64)
            size = share * self._world_size
            drawn = generator.choice(len(names), size=size, replace=False, p=chances / chances.sum())
            drawn = generator.permutation(drawn)  # large identities tend to be drawn first, that is for the first rank
            chosen += [names[place] for place in drawn[self._rank * share : (self._rank + 1) * share]]
        own = numpy_stream(self._seed, "set-weighted", step, self._rank)
        indices: list[int] = []
        for place in own.permutation(len(chosen)):
            images = self._images[chosen[place]]
            drawn = own.choice(len(images), size=self._num_instances, replace=len(images) < self._num_instances)
            indices += [images[image] for image in drawn]
        return indices
