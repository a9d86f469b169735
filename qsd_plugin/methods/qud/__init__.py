"""QUD: unsupervised feature distillation with a queue of teacher embeddings (Kolf et al., BMVC 2024)."""

from qsd_plugin.methods.qud.loss import cosine_loss, mse_loss, qud_loss, qud_monitors, soft_target_loss
from qsd_plugin.methods.qud.queue import FeatureQueue
from qsd_plugin.methods.qud.teacher import ModuleTeacher, OnnxTeacher, Teacher
from qsd_plugin.methods.qud.temperature import (
    half_saturation_cosine,
    loss_floor,
    temperature_for,
    temperature_note,
)

__all__ = [
    "FeatureQueue",
    "ModuleTeacher",
    "OnnxTeacher",
    "Teacher",
    "cosine_loss",
    "half_saturation_cosine",
    "loss_floor",
    "mse_loss",
    "qud_loss",
    "qud_monitors",
    "soft_target_loss",
    "temperature_for",
    "temperature_note",
]
