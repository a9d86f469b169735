"""The teacher's embeddings on disk: complete or not there, whatever is killed, and never another teacher's."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.feature_cache import FeatureCache
from qsd_plugin.data.feature_cache_writer import FeatureCacheWriter

IDENTITY = {"teacher weights": "aa", "image size": "112x112"}
KEYS = [f"set/{number}.jpg" for number in range(10)]
FEATURES = np.random.default_rng(0).normal(size=(10, 2, 6)).astype(np.float32)

#: Writes three rows at a time and kills itself at the given place of the second three.
KILLED = """
import os, signal, sys
import numpy as np
from qsd_plugin.data import feature_cache_writer as module
features = np.random.default_rng(0).normal(size=(10, 2, 6)).astype(np.float32)
keys = [f"set/{number}.jpg" for number in range(10)]
writer = module.FeatureCacheWriter(
    sys.argv[1], keys, 6, identity={"teacher weights": "aa", "image size": "112x112"}, dtype="float16"
)
class Deadly:
    def __init__(self, array): self.array, self.left = array, 1
    def __setitem__(self, rows, value):
        if not self.left:
            if sys.argv[2] == "half a batch":
                self.array[rows[:1]] = value[:1]
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        self.array[rows] = value
    def __getattr__(self, name): return getattr(self.array, name)
target = "_done" if sys.argv[2] == "before it counts" else "_features"
setattr(writer, target, Deadly(getattr(writer, target)))
for first in range(0, 10, 3):
    rows = np.arange(first, min(first + 3, 10))
    writer.write(rows, features[rows])
