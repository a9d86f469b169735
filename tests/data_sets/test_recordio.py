"""Records against frames put together by hand, and against files that are cut off, foreign or shared by processes."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from qsd_plugin.core.errors import DataError
from qsd_plugin.data import recordio
from qsd_plugin.data.record_frames import FrameError, frames, pack, read_payload, unpack
from qsd_plugin.data.recordio import RecordReader, RecordWriter

MAGIC = bytes.fromhex("0a23d7ce")


def hand_made(*parts: tuple[int, bytes]) -> bytes:
    """Frames from (flag, bytes), as the format's description has them."""
    return b"".join(
        MAGIC + struct.pack("<I", flag * 2**29 + len(part)) + part + b"\0" * ((4 - len(part) % 4) % 4)
        for flag, part in parts
    )


def split_by_hand(payload: bytes) -> list[tuple[int, bytes]]:
    """The format's description followed literally: a look at every fourth byte."""
    parts, start = [], 0
    for place in range(0, len(payload) // 4 * 4, 4):
        if payload[place : place + 4] == MAGIC:
            parts.append((2 if parts else 1, payload[start:place]))
            start = place + 4
    return [*parts, (3 if parts else 0, payload[start:])]


FRAMED = {
    "nothing": (b"", [(0, b"")]),
    "padding": (b"abcde", [(0, b"abcde")]),
    "the word alone": (MAGIC, [(1, b""), (3, b"")]),
    "twice": (MAGIC * 2, [(1, b""), (2, b""), (3, b"")]),
    "word off the grid": (b"x" + MAGIC + b"yyy", [(0, b"x" + MAGIC + b"yyy")]),
    "word off the grid, then on it": (b"x" + MAGIC + b"yyy" + MAGIC + b"z", [(1, b"x" + MAGIC + b"yyy"), (3, b"z")]),
    "word cut off at the end": (b"abcd" + MAGIC[:3], [(0, b"abcd" + MAGIC[:3])]),
    "grid of the whole payload": (MAGIC + b"ab" + MAGIC + b"cd", [(1, b""), (3, b"ab" + MAGIC + b"cd")]),
}


@pytest.mark.parametrize(("payload", "parts"), FRAMED.values(), ids=FRAMED)
def test_frames_are_those_made_by_hand(payload: bytes, parts: list[tuple[int, bytes]]) -> None:
    written = hand_made(*parts)
    assert frames(payload) == written
    padded = b"12345678" + written
    read = read_payload(lambda offset, length: padded[offset : offset + length], 8, len(padded))
    assert read == (payload, len(padded))


def test_random_payloads_full_of_the_word() -> None:
    draw = random.Random(0)
    for _ in range(400):
        pieces = [draw.choice([MAGIC, MAGIC[:2], b"\0", b"abcd", MAGIC[2:]]) for _ in range(draw.randrange(12))]
        payload = b"".join(pieces)
        written = frames(payload)
        assert written == hand_made(*split_by_hand(payload))
        assert read_payload(lambda o, n, file=written: file[o : o + n], 0, len(written)) == (payload, len(written))


def test_too_long_a_record_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsd_plugin.data.record_frames.MAX_LENGTH", 7)
    frames(bytes(7))
    with pytest.raises(DataError, match="got '8 bytes'; expected at most 7 bytes"):
        frames(bytes(8))


def test_header_of_a_payload() -> None:
    assert pack(b"jpeg", 3, (17, 0)) == struct.pack("<IfQQ", 0, 3.0, 17, 0) + b"jpeg"
    assert pack(b"", (5, 9)) == struct.pack("<IfQQff", 2, 0.0, 0, 0, 5.0, 9.0)
    assert pack(b"", [5]) == struct.pack("<IfQQf", 1, 0.0, 0, 0, 5.0)
    record = unpack(struct.pack("<IfQQff", 2, 0.0, 4, 8, 5.0, 9.0) + b"rest")
    assert (record.flag, record.ids, record.content, record.label.tolist()) == (2, (4, 8), b"rest", [5.0, 9.0])
    assert unpack(pack(b"x", 3)).label.tolist() == [3.0]
    with pytest.raises(FrameError, match="1000000 labels announced in 24 bytes"):
        unpack(struct.pack("<IfQQ", 10**6, 0.0, 0, 0))
    with pytest.raises(FrameError, match="23 bytes, fewer than the 24"):
        unpack(bytes(23))


def write(path: Path, *contents: bytes, header: bool = False) -> Path:
    """Records of two images per class."""
    with RecordWriter(path) as writer:
        if header:
            writer.append(b"", (len(contents) + 1, len(contents) + 1 + len(contents) // 2))
        for number, content in enumerate(contents):
            writer.append(content, number // 2)
        if header:
            for first in range(1, len(contents), 2):
                writer.append(b"", (first, first + 2))
    return path


def test_files_byte_for_byte(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "new" / "train.rec", image_size=(112, 96), listing=True) as writer:
        assert writer.append(b"", (3, 5)) == 0
        assert writer.append(b"one", 0, name="ann/1.jpg") == 1
        assert writer.append(MAGIC + b"two", 1, name="bob/1.jpg") == 2
        assert writer.append(b"", (1, 2)) == 3
        assert writer.append(b"late", 1, key=9, ids=(7, 8)) == 9
    payloads = [
        (struct.pack("<IfQQff", 2, 0, 0, 0, 3, 5),),
        (struct.pack("<IfQQ", 0, 0, 1, 0) + b"one",),
        (struct.pack("<IfQQ", 0, 1, 2, 0), b"two"),
        (struct.pack("<IfQQff", 2, 0, 3, 0, 1, 2),),
        (struct.pack("<IfQQ", 0, 1, 7, 8) + b"late",),
    ]
    written = [hand_made(*zip((1, 3) if len(parts) > 1 else (0,), parts, strict=True)) for parts in payloads]
    starts = np.cumsum([0, *map(len, written)])
    folder = tmp_path / "new"
    assert (folder / "train.rec").read_bytes() == b"".join(written)
    lines = [f"{key}\t{start}\n" for key, start in zip((0, 1, 2, 3, 9), starts, strict=False)]
    assert (folder / "train.idx").read_text() == "".join(lines)
    assert (folder / "property").read_text() == "2,112,96\n"
    assert (folder / "train.lst").read_text() == "1\t0.000000\tann/1.jpg\n2\t1.000000\tbob/1.jpg\n9\t1.000000\t\n"
    assert sorted(path.name for path in folder.iterdir()) == ["property", "train.idx", "train.lst", "train.rec"]


def test_round_trip_in_any_order(tmp_path: Path) -> None:
    contents = [random.Random(size).randbytes(size) + MAGIC * (size % 3) for size in (0, 1, 2, 3, 4, 500, 70000)]
    reader = RecordReader(write(tmp_path / "a.rec", *contents))
    assert [reader.read(key).content for key in range(7)] == contents
    wanted = [6, 0, 6, 3]
    assert reader.read_many(wanted).contents == [contents[key] for key in wanted]
    assert reader.labels([5, 0, 6]).tolist() == [2.0, 0.0, 3.0]
    assert reader.end(6) == (tmp_path / "a.rec").stat().st_size
    with pytest.raises(DataError, match=r"a\.idx: unknown key: got 7; expected keys from 0 to 6 \(7\)"):
        reader.read(7)


def test_label_of_a_record_that_is_split_inside_its_header(tmp_path: Path) -> None:
    label = struct.unpack("<f", MAGIC)[0]
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.append(b"jpeg", label)
        writer.append(b"jpeg", (4.0, 5.0))
    assert RecordReader(tmp_path / "a.rec").labels([0, 1]).tolist() == [np.float32(label), 4.0]


def test_interrupted_writing_leaves_what_was_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec", b"old")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupted() -> None:
        with RecordWriter(path) as writer:
            writer.append(b"new", 0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["a.idx", "a.rec", ".a.idx.new", "property"])
def test_failure_at_the_end_leaves_no_index_beside_other_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write(tmp_path / "a.rec", b"old", b"older")
    real = os.replace

    def full(source: str, target: Path) -> None:
        if Path(target).name == name:
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write(path, b"something longer", b"new")
    left = {file.name for file in tmp_path.iterdir()}
    assert not {file for file in left if file.startswith(".")}
    if "a.idx" in left:
        assert RecordReader(path).read(0).content == b"old"


@pytest.mark.parametrize("key", [-1, 0, 5])
def test_key_is_taken_once(tmp_path: Path, key: int) -> None:
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.append(b"", 0, key=0)
        writer.append(b"", 0, key=9)
        writer.append(b"", 0, key=5)
        with pytest.raises(DataError, match=rf"a\.rec: key: got {key}; expected a number >= 0 that is not taken"):
            writer.append(b"", 0, key=key)


def test_other_file_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a name that ends in \.rec"):
        RecordWriter(tmp_path / "train.bin")


# Layouts


def test_layout_with_header(tmp_path: Path) -> None:
    reader = RecordReader(write(tmp_path / "a.rec", *[b"x"] * 6, header=True))
    assert reader.has_header
    assert reader.image_keys.tolist() == [1, 2, 3, 4, 5, 6]
    assert reader.identity_keys.tolist() == [7, 8, 9]
    assert reader.image_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(reader) == 10


def test_layout_without_header(tmp_path: Path) -> None:
    reader = RecordReader(write(tmp_path / "a.rec", *[b"x"] * 6))
    assert not reader.has_header
    assert reader.image_keys.tolist() == [0, 1, 2, 3, 4, 5]
    assert reader.identity_keys.tolist() == []


def test_header_without_identity_records(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.append(b"", (3, 3))
        writer.append(b"x", 0)
        writer.append(b"x", 0)
    assert RecordReader(tmp_path / "a.rec").image_keys.tolist() == [1, 2]


@pytest.mark.parametrize("images", [2**24, 2**24 + 2, 2**25 + 1, 2**25 + 4])
def test_index_decides_where_float32_rounds_the_header(tmp_path: Path, images: int) -> None:
    first_identity = images + 1
    if images != 2**25 + 4:  # 2^25 + 5 is rounded to 2^25 + 4, the others by one
        assert abs(int(np.float32(first_identity)) - first_identity) == 1 + (images == 2**25 + 1)
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.append(b"", (first_identity, first_identity + 3))
        for key in range(images - 3, images + 1):
            writer.append(b"x", 0, key=key)
        for key in range(first_identity, first_identity + 3):
            writer.append(b"", (1, 2), key=key)
    reader = RecordReader(tmp_path / "a.rec")
    assert reader.image_keys.tolist() == list(range(images - 3, images + 1))
    assert reader.identity_keys.tolist() == [first_identity, first_identity + 1, first_identity + 2]


@pytest.mark.parametrize("stated", [3, 5, 900, float("nan")])
def test_header_that_does_not_fit_the_index(tmp_path: Path, stated: float) -> None:
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.append(b"", (stated, 6))
        for number in range(3):
            writer.append(b"x", number)
        for number in range(3):
            writer.append(b"", (number + 1, number + 2))
    with pytest.raises(DataError, match=r"a\.rec: header: got 'images up to key .*index says, whose last key is 6"):
        _ = RecordReader(tmp_path / "a.rec").image_keys


# Damage


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def test_file_cut_off_inside_a_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec", b"x" * 100, b"y" * 100)
    reader = RecordReader(cut(path, path.stat().st_size - 8))
    assert reader.read(0).content == b"x" * 100
    with pytest.raises(
        DataError, match=r"a\.rec: record with key 1 at offset 132 .*124 bytes from byte 140 on, .* 256"
    ):
        reader.read(1)
    with pytest.raises(DataError, match=r"key 1 at offset 132"):
        reader.labels([0, 1])


def test_file_cut_off_before_a_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec", b"x" * 100, b"y" * 100)
    with pytest.raises(DataError, match=r"a\.idx: 1 of 2 records lie outside .*'key 1 at offset 132'.*its 132 bytes"):
        RecordReader(cut(path, 132))


def test_file_cut_off_inside_a_split_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec", MAGIC + b"tail")
    whole = path.read_bytes()
    reader = RecordReader(cut(path, len(whole) - 12))
    with pytest.raises(DataError, match="a frame at byte 32, and the file has 32 bytes"):
        reader.read(0)
    path.write_bytes(whole[:-12] + hand_made((0, b"tail")))
    with pytest.raises(DataError, match="a part of kind 0 at byte 32 where another goes on"):
        RecordReader(path).read(0)
    path.write_bytes(hand_made((3, bytes(24))))
    with pytest.raises(DataError, match="a part of kind 3 at byte 0 where none goes on"):
        RecordReader(path).read(0)


def test_bytes_behind_the_last_record_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec", b"x")
    path.write_bytes(path.read_bytes() + b"padding.")
    assert RecordReader(path).read(0).content == b"x"


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(200), bytes(range(200))], ids=["zip", "bytes"])
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "a.rec", b"x")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"key 0 at offset 0 .*no frame at byte 0: it begins with"):
        RecordReader(path).read(0)


@pytest.mark.parametrize("offset", [2, 32, 1000, 10**18])
def test_index_that_points_outside(tmp_path: Path, offset: int) -> None:
    path = write(tmp_path / "a.rec", b"x")
    (tmp_path / "a.idx").write_text(f"0\t0\n1\t{offset}\n")
    with pytest.raises(DataError, match=f"got 'key 1 at offset {offset}'"):
        RecordReader(path)


def test_index_that_points_into_a_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec", b"x" * 100, b"y")
    (tmp_path / "a.idx").write_text("0\t0\n1\t64\n")
    reader = RecordReader(path)
    for read in (lambda: reader.read(1), lambda: reader.read_many([0, 1]), lambda: reader.labels([1])):
        with pytest.raises(DataError, match=r"key 1 at offset 64 .*no frame at byte 64: it begins with 7878"):
            read()
    assert reader.read(0).content == b"x" * 100


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.rec'; expected an existing \.rec file\. No such file"):
        RecordReader(tmp_path / "absent.rec")
    path = write(tmp_path / "a.rec", b"x")
    (tmp_path / "a.idx").rename(tmp_path / "other.txt")
    with pytest.raises(DataError, match=r"a\.idx'; expected the \.idx file that was written with"):
        RecordReader(path)
    assert RecordReader(path, tmp_path / "other.txt").read(0).content == b"x"


# Processes


def test_forked_readers_of_one_reader(tmp_path: Path) -> None:
    draw = random.Random(1)
    contents = [draw.randbytes(draw.randrange(3000)) for _ in range(60)]
    digests = [hashlib.md5(content).digest() for content in contents]
    reader = RecordReader(write(tmp_path / "a.rec", *contents))
    children = []
    for seed in range(3):
        child = os.fork()
        if child == 0:
            order = random.Random(seed)
            wrong = 0
            for _ in range(1000):
                key = order.randrange(60)
                wrong += hashlib.md5(reader.read(key).content).digest() != digests[key]
            os._exit(1 if wrong else 2 if reader._pid != os.getpid() else 0)  # 2: the parent's open file was used
        children.append(child)
    for key in range(60):
        assert reader.read(key).content == contents[key]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_threads_share_no_file_position(tmp_path: Path) -> None:
    reader = RecordReader(write(tmp_path / "a.rec", b"x" * 100, b"y"))
    os.lseek(reader._descriptor, 5, os.SEEK_SET)
    assert reader.read(1).content == b"y"
    assert reader.labels([0]).tolist() == [0.0]
    assert os.lseek(reader._descriptor, 0, os.SEEK_CUR) == 5


def test_pickled_reader_opens_the_file_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec", b"x", b"y")
    reader = RecordReader(path)
    state = pickle.dumps(reader)
    assert pickle.loads(state).read(1).content == b"y"
    reader.close()
    assert reader.read(1).content == b"y"
    write(path, b"other", b"longer")
    with pytest.raises(DataError, match=r"a\.rec has changed since it was opened"):
        pickle.loads(state).read(1)


def test_readers_are_kept_per_path(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.rec", b"x"))
    assert recordio.open_records(path) is recordio.open_records(path)
