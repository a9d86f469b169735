"""Face records beside a bare loop of reads, and opening an index beside one call that parses it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qsd_plugin.data.recordio import RecordReader, RecordWriter
from qsd_plugin.report.benchmarks.paired import extra_memory_mib, paired_excess, paired_ratio

#: Microseconds per record above the bare loop, and the time of batches over the loop's: 90 % of its throughput.
ABOVE_LIMIT_US, BATCH_LIMIT = 2.5, 1.11
#: Opening the index: seconds, and memory beyond what was there (200 MB).
INDEX_LIMIT_S, INDEX_LIMIT_MIB = 1.5, 200e6 / 2**20
#: Distance of two records in the index, bytes.
STEP = 9036


def run(
    records: int = 8192,
    image_bytes: int = 9000,
    batch: int = 512,
    index_keys: int = 10_000_000,
    seed: int = 0,
    *,
    pairs: int = 30,
) -> dict[str, Any]:
    """Time reading one by one and in batches, in the file's order and shuffled, and opening an index.

    The bare loop calls ``os.pread`` once per record with offsets and lengths that lie ready in a list, in the same
    order, and drops what it gets. Ours looks keys up, checks every frame, and returns labels and images. The file is
    in the system's page cache. The limit of batches is that of the index's order: a shuffled one has no neighbours to
    read at once.

    Args:
        records: Records in the file.
        image_bytes: Bytes of an image, at random.
        batch: Records per batch.
        index_keys: Lines of the index, whose keys and offsets ascend.
        seed: Seeds contents and order.
        pairs: Interleaved pairs of timings after a warm-up.

    Returns:
        ``size``, ``threads``, ``load`` and ``items`` as :func:`qsd_plugin.report.benchmarks.ranking.run` gives them.
        ``identical`` says whether what was read is what was written. Seconds are those of one pass through the file.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        items = {f"index of {index_keys:,} keys": _index(Path(folder), index_keys, pairs)}
        items |= _reading(Path(folder), records, image_bytes, batch, seed, pairs)
    size = {"records": records, "image_bytes": image_bytes, "batch": batch, "index_keys": index_keys}
    return {"size": size, "threads": torch.get_num_threads(), "load": load, "items": items}


def _reading(
    folder: Path, records: int, image_bytes: int, batch: int, seed: int, pairs: int
) -> dict[str, dict[str, Any]]:
    path, rng = folder / "faces.rec", np.random.default_rng(seed)
    written = [rng.bytes(image_bytes) for _ in range(records)]
    with RecordWriter(path) as writer:
        for number, content in enumerate(written):
            writer.append(content, number % 1000)
    _settle_allocator()
    items = {}
    with RecordReader(path) as reader, path.open("rb") as file:
        for order, keys in {"in order": np.arange(records), "shuffled": rng.permutation(records)}.items():
            parts = np.split(keys, range(batch, records, batch))
            bare = _bare(file.fileno(), reader, keys)
            one_by_one = paired_excess(_each(reader, keys.tolist()), bare, pairs, parts=records)
            batches = paired_ratio(_batches(reader, parts), bare, pairs)
            identical = all(_identical(reader, part, written) for part in parts)
            limit = {"limit": BATCH_LIMIT} if order == "in order" else {}
            items[f"records one by one, {order}"] = {
                **one_by_one,
                "above_limit_us": ABOVE_LIMIT_US,
                "identical": identical,
            }
            items[f"records in batches of {batch}, {order}"] = {**batches, **limit, "identical": identical}
    return items


def _settle_allocator() -> None:
    """Free a block as large as a batch of images, as any process that uses images does.

    Until then glibc gives freed memory back to the system at once, and taking it again costs ten times the copy that is
    to be timed.
    """
    np.ones(16 << 20, dtype=np.uint8)


def _identical(reader: RecordReader, keys: NDArray[np.int64], written: list[bytes]) -> bool:
    labels, contents = reader.read_many(keys)
    singly = [reader.read(key) for key in keys.tolist()]
    expected = [(float(key % 1000), written[key]) for key in keys.tolist()]
    pairs = [(float(record.label[0]), record.content) for record in singly]
    return expected == pairs == list(zip(labels.tolist(), map(bytes, contents), strict=True))


def _each(reader: RecordReader, keys: list[int]) -> Callable[[], None]:
    def work() -> None:
        for key in keys:
            reader.read(key)

    return work


def _batches(reader: RecordReader, parts: list[NDArray[np.int64]]) -> Callable[[], None]:
    def work() -> None:
        for part in parts:
            reader.read_many(part)

    return work


def _bare(descriptor: int, reader: RecordReader, keys: NDArray[np.int64]) -> Callable[[], None]:
    offsets = reader.index.offsets
    lengths = np.diff(offsets, append=reader.size)
    extents = list(zip(offsets[keys].tolist(), lengths[keys].tolist(), strict=True))

    def work() -> None:
        pread = os.pread
        for offset, length in extents:
            pread(descriptor, length, offset)

    return work


def _index(folder: Path, keys: int, pairs: int) -> dict[str, Any]:
    path = folder / "index.rec"
    index = path.with_suffix(".idx")
    path.touch()
    os.truncate(path, keys * STEP)  # holes: opening looks at the size alone
    with index.open("w") as file:
        for start in range(0, keys, 100_000):
            file.write("".join(f"{key}\t{key * STEP}\n" for key in range(start, min(start + 100_000, keys))))

    def ours() -> None:
        RecordReader(path).close()

    def plain() -> None:
        np.fromstring(index.read_bytes(), dtype=np.int64, sep=" ")

    memory = extra_memory_mib(ours)
    figures = paired_ratio(ours, plain, pairs)
    with RecordReader(path) as reader:
        wanted = np.arange(keys)
        identical = np.array_equal(reader.index.keys, wanted) and np.array_equal(reader.index.offsets, wanted * STEP)
    limits = {"seconds_limit": INDEX_LIMIT_S, "memory_limit_mib": INDEX_LIMIT_MIB}
    return {**figures, **limits, "extra_memory_mib": memory, "identical": identical}
