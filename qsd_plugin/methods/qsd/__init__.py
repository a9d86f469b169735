"""QSD: quality self-distillation (Ou et al., IEEE TMM 2024)."""

from qsd_plugin.methods.qsd.gate import PairGate, check_quality, gap_weights, pair_gate
from qsd_plugin.methods.qsd.levels import energy_map, map_levels, vector_levels, with_known_gradient
from qsd_plugin.methods.qsd.loss import QSDLoss, QSDResult
from qsd_plugin.methods.qsd.pairing import best_vs_rest_pairs, check_blocks, inbatch_pairs
from qsd_plugin.methods.qsd.presets import Preset, level_weights, preset
from qsd_plugin.methods.qsd.watch import PairWatch

__all__ = [
    "PairGate",
    "PairWatch",
    "Preset",
    "QSDLoss",
    "QSDResult",
    "best_vs_rest_pairs",
    "check_blocks",
    "check_quality",
    "energy_map",
    "gap_weights",
    "inbatch_pairs",
    "level_weights",
    "map_levels",
    "pair_gate",
    "preset",
    "vector_levels",
    "with_known_gradient",
]
