"""How stage 1 is trained: factors of its terms, ablations, and where it may differ from the authors.

Source: Huang et al., CVPR 2020 and IJCV 2022; the defaults are those of their program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.methods.dil.losses import PIXEL_LOSSES

#: Terms of the generator's side.
TERMS = ("self", "cross", "content", "identity", "degradation", "realness")
#: Names that ``Stage1Options.ablate`` takes; the unsupervised phase goes with the unpaired one.
ABLATIONS = tuple(f"{phase}.{term}" for phase in ("paired", "unpaired") for term in TERMS)


@dataclass(frozen=True)
class Stage1Weights:
    """Factors of the terms, >= 0; the defaults are the authors'."""

    realness: float = 1.0
    degradation: float = 1.0
    reconstruction: float = 10.0
    content: float = 5.0
    identity: float = 0.5


@dataclass(frozen=True)
class Stage1Options:
    """How stage 1 is trained; the defaults are the authors'.

    Args:
        weights: Factors of the terms.
        pixel: ``"l1"``, ``"l2"`` or ``"smooth_l1"``.
        predictions_agree: In the paired phase, tie the identity predictions on both images by KL.
        ablate: Terms of the generator's side that are left out, by the names in :data:`ABLATIONS`; the discriminators
            go on learning.
        cycle_through_trunk: Let the gradient of the cycle pass through the trunk to the rendered images. The authors
            cut it there, so that it reaches them through the degradation code only.
        rendered_identity: Run the identity branch on the rendered images of the cycle, too, as the authors do: nothing
            uses what it finds, but its batch statistics move.
        freeze_trunk_norm: Keep the trunk's batch statistics. The authors let them move, on rendered images as well.
        r1_weight: Of the gradient penalty beside least squares.
        rank_r1_weight: Of the one beside ranking, which is inert at the authors' 0.01.
        r1_every: Take the penalty in every k-th pair of iterations only, with k times the weight.

    Raises:
        ConfigError: Unknown ablation or pixel loss, or a number out of range.
    """

    weights: Stage1Weights = field(default_factory=Stage1Weights)
    pixel: str = "l1"
    predictions_agree: bool = False
    ablate: Sequence[str] = ()
    cycle_through_trunk: bool = False
    rendered_identity: bool = True
    freeze_trunk_norm: bool = False
    r1_weight: float = 0.01
    rank_r1_weight: float = 0.01
    r1_every: int = 1

    def __post_init__(self) -> None:
        for name in self.ablate:
            if name not in ABLATIONS:
                raise ConfigError("DIL ablation", value=name, remedy=did_you_mean(name, ABLATIONS))
        if self.pixel not in PIXEL_LOSSES:
            raise ConfigError("DIL pixel loss", value=self.pixel, remedy=did_you_mean(self.pixel, PIXEL_LOSSES))
        if self.r1_every < 1 or min(self.r1_weight, self.rank_r1_weight, *vars(self.weights).values()) < 0:
            raise ConfigError(
                "DIL stage 1: weights and r1_every",
                value=(self.weights, self.r1_weight, self.rank_r1_weight, self.r1_every),
                expected="weights >= 0 and r1_every >= 1",
            )
