"""Network parts that are not tied to a method or a host."""

from qsd_plugin.networks.ema import ema_update
from qsd_plugin.networks.quality_regressor import quality_regressor
from qsd_plugin.networks.taps import TapRecorder, tokens_to_map

__all__ = ["TapRecorder", "ema_update", "quality_regressor", "tokens_to_map"]
