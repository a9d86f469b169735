"""What keeps a sampler from running for ever, or an epoch from having no step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from qsd_plugin.core.errors import ConfigError, DataError


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
