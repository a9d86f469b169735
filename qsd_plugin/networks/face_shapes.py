"""What the face networks share: input sizes other than 112, a width factor, the grid behind four halvings."""

from __future__ import annotations

import torch
from torch import Tensor

from qsd_plugin.core.errors import ConfigError

InputSize = int | tuple[int, int]

_HALVINGS = 4


def height_width(input_size: InputSize) -> tuple[int, int]:
    """``(height, width)`` in pixels of an input size; one number means a square.

    Raises:
        ConfigError: Not one or two positive numbers.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) != 2 or min(size) < 1:
        raise ConfigError("Input size", value=input_size, expected="pixels, or (height, width) in pixels")
    return int(size[0]), int(size[1])


def grid(input_size: InputSize) -> tuple[int, int]:
    """Height and width of the last map: 7 x 7 for 112 pixels."""
    height, width = height_width(input_size)
    return -(-height // 2**_HALVINGS), -(-width // 2**_HALVINGS)


def base_channels(width: float) -> int:
    """Channels that stand for 64 of the published network, all others being multiples of them.

    Raises:
        ConfigError: The factor leaves no channel, or looks like a number of channels.
    """
    channels = round(64 * width)
    if channels < 1 or width > 8:
        raise ConfigError(
            "Width", value=width, expected="a factor on all channels, above 0 and up to 8 (0.25 makes 16 out of 64)"
        )
    return channels


def require_size(images: Tensor, input_size: tuple[int, int]) -> None:
    """Refuse images that the network's last layer was not built for.

    Raises:
        ConfigError: Other height or width.
    """
    # While a graph is traced for export sizes are tensors, and comparing them would only cause a warning.
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if not tracing and tuple(images.shape[-2:]) != input_size:
        raise ConfigError(
            "Images of a face network",
            value=tuple(images.shape),
            expected=f"[B, 3, {input_size[0]}, {input_size[1]}]",
            remedy="The last layer depends on the size: resize the images or build the network with input_size.",
        )
