"""Several degradations after each other, by the two rules of DIL.

Source: the released program of Huang et al., CVPR 2020, whose texts :func:`parse_mix` reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.degradations.operations import DEGRADATIONS, Image, check_image, draw, replay

#: What a text may leave out of a name.
PREFIX = "dil_"
_TEXT = re.compile(r"(?P<names>.+?)_(?P<probability>\d*\.?\d+)(?P<clear>_clear)?")


@dataclass(frozen=True)
class Mix:
    """A rule that degrades an image in several ways.

    Args:
        names: Registered degradations, in this order when ``may_stay_clean``.
        probability: q in (0, 1].
        may_stay_clean: True: each is applied with probability q, independent of the others. False: one or more of them
            in random order, their number binomial(len(names), q) given that it is not 0.

    Raises:
        RegistryError: Unknown name.
        ConfigError: No names, or a probability outside (0, 1].
    """

    names: tuple[str, ...]
    probability: float
    may_stay_clean: bool = False

    def __post_init__(self) -> None:
        for name in self.names:
            DEGRADATIONS.get(name)
        if not self.names:
            raise ConfigError("Mix of degradations without a name", expected="at least one", remedy="Name some.")
        if not 0.0 < self.probability <= 1.0:
            raise ConfigError(
                "Probability of a mix of degradations",
                value=self.probability,
                expected="a number in (0, 1]",
                remedy="1 applies all of them.",
            )

    def draw(
        self, generator: np.random.Generator, height: int, width: int, severity: float | None = None
    ) -> list[dict[str, Any]]:
        """Which degradations an image of that size goes through, in order, with the parameters of each.

        Args:
            generator: Source of every random choice.
            height: Of the image, in pixels.
            width: Of the image, in pixels.
            severity: Of each of them, as in :func:`.operations.apply`.

        Raises:
            DataError: The image, or what an earlier degradation leaves of it, is too small.
            ConfigError: Severity outside [0, 1].
        """
        steps = []
        for name in self._chosen(generator):
            steps.append(draw(name, generator, height, width, severity))
            if DEGRADATIONS.get(name).resizes:
                height, width = steps[-1]["height"], steps[-1]["width"]
        return steps

    def apply(
        self, image: Image, generator: np.random.Generator, severity: float | None = None
    ) -> tuple[Image, list[dict[str, Any]]]:
        """Degrade one image, [H, W, 3] uint8 RGB; see :meth:`draw`. :func:`replay_steps` does it again."""
        check_image(image)
        steps = self.draw(generator, image.shape[0], image.shape[1], severity)
        return replay_steps(image, steps), steps

    def _chosen(self, generator: np.random.Generator) -> list[str]:
        if self.may_stay_clean:
            return [name for name in self.names if generator.uniform() < self.probability]
        chosen = []
        stops = stop_probabilities(len(self.names), self.probability)
        for place, stop in zip(generator.permutation(len(self.names)), stops, strict=True):
            chosen.append(self.names[int(place)])
            if generator.uniform() < stop:
                break
        return chosen


def parse_mix(text: str) -> Mix:
    """Read ``a+b+c_q`` or ``a+b+c_q_clear``, q being the probability; ``_clear`` is ``may_stay_clean``.

    Names stand with or without their ``dil_``: ``blur`` and ``noise`` are DIL's here, and the toolkit's own of those
    names can be had by building a :class:`Mix`. A single name without a probability is always applied.

    Raises:
        RegistryError: Unknown name; the message suggests the nearest.
        ConfigError: Not such a text.
    """
    found = _TEXT.fullmatch(text)
    if found is None:
        if text and "+" not in text and not text.endswith("_clear"):
            return Mix((_registered(text),), 1.0)
        raise ConfigError(
            "Mix of degradations",
            value=text,
            expected="a+b_q or a+b_q_clear, such as res+ill+noise_0.5",
            remedy="Give the probability after the names; without _clear at least one of them is applied.",
        )
    names = tuple(_registered(name) for name in found["names"].split("+"))
    return Mix(names, float(found["probability"]), may_stay_clean=found["clear"] is not None)


def stop_probabilities(count: int, probability: float) -> list[float]:
    """P(stop after the i-th of ``count`` | i were applied), i = 1..count, for the number k ~ binomial given k >= 1.

    Equation: ``p_i = P(k = i) / P(k >= i)``; the last is 1.
    """
    mass = [math.comb(count, k) * probability**k * (1.0 - probability) ** (count - k) for k in range(1, count + 1)]
    tails = [math.fsum(mass[place:]) for place in range(count)]
    # A tail too small for a float is one that is never reached.
    return [here / tail if tail else 1.0 for here, tail in zip(mass, tails, strict=True)]


def replay_steps(image: Image, steps: Sequence[Mapping[str, Any]]) -> Image:
    """Go through the degradations that :meth:`Mix.draw` chose, also after a trip through JSON; bit-equal.

    Raises:
        RegistryError, DataError: As :func:`.operations.replay`.
    """
    check_image(image)
    if isinstance(steps, (str, Mapping)) or not isinstance(steps, Sequence):
        raise DataError(
            "Steps of a mix", value=type(steps).__name__, expected="the list that draw() returned", remedy="Pass it on."
        )
    result = image.copy()
    for params in steps:
        result = replay(result, params)
    return result


def _registered(name: str) -> str:
    return PREFIX + name if PREFIX + name in DEGRADATIONS else name
