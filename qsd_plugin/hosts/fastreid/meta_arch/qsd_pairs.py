"""Rows of a batch: what is known of images and pairs, which of them teach, and which the host's losses see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsd_plugin.quality.scaling import random_direction


class ImageLabels(NamedTuple):
    """Quality of B images."""

    quality: Tensor
    valid: Tensor
    spread: Tensor | None

    def rows(self, index: Tensor) -> ImageLabels:
        """Those of some images."""
        return ImageLabels(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]


class PairLabels(NamedTuple):
    """Quality of both images of P pairs, in the order in which :class:`~qsd_plugin.methods.qsd.QSDLoss` takes them."""

    quality_1: Tensor
    quality_2: Tensor
    valid_1: Tensor
    valid_2: Tensor
    spread_1: Tensor | None
    spread_2: Tensor | None

    def better(self) -> tuple[Tensor, Tensor]:
        """Where the first and where the second image has the higher label, [P] bool each; nowhere if one is missing."""
        labelled = self.valid_1 & self.valid_2
        return labelled & (self.quality_1 > self.quality_2), labelled & (self.quality_2 > self.quality_1)


def pair_labels(first: ImageLabels, second: ImageLabels, coin: torch.Generator | None) -> PairLabels:
    """Labels of pairs; ``coin`` decides who teaches in the control experiment ``random_direction``."""
    quality = first.quality, second.quality
    quality_1, quality_2 = quality if coin is None else random_direction(*quality, coin)
    return PairLabels(quality_1, quality_2, first.valid, second.valid, first.spread, second.spread)


@dataclass(frozen=True)
class BatchLabels:
    """Quality of the images of a batch, and which of them are pairs."""

    images: ImageLabels
    pairs: tuple[Tensor, Tensor]
    """Rows of the first and of the second image of each pair, [P] each."""
    coin: torch.Generator | None

    @cached_property
    def of_pairs(self) -> PairLabels:
        """Only worked out where it is asked for, and once: every time would toss the coin anew."""
        first, second = self.pairs
        return pair_labels(self.images.rows(first), self.images.rows(second), self.coin)


def teaching_images(pairs: tuple[Tensor, Tensor], labels: PairLabels, count: int) -> Tensor:
    """Which of ``count`` images teach in at least one of the pairs of their rows, [count] bool."""
    teaches = torch.zeros(count, device=labels.quality_1.device)
    for rows, better in zip(pairs, labels.better(), strict=True):
        teaches.index_add_(0, rows, better.to(teaches.dtype))
    return teaches > 0


def host_outputs(cls_on: str, first: Any, second: Any, count: int, labels: PairLabels) -> Any:
    """Arguments of the host's losses for ``QSD.CLS_ON``, from those of the anchors and of the partners.

    Args:
        cls_on: ``anchor``, ``teacher`` or ``both``.
        first: Tensors of ``count`` rows in tuples, lists and dicts.
        second: The same for the partners.
        count: Pairs of the batch.
        labels: Of the pairs.
    """
    if cls_on == "anchor":
        return first
    if cls_on == "both":
        return _combine(first, second, count, lambda a, b: torch.cat([a, b]))
    partner_teaches = labels.better()[1]

    def better(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(partner_teaches.view(-1, *[1] * (a.dim() - 1)), b, a)

    return _combine(first, second, count, better)


def halves(value: Any, count: int) -> tuple[Any, Any]:
    """``value`` twice, every tensor that holds a joint batch of ``2 * count`` rows cut to its first and second half."""
    return _cut(value, 2 * count, slice(count)), _cut(value, 2 * count, slice(count, None))


def _cut(value: Any, rows: int, part: slice) -> Any:
    if isinstance(value, Tensor):
        return value[part] if value.dim() and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _cut(item, rows, part) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cut(item, rows, part) for item in value)
    return value


def _combine(first: Any, second: Any, count: int, function: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """``function`` of every two tensors of ``count`` rows; anything else is the first's."""
    if isinstance(first, Tensor):
        return function(first, second) if first.dim() and len(first) == count else first
    if isinstance(first, dict):
        return {key: _combine(item, second[key], count, function) for key, item in first.items()}
    if isinstance(first, (list, tuple)):
        return type(first)(_combine(a, b, count, function) for a, b in zip(first, second, strict=True))
    return first
