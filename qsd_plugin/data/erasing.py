"""Random erasing in two steps: boxes are drawn where images are loaded, and applied where it is known to which images.

Whether an image may be erased can depend on the rest of its batch, which the loading of one image does not know.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_ATTEMPTS = 10


def draw_box(
    generator: np.random.Generator,
    height: int,
    width: int,
    *,
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.33),
    aspect: tuple[float, float] = (0.3, 3.3),
) -> tuple[int, int, int, int]:
    """Where to erase an image: ``(top, left, height, width)`` in pixels, all 0 for not at all.

    The distribution is that of ``torchvision.transforms.RandomErasing`` with the same numbers.

    Args:
        generator: All draws come from it.
        height: Of the image.
        width: Of the image.
        probability: Of erasing anything.
        area: Share of the image, uniform in this range.
        aspect: Height over width, log-uniform in this range.
    """
    if generator.random() >= probability:
        return 0, 0, 0, 0
    for _ in range(_ATTEMPTS):
        pixels = height * width * generator.uniform(*area)
        ratio = math.exp(generator.uniform(math.log(aspect[0]), math.log(aspect[1])))
        tall, wide = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if tall < height and wide < width:
            top = int(generator.integers(height - tall + 1))
            return top, int(generator.integers(width - wide + 1)), tall, wide
    return 0, 0, 0, 0


def erase(images: Tensor, boxes: Tensor, value: Tensor, rows: Tensor | None = None) -> Tensor:
    """``images`` with the boxes filled; nothing waits for the device.

    Args:
        images: [B, C, H, W]; not changed.
        boxes: [B, 4] integers as from :func:`draw_box`.
        value: Fill of each channel, [C] or [1], in the range of the images and on their device.
        rows: Which images are erased, [B] bool; default: all.
    """
    boxes = boxes.to(images.device)
    top, left, tall, wide = boxes.unbind(dim=1)
    if rows is not None:
        tall = torch.where(rows, tall, 0)
    down = torch.arange(images.shape[2], device=images.device)
    across = torch.arange(images.shape[3], device=images.device)
    inside_rows = (down >= top[:, None]) & (down < (top + tall)[:, None])
    inside_columns = (across >= left[:, None]) & (across < (left + wide)[:, None])
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return torch.where(inside, value.to(images.dtype).view(1, -1, 1, 1), images)
