"""QGFace: good images by margin, poor images by contrast (Song and Wang, arXiv 2312.17494), and AdaFace's head."""

from qsd_plugin.methods.qgface.contrast import ContrastResult, QGContrast, contrast_logits
from qsd_plugin.methods.qgface.gates import classification_gate, contrast_weight, image_quality, pair_quality
from qsd_plugin.methods.qgface.head import AdaFaceHead, HeadResult, QGFaceHead, adaface_logits, check_labels
from qsd_plugin.methods.qgface.profiles import PROFILES, ContrastOptions, contrast_options
from qsd_plugin.methods.qgface.queue import Negatives, ProxyQueue, check_queue_size, translated
from qsd_plugin.methods.qgface.schedules import contrast_weight_at, queue_limit_at, threshold_at
from qsd_plugin.methods.qgface.sharded import sharded_adaface_logits
from qsd_plugin.methods.qgface.statistics import NormStatistics, margin_scaler, norm_moments, unit_and_norm

__all__ = [
    "PROFILES",
    "AdaFaceHead",
    "ContrastOptions",
    "ContrastResult",
    "HeadResult",
    "Negatives",
    "NormStatistics",
    "ProxyQueue",
    "QGContrast",
    "QGFaceHead",
    "adaface_logits",
    "check_labels",
    "check_queue_size",
    "classification_gate",
    "contrast_logits",
    "contrast_options",
    "contrast_weight",
    "contrast_weight_at",
    "image_quality",
    "margin_scaler",
    "norm_moments",
    "pair_quality",
    "queue_limit_at",
    "sharded_adaface_logits",
    "threshold_at",
    "translated",
    "unit_and_norm",
]
