"""Person data sets that multi-low-resolution (MLR) sets are made of, as their owners release them.

* ``market1501``: Market-1501's folders, with their own people for training and testing; any set in this layout.
* ``cuhk03``: ``<pair>_<person>_<view>_<image>.png`` in ``images_labeled`` or ``images_detected``, as fast-reid unpacks
  the release.
* ``viper``: ``cam_a`` and ``cam_b`` with ``<person>_<angle>.bmp``.
* ``caviar``: ``<person><image>.jpg`` with four and three digits; its low resolution is real.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qsd_plugin.core.errors import ConfigError, DataError, did_you_mean
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.items import ImageItem, existing_folder, image_files
from qsd_plugin.data.reid_folders import FOLDER_NAMES, read_folder

#: People held out for testing, of all people: Jiao et al., AAAI 2018, where the protocol comes from.
TEST_PEOPLE = {"cuhk03": 100, "viper": 316, "caviar": 25}

#: Images of a person of CAVIAR whom both cameras see: ten near ones and ten far ones.
_CAVIAR_IMAGES = 20
_CAVIAR_NAME = re.compile(r"(\d{4})(\d{3})")
_CUHK03_NAME = re.compile(r"(\d)_(\d+)_([12])_\d+")
_VIPER_NAME = re.compile(r"(\d+)_\d+")


@dataclass(frozen=True)
class Source:
    """Images to make an MLR set of; every one has a camera.

    Args:
        kind: One of :data:`KINDS`.
        root: The source's folder.
        train: Training images.
        test: Test images, queries and gallery alike.
        degraded: The camera that counts as degraded unless another one is chosen.
        real: Whether its images are of low resolution already.
        distractors: Whether person 0 is everybody who is not searched for, as in Market-1501.
    """

    kind: str
    root: Path
    train: tuple[ImageItem, ...]
    test: tuple[ImageItem, ...]
    degraded: str
    real: bool = False
    distractors: bool = False


def read_source(folder: Path, kind: str = "", *, seed: int = 0, test_people: int | None = None) -> Source:
    """Read a source set.

    Args:
        folder: As its owners release it.
        kind: One of :data:`KINDS`; empty: found out by the folder's content.
        seed: Decides who is tested where the set itself does not.
        test_people: How many people are tested, for sets without a split; default: the protocol's.

    Raises:
        ConfigError: Unknown kind, or a number of people that cannot be held out.
        DataError: The folder is not of this kind, or has no images.
    """
    root = existing_folder(folder, "Source of an MLR set")
    kind = kind or _kind_of(root)
    if kind not in _READERS:
        raise ConfigError("Kind of source", value=kind, expected=" or ".join(KINDS), remedy=did_you_mean(kind, KINDS))
    if kind == "market1501":
        if test_people is not None:
            raise ConfigError(
                "Number of people tested", value=test_people, expected="none: the source has its own split"
            )
        return _market(root)
    items = sorted(_READERS[kind](root))
    if not items:
        raise DataError(f"Source of kind {kind} without images", value=str(root), expected=_LAYOUTS[kind])
    held_out = _held_out(items, TEST_PEOPLE[kind] if test_people is None else test_people, seed)
    return Source(
        kind,
        root,
        train=tuple(item for item in items if item.identity not in held_out),
        test=tuple(item for item in items if item.identity in held_out),
        degraded=min(str(item.camera) for item in items),
        real=kind == "caviar",
    )


def _kind_of(root: Path) -> str:
    if all((root / name).is_dir() for name in ("cam_a", "cam_b")):
        return "viper"
    if any((root / name).is_dir() for name in _CUHK03_FOLDERS):
        return "cuhk03"
    if any((root / name).is_dir() for name in FOLDER_NAMES["train"]):
        return "market1501"
    if any(_CAVIAR_NAME.fullmatch(file.stem) for file in root.glob("*.jpg")):
        return "caviar"
    layouts = "; ".join(f"{kind}: {layout}" for kind, layout in _LAYOUTS.items())
    raise DataError(
        f"Source of an MLR set {root}", value=sorted(path.name for path in root.iterdir())[:6], expected=layouts
    )


def _market(root: Path) -> Source:
    missing = [names[0] for names in FOLDER_NAMES.values() if not any((root / name).is_dir() for name in names)]
    if missing:
        raise DataError(f"Source of kind market1501 {root}", value=f"no {missing[0]}", expected=_LAYOUTS["market1501"])
    splits = read_folder(root)
    if not splits.has_cameras:
        unknown = next(item.path for _, item in splits)
        raise DataError("Image without a camera", value=unknown, expected="names such as 0002_c1s1_000451_03.jpg")
    cameras = {str(item.camera) for _, item in splits}
    first = min(cameras, key=lambda name: (len(name), name))
    test = tuple(sorted({*splits.query, *splits.gallery}))
    return Source("market1501", root, splits.train, test, first, distractors=True)


def _cuhk03(root: Path) -> list[ImageItem]:
    folder = next((root / name for name in _CUHK03_FOLDERS if (root / name).is_dir()), root)
    items = []
    for file, match in _named(image_files(folder), _CUHK03_NAME, "cuhk03"):
        # Five pairs of cameras, of which nobody passes two: a person is the pair and a number of it.
        items.append(ImageItem(str(file), f"{match[1]}{int(match[2]):04d}", match[3]))
    return items


def _viper(root: Path) -> list[ImageItem]:
    return [
        ImageItem(str(file), match[1], camera)
        for camera in ("cam_a", "cam_b")
        for file, match in _named(image_files(root / camera), _VIPER_NAME, "viper")
    ]


def _caviar(root: Path) -> list[ImageItem]:
    """People seen by both cameras; of each the smaller half is the far camera's, which is called ``far``."""
    from PIL import Image

    people: defaultdict[str, list[tuple[int, Path]]] = defaultdict(list)
    for file, match in _named(image_files(root), _CAVIAR_NAME, "caviar"):
        with Image.open(file) as image:
            people[match[1]].append((image.width * image.height, file))
    items = []
    for person, images in people.items():
        if len(images) == _CAVIAR_IMAGES:
            for place, (_, file) in enumerate(sorted(images)):
                camera = "far" if place < _CAVIAR_IMAGES // 2 else "near"
                items.append(ImageItem(str(file), person, camera))
    return items


