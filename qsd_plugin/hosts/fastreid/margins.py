"""Margins as ``MODEL.HEADS.CLS_LAYER``, beside the host's ArcSoftmax, CosSoftmax and CircleSoftmax."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.methods.margins.combined import check_margins, combined_margin_logits


class _MarginLayer(nn.Module):
    """What the host's heads expect of a classification layer: ``s``, and ``forward(cosine, targets)`` to logits.

    Args:
        num_classes: Not used; the head holds the class centres.
        scale: ``MODEL.HEADS.SCALE``.
        margin: ``MODEL.HEADS.MARGIN``, or ``COMBINED_MARGIN`` for the combined margin.
    """

    gradient: ClassVar[str] = "straight_through"

    def __init__(self, num_classes: int, scale: float, margin: Any) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.s = scale
        self.m = margin
        self._margins = self.margins(margin)
        check_margins(*self._margins, scale, self.gradient)

    @staticmethod
    def margins(margin: Any) -> tuple[float, float, float]:
        """m1, m2 and m3."""
        raise NotImplementedError

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cosines [B, C] and targets [B] (-1: a class of another rank) to logits [B, C]."""
        m1, m2, m3 = self._margins
        return combined_margin_logits(logits, targets, m1=m1, m2=m2, m3=m3, scale=self.s, gradient=self.gradient)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, scale={self.s}, margin={self.m}, gradient={self.gradient}"


class ArcFaceStraightThrough(_MarginLayer):
    """ArcFace as arcface_torch trains it: the gradient of the cosine passes the margin as it is."""

    @staticmethod
    def margins(margin: float) -> tuple[float, float, float]:
        """``MARGIN`` in radians."""
        return 1.0, margin, 0.0


class ArcFaceExact(ArcFaceStraightThrough):
    """ArcFace with the derivative of the margin, as the host's ``ArcSoftmax``, finite also at a cosine of 1."""

    gradient = "exact"


class CosFace(_MarginLayer):
    """CosFace; its gradient is exact and straight-through at once."""

    gradient = "exact"

    @staticmethod
    def margins(margin: float) -> tuple[float, float, float]:
        """``MARGIN`` as a cosine."""
        return 1.0, 0.0, margin


class CombinedMarginStraightThrough(_MarginLayer):
    """``cos(m1 theta + m2) - m3`` with ``MODEL.HEADS.COMBINED_MARGIN``, straight-through gradient."""

    @staticmethod
    def margins(margin: Sequence[float]) -> tuple[float, float, float]:
        """``COMBINED_MARGIN``: m1, m2 in radians, m3 as a cosine."""
        if not isinstance(margin, Sequence) or len(margin) != 3:
            raise ConfigError("MODEL.HEADS.COMBINED_MARGIN", value=margin, expected="three numbers m1, m2, m3")
        m1, m2, m3 = margin
        return float(m1), float(m2), float(m3)


class CombinedMarginExact(CombinedMarginStraightThrough):
    """``cos(m1 theta + m2) - m3`` with ``MODEL.HEADS.COMBINED_MARGIN``, its derivative as gradient."""

    gradient = "exact"


LAYERS = (ArcFaceStraightThrough, ArcFaceExact, CosFace, CombinedMarginStraightThrough, CombinedMarginExact)
_COMBINED = {layer.__name__ for layer in LAYERS if issubclass(layer, CombinedMarginStraightThrough)}


def register_margins() -> None:
    """Add the layers to those that ``MODEL.HEADS.CLS_LAYER`` can name, and let heads read ``COMBINED_MARGIN``."""
    from fastreid.layers import any_softmax
    from fastreid.modeling.heads.embedding_head import EmbeddingHead

    for layer in LAYERS:
        setattr(any_softmax, layer.__name__, layer)
        any_softmax.__all__.append(layer.__name__)
    host_from_config = EmbeddingHead.from_config.__func__

    @functools.wraps(host_from_config)
    def from_config(cls: type, cfg: Any) -> dict[str, Any]:
        name = cfg.MODEL.HEADS.CLS_LAYER
        if not hasattr(any_softmax, name):
            raise ConfigError("MODEL.HEADS.CLS_LAYER", value=name, remedy=did_you_mean(name, any_softmax.__all__))
        arguments: dict[str, Any] = host_from_config(cls, cfg)
        if name in _COMBINED:
            arguments["margin"] = tuple(cfg.MODEL.HEADS.COMBINED_MARGIN)
        return arguments

    EmbeddingHead.from_config = classmethod(from_config)
