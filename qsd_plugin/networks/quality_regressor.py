"""A network that scores the quality of images."""

from __future__ import annotations

from torch import nn


def quality_regressor(backbone: nn.Module, num_features: int, *, dropout: float = 0.5) -> nn.Sequential:
    """A recognition backbone with the regression head of SDD-FIQA behind it: images [B, C, H, W] to scores [B].

    Args:
        backbone: Maps images to features of any shape with B in front.
        num_features: Features per image, flattened; 25088 for 512 x 7 x 7.
        dropout: Probability in front of the linear layer, in [0, 1); no effect in eval mode.

    Source: Ou et al., SDD-FIQA, CVPR 2021; the head of their released quality network, which they train with a smooth
    L1 loss on labels from 0 to 100.
    """
    return nn.Sequential(
        backbone,
        nn.Flatten(),
        nn.PReLU(num_features),
        nn.Dropout(dropout),
        nn.Linear(num_features, 1),
        nn.Flatten(0),
    )
