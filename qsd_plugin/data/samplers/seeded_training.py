"""All images in random order, without regard to identities, from a stream that can begin at any step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.samplers.base import StepSampler


class SeededTrainingSampler(StepSampler):
    """Shuffled passes over all images, one behind the other.

    Ranks take turns image by image, as with the host's ``TrainingSampler``, so the images of a step are the same
    however many ranks share it. No image is left out: what does not fill a step at the end of a pass begins a step
    that the next pass fills.

    Args:
        num_images: Size of the training set, >= 1.
        batch_size: Images per batch and rank, >= 1.
        seed: Equal on all ranks, >= 0.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ConfigError: There is no such seed or rank.
        DataError: No images.
    """

    def __init__(self, num_images: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if num_images < 1:
            raise DataError("Training images for a sampler", value=num_images, expected="at least one")
        super().__init__(batch_size, seed=seed, rank=rank, world_size=world_size)
        self.num_images = num_images
        self._order: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def batch(self, step: int) -> list[int]:
        """This rank's image indices of one step, [batch_size]."""
        first = step * self.batch_size * self._world_size + self._rank
        places = range(first, first + self.batch_size * self._world_size, self._world_size)
        return [int(self._pass(place // self.num_images)[place % self.num_images]) for place in places]

    def _pass(self, number: int) -> NDArray[np.int64]:
        """The order of all images in one pass, [N]; the last one asked for is kept."""
        if self._order is None or self._order[0] != (self.seed, number):
            order = numpy_stream(self.seed, "images of a pass", number).permutation(self.num_images)
            self._order = (self.seed, number), order
        return self._order[1]
