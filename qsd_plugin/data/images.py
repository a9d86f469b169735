"""Decoding: every image that is meant to be seen becomes 8-bit RGB, every other one an error that names the file."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from typing import IO

import numpy as np
import PIL
from PIL import Image, ImageOps, features

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.recordio import open_records
from qsd_plugin.quality.keys import split_record_path

#: Pillow reports a damaged file by whatever its decoders stumble over; these cover all of its formats.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, Image.DecompressionBombError)


def read_rgb(path: str | os.PathLike[str], stream: IO[bytes] | None = None) -> Image.Image:
    """Decode one image to RGB, turned as its EXIF data says.

    Alpha is dropped, palettes are looked up, grey is repeated and 16-bit grey is scaled to 8 bits.

    Args:
        path: The file, or a place in a record file such as ``train.rec#17``; names it in messages when ``stream`` is
            given.
        stream: Binary file to read instead of ``path``.

    Raises:
        DataError: The file is missing or cannot be decoded.
    """
    record = split_record_path(path) if stream is None else None
    if record is not None:
        stream = io.BytesIO(open_records(record[0]).read(record[1]).content)
    try:
        if stream is not None:
            return _decode(stream)
        with open(path, "rb") as file:
            return _decode(file)
    except _DECODER_ERRORS as error:
        raise DataError(
            "Image that cannot be read",
            value=os.fspath(path),
            expected="a complete image file",
            remedy=f"Replace or remove it ({type(error).__name__}: {error}).",
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` in mode RGB; unchanged when it is already."""
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would clip 16 bits to 8, which turns everything but the darkest greys white.
        levels = np.asarray(image).astype(np.float64)
        image = Image.fromarray((levels / 257.0).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # going straight to RGB makes Pillow warn
    return image.convert("RGB")


def decoder() -> str:
    """What decodes and resizes images here, with versions: another one may give slightly different pixels."""
    jpeg = features.version("libjpeg_turbo")
    return f"Pillow {PIL.__version__}, " + (f"libjpeg-turbo {jpeg}" if jpeg else f"libjpeg {features.version('jpg')}")


def _decode(file: IO[bytes]) -> Image.Image:
    image: Image.Image = Image.open(file)
    image.load()
    with suppress(Exception):  # a sound image may have broken EXIF data, which the host ignores as well
        image = ImageOps.exif_transpose(image)
    return to_rgb(image)
