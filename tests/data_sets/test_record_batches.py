"""Batches of records, and reads of single ones in one piece, against frames taken apart one after another."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from qsd_plugin.core.errors import DataError
from qsd_plugin.data import record_index
from qsd_plugin.data.record_frames import IMAGE_START, MAGIC, frames, pack, read_payload, unpack, unpack_image
from qsd_plugin.data.record_index import READ_AHEAD
from qsd_plugin.data.recordio import RecordReader, RecordWriter


def content(number: int, size: int) -> bytes:
    return np.random.default_rng([number, size]).bytes(size)


#: What records can be: content and label.
KINDS: list[tuple[bytes, float | tuple[float, ...]]] = [
    (b"", (9.0, 12.0)),
    *((content(number, 100 + number), float(number)) for number in range(6)),
    (b"", 3.0),
    (MAGIC + b"split", 4.0),
    (b"split later" + b"\0" + MAGIC + MAGIC, 5.0),
    (b"several labels", (6.0, 7.0, 8.0)),
    (content(1, READ_AHEAD - IMAGE_START), 9.0),
    (content(2, READ_AHEAD), 10.0),
    (content(3, 3 * READ_AHEAD), 11.0),
    *((content(number, 9000), float(number)) for number in range(200)),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "a.rec"
    with RecordWriter(path) as writer:
        for one, label in KINDS:
            writer.append(one, label)
    return path


def reindexed(path: Path, folder: Path, kind: str) -> RecordReader:
    """The same records behind another index."""
    lines = path.with_suffix(".idx").read_text().splitlines(keepends=True)
    if kind == "gaps":
        lines = [line for number, line in enumerate(lines) if number % 20 not in (3, 4, 11)]
    elif kind == "any order":
        lines = [lines[place] for place in np.random.default_rng(0).permutation(len(lines))]
    elif kind == "other keys":
        lines = [f"{7 * int(line.split()[0]) + 5}\t{line.split()[1]}\n" for line in lines]
    (folder / "other.idx").write_text("".join(lines))
    return RecordReader(path, folder / "other.idx")


@pytest.mark.parametrize("kind", ["as written", "gaps", "any order", "other keys"])
def test_equal_to_taking_frames_apart(path: Path, tmp_path: Path, kind: str) -> None:
    reader = reindexed(path, tmp_path, kind)
    file = path.read_bytes()
    keys = np.sort(reader.index.keys)

    def piece(begin: int, size: int) -> bytes:
        return file[begin : begin + size]

    apart = {key: unpack(read_payload(piece, reader.index.offset(key), len(file))[0]) for key in keys.tolist()}
    for key, expected in apart.items():
        record = reader.read(key)
        assert (record.content, record.flag, record.ids) == (expected.content, expected.flag, expected.ids), key
        assert (record.label.tolist(), record.label.dtype) == (expected.label.tolist(), np.float32), key
    draw = np.random.default_rng(1)
    for wanted in (keys, keys[::-1], draw.permutation(keys), draw.choice(keys, 30), keys[:1], keys[-1:], keys[:0]):
        labels, contents = reader.read_many(wanted)
        assert labels.tolist() == [float(apart[key].label[0]) for key in wanted.tolist()]
        assert contents == [apart[key].content for key in wanted.tolist()]
        assert labels.dtype == np.float32


def test_images_are_taken_apart_at_once_and_nothing_else_is() -> None:
    for one, label in KINDS:
        frame = frames(pack(one, label, (3, 4)))
        record = unpack_image(frame + b"next")
        if isinstance(label, tuple) or MAGIC in one:
            assert record is None
        else:
            assert record is not None
            assert (record.content, record.label.tolist(), record.flag, record.ids) == (one, [label], 0, (3, 4))
        assert unpack_image(frame[: IMAGE_START - 1]) is None
    whole = frames(pack(b"1234", 0.0))
    assert unpack_image(whole[:-1]) is None
    assert unpack_image(b"\0" + whole[1:]) is None
    assert unpack_image(frames(b"\0" * 23) + bytes(99)) is None  # no room for a header


def test_one_read_per_record_and_per_run_of_neighbours(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, reads = RecordReader(path), []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: reads.append(arguments) or real(*arguments))
    first = next(number for number, (one, _) in enumerate(KINDS) if len(one) == 9000)
    reader.read(first)
    assert len(reads) == 1
    reads.clear()
    reader.read_many(np.arange(first, first + 30))
    assert len(reads) <= 2  # a bound of the blocks may lie between
    reads.clear()
    reader.read_many([first + 4, first, first + 1, first + 2, first + 8])
    assert len(reads) in (3, 4)
    assert sum(length for _, length, _ in reads) < 5 * 9100


def test_gap_in_the_index_is_not_read(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = path.with_suffix(".idx").read_text().splitlines(keepends=True)
    (tmp_path / "few.idx").write_text(lines[1] + lines[-1])
    reader, lengths = RecordReader(path, tmp_path / "few.idx"), []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, at: lengths.append(length) or real(fd, length, at))
    reader.read(1)
    reader.read_many([1, len(KINDS) - 1])
    assert max(lengths) <= READ_AHEAD


def test_damaged_record_of_a_batch_is_named(path: Path, tmp_path: Path) -> None:
    blob = bytearray(path.read_bytes())
    offset = RecordReader(path).index.offset(50)
    blob[offset + 4 : offset + 8] = (1 << 20).to_bytes(4, "little")  # longer than up to the next, but not than the file
    whole = tmp_path / "a.rec"
    whole.write_bytes(blob)
    whole.with_suffix(".idx").write_bytes(path.with_suffix(".idx").read_bytes())
    assert len(RecordReader(whole).read_many([50]).contents[0]) == (1 << 20) - 24  # as its frame says
    blob = bytearray(path.read_bytes())
    blob[offset : offset + 4] = b"oops"
    whole.write_bytes(blob)
    for keys in ([50], range(40, 60), [60, 50, 40]):
        with pytest.raises(DataError, match=rf"record with key 50 at offset {offset} .*begins with 6f6f7073"):
            RecordReader(whole).read_many(list(keys))
    whole.write_bytes(blob[:offset])
    with pytest.raises(DataError, match="records lie outside"):
        RecordReader(whole)
    with pytest.raises(DataError, match="unknown key: got 999"):
        RecordReader(path).read_many([50, 999])


def test_file_that_is_cut_off_or_fails_meanwhile(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "a.rec"
    copy.write_bytes(path.read_bytes())
    reader = RecordReader(copy, path.with_suffix(".idx"))
    os.truncate(copy, reader.index.offset(60) + 500)
    assert reader.read_many([50, 51]).contents[1] == KINDS[51][0]
    for read in (lambda: reader.read_many(range(50, 70)), lambda: reader.read_many([60]), lambda: reader.read(60)):
        with pytest.raises(DataError, match=r"record with key 60 .*the file ends at byte"):
            read()

    def failing(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    for read in (lambda: reader.read_many([50]), lambda: reader.read(50)):
        with pytest.raises(DataError, match=r"record with key 50 .*Input/output error"):
            read()


def test_children_read_batches_from_a_file_of_their_own(path: Path) -> None:
    reader = RecordReader(path)
    child = os.fork()
    if child == 0:
        right = reader.read_many(range(len(KINDS))).contents == [one for one, _ in KINDS]
        os._exit(0 if right and reader._pid == os.getpid() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_index_takes_its_arrays_and_little_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_index, "_CHUNK_BYTES", 1 << 14)
    count = 200_000
    (tmp_path / "a.rec").touch()
    os.truncate(tmp_path / "a.rec", 40 * count)
    (tmp_path / "a.idx").write_text("".join(f"{key}\t{40 * key}\n" for key in range(count)))
    tracemalloc.start()
    reader = RecordReader(tmp_path / "a.rec")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reader.index.offset(count - 1) == 40 * (count - 1)
    assert peak < 1.15 * 16 * count
