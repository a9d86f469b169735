"""Margins on the cosine of the true class: ArcFace, CosFace and both combined."""

from qsd_plugin.methods.margins.combined import arcface_logits, combined_margin_logits, cosface_logits

__all__ = ["arcface_logits", "combined_margin_logits", "cosface_logits"]
