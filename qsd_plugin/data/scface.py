"""SCface (Grgic et al., 2011, "SCface - surveillance cameras face database"): roles by file name, and landmarks."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.items import existing_folder, image_files

#: Distances in metres, by the number at the end of an image's name.
SCFACE_METRES = {1: 4.2, 2: 2.6, 3: 1.0}
#: Subjects that methods fine-tune on, of 130; the remaining 80 are the ``-FT`` rows' test set.
FINE_TUNING_SUBJECTS = 50

_PROBE = re.compile(r"(?P<identity>\d+)_cam[1-5]_(?P<distance>[123])", re.ASCII)
_MUGSHOT = re.compile(r"(?P<identity>\d+)_frontal", re.ASCII)
#: Infra-red cameras, and mug shots from the sides.
_OTHER = re.compile(r"\d+_cam(6|7)_[123]|\d+_cam8|\d+_[LR][1-4]", re.ASCII)


@dataclass(frozen=True)
class SCfaceSplit:
    """Roles of SCface's images, as indices into the list of names.

    Attributes:
        gallery: Frontal mug shots [G].
        probe: Images of the visible-light cameras 1 to 5 [Q].
        gallery_ids: Identities [G].
        probe_ids: Identities [Q].
        distance: 1 (4.2 m), 2 (2.6 m) or 3 (1.0 m) of each probe [Q].
    """

    gallery: NDArray[np.int64]
    probe: NDArray[np.int64]
    gallery_ids: NDArray[np.int64]
    probe_ids: NDArray[np.int64]
    distance: NDArray[np.int64]

    def subjects(self) -> NDArray[np.int64]:
        """Who has a mug shot, ascending."""
        return np.unique(self.gallery_ids)

    def without_first(self, count: int) -> SCfaceSplit:
        """The same without the first ``count`` subjects by number, neither as probes nor in the gallery.

        Published splits are drawn at random and not listed; this one is the same for everybody.
        """
        kept = self.subjects()[count:]
        gallery, probe = np.isin(self.gallery_ids, kept), np.isin(self.probe_ids, kept)
        return SCfaceSplit(
            self.gallery[gallery],
            self.probe[probe],
            self.gallery_ids[gallery],
            self.probe_ids[probe],
            self.distance[probe],
        )


@dataclass(frozen=True)
class SCface:
    """The images that SCface's protocol uses.

    Attributes:
        paths: Of the images, N of them.
        names: Their file names or paths, which tell the roles; no two have one stem.
        points: Landmarks in pixels, [N, 5, 2] or [N, 4, 2] (both eyes, nose, middle of the mouth); ``None``: crops.
    """

    paths: list[Path]
    names: list[str]
    points: NDArray[np.float64] | None = None


def scface_split(names: Sequence[str]) -> SCfaceSplit:
    """Roles by file name, as QGFace evaluates: all 130 subjects, no fine-tuning, infra-red cameras 6 to 8 left out.

    Args:
        names: Stems or paths: ``001_frontal`` (mug shot), ``001_cam1_3`` (camera 1, distance 3). Folders do not matter.

    Raises:
        DataError: A name that is none of SCface's, or no mug shots or no probes among them.
    """
    gallery, probe = [], []
    for index, name in enumerate(names):
        stem = PurePath(name).stem
        if found := _MUGSHOT.fullmatch(stem):
            gallery.append((index, int(found["identity"])))
        elif found := _PROBE.fullmatch(stem):
            probe.append((index, int(found["identity"]), int(found["distance"])))
        elif not _OTHER.fullmatch(stem):
            raise DataError(
                "Name of an SCface image",
                value=name,
                expected="such as 001_frontal, 001_cam1_3, 001_cam6_2 or 001_cam8",
            )
    if not gallery or not probe:
        raise DataError(
            "SCface images", value=f"{len(gallery)} mug shots, {len(probe)} probes", expected="some of both kinds"
        )
    mugshots, probes = np.array(gallery), np.array(probe)
    return SCfaceSplit(mugshots[:, 0], probes[:, 0], mugshots[:, 1], probes[:, 1], probes[:, 2])


def read_scface(folder: str | os.PathLike[str], landmarks: str | os.PathLike[str] | None = None) -> SCface:
    """Frontal mug shots and images of cameras 1 to 5 below ``folder``, sorted; what else SCface has is left out.

    Args:
        folder: With the images, in any folders below it.
        landmarks: List of landmarks; default: the images are aligned crops. One image per line, separated by tabs or
            spaces: its stem, then x and y of both eyes, the nose and both mouth corners, or of the middle of the mouth.

    Raises:
        DataError: No such folder, a name that is none of SCface's, a stem twice, or no landmarks of an image.
    """
    root = existing_folder(folder, "SCface")
    files = image_files(root)
    split = scface_split([path.name for path in files])
    used = sorted([*split.gallery.tolist(), *split.probe.tolist()])
    paths = [files[index] for index in used]
    check_unique([(path.stem, path) for path in paths], "SCface")
    names = [path.relative_to(root).as_posix() for path in paths]
    points = None if landmarks is None else _points(Path(landmarks).expanduser(), paths)
    return SCface(paths, names, points)


def check_unique(keyed: Sequence[tuple[str, Path]], what: str) -> None:
    """Refuse two files with one key, which would stand for one image.

    Raises:
        DataError: There are two; both are named.
    """
    known: dict[str, Path] = {}
    for key, path in keyed:
        if key in known:
            raise DataError(
                f"{what}: two images with the name {key}",
                value=f"{known[key]} and {path}",
                expected="every image once",
                remedy="Remove one of them.",
            )
        known[key] = path


def _points(file: Path, paths: Sequence[Path]) -> NDArray[np.float64]:
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        known = {PurePath(name).stem: np.array(values, dtype=np.float64) for name, *values in lines}
    except (OSError, ValueError) as error:
        raise DataError("List of landmarks", value=str(file), expected="a stem and numbers per line") from error
    missing = [path.stem for path in paths if path.stem not in known]
    if missing:
        raise DataError(
            f"List of landmarks {file}: {len(missing)} images are not in it", value=missing[:3], expected="all of them"
        )
    found = [known[path.stem] for path in paths]
    if len({len(values) for values in found}) != 1 or len(found[0]) not in (8, 10):
        raise DataError(
            f"List of landmarks {file}",
            value=f"{sorted({len(values) for values in found})} numbers",
            expected="8 or 10 in every line: x and y of four or five points",
        )
    return np.stack(found).reshape(len(found), -1, 2)
