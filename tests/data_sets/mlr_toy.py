"""Small person sets as their owners release them, to make MLR sets of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(name: str, size: tuple[int, int] = (24, 48)) -> Image.Image:
    """Noise that depends on ``name``, [height 48, width 24]."""
    seed = np.frombuffer(name.encode(), dtype=np.uint8)
    pixels = np.random.default_rng(seed.astype(np.int64)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write(root: Path, *names: str) -> Path:
    """Write a picture under each name; the suffix decides the format."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(name).save(file)
    return root


def market(root: Path, people: int = 4, tested: int = 3, each: int = 3) -> Path:
    """Three cameras; people ``1 .. people`` to train on, the others to test, distractors and junk."""
    names = []
    for person in range(1, people + tested + 1):
        for camera in (1, 2, 3):
            for number in range(each):
                train = person <= people
                folder = "bounding_box_train" if train else "bounding_box_test"
                if not train and number == 0:
                    folder = "query"
                names.append(f"{folder}/{person:04d}_c{camera}s1_{number:06d}_00.jpg")
    names += ["bounding_box_test/0000_c1s1_000000_00.jpg", "bounding_box_test/0000_c2s1_000001_00.jpg"]
    return write(root, *names, "bounding_box_test/-1_c2s1_000002_00.jpg")


def viper(root: Path, people: int = 6) -> Path:
    """Two cameras, an image of each."""
    return write(
        root,
        *(
            f"cam_{camera}/{person:03d}_{90 * place}.bmp"
            for person in range(people)
            for place, camera in enumerate("ab")
        ),
    )


def cuhk03(root: Path, people: int = 6) -> Path:
    """Two pairs of cameras, two images per view."""
    return write(
        root,
        *(
            f"images_labeled/{1 + person % 2}_{person // 2 + 1:03d}_{view}_{number:02d}.png"
            for person in range(people)
            for view in (1, 2)
            for number in (1, 2)
        ),
    )


def caviar(root: Path, people: int = 4) -> Path:
    """The last of ``people`` is seen by one camera; far images are smaller."""
    for person in range(1, people + 1):
        for number in range(1, 21 if person < people else 11):
            file = root / f"{person:04d}{number:03d}.jpg"
            root.mkdir(parents=True, exist_ok=True)
            far = number % 2
            picture(file.name, (12, 24) if far else (24, 48)).save(file)
    return root
