import io

import numpy as np
import pytest
from PIL import Image
from PIL import features as pillow_features

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.images import read_rgb

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixels(path):
    image = read_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_is_left_as_it_is(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    assert np.array_equal(pixels(saved(tmp_path, Image.fromarray(colours))), colours)


def test_grey_is_repeated(tmp_path):
    assert np.array_equal(pixels(saved(tmp_path, Image.fromarray(RAMP))), np.stack([RAMP] * 3, axis=2))


def test_alpha_is_dropped_and_colours_survive(tmp_path):
    colours = np.full((3, 2, 4), (10, 200, 30, 77), dtype=np.uint8)
    assert np.array_equal(pixels(saved(tmp_path, Image.fromarray(colours))), colours[..., :3])


def test_palette_is_looked_up(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    red, blue = (255, 0, 0), (0, 0, 255)
    assert pixels(saved(tmp_path, image)).tolist() == [[[*red], [*blue]], [[*blue], [*red]]]


def test_palette_with_transparency_table_does_not_warn(tmp_path, recwarn):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    path = saved(tmp_path, image, transparency=b"\x00\x80")
    assert pixels(path).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert not recwarn.list


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = RAMP.astype(np.uint16) * 257
    assert np.array_equal(pixels(saved(tmp_path, Image.fromarray(deep)))[..., 0], RAMP)


def test_bilevel_becomes_black_and_white(tmp_path):
    image = Image.fromarray(np.array([[True, False]]))
    assert image.mode == "1"
    assert pixels(saved(tmp_path, image)).tolist() == [[[255] * 3, [0] * 3]]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    path = saved(tmp_path, Image.new("RGB", (10, 4)), "turned.jpg", exif=exif)
    assert read_rgb(path).size == (4, 10)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
def test_every_accepted_format_can_be_read(tmp_path, suffix):
    if suffix == "webp" and not pillow_features.check("webp"):
        pytest.skip("Pillow without WebP")
    path = saved(tmp_path, Image.new("RGB", (8, 8), (200, 40, 90)), f"image.{suffix}")
    assert np.abs(pixels(path).astype(int) - (200, 40, 90)).max() <= 3


def damaged_files():
    def encoded(kind):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, kind)
        return bytearray(buffer.getvalue())

    broken_chunk = encoded("png")
    broken_chunk[100] ^= 0xFF
    return {
        "empty": b"",
        "text": b"not an image",
        "half a jpeg": bytes(encoded("jpeg")[:2000]),
        "half a png": bytes(encoded("png")[:2000]),
        "png with a wrong checksum": bytes(broken_chunk),
        "half a bmp": bytes(encoded("bmp")[:500]),
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_damaged_file_is_named(tmp_path, kind):
    path = tmp_path / "person.jpg"
    path.write_bytes(damaged_files()[kind])
    with pytest.raises(
        DataError, match=r"cannot be read: got '.*person\.jpg'; expected a complete image file\. Replace"
    ):
        read_rgb(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jpg.*No such file"):
        read_rgb(tmp_path / "absent.jpg")


def test_stream_is_read_instead_of_the_path():
    buffer = io.BytesIO()
    Image.new("RGB", (3, 5)).save(buffer, "png")
    buffer.seek(0)
    assert read_rgb("s3://elsewhere/person.png", buffer).size == (3, 5)