def _named(files: Iterable[Path], pattern: re.Pattern[str], kind: str) -> list[tuple[Path, re.Match[str]]]:
    found = []
    for file in files:
        match = pattern.fullmatch(file.stem)
        if match is None:
            raise DataError(f"Image of kind {kind}", value=str(file), expected=_LAYOUTS[kind])
        found.append((file, match))
    return found


def _held_out(items: list[ImageItem], count: int, seed: int) -> set[str]:
    """People to test, drawn from those that two cameras see."""
    cameras: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        cameras[item.identity].add(str(item.camera))
    testable = sorted(name for name, seen in cameras.items() if len(seen) > 1)
    if not 0 < count < len(cameras) or count > len(testable):
        raise ConfigError(
            "Number of people tested",
            value=count,
            expected=f"1 to {min(len(testable), len(cameras) - 1)}: two cameras see {len(testable)} of {len(cameras)} "
            "people, and somebody is to be trained on",
        )
    order = numpy_stream(seed, "mlr test people").permutation(len(testable))
    return {testable[place] for place in order[:count]}


_CUHK03_FOLDERS = ("images_labeled", "images_detected")
_READERS: Mapping[str, Callable[[Path], list[ImageItem]]] = {
    "market1501": lambda root: list(_market(root).train),
    "cuhk03": _cuhk03,
    "viper": _viper,
    "caviar": _caviar,
}
#: Sets that can be read.
KINDS = tuple(_READERS)
_LAYOUTS = {
    "market1501": "bounding_box_train, query and bounding_box_test with 0002_c1s1_000451_03.jpg",
    "cuhk03": "images_labeled or images_detected with <pair>_<person>_<view>_<image>.png, such as 1_001_1_01.png",
    "viper": "cam_a and cam_b with <person>_<angle>.bmp, such as 000_45.bmp",
    "caviar": "<person><image>.jpg with four and three digits, such as 0001001.jpg",
}
