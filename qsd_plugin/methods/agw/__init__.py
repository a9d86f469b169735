"""AGW: the host losses that QSD's person re-identification baseline needs and fast-reid lacks."""

from qsd_plugin.methods.agw.losses import CenterLoss, center_loss, weighted_regularised_triplet

__all__ = ["CenterLoss", "center_loss", "weighted_regularised_triplet"]