"""


def written(folder: Path, dtype: str = "float16", rows: int = 10) -> Path:
    writer = FeatureCacheWriter(folder, KEYS[:rows], 6, identity=IDENTITY, dtype=dtype)
    fill(writer)
    writer.finish()
    return folder


def fill(writer: FeatureCacheWriter, step: int = 3) -> None:
    pending = writer.pending
    for first in range(0, len(pending), step):
        rows = pending[first : first + step]
        writer.write(rows, FEATURES[rows])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_come_back_by_key_as_they_are_and_mirrored(tmp_path: Path, dtype: str) -> None:
    cache = FeatureCache(written(tmp_path, dtype), dim=6)
    assert (len(cache), cache.dim, cache.dtype, cache.identity) == (10, 6, dtype, IDENTITY)
    rows = cache.rows([KEYS[7], KEYS[0], KEYS[7]])
    assert rows.tolist() == [7, 0, 7]
    assert cache.rows(KEYS).tolist() == list(range(10))
    for row in range(10):
        for mirrored in (False, True):
            feature = cache.read(row, mirrored=mirrored)
            np.testing.assert_array_equal(feature, FEATURES[row, int(mirrored)].astype(dtype))
            feature[:] = 0  # a copy: neither the file nor the next read sees it
            assert cache.read(row, mirrored=mirrored).all()
    assert {path.name for path in tmp_path.iterdir()} == {"cache.json", "features.npy", "keys.json"}
    assert np.load(tmp_path / "features.npy").shape == (10, 2, 6)


def read_in_worker(cache: FeatureCache, rows: list[int]) -> list[float]:
    return [float(cache.read(row, mirrored=True)[0]) for row in rows]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_the_parent_opened(tmp_path: Path, method: str) -> None:
    cache = FeatureCache(written(tmp_path, "float32"))
    small = len(pickle.dumps(cache))
    cache.rows(KEYS[:2])
    assert len(pickle.dumps(cache)) == small < 1000  # neither embeddings nor keys travel
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(read_in_worker, (cache, [3, 9])) == FEATURES[[3, 9], 1, 0].tolist()


@pytest.mark.parametrize("place", ["at a batch", "half a batch", "before it counts"])
def test_killed_writer_goes_on_to_the_same_bytes(tmp_path: Path, place: str) -> None:
    whole, killed = written(tmp_path / "whole"), tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(killed), place], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(
        DataError,
        match=r"got '.*killed'; expected a folder with a finished cache \(cache\.json\)\. It "
        r"was cut off while it was being made: start that again, it goes on\.",
    ):
        FeatureCache(killed)
    writer = FeatureCacheWriter(killed, KEYS, 6, identity=IDENTITY)
    assert writer.pending.tolist() == [3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(DataError, match=r"7 of 10 images have none yet: got 'set/3\.jpg'; expected all images\."):
        writer.finish()
    fill(writer)
    writer.finish()
    for name in ("features.npy", "keys.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    headers = [json.loads((folder / "cache.json").read_text()) for folder in (killed, whole)]
    assert {**headers[0], "written": ""} == {**headers[1], "written": ""}


def test_killed_behind_the_marker_it_is_complete(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "building.json").write_text("{}")
    (tmp_path / "done.npy").write_bytes(b"")
    assert len(FeatureCache(tmp_path)) == 10
    writer = FeatureCacheWriter(tmp_path, KEYS, 6, identity=IDENTITY)
    assert writer.finished
    assert len(writer.pending) == 0
    writer.finish()
    assert not (tmp_path / "building.json").exists()


def test_another_cache_in_the_folder_is_gone_before_a_byte_changes(tmp_path: Path) -> None:
    written(tmp_path)
    before = (tmp_path / "features.npy").read_bytes()
    writer = FeatureCacheWriter(tmp_path, KEYS, 6, identity={**IDENTITY, "teacher weights": "bb"})
    assert not (tmp_path / "cache.json").exists()
    assert writer.pending.tolist() == list(range(10))
    fill(writer)
    writer.finish()
    assert FeatureCache(tmp_path).identity["teacher weights"] == "bb"
    assert (tmp_path / "features.npy").read_bytes() == before
    other_dtype = FeatureCacheWriter(tmp_path, KEYS, 6, identity=IDENTITY, dtype="float32")
    assert len(other_dtype.pending) == 10


def test_two_writers_share_the_rows(tmp_path: Path) -> None:
    first = FeatureCacheWriter(tmp_path, KEYS, 6, identity=IDENTITY)
    second = FeatureCacheWriter(tmp_path, KEYS, 6, identity=IDENTITY)
    for writer, rows in ((first, np.arange(0, 10, 2)), (second, np.arange(1, 10, 2))):
        writer.write(rows, FEATURES[rows])
    first.finish()
    cache = FeatureCache(tmp_path)
    found = np.stack([[cache.read(row, mirrored=mirrored) for mirrored in (False, True)] for row in range(10)])
    np.testing.assert_array_equal(found, FEATURES.astype(np.float16))


def test_images_left_out_have_no_embedding(tmp_path: Path) -> None:
    writer = FeatureCacheWriter(tmp_path, KEYS, 6, identity=IDENTITY)
    writer.leave_out(np.array([4]))
    assert writer.left_out.tolist() == [4]
    fill(writer)
    writer.finish()
    assert json.loads((tmp_path / "cache.json").read_text())["left_out"] == [KEYS[4]]
    cache = FeatureCache(tmp_path)
    with pytest.raises(DataError, match=r"row 4 has entries that are not finite; expected an image that could be"):
        cache.read(4, mirrored=True)
    assert np.isfinite(cache.read(5, mirrored=True)).all()


def test_embeddings_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    writer = FeatureCacheWriter(tmp_path, KEYS, 6, identity=IDENTITY)
    rows, bad = np.arange(3), FEATURES[:3].copy()
    bad[1, 1, 2] = np.nan
    with pytest.raises(DataError, match=r"of 1 images are not finite: got 'set/1\.jpg'\. The teacher is broken\."):
        writer.write(rows, bad)
    for factor in (1e6, 1e30, 1e-6):
        scaled = FEATURES[:3].copy()
        scaled[2] *= np.float32(factor)
        with pytest.raises(DataError, match=r"of 1 images lose too much in float16: got 'set/2\.jpg'\. .*use float32"):
            writer.write(rows, scaled)
    with pytest.raises(DataError, match=r"to store: got \(3, 2, 5\); expected the shape \(3, 2, 6\)"):
        writer.write(rows, FEATURES[:3, :, :5])
    assert len(writer.pending) == 10
    writer.write(rows, np.zeros((3, 2, 6), np.float32))  # what float16 holds exactly
    exact = FeatureCacheWriter(tmp_path / "exact", KEYS, 6, identity=IDENTITY, dtype="float32")
    exact.write(rows, FEATURES[:3] * np.float32(1e-6))


def test_arguments_that_make_no_cache(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype: got 'float61'; expected float16 or float32"):
        FeatureCacheWriter(tmp_path, KEYS, 6, identity=IDENTITY, dtype="float61")
    with pytest.raises(ConfigError, match=r"got \(0, 2, 6\); expected N, D >= 1"):
        FeatureCacheWriter(tmp_path, [], 6, identity=IDENTITY)
    with pytest.raises(DataError, match=r"two images have the same key: got 'set/3\.jpg'"):
        FeatureCacheWriter(tmp_path, [*KEYS, KEYS[3]], 6, identity=IDENTITY)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Cannot write"):
        FeatureCacheWriter(tmp_path / "file" / "below", KEYS, 6, identity=IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_full_disk_is_found_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"features\.npy'; expected room for 0 MiB\. The system says: No space left"):
        FeatureCacheWriter(tmp_path, KEYS, 6, identity=IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]


def test_caches_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    cache = FeatureCache(written(tmp_path))
    with pytest.raises(DataError, match=r"2 of 3 images are not in it: got 'set/x\.jpg, 4\.jpg'"):
        cache.rows([KEYS[0], "set/x.jpg", "4.jpg"])
    with pytest.raises(DataError, match="embedding size: got 6; expected 512"):
        FeatureCache(tmp_path, dim=512)
    cache.require(IDENTITY)
    with pytest.raises(
        DataError,
        match=r"were made with another teacher weights and another decoder: got 'aa, None'; expected bb, Pillow 1\. "
        r"Make it again, or name the cache that belongs to this run\.",
    ):
        cache.require({"teacher weights": "bb", "image size": "112x112", "decoder": "Pillow 1"})


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a folder with a finished cache \(cache\.json\)\. Make it\."):
        FeatureCache(tmp_path)
    opened = FeatureCache(written(tmp_path))
    content = (tmp_path / "features.npy").read_bytes()
    for damaged in (content[:-1], content[:40], b""):
        (tmp_path / "features.npy").write_bytes(damaged)
        with pytest.raises(
            DataError, match=r"features\.npy cannot be read: .*expected \[10, 2, 6\] float16\. .*cut off"
        ):
            FeatureCache(tmp_path)
    np.save(tmp_path / "features.npy", FEATURES.astype(np.float16)[:9])
    with pytest.raises(DataError, match=r"does not fit cache\.json: got '\[9, 2, 6\] float16'; expected \[10, 2, 6\]"):
        FeatureCache(tmp_path)
    np.save(tmp_path / "features.npy", np.zeros((10, 2, 6), np.float16))
    os.utime(tmp_path / "features.npy", (1, 1))
    with pytest.raises(DataError, match="has changed since it was opened"):
        pickle.loads(pickle.dumps(opened)).read(0, mirrored=False)


def test_foreign_keys_and_headers_are_named(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "keys.json").write_text(json.dumps([*KEYS[1:], KEYS[0]]))
    with pytest.raises(DataError, match=r"keys\.json does not fit cache\.json: got '10 keys'"):
        FeatureCache(tmp_path).rows(KEYS)
    (tmp_path / "keys.json").write_text("[")
    with pytest.raises(DataError, match=r"keys\.json cannot be read: .*expected a list of image keys"):
        FeatureCache(tmp_path).rows(KEYS)
    header = json.loads((tmp_path / "cache.json").read_text())
    for change, text in (
        ({"format": 2}, "got 'format 2, missing or wrong: nothing'; expected format 1"),
        ({"dim": "6"}, "got 'format 1, missing or wrong: dim'"),
    ):
        (tmp_path / "cache.json").write_text(json.dumps({**header, **change}))
        with pytest.raises(DataError, match=text):
            FeatureCache(tmp_path)
    (tmp_path / "cache.json").write_text("[]")
    with pytest.raises(DataError, match=r"cache\.json: got 'list'; expected a JSON object"):
        FeatureCache(tmp_path)
