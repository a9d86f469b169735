"""What tells people apart: bottleneck and classifier, the teacher, and its optional attention.

Shapes: B images, H x W pixels, D feature size, K numbers of a degradation code, C classes. Source: Huang et al., CVPR
2020 and IJCV 2022; sizes as in their program.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsd_plugin.methods.dil.layers import LinearLayer, Stack, kaiming, largest
from qsd_plugin.networks.resnet_stages import ResNetStages


class ClassBlock(nn.Module):
    """Bottleneck and classifier: linear, batch norm, dropout, linear.

    Args:
        in_features: D.
        num_classes: C.
        embedding_dim: Of the bottleneck.
        dropout: Probability, [0, 1).
    """

    def __init__(self, in_features: int, num_classes: int, *, embedding_dim: int = 512, dropout: float = 0.5) -> None:
        super().__init__()
        linear, norm = nn.Linear(in_features, embedding_dim), nn.BatchNorm1d(embedding_dim)
        classifier = nn.Linear(embedding_dim, num_classes)
        nn.init.kaiming_normal_(linear.weight, mode="fan_out")
        nn.init.zeros_(linear.bias)
        nn.init.normal_(norm.weight, 1.0, 0.02)
        nn.init.normal_(classifier.weight, std=0.001)
        nn.init.zeros_(classifier.bias)
        self.add_block = nn.Sequential(linear, norm)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Sequential(classifier)

    def embed(self, features: Tensor) -> Tensor:
        """[B, D] to the bottleneck's [B, embedding_dim], which inference compares."""
        embedding: Tensor = self.add_block(features)
        return embedding

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] to logits [B, C]."""
        logits: Tensor = self.classifier(self.dropout(self.embed(features)))
        return logits


class IdentityEncoder(nn.Module):
    """The teacher: a plain re-identification network, of which stage 2 takes over the last stage and the classifier.

    Args:
        num_classes: C.
        network: Maps images to several maps, the last of which is pooled; default ``ResNetStages()``.
        embedding_dim: Of the bottleneck.
        dropout: In front of the classifier, [0, 1).
    """

    def __init__(
        self, num_classes: int, *, network: nn.Module | None = None, embedding_dim: int = 512, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.model = ResNetStages() if network is None else network
        channels: tuple[int, ...] = self.model.channels  # type: ignore[assignment]
        self.classifier = ClassBlock(channels[-1], num_classes, embedding_dim=embedding_dim, dropout=dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features [B, D], the maximum over each map of the last stage."""
        return largest(self.model(images)[-1])


class DegradationAttention(nn.Module):
    """Factors in (0, 1) for the sensitive feature, from itself or from the degradation code; off in the authors' runs.

    Args:
        feature_dim: D.
        code_dim: K, and of the latent vector.
        hidden: Of the path from the feature.
    """

    def __init__(self, *, feature_dim: int = 2048, code_dim: int = 128, hidden: int = 256) -> None:
        super().__init__()
        self.identity2latent = Stack(
            LinearLayer(feature_dim, hidden, norm=nn.BatchNorm1d(hidden), activation="relu"),
            LinearLayer(hidden, hidden, norm=nn.BatchNorm1d(hidden), activation="relu"),
            LinearLayer(hidden, code_dim),
        )
        self.deg2latent = LinearLayer(code_dim, code_dim, norm=nn.BatchNorm1d(code_dim), activation="relu")
        self.latent2weight = nn.Linear(code_dim, feature_dim, bias=False)
        self.apply(kaiming)

    def forward(self, features: Tensor, codes: Tensor | None = None) -> Tensor:
        """Factors [B, D] from the codes [B, K] where given, otherwise from the features [B, D]."""
        latent = self.identity2latent(features) if codes is None else self.deg2latent(codes)
        return torch.sigmoid(self.latent2weight(latent))
