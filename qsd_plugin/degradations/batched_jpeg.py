"""A JPEG round trip of a batch in tensor operations: the loss of a baseline JPEG without writing its bytes.

The standard's steps (ITU-T T.81, and JFIF's colours): luma and chroma, chroma at half the resolution if asked for, 8 x
8 cosine transform, division by the quality's table, rounding, and all of it back. The tables are Pillow's.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as PILImage
from torch.nn import functional

from qsd_plugin.degradations.operations import to_uint8

#: Red, green, blue to luma, blue difference, red difference (JFIF).
_TO_CHROMA = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def jpeg(
    images: torch.Tensor,
    qualities: Sequence[float],
    *,
    halved_chroma: bool,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """Compress and decompress.

    Args:
        images: [B, 3, H, W] RGB, whole numbers 0-255.
        qualities: For each image, 1-100.
        halved_chroma: 4:2:0 instead of 4:4:4.
        sizes: Height and width of the part of each image, from the top left corner, that is meant; default: all of it.

    Returns:
        [B, 3, H, W], whole numbers 0-255. What lies outside ``sizes`` is of no meaning.
    """
    count, _, height, width = images.shape
    sizes = sizes or [(height, width)] * count
    block = 16 if halved_chroma else 8
    # A block at the border repeats the last row and column.
    full = _repeat_edges(images, sizes, math.ceil(height / block) * block, math.ceil(width / block) * block)
    planes = torch.einsum("cd,bdhw->bchw", full.new_tensor(_TO_CHROMA), full)
    planes = (planes + full.new_tensor([0.0, 128.0, 128.0])[:, None, None]).round().clamp(0.0, 255.0)
    luma, chroma = planes[:, :1], planes[:, 1:]
    tables = np.stack([_tables(int(quality)) for quality in qualities])
    table = torch.from_numpy(tables).to(images.device, images.dtype)
    luma = _transform(luma, table[:, :1])
    if halved_chroma:
        chroma = _halved(chroma)
        halves = [((tall + 1) // 2, (wide + 1) // 2) for tall, wide in sizes]
        # libjpeg's border: columns are repeated before the resolution is halved, rows after it.
        halved = [(tall, chroma.shape[3]) for tall, _ in halves]
        chroma = _transform(_repeat_edges(chroma, halved, *chroma.shape[2:]), table[:, 1:])
        chroma = _doubled(_repeat_edges(chroma, halves, *chroma.shape[2:]), halves)
    else:
        chroma = _transform(chroma, table[:, 1:])
    planes = torch.cat([luma, chroma - 128.0], dim=1)[:, :, :height, :width]
    return torch.einsum("cd,bdhw->bchw", full.new_tensor(_TO_RGB), planes).clamp(0.0, 255.0).round()


def _halved(chroma: torch.Tensor) -> torch.Tensor:
    """Means of 2 x 2, halves rounded down and up in turns, as libjpeg does."""
    total = 4.0 * functional.avg_pool2d(chroma, 2)
    return ((total + 1.0 + torch.arange(total.shape[3], device=chroma.device) % 2) / 4.0).floor()


def _doubled(chroma: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Twice the resolution by libjpeg's triangle filter, or by repetition where there are at most two columns."""
    smooth = functional.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    bias = 0.5 - torch.arange(smooth.shape[3], device=chroma.device) % 2 / 16.0
    narrow = torch.tensor([width <= 2 for _, width in sizes], device=chroma.device)[:, None, None, None]
    return torch.where(narrow, functional.interpolate(chroma, scale_factor=2), (smooth + bias).floor())


def _transform(planes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[B, C, 8m, 8n] through the transform, ``table`` [B, 1, 8, 8] and back."""
    basis = torch.from_numpy(_basis()).to(planes.device, planes.dtype)
    count, channels, height, width = planes.shape
    blocks = (planes - 128.0).reshape(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    steps = table[:, :, None, None]
    # libjpeg's precision: eighths. Their ties are common at high quality, and go away from 0.
    eighths = (8.0 * (basis @ blocks @ basis.T)).round()
    coefficients = eighths.sign() * ((eighths.abs() + 4.0 * steps) / (8.0 * steps)).floor() * steps
    restored = (basis.T @ coefficients @ basis).transpose(3, 4).reshape(count, channels, height, width)
    return (restored + 128.0).round().clamp(0.0, 255.0)


def _repeat_edges(images: torch.Tensor, sizes: Sequence[tuple[int, int]], height: int, width: int) -> torch.Tensor:
    """Make every image ``height`` x ``width`` by repeating the last row and column of its part in ``sizes``."""
    tall = torch.tensor([size[0] for size in sizes], device=images.device)[:, None]
    wide = torch.tensor([size[1] for size in sizes], device=images.device)[:, None]
    rows = torch.minimum(torch.arange(height, device=images.device), tall - 1)[:, None, :, None]
    columns = torch.minimum(torch.arange(width, device=images.device), wide - 1)[:, None, None, :]
    channels = images.shape[1]
    result = images.gather(2, rows.expand(-1, channels, -1, images.shape[3]))
    return result.gather(3, columns.expand(-1, channels, height, -1))


@functools.lru_cache(maxsize=1)
def _basis() -> npt.NDArray[np.float64]:
    """The orthonormal cosine transform of 8 values, [frequency, place]."""
    frequency, place = np.mgrid[:8, :8]
    rows = np.cos((2 * place + 1) * frequency * np.pi / 16.0) / 2.0
    rows[0] /= np.sqrt(2.0)
    return np.asarray(rows, dtype=np.float64)


@functools.lru_cache(maxsize=128)
def _tables(quality: int) -> npt.NDArray[np.float64]:
    """Pillow's divisors of luma and chroma at ``quality``, [2, 8, 8]."""
    packed = io.BytesIO()
    PILImage.fromarray(to_uint8(np.zeros((8, 8, 3)))).save(packed, format="JPEG", quality=quality)
    found = PILImage.open(packed).quantization  # type: ignore[attr-defined]
    return np.array([found[0], found[1]], dtype=np.float64).reshape(2, 8, 8)
