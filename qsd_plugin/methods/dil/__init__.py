"""DIL: degradation-invariance learning (Huang et al., CVPR 2020 and IJCV 2022)."""

from qsd_plugin.methods.dil.discriminator import MultiScaleDiscriminator
from qsd_plugin.methods.dil.encoders import (
    ClassBlock,
    ContentEncoder,
    DegradationAttention,
    DegradationEncoder,
    Encoded,
    IdentityEncoder,
)
from qsd_plugin.methods.dil.generator import Generator
from qsd_plugin.methods.dil.networks import Networks, dil_networks
from qsd_plugin.methods.dil.pairs import Pair, PhaseSchedule
from qsd_plugin.methods.dil.stage1 import Stage1, Stage1Options, Stage1Result, Stage1Weights
from qsd_plugin.methods.dil.stage1_training import Stage1Trainer

__all__ = [
    "ClassBlock",
    "ContentEncoder",
    "DegradationAttention",
    "DegradationEncoder",
    "Encoded",
    "Generator",
    "IdentityEncoder",
    "MultiScaleDiscriminator",
    "Networks",
    "Pair",
    "PhaseSchedule",
    "Stage1",
    "Stage1Options",
    "Stage1Result",
    "Stage1Trainer",
    "Stage1Weights",
    "dil_networks",
]
