"""S18, S19: images that are not plain RGB reach the network as what they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import DataError


def test_s18_to_tensor_understands_every_grey_mode() -> None:
    from fastreid.data.transforms import ToTensor

    bilevel = ToTensor()(Image.fromarray(np.array([[True, False, True]])))
    assert torch.equal(bilevel, torch.tensor([[[255.0, 0.0, 255.0]]]))
    deep = ToTensor()(Image.fromarray(np.array([[0], [1000], [65535]], dtype=np.uint16)))
    assert deep.tolist() == [[[0], [1000], [65535]]]
    integers = ToTensor()(Image.fromarray(np.array([[-5, 70000]], dtype=np.int32)))
    assert integers.tolist() == [[[-5, 70000]]]
    floats = ToTensor()(Image.fromarray(np.array([[0.5, -1.0]], dtype=np.float32)))
    assert floats.tolist() == [[[0.5, -1.0]]]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_to_tensor_is_the_hosts_elsewhere(mode: str) -> None:
    from fastreid.data.transforms import ToTensor

    levels = np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype=np.uint8)
    image = Image.fromarray(levels).convert(mode)
    expected = torch.from_numpy(np.array(image).reshape(5, 4, -1)).permute(2, 0, 1).float()
    assert torch.equal(ToTensor()(image), expected)


def test_s19_reads_every_mode_as_rgb(tmp_path: Path) -> None:
    from fastreid.data.common import CommDataset
    from fastreid.data.data_utils import read_image

    palette = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    pictures = {
        "rgba": Image.new("RGBA", (2, 2), (10, 20, 30, 40)),
        "palette": palette,
        "deep": Image.fromarray(np.full((2, 2), 257 * 99, dtype=np.uint16)),
        "bilevel": Image.fromarray(np.array([[True, False], [True, False]])),
        "grey": Image.new("L", (2, 2), 55),
        "cmyk": Image.new("CMYK", (2, 2), (0, 0, 0, 0)),
    }
    corner = {
        "rgba": (10, 20, 30),
        "palette": (255, 0, 0),
        "deep": (99, 99, 99),
        "bilevel": (255, 255, 255),
        "grey": (55, 55, 55),
        "cmyk": (255, 255, 255),
    }
    for name, picture in pictures.items():
        path = str(tmp_path / f"{name}.{'tif' if name == 'cmyk' else 'png'}")
        picture.save(path)
        image = read_image(path)
        assert (name, image.mode, image.getpixel((0, 0))) == (name, "RGB", corner[name])
        assert CommDataset([(path, "1", "1")])[0]["images"].mode == "RGB"


def test_read_image_formats_are_the_hosts(tmp_path: Path) -> None:
    from fastreid.data.data_utils import read_image

    path = str(tmp_path / "red.png")
    Image.new("RGB", (1, 1), (200, 1, 2)).save(path)
    assert read_image(path, format="BGR").getpixel((0, 0)) == (2, 1, 200)


def test_s19_names_what_cannot_be_decoded(tmp_path: Path) -> None:
    from fastreid.data.data_utils import read_image

    (tmp_path / "broken.jpg").write_bytes(b"JFIF")
    for name in ("broken.jpg", "absent.jpg"):
        with pytest.raises(DataError, match=f"cannot be read: got '.*{name}'"):
            read_image(str(tmp_path / name))
