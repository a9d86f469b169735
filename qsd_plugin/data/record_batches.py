"""Many records at once: neighbours in the file share one read, and headers are looked at together."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.data.record_frames import FRAME_BYTES, IMAGE_START, MAGIC

#: Most bytes that are read at once for neighbours, unless a single one has more.
_RUN_BYTES = 1 << 20
_START = np.dtype(
    [("magic", "<u4"), ("length", "<u4"), ("labels", "<u4"), ("label", "<f4"), ("first", "<u8"), ("second", "<u8")]
)
_MAGIC = int.from_bytes(MAGIC, "little")


class RecordBatch(NamedTuple):
    """B records.

    Args:
        labels: The first label of each, float32 [B].
        contents: The encoded images, B of them, to be decoded at once; empty for a header or identity record. Each is a
            view into up to a MiB of its neighbours, which it keeps in memory: ``bytes(view)`` is what to store.
    """

    labels: NDArray[np.float32]
    contents: list[memoryview]


def read_images(
    descriptor: int, offsets: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[RecordBatch, NDArray[np.int64]]:
    """Records of one frame and one label each, as images are.

    Args:
        descriptor: The open file.
        offsets: First byte of each record, [B], ascending.
        ends: Where to stop reading for each, [B], as :meth:`~qsd_plugin.data.record_index.RecordIndex.extents` has it.

    Returns:
        The batch, and the places in it of all other records, which :func:`~qsd_plugin.data.record_frames.read_payload`
        can tell from damaged ones; nothing that means anything stands there.
    """
    chunks, places = _chunks(descriptor, offsets, ends)
    starts, begins = places.tolist(), (places + IMAGE_START).tolist()
    heads = b"".join([chunk[start:begin] for chunk, start, begin in zip(chunks, starts, begins, strict=True)])
    if len(heads) != IMAGE_START * len(offsets):  # the file ends early, or one lies closer to the next than any can
        nothing = RecordBatch(np.zeros(len(offsets), np.float32), [memoryview(b"")] * len(offsets))
        return nothing, np.arange(len(offsets))
    head = np.frombuffer(heads, _START)
    lengths = head["length"].astype(np.int64) + FRAME_BYTES  # where there is a flag it is longer than anything
    plain = (head["magic"] == _MAGIC) & (head["labels"] == 0) & (lengths >= IMAGE_START) & (lengths <= ends - offsets)
    stops = (places + lengths).tolist()
    contents = [chunk[begin:stop] for chunk, begin, stop in zip(chunks, begins, stops, strict=True)]
    return RecordBatch(head["label"].astype(np.float32), contents), np.flatnonzero(~plain)


def bytes_or_none(descriptor: int, length: int, offset: int) -> bytes:
    """``length`` bytes of a file from ``offset`` on; none of them where there are fewer or they cannot be read."""
    try:
        content = os.pread(descriptor, length, offset)
    except OSError:
        return b""
    return content if len(content) == length else b""


def _chunks(
    descriptor: int, offsets: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[list[memoryview], NDArray[np.int64]]:
    """For each record bytes of the file, none where they cannot be read, and where in them it begins."""
    block = offsets // _RUN_BYTES
    apart = (offsets[1:] != ends[:-1]) | (block[1:] != block[:-1])
    first = np.flatnonzero(np.append(True, apart)[: len(offsets)])
    sizes = np.diff(np.append(first, len(offsets)))
    bases, lengths = offsets[first], ends[first + sizes - 1] - offsets[first]
    chunks: list[memoryview] = []
    for base, length, size in zip(bases.tolist(), lengths.tolist(), sizes.tolist(), strict=True):
        chunks += [memoryview(bytes_or_none(descriptor, length, base))] * size
    return chunks, offsets - bases.repeat(sizes)
