"""Network parts that are not tied to a method or a host."""

from qsd_plugin.networks.ema import ema_update
from qsd_plugin.networks.ir import ir_18, ir_34, ir_50, ir_101, ir_se_50
from qsd_plugin.networks.iresnet import iresnet18, iresnet34, iresnet50, iresnet100, iresnet200
from qsd_plugin.networks.mobilefacenet import mobilefacenet, mobilefacenet_large
from qsd_plugin.networks.mobilefacenet_qud import mobilefacenet_qud
from qsd_plugin.networks.quality_regressor import quality_regressor
from qsd_plugin.networks.taps import TapRecorder, tokens_to_map

__all__ = [
    "TapRecorder",
    "ema_update",
    "ir_18",
    "ir_34",
    "ir_50",
    "ir_101",
    "ir_se_50",
    "iresnet18",
    "iresnet34",
    "iresnet50",
    "iresnet100",
    "iresnet200",
    "mobilefacenet",
    "mobilefacenet_large",
    "mobilefacenet_qud",
    "quality_regressor",
    "tokens_to_map",
]
