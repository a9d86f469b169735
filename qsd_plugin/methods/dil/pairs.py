"""What stage 1 learns from: pairs of a better and a worse image, and which kind of pair comes when.

Shapes: B pairs, H x W pixels. Source: Huang et al., CVPR 2020 and IJCV 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.core.streams import numpy_stream

#: Kinds of pairs.
#:
#: ``paired``: the worse image is a synthetic degradation of the better one (pixel-wise supervision).
#: ``unpaired``: they show different people, one from a clean and one from a degraded domain (domain-wise).
#: ``unsupervised``: two images of unknown quality, from different cameras; the discriminator's own ranking is believed.
PHASES = ("paired", "unpaired", "unsupervised")


@dataclass(frozen=True)
class Pair:
    """A batch of stage 1, all of one phase, normalised with ImageNet's mean and deviation.

    Args:
        phase: One of :data:`PHASES`.
        better: x_a, [B, 3, H, W].
        worse: x_b, [B, 3, H, W].
        better_labels: Identities of ``better``, [B] int64; ``None`` for paired images, which do not need any.
        worse_labels: Identities of ``worse``, [B] int64; ``None`` where they are not known, e.g. of haze: those of the
            better images then count twice.

    Raises:
        ConfigError: Unknown phase, or images of different shapes.
    """

    phase: str
    better: Tensor
    worse: Tensor
    better_labels: Tensor | None = None
    worse_labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ConfigError(
                "DIL phase",
                value=self.phase,
                expected=" or ".join(map(repr, PHASES)),
                remedy=did_you_mean(self.phase, PHASES),
            )
        if self.better.shape != self.worse.shape or self.better.dim() != 4:
            raise ConfigError(
                "DIL pair: shapes of the images",
                value=(tuple(self.better.shape), tuple(self.worse.shape)),
                expected="[B, 3, H, W] both, of equal size",
            )

    @property
    def paired(self) -> bool:
        """Whether the worse images are degradations of the better ones."""
        return self.phase == "paired"


@dataclass(frozen=True)
class PhaseSchedule:
    """Which phase comes when: a function of the iteration, so that a resumed run and every rank agree on it.

    Args:
        other: The phase beside ``"paired"``: ``"unpaired"`` or ``"unsupervised"``.
        paired_probability: Probability that an iteration is paired, [0, 1]; 0 for data without a degradation function
            (haze), 1 for paired images only. ``None``, the authors' default, alternates: odd iterations are paired.
        seed: Of the draws, >= 0.

    Raises:
        ConfigError: An argument is out of range.
    """

    other: str = "unpaired"
    paired_probability: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.other not in PHASES[1:]:
            raise ConfigError("DIL phase beside paired", value=self.other, expected=" or ".join(map(repr, PHASES[1:])))
        if self.paired_probability is not None and not 0 <= self.paired_probability <= 1:
            raise ConfigError(
                "DIL paired_probability", value=self.paired_probability, expected="a number in [0, 1], or None"
            )

    def phase(self, iteration: int) -> str:
        """The phase of an iteration, counted from 1."""
        if self.paired_probability is None:
            return "paired" if iteration % 2 else self.other
        drawn = numpy_stream(self.seed, "dil phase", iteration).random()
        return "paired" if drawn < self.paired_probability else self.other
