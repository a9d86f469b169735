"""Training samplers; a batch is that of one rank unless said otherwise.

Identity samplers draw P identities per batch and K images of each, :class:`SeededTrainingSampler` draws images.
"""

from __future__ import annotations

from qsd_plugin.data.samplers.base import IdentitySampler, StepSampler
from qsd_plugin.data.samplers.checks import check_batch_fits, check_identity_sampling
from qsd_plugin.data.samplers.quality_balanced import EDGES, QualityBalancedSampler, balanced_counts, quality_bins
from qsd_plugin.data.samplers.quality_identity import QualityIdentitySampler, median_cuts
from qsd_plugin.data.samplers.seeded_identity import SeededIdentitySampler
from qsd_plugin.data.samplers.seeded_training import SeededTrainingSampler
from qsd_plugin.data.samplers.set_weighted import SetWeightedIdentitySampler

__all__ = [
    "EDGES",
    "IdentitySampler",
    "QualityBalancedSampler",
    "QualityIdentitySampler",
    "SeededIdentitySampler",
    "SeededTrainingSampler",
    "SetWeightedIdentitySampler",
    "StepSampler",
    "balanced_counts",
    "check_batch_fits",
    "check_identity_sampling",
    "median_cuts",
    "quality_bins",
]
