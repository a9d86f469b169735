"""The ``.idx`` file of a RecordIO file: a key and a byte offset per line, held as two arrays."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import DataError

_CHUNK_BYTES = 1 << 20

#: Most bytes that are read of one record without knowing its length, where a gap in the index hides where it ends.
READ_AHEAD = 1 << 16


class RecordIndex:
    """Where each record begins: 16 bytes per record (32 where the keys do not ascend), whatever their number.

    Args:
        keys: Different numbers, [N], in the order of the file.
        offsets: First byte of each record's frame, [N].
        path: The index file, for messages.

    Raises:
        DataError: A key occurs twice.
    """

    def __init__(self, keys: NDArray[np.int64], offsets: NDArray[np.int64], *, path: Path) -> None:
        self.keys, self.offsets, self.path = keys, offsets, path
        #: Rows whose record ends where that of the next row begins: all but the last where the file has the same order.
        self._followed = len(offsets) - 1 if np.all(offsets[1:] > offsets[:-1]) else 0
        self._order: NDArray[np.int64] | None = None
        self._ascending = keys
        if not np.all(keys[1:] > keys[:-1]):
            self._order = np.argsort(keys, kind="stable")
            self._ascending = keys[self._order]
            repeated = np.flatnonzero(self._ascending[1:] == self._ascending[:-1])
            if len(repeated):
                raise DataError(
                    f"Record index {path}: {len(repeated)} keys occur more than once",
                    value=int(self._ascending[repeated[0]]),
                    expected="every key once",
                    remedy="Write the records anew.",
                )
        #: The first key where the keys follow each other without a gap, so that a row can be computed.
        self._first: int | None = None
        if self._order is None and len(keys) and int(keys[-1]) - int(keys[0]) == len(keys) - 1:
            self._first = int(keys[0])

    @classmethod
    def load(cls, path: Path) -> RecordIndex:
        """Read an index file.

        Raises:
            DataError: It is missing or has a line that is not ``key<TAB>offset``.
        """
        try:
            with path.open("rb") as file:
                keys, offsets = _parse(file, path)
        except OSError as error:
            raise DataError(
                "Record index that cannot be read",
                value=str(path),
                expected="the .idx file that was written with the .rec file",
                remedy=f"Copy it beside the .rec file, or name it ({error.strerror}).",
            ) from error
        return cls(keys, offsets, path=path)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: int) -> bool:
        place = int(np.searchsorted(self._ascending, key))
        return place < len(self) and int(self._ascending[place]) == key

    def position(self, key: int) -> int:
        """Row of ``key`` in :attr:`keys` and :attr:`offsets`; errors as for :meth:`positions`."""
        if self._first is not None:
            row = key - self._first
            if 0 <= row < len(self.keys):
                return row
        return int(self.positions([key])[0])

    def extent(self, key: int, size: int) -> tuple[int, int]:
        """Where a record begins, and where to stop reading to have all of it, as a rule: at the next record, at the end
        of the file of ``size`` bytes, or :data:`READ_AHEAD` further on.

        Raises:
            DataError: The key is not in the index.
        """
        row = self.position(key)
        offset = self.offsets.item(row)
        behind = self.offsets.item(row + 1) if row < self._followed else size
        most = offset + READ_AHEAD
        return offset, behind if behind < most else most

    def extents(self, keys: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """:meth:`extent` of several records, two times [B]; errors as there."""
        rows = self.positions(keys)
        offsets, ends = self.offsets[rows], self.offsets.take(rows + 1, mode="clip")
        ends[rows >= self._followed] = size
        return offsets, np.minimum(ends, offsets + READ_AHEAD)

    def positions(self, keys: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of ``keys`` in :attr:`keys` and :attr:`offsets`, [B]; found by binary search.

        Raises:
            DataError: A key is not in the index.
        """
        wanted = np.asarray(keys, dtype=np.int64)
        if self._first is not None:
            rows = wanted - self._first
            if not len(rows) or (rows.min() >= 0 and rows.max() < len(self)):
                return rows
        places = np.searchsorted(self._ascending, wanted)
        found = places < len(self)
        found[found] = self._ascending[places[found]] == wanted[found]
        if not found.all():
            span = f"keys from {self._ascending[0]} to {self._ascending[-1]}" if len(self) else "no key: it is empty"
            raise DataError(
                f"Record index {self.path}: unknown key", value=int(wanted[~found][0]), expected=f"{span} ({len(self)})"
            )
        return places if self._order is None else self._order[places]

    def offset(self, key: int) -> int:
        """First byte of the record ``key``."""
        return int(self.offsets[self.position(key)])


def _parse(file: IO[bytes], path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # Counted first: arrays that grow, or parts put together at the end, take twice the memory.
    lines = 1 + sum(chunk.count(b"\n") + chunk.count(b"\r") for chunk in _chunks(file))
    keys, offsets = np.empty((2, lines), dtype=np.int64)
    file.seek(0)
    rest, line, found = b"", 1, 0
    for content in itertools.chain(_chunks(file), (None,)):
        text = rest + (content or b"")
        end = len(text) if content is None else text.rfind(b"\n") + 1
        rest = text[end:]
        values = _numbers(text[:end], path, line)
        line += text.count(b"\n", 0, end)
        known, found = found, found + len(values) // 2
        keys[known:found], offsets[known:found] = values[0::2], values[1::2]
    return keys[:found], offsets[:found]


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(_CHUNK_BYTES), b"")


def _numbers(text: bytes, path: Path, first_line: int) -> NDArray[np.int64]:
    """All numbers of ``text``, two per line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # text that is no number; told apart by its count
            values = np.fromstring(text, dtype=np.int64, sep=" ")
    except ValueError:
        values = np.empty(0, dtype=np.int64)
    lines = text.count(b"\n")
    # Older NumPy keeps what stands before text that is no number, so the count alone does not tell.
    complete = (not text or text.endswith(b"\n")) and not text.translate(None, b"0123456789\t\n")
    if complete and len(values) == 2 * lines == 2 * text.count(b"\t") and values.min(initial=0) >= 0:
        return values
    numbers: list[int] = []  # blank lines, another separator, no newline at the end, or something that is wrong
    for line, content in enumerate(text.splitlines(), first_line):
        fields = content.split()
        if len(fields) not in (0, 2) or not all(field.isdigit() for field in fields):
            raise DataError(
                f"Record index {path}, line {line}",
                value=content.decode("utf-8", "replace"),
                expected="key<TAB>offset, two whole numbers",
                remedy="Write the records anew, or copy the index again.",
            )
        numbers += map(int, fields)
    return np.array(numbers, dtype=np.int64)
