"""Contents and degradation codes put together anew, and the axis between clean and degraded codes.

Shapes: N contents of C x h x w, M codes of K numbers, S positions on the axis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qsd_plugin.core.errors import DataError
from qsd_plugin.methods.dil.generator import Generator
from qsd_plugin.methods.dil.severity import severity, with_severity

_BATCH = 64


@torch.no_grad()
def render(generator: Generator, contents: Tensor, codes: Tensor, *, batch: int = _BATCH) -> Tensor:
    """Contents [N, C, h, w], each with its code [N, K], to images [N, 3, 4 h, 4 w], some at a time."""
    starts = range(0, len(contents), batch)
    return torch.cat([generator(contents[at : at + batch], codes[at : at + batch]) for at in starts])


def render_all(generator: Generator, contents: Tensor, codes: Tensor) -> Tensor:
    """Every content [N, C, h, w] with every code [M, K]: images [N, M, 3, 4 h, 4 w]."""
    count, number = len(contents), len(codes)
    images = render(generator, contents.repeat_interleave(number, dim=0), codes.repeat(count, 1))
    return images.reshape(count, number, *images.shape[1:])


class DegradationAxis(NamedTuple):
    """The line through the centre of clean and the centre of degraded codes: position 0 and position 1."""

    clean: Tensor
    """Mean of the clean codes, [K]."""
    degraded: Tensor
    """Mean of the degraded codes, [K]."""

    @property
    def length(self) -> Tensor:
        """Distance of the centres, 0-d."""
        gap: Tensor = self.degraded - self.clean
        return gap.square().sum().sqrt()

    @property
    def direction(self) -> Tensor:
        """From clean to degraded, [K], of unit length."""
        return (self.degraded - self.clean) / self.length

    def position(self, codes: Tensor) -> Tensor:
        """Where codes [N, K] stand along the axis, [N]; unbounded."""
        return (severity(codes, self.direction) - self.clean @ self.direction) / self.length

    def moved(self, codes: Tensor, positions: Tensor) -> Tensor:
        """Codes [N, K] moved along the axis to each of the positions [S]; what lies across it stays. [N, S, K]."""
        return with_severity(codes, self.direction, self.clean @ self.direction + positions * self.length)


def degradation_axis(clean: Tensor, degraded: Tensor) -> DegradationAxis:
    """The axis of clean codes [N, K] and degraded codes [M, K].

    Raises:
        DataError: One of them is empty, or both have the same centre.
    """
    if not len(clean) or not len(degraded):
        raise DataError(
            "Axis from clean to degraded codes",
            value=(len(clean), len(degraded)),
            expected="at least one code of clean and one of degraded images",
        )
    axis = DegradationAxis(clean.mean(dim=0), degraded.mean(dim=0))
    if not bool(axis.length > 0):
        raise DataError(
            "Axis from clean to degraded codes: both have the same centre",
            expected="an encoder that tells them apart",
            remedy="Train stage 1 for longer, or take a stronger degradation.",
        )
    return axis
