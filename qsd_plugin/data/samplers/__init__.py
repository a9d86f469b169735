"""Identity samplers: P identities per batch, K images of each; a batch is that of one rank unless said otherwise."""

from __future__ import annotations

from qsd_plugin.data.samplers.base import IdentitySampler
from qsd_plugin.data.samplers.checks import check_batch_fits, check_identity_sampling
from qsd_plugin.data.samplers.quality_balanced import EDGES, QualityBalancedSampler, balanced_counts, quality_bins
from qsd_plugin.data.samplers.quality_identity import QualityIdentitySampler, median_cuts
from qsd_plugin.data.samplers.set_weighted import SetWeightedIdentitySampler

__all__ = [
    "EDGES",
    "IdentitySampler",
    "QualityBalancedSampler",
    "QualityIdentitySampler",
    "SetWeightedIdentitySampler",
    "balanced_counts",
    "check_batch_fits",
    "check_identity_sampling",
    "median_cuts",
    "quality_bins",
]
