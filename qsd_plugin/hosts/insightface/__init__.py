"""InsightFace: the runtime package and arcface_torch checkouts."""
