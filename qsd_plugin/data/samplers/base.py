"""What the samplers share: the stream's dependence on (seed, step) only, ranks and state; identities in passes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.samplers.checks import check_identity_sampling


class StepSampler(Sampler[int]):
    """Endless stream of image indices in which every ``batch_size`` are one rank's batch.

    A batch depends on (seed, step) and the rank only, so the number of loader workers changes nothing and a stream can
    begin at any step.

    Args:
        batch_size: Images per batch and rank.
        seed: Equal on all ranks, >= 0.
        rank: This rank.
        world_size: Number of ranks.

    Attributes:
        seed: As given; part of the state.
        step: Where the next iteration begins. Loaders read ahead, so it is for the training loop to keep it.

    Raises:
        ConfigError: There is no such seed or rank.
    """

    def __init__(self, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError("Rank of a sampler", value=rank, expected=f"0 to {world_size - 1}")
        if seed < 0:
            raise ConfigError("Seed of a sampler", value=seed, expected="an integer >= 0")
        self.batch_size = batch_size
        self.seed, self.step = seed, 0
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[int]:
        step = self.step
        while True:
            yield from self.batch(step)
            step += 1

    @abstractmethod
    def batch(self, step: int) -> list[int]:
        """This rank's image indices of one step, [batch_size]."""

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs to go on with this stream; equal on all ranks."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a stored stream. An iterator that exists already stays on its own."""
        self.seed, self.step = int(state["seed"]), int(state["step"])


def images_by_identity(identities: Sequence[Hashable]) -> list[list[int]]:
    """Image indices of each identity of ``identities`` [N], in the order in which these first appear."""
    members: dict[Hashable, list[int]] = {}
    for index, identity in enumerate(identities):
        members.setdefault(identity, []).append(index)
    return list(members.values())


class IdentitySampler(StepSampler):
    """A batch is P x K images, the K of an identity in a row.

    The identities of a step are distinct over all ranks, and the same however many ranks share the step. Identities
    come in passes: a pass goes through all of them in a new order, each at most once, and leaves out those at its end
    that do not fill a step.

    Args:
        identities: Identity of every image.
        batch_size: Images per batch and rank, P x K.
        num_instances: K.
        seed: Equal on all ranks, >= 0.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ConfigError: K does not divide ``batch_size``, or there is no such seed or rank.
        DataError: Fewer identities than a step takes.
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
        check_identity_sampling(identities, batch_size, num_instances, world_size=world_size)
        super().__init__(batch_size, seed=seed, rank=rank, world_size=world_size)
        self.num_instances = num_instances
        self._images = images_by_identity(identities)
        self._order: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def batch(self, step: int) -> list[int]:
        """This rank's image indices of one step, [P x K], the K images of an identity in a row."""
        return self._draw(step, self._identities(step))

    def _identities(self, step: int) -> list[int]:
        """Numbers of this rank's identities of a step, [P]."""
        share = self.batch_size // self.num_instances
        turn, place = divmod(step, len(self._images) // (share * self._world_size))
        if self._order is None or self._order[0] != (self.seed, turn):
            order = numpy_stream(self.seed, "identities", turn).permutation(len(self._images))
            self._order = (self.seed, turn), order
        start = (place * self._world_size + self._rank) * share
        numbers: list[int] = self._order[1][start : start + share].tolist()
        return numbers

    @abstractmethod
    def _draw(self, step: int, numbers: Sequence[int]) -> list[int]:
        """K images of each identity, in the order given."""

    def _stream(self, step: int, number: int) -> np.random.Generator:
        """The generator of one identity's images in one step, whichever rank draws them."""
        return numpy_stream(self.seed, "images", step, number)


def take(generator: np.random.Generator, images: Sequence[int], count: int) -> list[int]:
    """``count`` of ``images`` in random order, every one once before any comes again."""
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += [images[place] for place in generator.permutation(len(images))[: count - len(drawn)]]
    return drawn


def checked_scores(scores: ArrayLike | torch.Tensor, num_images: int) -> NDArray[np.float64]:
    """Quality scores as float64 [N], NaN where unlabelled.

    Raises:
        DataError: Not one score per image, or an infinite one.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (num_images,):
        raise DataError(
            "Quality scores for a sampler", value=values.shape, expected=f"one for each of the {num_images} images"
        )
    if np.isinf(values).any():
        raise DataError(
            f"Quality score of image number {int(np.argmax(np.isinf(values)))}",
            value=float(values[np.isinf(values)][0]),
            expected="a finite number, or NaN for an image without a label",
        )
    return values


def checked_sets(sets: Sequence[int] | None, num_images: int) -> NDArray[np.int64]:
    """The data set of every image, [N]; all of one set for ``None``.

    Raises:
        DataError: Not one index >= 0 per image.
    """
    values = np.zeros(num_images, np.int64) if sets is None else np.asarray(sets, dtype=np.int64)
    if values.shape != (num_images,) or (values < 0).any():
        raise DataError(
            "Data sets of the images for a sampler",
            value=values.shape if values.shape != (num_images,) else int(values.min()),
            expected=f"an index from 0 for each of the {num_images} images",
        )
    return values
