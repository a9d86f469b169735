"""Images that are not plain RGB: converted where the host reads them (S19) and understood by its ToTensor (S18)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from PIL import Image

from qsd_plugin.data.images import read_rgb
from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, always, replace, together
from qsd_plugin.quality.keys import split_record_path

#: Pillow modes that the host's ToTensor converts through ``np.array(copy=False)``, and the type that holds them.
_NUMPY_MODES = {"1": np.uint8, "I;16": np.int32, "I": np.int32, "F": np.float32}


def _to_tensor_fails() -> bool:
    from fastreid.data.transforms.functional import to_tensor

    try:
        # NumPy 2 refuses the host's conversion; NumPy 1 lets 65535 wrap around to -1.
        return int(to_tensor(Image.new("I;16", (1, 1), 65535)).max()) != 65535
    except ValueError:
        return True


def _repair_to_tensor() -> Undo:
    from fastreid.data.transforms import functional, transforms

    host_to_tensor = functional.to_tensor

    @functools.wraps(host_to_tensor)
    def to_tensor(pic: Any) -> Any:
        if not isinstance(pic, Image.Image) or pic.mode not in _NUMPY_MODES:
            return host_to_tensor(pic)
        levels = torch.from_numpy(np.asarray(pic).astype(_NUMPY_MODES[pic.mode]))[None]
        return 255.0 * levels if pic.mode == "1" else levels

    return together(replace(functional, "to_tensor", to_tensor), replace(transforms, "to_tensor", to_tensor))


def read_image(path: str) -> Image.Image:
    """An image in RGB from wherever the host's file handlers find ``path``.

    Raises:
        DataError: It is missing or cannot be decoded.
    """
    from fastreid.utils.file_io import PathManager

    if split_record_path(path) is not None:  # no file that a handler of the host could open
        return read_rgb(path)
    try:
        stream = PathManager.open(path, "rb")
    except OSError:
        return read_rgb(path)  # raises the error that names the file
    with stream:
        return read_rgb(path, stream)


def _read_as_rgb() -> Undo:
    from fastreid.data import common, data_utils

    host_read_image = data_utils.read_image

    @functools.wraps(host_read_image)
    def read_rgb_image(file_name: str, format: str | None = None) -> Any:
        return read_image(file_name) if format is None else host_read_image(file_name, format)

    return together(replace(data_utils, "read_image", read_rgb_image), replace(common, "read_image", read_rgb_image))


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S18",
        where="data/transforms/functional.py:40,44",
        symptom="ToTensor raises ValueError on bilevel and 16-bit images under NumPy 2; under NumPy 1 the latter wrap",
        action="these modes are converted with a copy",
        needed=_to_tensor_fails,
        apply=_repair_to_tensor,
        proof="test_s18_to_tensor_understands_every_grey_mode",
    ),
    Patch(
        row="S19",
        where="data/data_utils.py:17",
        symptom="RGBA stays four-channel, a palette image becomes a grey picture of its indices, 16 bits raise",
        action="images are converted to RGB; one that cannot be decoded is named",
        needed=always,
        apply=_read_as_rgb,
        proof="test_s19_reads_every_mode_as_rgb",
    ),
)
