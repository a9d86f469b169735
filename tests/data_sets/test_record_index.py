"""The index of a record file against plain parsing, line by line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qsd_plugin.core.errors import DataError
from qsd_plugin.data import record_index
from qsd_plugin.data.record_index import RecordIndex


def load(tmp_path: Path, text: str) -> RecordIndex:
    path = tmp_path / "a.idx"
    path.write_bytes(text.encode())
    return RecordIndex.load(path)


@pytest.mark.parametrize("chunk", [1 << 24, 1 << 12])
@pytest.mark.parametrize("ascending", [True, False])
def test_100000_keys_equal_plain_parsing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, ascending: bool
) -> None:
    monkeypatch.setattr(record_index, "_CHUNK_BYTES", chunk)
    draw = np.random.default_rng(0)
    keys = np.cumsum(draw.integers(1, 9, 100_000))
    keys = keys if ascending else draw.permutation(keys)
    offsets = draw.integers(0, 2**45, 100_000)
    text = "".join(f"{key}\t{offset}\n" for key, offset in zip(keys.tolist(), offsets.tolist(), strict=True))
    index = load(tmp_path, text)
    plain = {int(key): int(offset) for key, offset in (line.split("\t") for line in text.splitlines())}
    assert len(index) == len(plain)
    assert dict(zip(index.keys.tolist(), index.offsets.tolist(), strict=True)) == plain
    assert index.keys.tolist() == list(plain)
    some = draw.choice(keys, 500)
    assert index.offsets[index.positions(some)].tolist() == [plain[key] for key in some.tolist()]
    for key in some[:50].tolist():
        assert index.offset(key) == plain[key]
    absent = sorted(set(range(int(keys.max()) + 3)) - set(plain))
    for key in (-1, absent[0], absent[len(absent) // 2], absent[-1]):
        assert key not in index
        with pytest.raises(DataError, match=rf"unknown key: got {key}; expected keys from {keys.min()} to"):
            index.positions([int(keys[0]), key])
    assert all(key in index for key in some.tolist())


@pytest.mark.parametrize(
    "text",
    [
        "1\t0\n2\t8\n3\t16",
        "1\t0\r2\t8\r3\t16\r",
        "1\t0\r\n2\t8\r\n3\t16\r\n",
        "1\t0\n\n2\t8\n3\t16\n\n",
        "1 0\n2 8\n3 16\n",
    ],
)
def test_line_ends_blank_lines_and_spaces(tmp_path: Path, text: str) -> None:
    index = load(tmp_path, text)
    assert (index.keys.tolist(), index.offsets.tolist()) == ([1, 2, 3], [0, 8, 16])


def test_empty_index(tmp_path: Path) -> None:
    index = load(tmp_path, "")
    assert len(index) == 0
    assert 0 not in index
    with pytest.raises(DataError, match="expected no key: it is empty"):
        index.offset(0)


@pytest.mark.parametrize("line", ["4", "4\t8\t2", "four\t8", "4\t8.5", "-4\t8", "4\t-8", "4\t\u00e9"])
def test_wrong_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(record_index, "_CHUNK_BYTES", 8)
    text = "".join(f"{key}\t{8 * key}\n" for key in range(4)) + f"{line}\n5\t40\n"
    with pytest.raises(DataError, match=r"a\.idx, line 5: got '.+'; expected key<TAB>offset, two whole numbers"):
        load(tmp_path, text)


def test_repeated_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 keys occur more than once: got 3; expected every key once"):
        load(tmp_path, "3\t0\n7\t8\n3\t16\n7\t24\n1\t32\n")


def test_first_and_last_key_say_nothing_about_those_between(tmp_path: Path) -> None:
    for keys in ([3, 5, 4, 6], [3, 4, 6, 7], [3, 4, 5, 6]):
        index = load(tmp_path, "".join(f"{key}\t{8 * key}\n" for key in keys))
        for key in keys:
            assert index.offset(key) == 8 * key
        assert index.offsets[index.positions(keys[::-1])].tolist() == [8 * key for key in keys[::-1]]
        for absent in {2, 5, 7, 8} - set(keys):
            with pytest.raises(DataError, match=f"unknown key: got {absent}"):
                index.offset(absent)
