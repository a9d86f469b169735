"""Margins on the cosine of the true class: ArcFace, CosFace and both combined, also over a shard of the classes."""

from qsd_plugin.methods.margins.class_shard import ClassShard, class_range
from qsd_plugin.methods.margins.combined import arcface_logits, combined_margin_logits, cosface_logits
from qsd_plugin.methods.margins.sharded import ShardedClassifier, ShardedSoftmax, sharded_margin_softmax

__all__ = [
    "ClassShard",
    "ShardedClassifier",
    "ShardedSoftmax",
    "arcface_logits",
    "class_range",
    "combined_margin_logits",
    "cosface_logits",
    "sharded_margin_softmax",
]
