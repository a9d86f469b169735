"""The boundary of face images: what is RGB, what is not, and which decoder turned the channels round."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.face_images import check_colour_order, check_rgb, decode_face, storable, suffix

COLOURS = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (COLOURS[..., 0], r"got 'uint8 \(112, 112\)'; expected RGB, uint8 .* Repeat a grey image in three"),
        (COLOURS[..., :1], r"got 'uint8 \(112, 112, 1\)'"),
        (
            np.concatenate([COLOURS, COLOURS[..., :1]], axis=2),
            r"got 'uint8 \(112, 112, 4\)'; .* Drop the alpha channel",
        ),
        (COLOURS.astype(np.float32), r"got 'float32 \(112, 112, 3\)'"),
        (COLOURS.transpose(2, 0, 1), r"got 'uint8 \(3, 112, 112\)'"),
        (COLOURS[:0], "got '112x0 pixels'"),
        (COLOURS[:90], "got '112x90 pixels'; expected 112x112 pixels. Align faces with"),
        (Image.fromarray(COLOURS), "got 'Image None'"),
        (None, "got 'NoneType None'"),
    ],
)
def test_what_is_no_rgb_crop(image: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"face 7: {message}"):
        check_rgb(image, size=112, name="face 7")


def test_rgb_of_any_size_passes() -> None:
    check_rgb(COLOURS[:7])
    check_rgb(COLOURS, size=112)


def test_decoding() -> None:
    np.testing.assert_array_equal(decode_face(encoded(COLOURS), name="a", size=112), COLOURS)
    grey = COLOURS[..., 0]
    np.testing.assert_array_equal(decode_face(encoded(grey), name="a"), np.stack([grey] * 3, axis=2))
    alpha = np.concatenate([COLOURS, COLOURS[..., :1]], axis=2)
    np.testing.assert_array_equal(decode_face(encoded(alpha), name="a"), COLOURS)
    with pytest.raises(DataError, match=r"Image without content: got 'a\.jpg'"):
        decode_face(b"", name="a.jpg")
    with pytest.raises(DataError, match=r"cannot be read: got 'a\.jpg'"):
        decode_face(b"text", name="a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg: got '112x112 pixels'; expected 96x96 pixels"):
        decode_face(encoded(COLOURS), name="a.jpg", size=96)


def test_opencvs_order_is_told() -> None:
    for kind in ("png", "jpeg"):
        content = encoded(COLOURS, kind)
        bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        with pytest.raises(DataError, match=r"lfw: colour channels: got 'blue, green, red'; .*image\[\.\.\., ::-1\]"):
            check_colour_order(bgr, content, name="lfw")
        check_colour_order(np.ascontiguousarray(bgr[..., ::-1]), content)


def test_order_of_grey_cannot_be_told_and_small_differences_do_not_matter() -> None:
    grey = np.stack([COLOURS[..., 0]] * 3, axis=2)
    check_colour_order(grey[..., ::-1], encoded(grey))
    check_colour_order(COLOURS ^ 3, encoded(COLOURS))
    with pytest.raises(DataError, match=r"got 'shape \(7, 112, 3\)'"):
        check_colour_order(COLOURS[:7], encoded(COLOURS))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return encoded(COLOURS, "jpeg", exif=exif)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encoded(COLOURS[..., 0]), "mode L"),
        (encoded(np.concatenate([COLOURS, COLOURS[..., :1]], axis=2)), "mode RGBA"),
        (turned(), "mode RGB, turned by its EXIF data"),
    ],
)
def test_what_decoders_disagree_about_is_stored_on_request_as_seen(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"a: got '{message}'; expected an upright RGB image.*--convert"):
        storable(content, name="a", size=112)
    converted = storable(content, name="a", size=112, convert=True)
    assert suffix(converted) == ".png"
    np.testing.assert_array_equal(decode_face(converted, name="a"), decode_face(content, name="a"))
    assert storable(converted, name="a", size=112) == converted


def test_sound_images_are_stored_as_they_are() -> None:
    for kind, ending in (("jpeg", ".jpg"), ("png", ".png"), ("bmp", ".bmp")):
        content = encoded(COLOURS, kind)
        assert storable(content, name="a", size=112, convert=True) == content
        assert suffix(content) == ending
