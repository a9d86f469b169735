"""DIL: degradation-invariance learning (Huang et al., CVPR 2020 and IJCV 2022)."""

from qsd_plugin.methods.dil.bank import DegradationBank, ReplayAugmenter, flip_averaged_codes
from qsd_plugin.methods.dil.discriminator import MultiScaleDiscriminator
from qsd_plugin.methods.dil.encoders import ContentEncoder, DegradationEncoder, Encoded
from qsd_plugin.methods.dil.generator import Generator
from qsd_plugin.methods.dil.identity import ClassBlock, DegradationAttention, IdentityEncoder
from qsd_plugin.methods.dil.networks import Networks, dil_networks
from qsd_plugin.methods.dil.pairs import Pair, PhaseSchedule
from qsd_plugin.methods.dil.severity import Severity, fit_severity, severity, with_severity
from qsd_plugin.methods.dil.stage1 import Stage1, Stage1Result
from qsd_plugin.methods.dil.stage1_options import Stage1Options, Stage1Weights
from qsd_plugin.methods.dil.stage1_training import Stage1Trainer
from qsd_plugin.methods.dil.stage2 import BranchOutputs, DualBranchReID, SensitiveBranch, Stage2Options, stage2_terms

__all__ = [
    "BranchOutputs",
    "ClassBlock",
    "ContentEncoder",
    "DegradationAttention",
    "DegradationBank",
    "DegradationEncoder",
    "DualBranchReID",
    "Encoded",
    "Generator",
    "IdentityEncoder",
    "MultiScaleDiscriminator",
    "Networks",
    "Pair",
    "PhaseSchedule",
    "ReplayAugmenter",
    "SensitiveBranch",
    "Severity",
    "Stage1",
    "Stage1Options",
    "Stage1Result",
    "Stage1Trainer",
    "Stage1Weights",
    "Stage2Options",
    "dil_networks",
    "fit_severity",
    "flip_averaged_codes",
    "severity",
    "stage2_terms",
    "with_severity",
]
