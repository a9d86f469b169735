"""Low-light folders: dark and normal images, of the same scenes (LOL's layout) or of others (EnlightenGAN's)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.items import existing_folder, image_files

#: Folders of the dark and of the normal training images; the first layout that is there counts.
LAYOUTS = (
    ("our485/low", "our485/high"),
    ("train/low", "train/high"),
    ("low", "high"),
    ("train/trainA", "train/trainB"),
    ("trainA", "trainB"),
)


@dataclass(frozen=True)
class LowLightImages:
    """The training images of a folder.

    Args:
        root: The folder.
        low: Dark ones, sorted.
        normal: Normal ones, sorted.
        paired: Whether every image has a counterpart of the same name and size.
    """

    root: Path
    low: tuple[Path, ...]
    normal: tuple[Path, ...]
    paired: bool


def read_low_light(folder: str | os.PathLike[str]) -> LowLightImages:
    """Read one of :data:`LAYOUTS`. Images are paired where both folders hold the same names (endings aside).

    Raises:
        DataError: The folder is missing or of no such layout, one side is empty, a name is there twice, or the images
            of a pair differ in size.
    """
    root = existing_folder(folder, "Low-light images")
    layout = next((names for names in LAYOUTS if all((root / name).is_dir() for name in names)), None)
    if layout is None:
        raise DataError(
            "Low-light images",
            value=str(root),
            expected="folders " + ", or ".join(" and ".join(names) for names in LAYOUTS),
        )
    low, normal = (tuple(image_files(root / name)) for name in layout)
    for files, name, what in ((low, layout[0], "degraded"), (normal, layout[1], "clean")):
        if not files:
            raise DataError(f"No {what} images", value=str(root / name), expected="image files below it")
    names = [{path.stem: path for path in files} for files in (low, normal)]
    paired = names[0].keys() == names[1].keys()
    if paired:
        for files, own in ((low, names[0]), (normal, names[1])):
            if len(own) != len(files):
                twice = next(path for path in files if own[path.stem] != path)
                raise DataError("Low-light image that is there twice", value=str(twice), expected="one of each name")
        for stem, path in names[0].items():
            _check_sizes(path, names[1][stem])
    return LowLightImages(root, low, normal, paired)


def _check_sizes(low: Path, normal: Path) -> None:
    sizes = [_size(path) for path in (low, normal)]
    if sizes[0] != sizes[1]:
        raise DataError(
            "Low-light pair of different sizes",
            value=f"{low} {sizes[0][0]} x {sizes[0][1]}, {normal} {sizes[1][0]} x {sizes[1][1]}",
            expected="equal width and height",
            remedy="Crop or resize one of them; for images that are no pairs, give them other names.",
        )


def _size(path: Path) -> tuple[int, int]:
    """Width and height, from the file's head."""
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise DataError("Image that cannot be read", value=str(path), expected="a complete image file") from error
