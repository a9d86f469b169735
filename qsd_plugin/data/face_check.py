"""What is in a record file or a verification set, and what is wrong with it, before a run finds out."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.progress import progress
from qsd_plugin.data.face_images import decode_face
from qsd_plugin.data.record_frames import Record
from qsd_plugin.data.recordio import EXACT_LABELS, RecordReader
from qsd_plugin.data.verification_bin import load_bin, one_kind_folds

_SHOWN = 5


@dataclass
class FaceReport:
    """The result of :func:`check_records` or :func:`check_bin`.

    Args:
        source: The file.
        counts: What it holds.
        problems: What must be repaired before results mean anything, one sentence each.
    """

    source: str
    counts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def found(self, what: Iterable[object], sentence: str) -> None:
        """Add a problem unless ``what`` is empty."""
        listed = [str(one) for one in what]
        if listed:
            rest = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
            self.problems.append(f"{len(listed)} {sentence}: {', '.join(listed[:_SHOWN])}{rest}")

    def table(self) -> str:
        """Everything, for a terminal."""
        width = max(map(len, self.counts), default=0)
        lines = [self.source, *(f"{name:{width}}  {_shown(value)}" for name, value in self.counts.items())]
        return "\n".join([*lines, *([f"PROBLEM: {problem}" for problem in self.problems] or ["no problems found"])])

    def json(self) -> str:
        """Everything, in JSON."""
        return json.dumps(asdict(self), indent=1)


def check_faces(path: str | os.PathLike[str]) -> FaceReport:
    """:func:`check_bin` for ``.bin`` files, :func:`check_records` for ``.rec`` files.

    Raises:
        DataError: Another kind of file, or one that cannot be opened at all.
    """
    checks = {".rec": check_records, ".bin": check_bin}
    ending = Path(path).suffix
    if ending not in checks:
        raise DataError("File to check", value=str(path), expected="a name that ends in .rec or .bin")
    return checks[ending](path)


def check_records(path: str | os.PathLike[str]) -> FaceReport:
    """Read and decode every record of a ``.rec`` file.

    Raises:
        DataError: The file or its index is missing or misformed as a whole.
    """
    report = FaceReport(str(path))
    with RecordReader(path) as reader:
        try:
            layout = "with header" if reader.has_header else "without header"
            keys, ranges = reader.image_keys, reader.identity_keys
        except DataError as error:
            report.problems.append(str(error))
            layout = "unknown"
            keys, ranges = np.sort(reader.index.keys[reader.index.keys > 0]), reader.index.keys[:0]
        labels, sizes = _examine(reader, keys, report)
        numbers = Counter(labels.values())
        report.counts = {
            "layout": layout,
            "images": len(keys),
            "identities": len(numbers),
            "identities with one image": sum(count == 1 for count in numbers.values()),
            "most frequent sizes": {f"{width}x{height}": n for (width, height), n in sizes.most_common(3)},
        }
        whole = [label for label in numbers if label != int(label) or not 0 <= label <= EXACT_LABELS]
        report.found(whole, "labels are no class numbers")
        if len(ranges):
            _check_ranges(reader, keys, ranges, labels, report)
        _check_end(reader, report)
        _check_sizes(sizes, report)
        _check_property(reader.path.parent / "property", len(numbers), sizes, report)
    return report


def check_bin(path: str | os.PathLike[str]) -> FaceReport:
    """Decode every image of a ``.bin`` file and count its pairs, in all and per fold.

    Raises:
        DataError: The file is missing, unsafe, or holds no pairs.
    """
    report = FaceReport(str(path))
    pairs = load_bin(path, folds=None)
    sizes: Counter[tuple[int, int]] = Counter()
    damaged = []
    for number, content in enumerate(progress(pairs.images, "Decoding images")):
        size = _size(content)
        if size is None:
            damaged.append(number)
        else:
            sizes[size] += 1
    same = int(pairs.issame.sum())
    report.counts = {
        "pairs": len(pairs.issame),
        "matching pairs": same,
        "non-matching pairs": len(pairs.issame) - same,
        "most frequent sizes": {f"{width}x{height}": n for (width, height), n in sizes.most_common(3)},
    }
    report.found(damaged, "images cannot be decoded")
    report.found([f"{w}x{h}" for w, h in sizes if w != h], "sizes are not square")
    report.found(one_kind_folds(pairs.issame), "of 10 folds lack a kind of pairs (pairs2bin --interleave)")
    return report


def _examine(
    reader: RecordReader, keys: NDArray[np.int64], report: FaceReport
) -> tuple[dict[int, float], Counter[tuple[int, int]]]:
    """Label of every record that can be read, and the sizes of the images."""
    labels: dict[int, float] = {}
    sizes: Counter[tuple[int, int]] = Counter()
    truncated, undecodable = [], []
    for key in progress(keys.tolist(), "Reading records"):
        record = _record(reader, key)
        if record is None:
            truncated.append(key)
            continue
        labels[key] = float(record.label[0])
        size = _size(record.content)
        if size is None:
            undecodable.append(key)
        else:
            sizes[size] += 1
    report.found(truncated, "records are cut off or damaged")
    report.found(undecodable, "images cannot be decoded")
    return labels, sizes


def _check_ranges(
    reader: RecordReader,
    keys: NDArray[np.int64],
    ranges: NDArray[np.int64],
    labels: dict[int, float],
    report: FaceReport,
) -> None:
    """The ranges of the identities must follow each other, cover the images, and hold one class each."""
    stated = reader.read(0).label
    expected = np.float32(int(ranges[-1]) + 1)
    if stated[1] != expected:
        report.problems.append(f"header says {stated[1]:.0f} records and the index has {expected:.0f}")
    report.found(sorted(set(range(1, int(ranges[0]))) - set(keys.tolist())), "image keys are missing from the index")
    if int(ranges[0]) > EXACT_LABELS:
        return  # the ranges themselves are rounded
    wrong, covered = [], 1
    for key in ranges.tolist():
        record = _record(reader, key)
        if record is None or len(record.label) != 2 or not np.isfinite(record.label).all():
            wrong.append(key)
            continue
        first, end = record.label.astype(int).tolist()
        inside = {labels[image] for image in range(first, end) if image in labels}
        if first != covered or end <= first or len(inside) > 1:
            wrong.append(key)
        covered = end
    if covered != int(ranges[0]):
        wrong.append(int(ranges[-1]))
    report.found(wrong, "identity ranges do not fit the images")


def _record(reader: RecordReader, key: int) -> Record | None:
    try:
        return reader.read(key)
    except DataError:
        return None


def _size(content: bytes) -> tuple[int, int] | None:
    """Width and height of an encoded image, ``None`` where it cannot be decoded."""
    try:
        height, width = decode_face(content, name="image").shape[:2]
    except DataError:
        return None
    return width, height


def _check_end(reader: RecordReader, report: FaceReport) -> None:
    """Bytes behind the last record: records that the index does not know, or an interrupted copy."""
    if not len(reader):
        return
    with suppress(DataError):  # told already
        end = reader.end(int(reader.index.keys[reader.index.offsets.argmax()]))
        if end != reader.size:
            report.problems.append(f"{reader.size - end} bytes behind the last record of the index (byte {end})")


def _check_sizes(sizes: Counter[tuple[int, int]], report: FaceReport) -> None:
    """Aligned crops are square and of one size; whatever else there is was not aligned with the rest."""
    usual = sizes.most_common(1)[0][0] if sizes else None
    odd = {size: number for size, number in sizes.items() if size[0] != size[1] or size != usual}
    report.found(
        [f"{width}x{height} ({number} images)" for (width, height), number in odd.items()],
        "sizes are not those of the other crops, or not square",
    )


def _check_property(file: Path, identities: int, sizes: Counter[tuple[int, int]], report: FaceReport) -> None:
    """The file's first line is ``classes,height,width``."""
    if not file.is_file():
        return
    stated, *shape = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip().split(",")
    if stated != str(identities):
        report.problems.append(f"{file.name} says {stated} classes and the records have {identities}")
    if not sizes:
        return
    width, height = sizes.most_common(1)[0][0]
    if shape != [str(height), str(width)]:
        said = ",".join(shape) or "no"
        report.problems.append(f"{file.name} says {said} pixels (height,width) and most images have {height},{width}")


def _shown(value: object) -> str:
    return ", ".join(f"{name}: {count}" for name, count in value.items()) if isinstance(value, dict) else str(value)
