"""Multi-low-resolution (MLR) sets: the images of one camera shrunk by 2, 3 or 4, those of the others left as they are.

The protocol of Jiao et al., AAAI 2018, as the authors of DIL (CVPR 2020) and others use it: queries are what the shrunk
camera took of the people tested, the gallery is what the others took. Neither the camera nor the kernel is fixed there,
so the manifest states both. The folders are those that DIL's program reads:
``{train,query,gallery}/<5 digits>/<5 digits>_c<camera>_<number>.jpg``, camera 0 being the shrunk one.

The rate of an image follows from the seed and its name alone; equal sources and settings give equal bytes with the same
Pillow.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import PIL
from PIL import Image

from qsd_plugin.core.errors import ConfigError, DataError, did_you_mean
from qsd_plugin.core.files import new_folder
from qsd_plugin.core.progress import progress
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.images import read_rgb
from qsd_plugin.data.items import ImageItem
from qsd_plugin.data.mlr_sources import Source, read_source

#: One line per image, and what they have in common with the list's SHA-256.
MANIFEST_FILE, META_FILE = "manifest.csv", "mlr.json"
COLUMNS = ("path", "source", "source_camera", "rate", "width", "height", "sha256")
KERNELS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
#: Raised with every change that alters a file.
VERSION = 1


@dataclass(frozen=True)
class MLRSettings:
    """How an MLR set is made.

    Args:
        seed: Of the rates and, where the source has no split, of the people tested; >= 0.
        kernel: One of :data:`KERNELS`, Pillow's, which average over the area that a pixel covers. ``bilinear`` is what
            the degradation ``res`` of DIL's stage 1 uses.
        rates: Factors by which both sides shrink, drawn alike; whole numbers >= 2.
        camera: The shrunk camera, as the source names it; empty: its first one.
        quality: JPEG quality of what is shrunk or is no JPEG, 1 to 100, chroma at full resolution.
        test_people: How many people are tested where the source has no split; ``None``: the protocol's.
    """

    seed: int = 0
    kernel: str = "bilinear"
    rates: tuple[int, ...] = (2, 3, 4)
    camera: str = ""
    quality: int = 95
    test_people: int | None = None

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ConfigError(
                "Kernel", value=self.kernel, expected=" or ".join(KERNELS), remedy=did_you_mean(self.kernel, KERNELS)
            )
        if not self.rates or min(self.rates) < 2 or len(set(self.rates)) < len(self.rates):
            raise ConfigError("Rates", value=list(self.rates), expected="different whole numbers >= 2, such as 2 3 4")
        if not 1 <= self.quality <= 100:
            raise ConfigError("JPEG quality", value=self.quality, expected="1 to 100")


@dataclass(frozen=True)
class Built:
    """What :func:`build_mlr` wrote.

    Args:
        images: Number of images of each split.
        rates: Number of shrunk images by rate; of a set that is of low resolution already, all under 0.
        digest: SHA-256 of the manifest.
    """

    images: dict[str, int]
    rates: dict[int, int]
    digest: str


def build_mlr(source: Path, target: Path, settings: MLRSettings, *, kind: str = "") -> Built:
    """Make an MLR set of a source set, all of it or nothing.

    Args:
        source: Folder of Market-1501, CUHK03, VIPeR or CAVIAR (:mod:`qsd_plugin.data.mlr_sources`).
        target: The set's folder: empty, or to be made.
        settings: What to do.
        kind: Of the source; empty: found out.

    Raises:
        ConfigError: A setting that does not fit the source.
        DataError: The source is something else, one of the domains would be empty, or the target cannot be written.
    """
    read = read_source(source, kind, seed=settings.seed, test_people=settings.test_people)
    cameras = _numbered(read, settings.camera)
    if read.real and settings != MLRSettings(settings.seed, test_people=settings.test_people):
        raise ConfigError(
            "Settings of a set that is of low resolution already", value=read.kind, expected="the seed alone"
        )
    parts = _parts(read, cameras)
    rows: list[list[str]] = []
    with new_folder(target) as folder:
        for split, name, item in progress(list(_placed(parts, cameras)), "MLR images"):
            rows.append(_write(folder, f"{split}/{name}", read, item, cameras[str(item.camera)] == 0, settings))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
        manifest = text.getvalue().encode()
        (folder / MANIFEST_FILE).write_bytes(manifest)
        digest = hashlib.sha256(manifest).hexdigest()
        meta = {
            "version": VERSION,
            "source": read.kind,
            **({"seed": settings.seed, "low_resolution": "real"} if read.real else asdict(settings)),
            "cameras": {f"c{number}": name for name, number in cameras.items()},
            "pillow": PIL.__version__,
            "images": {split: len(items) for split, items in parts.items()},
            "manifest_sha256": digest,
        }
        (folder / META_FILE).write_text(json.dumps(meta, indent=1) + "\n")
    rates = Counter(int(row[3]) for row in rows if row[3] != "1")
    return Built({split: len(items) for split, items in parts.items()}, dict(sorted(rates.items())), digest)


def _numbered(source: Source, chosen: str) -> dict[str, int]:
    """Number of each camera in the names of the files; the shrunk one has 0."""
    names = {str(item.camera) for item in (*source.train, *source.test)}
    ordered = sorted(names, key=lambda name: (len(name), name))
    degraded = chosen or source.degraded
    if degraded not in names:
        raise ConfigError("Camera to shrink", value=degraded, expected=f"one of {', '.join(ordered)}")
    if len(names) < 2:
        raise DataError(
            f"MLR set of {source.root} without clean images",
            value=f"camera {degraded} alone",
            expected="images of two cameras or more: those of one are shrunk",
        )
    return {name: number for number, name in enumerate([degraded, *(name for name in ordered if name != degraded)])}


def _parts(source: Source, cameras: dict[str, int]) -> dict[str, list[ImageItem]]:
    """Training images, queries of the shrunk camera and gallery of the others."""
    query = [item for item in source.test if cameras[str(item.camera)] == 0]
    if source.distractors:
        query = [item for item in query if item.identity.strip("0")]
    gallery = [item for item in source.test if cameras[str(item.camera)] != 0]
    shrunk = sum(cameras[str(item.camera)] == 0 for item in source.train)
    degraded = next(name for name, number in cameras.items() if number == 0)
    for what, count in (
        (f"degraded training images (camera {degraded})", shrunk),
        ("clean training images", len(source.train) - shrunk),
        (f"queries (camera {degraded})", len(query)),
        ("gallery images of the people searched for", len({i.identity for i in gallery} & {i.identity for i in query})),
    ):
        if not count:
            raise DataError(
                f"MLR set of {source.root} without {what}",
                expected="images of both domains, and people whom the shrunk camera and another one saw",
                remedy=f"Choose another camera of {', '.join(sorted(cameras))} (--camera).",
            )
    return {"train": list(source.train), "query": query, "gallery": gallery}


def _placed(parts: dict[str, list[ImageItem]], cameras: dict[str, int]) -> Iterator[tuple[str, str, ImageItem]]:
    """Split, name below the split's folder and image."""
    for split, items in parts.items():
        numbers: Counter[tuple[str, int]] = Counter()
        for item in sorted(items):
            person, camera = _person(item), cameras[str(item.camera)]
            yield split, f"{person}/{person}_c{camera}_{numbers[person, camera]:04d}.jpg", item
            numbers[person, camera] += 1


def _person(item: ImageItem) -> str:
    if not item.identity.isdecimal():
        raise DataError("Person of an MLR set", value=item.identity, expected="a number", remedy=f"See {item.path}.")
    return f"{int(item.identity):05d}"


def _write(
    folder: Path, path: str, source: Source, item: ImageItem, degraded: bool, settings: MLRSettings
) -> list[str]:
    """Write one image; its line of the manifest."""
    file = Path(item.path)
    name = file.relative_to(source.root).as_posix()
    image = read_rgb(file)
    rate = 1
    if degraded and source.real:
        rate = 0
    elif degraded:
        rate = int(numpy_stream(settings.seed, "mlr rate", name).choice(settings.rates))
        size = max(1, round(image.width / rate)), max(1, round(image.height / rate))
        image = image.resize(size, KERNELS[settings.kernel])
    if rate < 2 and file.suffix.lower() in (".jpg", ".jpeg"):
        content = file.read_bytes()
    else:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=settings.quality, subsampling=0)
        content = stream.getvalue()
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return [path, name, str(item.camera), str(rate), str(image.width), str(image.height), digest]
