"""A trained stage 1 as a tool on pictures: codes of pictures, contents of pictures, and pictures of both.

Shapes: N pictures of H x W pixels, K numbers of a code. A picture is an [h, w, 3] uint8 RGB array of any size; it is
resized first as the host's test transform does, by Pillow's bicubic filter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

from qsd_plugin.core.errors import DataError
from qsd_plugin.methods.dil import Networks
from qsd_plugin.methods.dil.encoders import SMALLEST_SIDE
from qsd_plugin.methods.dil.exchange import render

Picture = NDArray[np.uint8]

_BATCH = 64


class Renderer:
    """Encoders and generator in evaluation mode.

    Args:
        networks: Trained; put into eval mode here.
        mean: Per channel, 0 to 255.
        std: Per channel, 0 to 255.
        size: Height and width at which pictures are encoded and rendered.

    Raises:
        DataError: The generator cannot hold the size.
    """

    def __init__(
        self, networks: Networks, *, mean: Sequence[float], std: Sequence[float], size: tuple[int, int]
    ) -> None:
        check_size(size)
        self.size = size
        self.content_encoder = networks.content_encoder.eval()
        self.degradation_encoder = networks.degradation_encoder.eval()
        self.generator = networks.generator.eval()
        self._device = next(self.generator.parameters()).device
        self._mean, self._std = (
            torch.tensor(list(values)).view(1, -1, 1, 1).to(self._device) for values in (mean, std)
        )

    def resized(self, pictures: Sequence[Picture]) -> list[Picture]:
        """Pictures at the networks' size."""
        height, width = self.size
        full = [PILImage.fromarray(picture) for picture in pictures]
        return [
            np.asarray(image.resize((width, height), PILImage.Resampling.BICUBIC), dtype=np.uint8) for image in full
        ]

    def normalised(self, pictures: Sequence[Picture]) -> Tensor:
        """Pictures to what the networks see, [N, 3, H, W]."""
        pixels = torch.from_numpy(np.stack(self.resized(pictures))).to(self._device)
        return (pixels.permute(0, 3, 1, 2).float() - self._mean) / self._std

    @torch.no_grad()
    def codes(self, pictures: Sequence[Picture], head: str = "real") -> Tensor:
        """Degradation codes, each the mean of the picture's and its mirror image's, [N, K].

        Args:
            pictures: N of them.
            head: As of :class:`~qsd_plugin.methods.dil.DegradationEncoder`.
        """
        encode = self.degradation_encoder
        parts = (self.normalised(pictures[at : at + _BATCH]) for at in range(0, len(pictures), _BATCH))
        return torch.cat([(encode(images, head) + encode(images.flip(3), head)) / 2 for images in parts])

    @torch.no_grad()
    def contents(self, pictures: Sequence[Picture]) -> Tensor:
        """Content maps, [N, C, H / 4, W / 4]."""
        parts = (self.normalised(pictures[at : at + _BATCH]) for at in range(0, len(pictures), _BATCH))
        return torch.cat([self.content_encoder(images, want_identity=False).content for images in parts])

    def render(self, contents: Tensor, codes: Tensor) -> list[Picture]:
        """Contents [N, C, h, w], each with its code [N, K], to N pictures."""
        return self.pictures(render(self.generator, contents, codes))

    def pictures(self, images: Tensor) -> list[Picture]:
        """Normalised images [N, 3, H, W] to N pictures; values outside 0 to 255 are clipped."""
        return to_pictures(images, self._mean, self._std)


def to_pictures(images: Tensor, mean: Tensor, std: Tensor) -> list[Picture]:
    """Normalised images [N, 3, H, W] to N pictures; ``mean`` and ``std`` are [1, 3, 1, 1], 0 to 255."""
    pixels = (images * std + mean).clamp(0, 255).round().to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def check_size(size: tuple[int, int]) -> None:
    """Refuse a height and width that the generator cannot hold.

    Raises:
        DataError: They are no multiples of 16, or too small.
    """
    if any(side % 16 or side < SMALLEST_SIDE for side in size):
        raise DataError(
            "Size of a picture for DIL's generator",
            value=f"{size[0]} x {size[1]} pixels (height x width)",
            expected=f"multiples of 16, at least {SMALLEST_SIDE}",
            remedy="Resize it, or name another size.",
        )
