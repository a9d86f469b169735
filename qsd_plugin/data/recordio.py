"""RecordIO files of face crops (``.rec`` with ``.idx``), read and written without mxnet, byte for byte as mxnet does.

Two layouts are in use. *With header*, as arcface_torch's training sets: record 0 holds ``[N + 1, N + 1 + C]`` and no
image, records 1 to N are the images, and each of the C records behind them the range of one identity. *Without*: every
record is an image.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.core.progress import progress
from qsd_plugin.data.record_batches import RecordBatch, bytes_or_none, read_images
from qsd_plugin.data.record_frames import (
    FRAME_BYTES,
    HEADER_BYTES,
    WHOLE,
    FrameError,
    Record,
    frames,
    pack,
    read_payload,
    read_words,
    unpack,
    unpack_header,
    unpack_image,
)
from qsd_plugin.data.record_index import RecordIndex

T = TypeVar("T")

#: float32, the type of a label, holds every whole number up to this one.
EXACT_LABELS = 1 << 24


class RecordReader:
    """Random access to a record file, from any process.

    Every read names its place (``pread``), and a process that inherited or unpickled the reader opens the file anew, so
    that loader workers cannot disturb each other.

    Args:
        path: The ``.rec`` file.
        index: Its ``.idx`` file; default: beside it.

    Raises:
        DataError: A file is missing, or the index is misformed or points outside the file.
    """

    def __init__(self, path: str | os.PathLike[str], index: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path).expanduser()
        self._pid, self._descriptor = -1, -1
        self._state: tuple[int, int] | None = None
        #: Bytes of the file.
        self.size = 0
        self._open()
        self.index = RecordIndex.load(self.path.with_suffix(".idx") if index is None else Path(index).expanduser())
        self._check_offsets()

    def __len__(self) -> int:
        """Number of records, those without an image included."""
        return len(self.index)

    def read(self, key: int) -> Record:
        """The record with the index key ``key``.

        Raises:
            DataError: Unknown key, or the record is damaged.
        """
        key = int(key)
        offset, end = self.index.extent(key, self.size)
        record = unpack_image(bytes_or_none(self._file(), end - offset, offset))
        return self._read_at(key, offset) if record is None else record

    def read_many(self, keys: Sequence[int] | NDArray[np.int64]) -> RecordBatch:
        """The records of ``keys`` in that order, for a fraction of the time of :meth:`read`; errors as there.

        They are read in the order of the file, neighbours at once.
        """
        wanted = np.asarray(keys, dtype=np.int64)
        offsets, ends = self.index.extents(wanted, self.size)
        if (offsets[1:] < offsets[:-1]).any():
            order = np.argsort(offsets, kind="stable")
            back = np.argsort(order)
            labels, contents = self._read_ascending(wanted[order], offsets[order], ends[order])
            return RecordBatch(labels[back], [contents[place] for place in back.tolist()])
        return self._read_ascending(wanted, offsets, ends)

    def labels(self, keys: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """The first label of each record, [B]. Reads the headers alone, with progress. Errors as for :meth:`read`."""
        offsets = self.index.offsets[self.index.positions(keys)]
        found = np.empty(len(offsets), dtype=np.float32)
        for place, offset in enumerate(progress(offsets.tolist(), f"Reading labels of {self.path.name}")):
            found[place] = self._guarded(int(keys[place]), offset, self._label_at)
        return found

    def end(self, key: int) -> int:
        """The offset behind the record, where the next one begins. Errors as for :meth:`read`."""
        offset = self.index.offset(key)
        return self._guarded(key, offset, lambda offset: read_payload(self._bytes, offset, self.size)[1])

    @cached_property
    def has_header(self) -> bool:
        """Whether record 0 counts images and identities instead of holding an image."""
        if 0 not in self.index:
            return False
        record = self.read(0)
        return record.flag == 2 and not record.content

    @cached_property
    def image_keys(self) -> NDArray[np.int64]:
        """Keys of the images, ascending. Shared between callers: not to be changed.

        Raises:
            DataError: The header does not fit the index by more than its numbers' float32 rounding.
        """
        keys = np.sort(self.index.keys)
        return keys[(keys > 0) & (keys < self._first_identity_key)] if self.has_header else keys

    @cached_property
    def image_labels(self) -> NDArray[np.float32]:
        """The first label of each image, in the order of :attr:`image_keys`. Shared as they are; errors as above."""
        return self.labels(self.image_keys)

    @cached_property
    def identity_keys(self) -> NDArray[np.int64]:
        """Keys of the records that hold an identity's range, ascending; none without header. Errors as above."""
        keys = np.sort(self.index.keys)
        return keys[keys >= self._first_identity_key] if self.has_header else keys[:0]

    @cached_property
    def _first_identity_key(self) -> int:
        # From 2^24 on the header's number is rounded, so the records around it decide.
        stated = float(self.read(0).label[0])
        last = int(self.index.keys.max())
        doubt = int(np.spacing(np.float32(stated))) // 2 if stated >= EXACT_LABELS else 0
        if np.isfinite(stated) and stated >= 1:
            for key in range(int(stated) - doubt, int(stated) + doubt + 1):
                behind_images = key == 1 or (key - 1 in self.index and bool(self.read(key - 1).content))
                before_identities = key == last + 1 or (key in self.index and not self.read(key).content)
                if behind_images and before_identities:
                    return key
        raise DataError(
            f"Record file {self.path}: header",
            value=f"images up to key {stated - 1:.0f}",
            expected=f"what the index says, whose last key is {last}",
            remedy="The .rec and .idx files are of different sets, or one of them is cut off.",
        )

    def close(self) -> None:
        """Close this process's file; reading opens it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._pid, self._descriptor = -1, -1

    def __enter__(self) -> RecordReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # at interpreter exit, or when __init__ failed
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pid": -1, "_descriptor": -1}

    def _open(self) -> None:
        self.close()  # after a fork this closes the child's copy only
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(
                "Record file", value=str(self.path), expected="an existing .rec file", remedy=f"{error.strerror}."
            ) from error
        self._pid = os.getpid()
        stat = os.fstat(self._descriptor)
        state = stat.st_size, stat.st_mtime_ns
        if self._state not in (None, state):
            self.close()
            raise DataError(
                f"Record file {self.path} has changed since it was opened", remedy="Start again once it is complete."
            )
        self._state, self.size = state, stat.st_size

    def _check_offsets(self) -> None:
        offsets = self.index.offsets
        last = self.size - FRAME_BYTES
        if offsets.min(initial=0) >= 0 and offsets.max(initial=0) <= last and not np.bitwise_or.reduce(offsets) % 4:
            return  # without arrays as long as the index
        wrong = np.flatnonzero((offsets < 0) | (offsets > last) | (offsets % 4 != 0))
        if len(wrong):
            key, offset = int(self.index.keys[wrong[0]]), int(offsets[wrong[0]])
            raise DataError(
                f"Record index {self.index.path}: {len(wrong)} of {len(self)} records lie outside {self.path}",
                value=f"key {key} at offset {offset}",
                expected=f"multiples of 4 within its {self.size} bytes",
                remedy="The .rec file is cut off, or the .idx file belongs to another one.",
            )

    def _file(self) -> int:
        """This process's descriptor."""
        if self._pid != os.getpid():
            self._open()
        return self._descriptor

    def _bytes(self, offset: int, length: int) -> bytes:
        content = os.pread(self._file(), length, offset)
        while len(content) < length:  # the system may give less than was asked for
            more = os.pread(self._descriptor, length - len(content), offset + len(content))
            if not more:
                raise FrameError(f"the file ends at byte {offset + len(content)}")
            content += more
        return content

    def _read_at(self, key: int, offset: int) -> Record:
        return self._guarded(key, offset, lambda offset: unpack(read_payload(self._bytes, offset, self.size)[0]))

    def _read_ascending(
        self, keys: NDArray[np.int64], offsets: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> RecordBatch:
        batch, others = read_images(self._file(), offsets, ends)
        for place in others.tolist():
            record = self._read_at(int(keys[place]), int(offsets[place]))
            batch.labels[place], batch.contents[place] = record.label[0], memoryview(record.content)
        return batch

    def _label_at(self, offset: int) -> float:
        flag, length = read_words(self._bytes, offset, self.size)
        begin = offset + FRAME_BYTES
        if flag == WHOLE and HEADER_BYTES <= length <= self.size - begin:
            labels, label, *_ = unpack_header(self._bytes(begin, HEADER_BYTES))
            if labels == 0:
                return label
        return float(unpack(read_payload(self._bytes, offset, self.size)[0]).label[0])

    def _guarded(self, key: int, offset: int, read: Callable[[int], T]) -> T:
        try:
            return read(offset)
        except (FrameError, OSError) as error:
            raise DataError(
                f"Record file {self.path}: record with key {key} at offset {offset} cannot be read",
                value=str(error),
                expected="a complete record",
                remedy="The file is cut off or damaged, or the index belongs to another one; copy both again.",
            ) from error


class RecordWriter:
    """Writes ``.rec`` and ``.idx`` and, on request, ``property`` and ``.lst``: all when the block ends, or none.

    ::

        with RecordWriter("faces/train.rec") as writer:
            writer.append(jpeg, label=0)

    Args:
        path: The ``.rec`` file; the others get its stem, ``property`` lies in the same folder.
        image_size: Height and width for ``property``, which also counts the classes; ``None``: not written.
        listing: Whether to write ``.lst``: key, label and name of each image, separated by tabs.

    Raises:
        DataError: The folder cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, image_size: tuple[int, int] | None = (112, 112), listing: bool = False
    ) -> None:
        self.path = Path(path).expanduser()
        if self.path.suffix != ".rec":
            raise DataError("Record file to write", value=str(path), expected="a name that ends in .rec")
        self._image_size = image_size
        self._keys, self._offsets = array("q"), array("q")
        self._last_key = -1
        self._classes: set[float] = set()
        self._listing: list[str] | None = [] if listing else None
        self._offset = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, self._temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        except OSError as error:
            raise DataError(
                "Cannot write", value=str(path), expected="a writable folder", remedy=f"{error.strerror}."
            ) from error
        self._file = os.fdopen(descriptor, "wb")

    def append(
        self,
        content: bytes,
        label: float | Sequence[float],
        *,
        key: int | None = None,
        ids: tuple[int, int] | None = None,
        name: str = "",
    ) -> int:
        """Add a record and return its key.

        Args:
            content: The encoded image (JPEG or PNG), or nothing for a record without one.
            label: Its class, or several numbers, which are stored as float32.
            key: Number in the index; default: the number of records so far.
            ids: The two numbers of the header; default: ``(key, 0)``.
            name: For the listing.

        Raises:
            DataError: The key is negative or taken, or the record is too long.
        """
        key = len(self._keys) if key is None else key
        if key < 0 or (key <= self._last_key and key in self._keys):
            raise DataError(f"Record file {self.path}: key", value=key, expected="a number >= 0 that is not taken")
        written = frames(pack(content, label, (key, 0) if ids is None else ids))
        self._file.write(written)
        self._keys.append(key)
        self._offsets.append(self._offset)
        self._last_key = max(key, self._last_key)
        self._offset += len(written)
        if content:
            labels = [float(label)] if isinstance(label, int | float | np.number) else [float(one) for one in label]
            self._classes.add(labels[0])
            if self._listing is not None:
                numbers = "\t".join(f"{one:f}" for one in labels)
                self._listing.append(f"{key}\t{numbers}\t{name}\n")
        return key

    def close(self) -> None:
        """Put all files in their places. An old index goes first, the new one last: none ever fits another file."""
        index = self.path.with_suffix(".idx")
        contents: dict[Path, bytes | Callable[[IO[bytes]], None]] = {}
        if self._image_size is not None:
            height, width = self._image_size
            contents[self.path.parent / "property"] = f"{len(self._classes)},{height},{width}\n".encode()
        if self._listing is not None:
            contents[self.path.with_suffix(".lst")] = "".join(self._listing).encode()
        contents[index] = self._write_index
        staged = {target: target.with_name(f".{target.name}.new") for target in contents}
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.chmod(self._temporary, 0o644)
            for target, content in contents.items():
                write_atomically(staged[target], content)
            index.unlink(missing_ok=True)
            os.replace(self._temporary, self.path)
            for target, source in staged.items():
                os.replace(source, target)
        except BaseException:
            for source in staged.values():
                source.unlink(missing_ok=True)
            self.abort()
            raise

    def _write_index(self, file: IO[bytes]) -> None:
        for key, offset in zip(self._keys, self._offsets, strict=True):
            file.write(b"%d\t%d\n" % (key, offset))

    def abort(self) -> None:
        """Drop everything that was written."""
        self._file.close()
        Path(self._temporary).unlink(missing_ok=True)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


@lru_cache(maxsize=16)
def open_records(path: str) -> RecordReader:
    """The reader of a record file, opened once per process and path."""
    return RecordReader(path)
