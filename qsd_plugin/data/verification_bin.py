"""Verification sets as arcface_torch reads them (``lfw.bin``): a pickle of 2P encoded images and P booleans.

A pickle may ask for anything to be run; these are read by :mod:`qsd_plugin.core.plain_pickle`, which runs nothing.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.core.plain_pickle import PickledArray, load_plain
from qsd_plugin.core.progress import progress
from qsd_plugin.data.face_images import decode_face, storable
from qsd_plugin.data.face_lists import read_pairs

#: Folds of the protocol (LFW's): contiguous, the first ones longer by one where P is no multiple.
FOLDS = 10


class VerificationPairs(NamedTuple):
    """Pair i is the images 2i and 2i + 1.

    Args:
        images: Encoded images, 2P of them.
        issame: Whether both images of a pair show the same person, bool [P].
    """

    images: list[bytes]
    issame: NDArray[np.bool_]

    def pixels(self, size: int = 112, *, name: str = "image") -> Iterator[NDArray[np.uint8]]:
        """Every image decoded, RGB, uint8 [size, size, 3]; square ones of another size are resized (bicubic).

        Raises:
            DataError: An image cannot be decoded or is not square.
        """
        for number, content in enumerate(self.images):
            pixels = decode_face(content, name=f"{name} {number}")
            height, width = pixels.shape[:2]
            if height != width:
                raise DataError(f"{name} {number}", value=f"{width}x{height} pixels", expected="a square crop")
            yield pixels if width == size else cv2.resize(pixels, (size, size), interpolation=cv2.INTER_CUBIC)


def load_bin(path: str | os.PathLike[str], *, folds: int | None = FOLDS) -> VerificationPairs:
    """Read a ``.bin`` file of Python 2 or 3 without running anything it asks for.

    Args:
        path: The file.
        folds: Each of that many contiguous folds must have pairs of both kinds; ``None``: not checked.

    Raises:
        DataError: The file is missing, asks for something else than bytes and arrays, or does not hold pairs.
    """
    try:
        with open(path, "rb") as file:
            content = load_plain(file)
    except OSError as error:
        raise DataError(
            "Verification set", value=os.fspath(path), expected="an existing .bin file", remedy=f"{error.strerror}."
        ) from error
    except Exception as error:  # a pickle can fail in as many ways as Python
        raise DataError(
            f"Verification set {os.fspath(path)} cannot be read",
            value=str(error),
            expected="a pickle of images and booleans, nothing else",
            remedy="Do not load it with pickle: it may run code. Get it again, or build it with pairs2bin.",
        ) from error
    pairs = _pairs(content, os.fspath(path))
    if folds is not None:
        check_folds(pairs.issame, folds, name=os.fspath(path))
    return pairs


def save_bin(
    path: str | os.PathLike[str], images: Sequence[bytes], issame: ArrayLike, *, folds: int | None = FOLDS
) -> None:
    """Write a ``.bin`` file for arcface_torch and :func:`load_bin`.

    Args:
        path: The file; complete or absent.
        images: Encoded images, 2P of them.
        issame: P booleans.
        folds: As for :func:`load_bin`: a file that the host stumbles over is not written.

    Raises:
        DataError: Images and pairs do not fit, or a fold has one kind of pairs only.
    """
    same = np.asarray(issame)
    pairs = _pairs(([bytes(image) for image in images], same.tolist()), os.fspath(path))
    if folds is not None:
        check_folds(pairs.issame, folds, name=os.fspath(path))
    write_atomically(Path(path), pickle.dumps((pairs.images, pairs.issame.tolist()), protocol=pickle.HIGHEST_PROTOCOL))


def one_kind_folds(issame: NDArray[np.bool_], folds: int = FOLDS) -> list[int]:
    """The contiguous folds, counted from 1, that lack matching or non-matching pairs; empty ones included."""
    parts = np.array_split(issame, folds)
    return [number for number, part in enumerate(parts, 1) if not (part.any() and not part.all())]


def check_folds(issame: NDArray[np.bool_], folds: int = FOLDS, *, name: str = "Verification set") -> None:
    """Refuse an order of pairs that the protocol cannot evaluate.

    Raises:
        DataError: A fold has one kind of pairs only.
    """
    wrong = one_kind_folds(issame, folds)
    if wrong:
        listed = ", ".join(map(str, wrong))
        raise DataError(
            f"{name}: {len(wrong)} of {folds} folds lack matching or non-matching pairs",
            value=f"folds {listed} of {len(issame)} pairs, {int(issame.sum())} of them matching",
            expected="both kinds in every contiguous fold",
            remedy="Interleave both kinds, as tools/build_data.py face-split and pairs2bin --interleave do.",
        )


def interleaved(issame: NDArray[np.bool_]) -> NDArray[np.int64]:
    """An order of the pairs, [P], that spreads both kinds evenly and keeps the order within each."""
    place = np.empty(len(issame))
    for kind in (True, False):
        count = int((issame == kind).sum())
        place[issame == kind] = (np.arange(count) + 0.5) / max(count, 1)
    return np.argsort(place, kind="stable")


def bin_from_pairs(
    pairs_file: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    size: int = 112,
    interleave: bool = False,
    convert: bool = False,
) -> VerificationPairs:
    """Build a ``.bin`` file from a CSV list of pairs and return what it holds.

    Args:
        pairs_file: Columns ``first,second,same``: two image files, absolute or relative to the list's folder, and 1 for
            the same person or 0.
        path: The file to write.
        size: Height and width of the crops in pixels.
        interleave: Whether to spread matching and non-matching pairs evenly; default: the list's order.
        convert: See :func:`~qsd_plugin.data.face_images.storable`.

    Raises:
        DataError: The list is misformed, an image is not such a crop, or a fold would have one kind only.
    """
    listed = read_pairs(pairs_file)
    same = listed.same
    order = interleaved(same) if interleave else np.arange(len(same))
    check_folds(same[order], name=os.fspath(pairs_file))
    images: list[bytes] = []
    for number in progress(order.tolist(), "Reading pairs"):
        files = (listed.first[number], listed.second[number])
        images += [storable(_read(file), name=str(file), size=size, convert=convert) for file in files]
    save_bin(path, images, same[order])
    return VerificationPairs(images, same[order])


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError("Image of a pair", value=str(file), expected="a file", remedy=f"{error.strerror}.") from error


def _pairs(content: object, name: str) -> VerificationPairs:
    images, issame = _lists(content, name)
    encoded = []
    for number, image in enumerate(map(_plain, images)):
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = image.tobytes()
        if not isinstance(image, bytes | bytearray):
            raise DataError(f"{name}: image {number}", value=type(image).__name__, expected="an encoded image")
        encoded.append(bytes(image))
    if not all(isinstance(same, bool | int | np.bool_ | np.integer) and same in (0, 1) for same in issame):
        raise DataError(f"{name}: list of pairs", value=list(issame)[:5], expected="booleans")
    if len(encoded) != 2 * len(issame) or not encoded:
        raise DataError(
            f"{name}: images and pairs",
            value=f"{len(encoded)} images, {len(issame)} pairs",
            expected="two images per pair, pair i being the images 2i and 2i + 1",
        )
    return VerificationPairs(encoded, np.array([bool(same) for same in issame]))


def _lists(content: object, name: str) -> tuple[Sequence[Any], Sequence[Any]]:
    if isinstance(content, tuple | list) and len(content) == 2:
        images, issame = map(_plain, content)
        issame = issame.tolist() if isinstance(issame, np.ndarray) else issame
        images = list(images) if isinstance(images, np.ndarray) and images.dtype == object else images
        if isinstance(images, list | tuple) and isinstance(issame, list | tuple):
            return images, issame
    raise DataError(f"{name}: content", value=type(content).__name__, expected="(list of images, list of booleans)")


def _plain(part: object) -> Any:
    return part.array if isinstance(part, PickledArray) else part
