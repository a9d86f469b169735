"""``INPUT.DEGRADE``: the project's degradations as an augmentation beside the host's."""

from __future__ import annotations

from typing import Any


def add_degrade_config(cfg: Any) -> None:
    """Add the keys of :mod:`qsd_plugin.hosts.fastreid.training_degradation` to ``cfg`` (a host ``CfgNode``), once."""
    if "DEGRADE" in cfg.INPUT:
        return
    cfg.INPUT.DEGRADE = node = type(cfg)()
    # True: training images are degraded, before all other augmentation and at their own size. DIL's stage 1, which
    # makes pairs of its own, takes no notice.
    node.ENABLED = False
    # Probability of an image to be degraded. 0 to 1.
    node.PROB = 0.5
    # What happens to it, as a+b_q or a+b_q_clear (degradations/mixing.py); see DIL.PAIRS.MIX.
    node.MIX = "res"
    # MIX res alone only. Range of the factor by which both sides shrink, uniform. 1 <= first <= second.
    node.RATIO = [3.0, 5.0]
