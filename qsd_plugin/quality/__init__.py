"""Image quality: labels and their files, the SDD-FIQA generator, scales, controls and sources of scores."""

from __future__ import annotations

from qsd_plugin.quality.checks import LabelCheck, check_labels, label_warnings
from qsd_plugin.quality.folds import identity_folds, merge_folds
from qsd_plugin.quality.labels import QualityLabels, label_key, require_coverage
from qsd_plugin.quality.norms import norm_labels
from qsd_plugin.quality.scaling import CONTROLS, SCALES, control, random_direction, rescale
from qsd_plugin.quality.sdd_fiqa import sdd_fiqa_labels
from qsd_plugin.quality.sources import QUALITY_SOURCES, QualitySource, build_source

__all__ = [
    "CONTROLS",
    "QUALITY_SOURCES",
    "SCALES",
    "LabelCheck",
    "QualityLabels",
    "QualitySource",
    "build_source",
    "check_labels",
    "control",
    "identity_folds",
    "label_key",
    "label_warnings",
    "merge_folds",
    "norm_labels",
    "random_direction",
    "require_coverage",
    "rescale",
    "sdd_fiqa_labels",
]
