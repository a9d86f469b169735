"""Face crops at the plugin's boundary: RGB, uint8, [height, width, 3]. Checked here, trusted behind it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.images import read_rgb

#: What encoded images of the common formats begin with, and their suffix.
_SIGNATURES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"BM": ".bmp", b"RIFF": ".webp"}


def decode_face(content: bytes, *, name: str, size: int | None = None) -> NDArray[np.uint8]:
    """An encoded image as RGB, uint8 [H, W, 3]. Grey is repeated and alpha dropped, as everywhere in the plugin.

    Args:
        content: The encoded image.
        name: What messages call it.
        size: Height and width that it must have, in pixels; default: any.

    Raises:
        DataError: It is empty, cannot be decoded, or has another size.
    """
    if not content:
        raise DataError(
            "Image without content", value=name, expected="an encoded image", remedy="Remove or replace it."
        )
    pixels = np.asarray(read_rgb(name, io.BytesIO(content)))
    check_rgb(pixels, size=size, name=name)
    return pixels


def check_rgb(image: Any, *, size: int | None = None, name: str = "Image") -> None:
    """Refuse what is not RGB, uint8 [H, W, 3].

    The order of the channels cannot be seen in an array: :func:`check_colour_order`.

    Args:
        image: What a caller passed.
        size: Height and width that it must have, in pixels; default: any.
        name: What messages call it.

    Raises:
        DataError: It is something else.
    """
    shape, kind = getattr(image, "shape", None), getattr(image, "dtype", type(image).__name__)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        remedies = {2: "Repeat a grey image in three channels.", 4: "Drop the alpha channel."}
        depth = None if not shape else 2 if len(shape) == 2 else shape[-1]
        raise DataError(
            name, value=f"{kind} {shape}", expected="RGB, uint8 [height, width, 3]", remedy=remedies.get(depth or 0, "")
        )
    if 0 in image.shape or (size is not None and image.shape[:2] != (size, size)):
        raise DataError(
            name,
            value=f"{image.shape[1]}x{image.shape[0]} pixels",
            expected="pixels" if size is None else f"{size}x{size} pixels",
            remedy="Align faces with qsd_plugin.data.align.norm_crop; resizing a crop would move the landmarks.",
        )


def check_colour_order(decoded: NDArray[np.uint8], encoded: bytes, *, name: str = "Image") -> None:
    """Refuse a decoder that gives BGR, as OpenCV's does: what it made of ``encoded`` is compared with Pillow's RGB.

    Says nothing about grey images, where the order cannot be told. Decoders may differ by some levels.

    Args:
        decoded: What the decoder in question gave, uint8 [H, W, 3].
        encoded: What it was given.
        name: What messages call it.

    Raises:
        DataError: The result is nearer to BGR than to RGB, or of another shape.
    """
    check_rgb(decoded, name=name)
    expected = decode_face(encoded, name=name).astype(np.int64)
    if decoded.shape != expected.shape:
        raise DataError(name, value=f"shape {decoded.shape}", expected=f"{expected.shape}, as Pillow decodes it")
    as_rgb, as_bgr = (np.abs(decoded - order).sum() for order in (expected, expected[..., ::-1]))
    if as_bgr < as_rgb:
        raise DataError(
            f"{name}: colour channels",
            value="blue, green, red",
            expected="red, green, blue",
            remedy="Reverse the last axis after cv2.imread or cv2.imdecode: image[..., ::-1].",
        )


def storable(content: bytes, *, name: str, size: int, convert: bool = False) -> bytes:
    """An encoded crop as it goes into a record or ``.bin`` file: unchanged where every decoder sees the same in it.

    Args:
        content: JPEG or another format.
        name: What messages call it.
        size: Height and width that it must have, in pixels.
        convert: Whether an image that is not RGB or is to be turned by its EXIF data is stored as an RGB PNG instead.

    Raises:
        DataError: It cannot be decoded, has another size or, without ``convert``, is grey, has alpha, or is turned.
    """
    pixels = decode_face(content, name=name, size=size)
    with Image.open(io.BytesIO(content)) as image:
        mode, turned = image.mode, image.getexif().get(0x0112, 1) != 1
    if mode == "RGB" and not turned:
        return content
    if not convert:
        raise DataError(
            name,
            value=f"mode {mode}{', turned by its EXIF data' if turned else ''}",
            expected="an upright RGB image",
            remedy="Decoders disagree about others. --convert stores what the plugin sees in it, as PNG.",
        )
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    return png.getvalue()


def suffix(content: bytes) -> str:
    """The file suffix of an encoded image, ``.jpg`` where nothing else is recognised."""
    return next((ending for start, ending in _SIGNATURES.items() if content.startswith(start)), ".jpg")
