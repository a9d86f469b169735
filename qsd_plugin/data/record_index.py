"""The ``.idx`` file of a RecordIO file: a key and a byte offset per line, held as two arrays."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import DataError

_CHUNK_BYTES = 1 << 24


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

    def positions(self, keys: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of ``keys`` in :attr:`keys` and :attr:`offsets`, [B]; found by binary search.

        Raises:
            DataError: A key is not in the index.
        """
        wanted = np.asarray(keys, dtype=np.int64)
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
        return int(self.offsets[self.positions([key])[0]])


def _parse(file: IO[bytes], path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    empty = np.empty(0, dtype=np.int64)
    keys, offsets = [empty], [empty]
    rest, line = b"", 1
    while chunk := file.read(_CHUNK_BYTES):
        chunk = rest + chunk
        end = chunk.rfind(b"\n") + 1
        rest = chunk[end:]
        values = _numbers(chunk[:end], path, line)
        line += chunk.count(b"\n")
        keys.append(values[0::2].copy())
        offsets.append(values[1::2].copy())
    values = _numbers(rest, path, line)
    return np.concatenate([*keys, values[0::2]]), np.concatenate([*offsets, values[1::2]])


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
