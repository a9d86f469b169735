"""What samplers that look at quality labels share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.samplers.base import IdentitySampler, checked_scores


class QualitySampler(IdentitySampler):
    """Identity sampler that chooses images by their quality.

    Args:
        identities: Identity of every image.
        scores: Quality of every image, [N], higher is better, NaN where unlabelled.
        batch_size: Images per batch and rank, P x K.
        num_instances: K.
        seed: Equal on all ranks, >= 0.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ConfigError: K does not divide ``batch_size``.
        DataError: Fewer identities than a step takes, or scores that do not belong to the images or leave no choice.
    """

    def __init__(
        self,
        identities: Sequence[Hashable],
        scores: ArrayLike | torch.Tensor,
        batch_size: int,
        num_instances: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(identities, batch_size, num_instances, seed=seed, rank=rank, world_size=world_size)
        self._prepare(checked_scores(scores, len(identities)))

    @abstractmethod
    def _prepare(self, scores: NDArray[np.float64]) -> None:
        """Sort the images of each identity by their scores, [N]; the last step of construction."""

    def _without_labels(self, value: str, expected: str) -> DataError:
        return DataError(
            f"Quality scores for {type(self).__name__}",
            value=value,
            expected=expected,
            remedy="Check the label files, or use another DATALOADER.SAMPLER_TRAIN.",
        )
