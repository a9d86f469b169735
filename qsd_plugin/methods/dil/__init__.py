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

__all__ = [
    "ClassBlock",
    "ContentEncoder",
    "DegradationAttention",
    "DegradationEncoder",
    "Encoded",
    "Generator",
    "IdentityEncoder",
    "MultiScaleDiscriminator",
]
