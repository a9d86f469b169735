"""A quality score that travels in the length of a face embedding, where every host can read it and none is disturbed.

Cosines do not see the length, so recognition stays what it is; hosts that weight images by the length of their
embedding (IJB's template pooling) then weight them by quality.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.errors import ExportError
from qsd_plugin.quality.scaling import TOP

#: Length of the embedding of the worst image: a vector of length 0 would have no direction left.
FLOOR = 0.1


class QualityNorm(nn.Module):
    """``normalize(embedding) * quality``, with the quality of a second network.

    Args:
        network: Normalised images to embeddings [B, D].
        quality: Images of 0 to 255 (RGB) to scores [B] or [B, 1] on the 0 to 100 scale of quality labels. Scores are
            clamped to :data:`FLOOR` ... 100.
        mean: What was subtracted from the pixels before they were given to ``network``, per channel.
        std: What they were divided by.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, quality: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.network = network
        self.quality = quality
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to [B, D], each as long as its image is good."""
        scores = self.quality(images * self.std + self.mean)
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if not tracing and scores.shape not in ((len(images),), (len(images), 1)):
            raise ExportError(
                "Output of the quality network", value=tuple(scores.shape), expected=f"[{len(images)}], one per image"
            )
        length = scores.flatten().clamp(FLOOR, TOP).unsqueeze(1)
        embedding: Tensor = F.normalize(self.network(images)) * length
        return embedding
