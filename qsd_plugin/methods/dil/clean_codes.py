"""Which code stands for "clean" when an image is to be enhanced: the mean of clean codes, or a centre near the image's.

Shapes: N clean codes of K numbers, B images. Source: Huang et al., IJCV 2022, promise enhancement without a program for
it; both choices are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsd_plugin.core.errors import ConfigError, DataError, did_you_mean

#: ``mean``: one code for all images. ``nearest``: of the centres of the clean codes, the nearest to the image's own.
CLEAN_MODES = ("mean", "nearest")
_ROUNDS = 50


class CleanCodes:
    """Codes to render enhanced images with.

    Args:
        codes: Of clean images, [N, K], N >= 1.
        mode: One of :data:`CLEAN_MODES`.
        centres: Mode ``"nearest"``: number of clusters, >= 1; at most N are made.
        seed: Of the clusters, >= 0.

    Raises:
        ConfigError: Unknown mode, or no centre.
        DataError: No codes.
    """

    def __init__(self, codes: Tensor, *, mode: str = "mean", centres: int = 128, seed: int = 0) -> None:
        if mode not in CLEAN_MODES:
            raise ConfigError(
                "Clean code",
                value=mode,
                expected=" or ".join(map(repr, CLEAN_MODES)),
                remedy=did_you_mean(mode, CLEAN_MODES),
            )
        if centres < 1:
            raise ConfigError("Centres of the clean codes", value=centres, expected="at least 1")
        if codes.dim() != 2 or not len(codes):
            raise DataError("Clean codes", value=tuple(codes.shape), expected="[N, K] with at least one code")
        generator = torch.Generator().manual_seed(seed)
        self.centres = codes.mean(dim=0, keepdim=True) if mode == "mean" else cluster(codes, centres, generator)

    def of(self, codes: Tensor) -> Tensor:
        """The clean code for each image by its own code [B, K], [B, K]."""
        return self.centres[torch.cdist(codes, self.centres).argmin(dim=1)]


def cluster(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres of k-means by Lloyd's algorithm from a k-means++ start (Arthur and Vassilvitskii, 2007).

    Args:
        points: [N, K], N >= 1.
        count: How many, >= 1.
        generator: Of the CPU.

    Returns:
        [k, K]; k is ``count``, or the number of different points where that is smaller.
    """
    centres = points[torch.randint(len(points), (1,), generator=generator).to(points.device)]
    while len(centres) < count:
        gaps = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1).square()
        if not bool(gaps.any()):
            break
        drawn = torch.multinomial(gaps.cpu(), 1, generator=generator)
        centres = torch.cat([centres, points[drawn.to(points.device)]])
    for _ in range(_ROUNDS):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        moved = torch.stack(
            [
                points[nearest == k].mean(dim=0) if bool((nearest == k).any()) else centres[k]
                for k in range(len(centres))
            ]
        )
        if moved.equal(centres):
            break
        centres = moved
    return centres
