"""RecordIO's bytes, as mxnet writes them: frames around payloads, and the header of an image payload. Pure functions.

A frame is ``u32 magic``, ``u32`` with a flag in its top 3 bits and a length in the others, that many bytes, and zeros
up to a multiple of 4; all little endian. A payload that holds the magic word at a multiple of 4 is split there into
frames flagged 1, 2, ..., 2, 3, and the word itself is left out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import DataError

MAGIC = struct.pack("<I", 0xCED7230A)
#: Most bytes of a payload.
MAX_LENGTH = (1 << 29) - 1

WHOLE, FIRST, MIDDLE, LAST = range(4)

_WORDS = struct.Struct("<4sI")
_HEADER = struct.Struct("<IfQQ")
_WORDS_AND_HEADER = struct.Struct("<4sII4xQQ")
_LABEL = slice(12, 16)

FRAME_BYTES = _WORDS.size
HEADER_BYTES = _HEADER.size
#: What stands in front of an image whose label is in the header.
IMAGE_START = FRAME_BYTES + HEADER_BYTES


class FrameError(ValueError):
    """Bytes that are no record; whoever knows the file turns it into an error that names it."""


class Record(NamedTuple):
    """One record.

    Args:
        label: Its labels, float32 [n], not to be changed: for an image its class; [1] for ``flag`` 0.
        flag: Number of labels that follow the header; 0: the label is in it.
        ids: The header's two numbers, of which the first is the record's key by habit.
        content: The encoded image; empty for a header or identity record.
    """

    label: NDArray[np.float32]
    flag: int
    ids: tuple[int, int]
    content: bytes


def frames(payload: bytes) -> bytes:
    """``payload`` as it lies in the file.

    Raises:
        DataError: It is too long.
    """
    if len(payload) > MAX_LENGTH:
        raise DataError("Record", value=f"{len(payload)} bytes", expected=f"at most {MAX_LENGTH} bytes")
    parts = []
    start, found = 0, payload.find(MAGIC)
    while found >= 0:
        if found % 4 == 0:
            parts.append(payload[start:found])
            start = found + 4
        found = payload.find(MAGIC, start if found % 4 == 0 else found + 1)
    parts.append(payload[start:])
    flags = [FIRST, *[MIDDLE] * (len(parts) - 2), LAST] if len(parts) > 1 else [WHOLE]
    return b"".join(
        _WORDS.pack(MAGIC, flag << 29 | len(part)) + part + bytes(-len(part) % 4)
        for flag, part in zip(flags, parts, strict=True)
    )


def read_payload(read: Callable[[int, int], bytes], offset: int, size: int) -> tuple[bytes, int]:
    """The payload whose first frame begins at ``offset``, and the offset behind its last.

    Args:
        read: Gives ``length`` bytes from an offset on, called as ``read(offset, length)``.
        offset: First byte of the frame.
        size: Bytes of the file; nothing beyond it is asked for.

    Raises:
        FrameError: There is no complete record.
    """
    parts: list[bytes] = []
    while True:
        flag, length = read_words(read, offset, size)
        if flag not in ((MIDDLE, LAST) if parts else (WHOLE, FIRST)):
            raise FrameError(f"a part of kind {flag} at byte {offset} where {'another' if parts else 'none'} goes on")
        begin = offset + FRAME_BYTES
        offset = begin + length + -length % 4
        if begin + length > size:
            raise FrameError(f"{length} bytes from byte {begin} on, and the file has {size}")
        parts.append(read(begin, length))
        if flag in (WHOLE, LAST):
            return MAGIC.join(parts), offset


def read_words(read: Callable[[int, int], bytes], offset: int, size: int) -> tuple[int, int]:
    """Flag and length of the frame at ``offset``; arguments and errors as for :func:`read_payload`."""
    if not 0 <= offset <= size - FRAME_BYTES:
        raise FrameError(f"a frame at byte {offset}, and the file has {size} bytes")
    magic, word = _WORDS.unpack(read(offset, FRAME_BYTES))
    if magic != MAGIC:
        raise FrameError(f"no frame at byte {offset}: it begins with {magic.hex()} instead of {MAGIC.hex()}")
    return word >> 29, word & MAX_LENGTH


def pack(content: bytes, label: float | Sequence[float] | NDArray[np.float32], ids: tuple[int, int] = (0, 0)) -> bytes:
    """A payload: header, labels and encoded image. A number is stored in the header, a sequence behind it."""
    if isinstance(label, int | float | np.number):
        return _HEADER.pack(0, float(label), *ids) + content
    labels = np.asarray(label, dtype="<f4")
    return _HEADER.pack(labels.size, 0.0, *ids) + labels.tobytes() + content


def unpack(payload: bytes) -> Record:
    """The inverse of :func:`pack`.

    Raises:
        FrameError: The payload is shorter than its header says.
    """
    flag, label, *ids = unpack_header(payload)
    begin = HEADER_BYTES + 4 * flag
    if begin > len(payload):
        raise FrameError(f"{flag} labels announced in {len(payload)} bytes")
    labels = np.frombuffer(payload, "<f4", flag, HEADER_BYTES) if flag else np.array([label])
    return Record(labels.astype(np.float32), flag, (ids[0], ids[1]), payload[begin:])


def unpack_image(frame: bytes) -> Record | None:
    """What :func:`read_payload` and :func:`unpack` find in ``frame``, in a tenth of the time, for nearly every record.

    Args:
        frame: What lies in the file from the record's first byte on, less than 2^29 bytes.

    Returns:
        ``None`` for whatever is not one complete frame with one label: a record that is split, has several labels, goes
        on behind ``frame`` or is damaged.
    """
    if len(frame) < IMAGE_START:
        return None
    magic, length, labels, first, second = _WORDS_AND_HEADER.unpack_from(frame)
    end = FRAME_BYTES + length  # more than there can be where the length has a flag
    if magic != MAGIC or labels or not IMAGE_START <= end <= len(frame):
        return None
    # Half the time of np.array, which matters here; of a copy, so that the label does not keep the whole frame.
    label = np.frombuffer(frame[_LABEL], np.float32)
    return Record(label, 0, (first, second), frame[IMAGE_START:end])


def unpack_header(payload: bytes) -> tuple[int, float, int, int]:
    """Flag, label and the two ids of a payload.

    Raises:
        FrameError: The payload is shorter than a header.
    """
    if len(payload) < HEADER_BYTES:
        raise FrameError(f"{len(payload)} bytes, fewer than the {HEADER_BYTES} of a header")
    flag, label, first, second = _HEADER.unpack_from(payload)
    return flag, label, first, second
