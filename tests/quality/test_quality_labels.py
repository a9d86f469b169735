"""Label files: every format there and back, look-up by a host's paths, coverage, and what is refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from qsd_plugin.core.errors import LabelError
from qsd_plugin.quality import QualityLabels, label_key, require_coverage
from qsd_plugin.quality.keys import KeyIndex

KEYS = (
    "Market1501/bounding_box_train/0002_c1s1_000451_03.jpg",
    "Market1501/bounding_box_train/0002_c1s1_000551_01.jpg",
    "Market1501/bounding box train/0007, c2.jpg",
)
META = {"dataset": "Market1501", "extractor": "R50 baseline", "scale": "minmax", "seed": 3, "raw_range": [0.125, 0.75]}


def labels_of(scores=(12.5, 1 / 3, 99.9), keys=KEYS, meta=META):
    scores = np.array(scores, dtype=np.float64)
    return QualityLabels(scores, scores / 128, scores / 1000, keys, meta)


@pytest.mark.parametrize("suffix", ["npz", "csv", "tsv", "json"])
def test_files_keep_everything(tmp_path, suffix):
    labels = labels_of()
    labels.save(tmp_path / f"labels.{suffix}")
    loaded = QualityLabels.load(tmp_path / f"labels.{suffix}")
    for name in ("score", "raw", "spread"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(labels, name))
    assert loaded.keys == labels.keys
    assert loaded.meta == META
    assert os.listdir(tmp_path) == [f"labels.{suffix}"]  # no temporary file left


def test_two_column_text_keeps_keys_and_scores(tmp_path):
    labels_of().save(tmp_path / "labels.txt")
    lines = (tmp_path / "labels.txt").read_text().splitlines()
    assert lines[0] == f"{KEYS[0]}\t12.5"  # what the authors' loader splits at white space
    loaded = QualityLabels.load(tmp_path / "labels.txt")
    assert loaded.keys == KEYS
    np.testing.assert_array_equal(loaded.score, labels_of().score)
    assert np.isnan(loaded.raw).all()
    assert np.isnan(loaded.spread).all()
    assert loaded.meta == {}


@pytest.mark.parametrize("suffix", ["npz", "csv", "json", "txt"])
def test_unlabelled_images_are_left_out_and_counted(tmp_path, suffix):
    labels_of((12.5, np.nan, 99.9)).save(tmp_path / f"labels.{suffix}")
    loaded = QualityLabels.load(tmp_path / f"labels.{suffix}")
    assert loaded.keys == (KEYS[0], KEYS[2])
    assert loaded.meta.get("unlabelled", 1) == 1


def test_unknown_raw_values_survive_text(tmp_path):
    labels = QualityLabels(np.array([1.0]), np.array([np.nan]), np.array([np.nan]), ("a",))
    for suffix in ("csv", "json"):
        labels.save(tmp_path / f"labels.{suffix}")
        assert np.isnan(QualityLabels.load(tmp_path / f"labels.{suffix}").raw).all()


def test_text_of_others_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("# scale: none\nimgs/a b.jpg 250.5\n\nimgs/c.jpg\t-3e-2\nIMG 12\t7\n")
    loaded = QualityLabels.load(tmp_path / "a.txt")
    assert dict(zip(loaded.keys, loaded.score, strict=True)) == {
        "imgs/a b.jpg": 250.5,
        "imgs/c.jpg": -0.03,
        "IMG 12": 7.0,
    }
    (tmp_path / "b.json").write_text('{"x/a.jpg": 5, "x/b.jpg": 7.5}')
    assert QualityLabels.load(tmp_path / "b.json").score.tolist() == [5.0, 7.5]
    (tmp_path / "c.csv").write_text('# extractor: my net\nkey,score\n"x/a, b.jpg",5\n')
    loaded = QualityLabels.load(tmp_path / "c.csv")
    assert (loaded.keys, loaded.meta) == (("x/a, b.jpg",), {"extractor": "my net"})
    np.savez(tmp_path / "d.npz", keys=np.array(["x/a.jpg"]), score=np.array([5.0], dtype=np.float32))
    assert QualityLabels.load(tmp_path / "d.npz").score.tolist() == [5.0]


def test_a_repeated_path_keeps_its_last_value_with_a_warning(tmp_path):
    (tmp_path / "a.txt").write_text("a.jpg 1\nb.jpg 2\na.jpg 3\n")
    with pytest.warns(UserWarning, match=r"a\.txt gives 1 paths more than once, e\.g\. 'a\.jpg'; the last one counts"):
        loaded = QualityLabels.load(tmp_path / "a.txt")
    assert dict(zip(loaded.keys, loaded.score, strict=True)) == {"a.jpg": 3.0, "b.jpg": 2.0}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            "a.jpg 5\nb.jpg nan\n",
            r"label of 'b\.jpg' \(1 of 2 labels are wrong\): got nan; expected a finite number.*Leave out",
        ),
        (
            "a.txt",
            "a.jpg 5\nb.jpg 100.5\nc.jpg -1\n",
            r"'b\.jpg' \(2 of 3 .*got 100\.5; expected a label from 0 to 100.*# scale: none",
        ),
        (
            "a.csv",
            "# scale: rank\nkey,score\na,101\n",
            r"label file .*a\.csv: label of 'a' .*got 101\.0; expected a label from 0 to 100",
        ),
        ("a.csv", "# scale: none\nkey,score\na,inf\n", r"'a' .*got inf; expected a finite number"),
        (
            "a.txt",
            "a.jpg 55.2 12.1\n",
            r"line 1 ends in two numbers, so which is the label\?.*put a tab after the path",
        ),
        ("a.txt", "a.jpg\t55.2\t12.1\n", r"line 1 is not one path and one score"),
        (
            "a.txt",
            "# seed: 1\na.jpg\n",
            r"a\.txt is not a readable \.txt label file: got .line 2 is not one path and one score",
        ),
        ("a.txt", "a.jpg high\n", r"line 1 holds 'high' where a number belongs"),
        ("a.txt", "", r"label file .*a\.txt holds no labels\. Make it again with tools/quality_labels\.py"),
        ("a.csv", "a.jpg,5\n", r"column titles \['a\.jpg', '5'\].*expected .*the titles key, score"),
        ("a.csv", "key,score\na,5\nb\n", r"line 3 has 1 fields, not 2"),
        ("a.csv", "key,score\na,5\na,6\n", r"a key occurs twice: got 'a'; expected one label per image"),
        ("a.json", '{"a": 5', r"a\.json is not a readable \.json label file"),
        ("a.json", "[1, 2]", r"a\.json is not a readable \.json label file"),
        ("a.npz", "no zip", r"a\.npz is not a readable \.npz label file.*no pickled objects"),
        ("a.xls", "", r"has an unknown format: got '\.xls'; expected one of \.npz, \.csv, \.tsv, \.json, \.txt"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(LabelError, match=message):
        QualityLabels.load(tmp_path / name)


def test_bad_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "short.npz", keys=np.array(["a", "b"]), score=np.array([1.0]))
    with pytest.raises(LabelError, match=r"2 keys, but 'score' has shape \(1,\)"):
        QualityLabels.load(tmp_path / "short.npz")
    np.savez(tmp_path / "other.npz", feats=np.eye(2))
    with pytest.raises(LabelError, match=r"keys is not a file in the archive.*expected arrays 'keys' and 'score'"):
        QualityLabels.load(tmp_path / "other.npz")
    np.savez(tmp_path / "pickled.npz", keys=np.array(["a", None], dtype=object), score=np.array([1.0, 2.0]))
    with pytest.raises(LabelError, match=r"Object arrays cannot be loaded"):
        QualityLabels.load(tmp_path / "pickled.npz")
    labels_of().save(tmp_path / "cut.npz")
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        LabelError, match=r"cut\.npz is not a readable \.npz label file.*check that the file was copied whole"
    ):
        QualityLabels.load(tmp_path / "cut.npz")


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(
        LabelError, match=r"nowhere\.npz does not exist\. Make it with tools/quality_labels\.py, or correct"
    ):
        QualityLabels.load(tmp_path / "nowhere.npz")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "labels.csv"
    labels_of().save(target)
    before = target.read_bytes()

    def full(source, destination):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LabelError, match=r"labels\.csv cannot be written: got .*No space left.*Choose a folder"):
        labels_of((1, 2, 3)).save(target)
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["labels.csv"]


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabelError, match=r"file/labels\.npz cannot be written.*Choose a folder that you can write to"):
        labels_of().save(tmp_path / "file" / "labels.npz")


def test_scores_off_the_scale_are_not_saved(tmp_path):
    with pytest.raises(
        LabelError, match=r"labels for .*labels\.npz: label of .*got 150\.0; expected a label from 0 to 100"
    ):
        labels_of((150, 1, 2)).save(tmp_path / "labels.npz")
    assert not (tmp_path / "labels.npz").exists()


def test_lookup_by_key_and_below_the_root(tmp_path, monkeypatch):
    root = tmp_path / "data" / "Market-1501-v15.09.15"
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    labels = labels_of()
    relative = "../data/Market-1501-v15.09.15/bounding_box_train/0002_c1s1_000551_01.jpg"
    absolute = root / "bounding_box_train" / "0002_c1s1_000451_03.jpg"
    elsewhere = "../data/Market-1501-v15.09.15/query/0002_c1s1_000551_02.jpg"
    for place in (root, os.path.relpath(root)):
        score, valid = labels.lookup([relative, absolute, KEYS[0], elsewhere], root=place, basenames=False)
        assert valid.tolist() == [True, True, True, False]
        np.testing.assert_array_equal(score.numpy(), np.array([1 / 3, 12.5, 12.5, 0.0], dtype=np.float32))
    assert labels.lookup([relative], basenames=False)[1].tolist() == [False]


def test_lookup_of_keys_that_are_host_paths(tmp_path, monkeypatch):
    """The authors' files hold the paths of their list; ours may hold absolute ones, or paths below the root."""
    monkeypatch.chdir(tmp_path)
    keys = ("datasets/cuhk03/a.png", str(tmp_path / "datasets/cuhk03/b.png"), "c.png", "other/c.png")
    labels = labels_of((1, 2, 3, 4), keys, {})
    paths = ["./datasets//cuhk03/a.png", "datasets/cuhk03/b.png", "datasets/cuhk03/c.png"]
    score, valid = labels.lookup(paths, root="datasets/cuhk03")
    assert score.tolist() == [1.0, 2.0, 3.0]
    assert valid.all()


def test_basenames_count_only_if_all_differ():
    path = ["/elsewhere/0002_c1s1_000451_03.jpg", "/elsewhere/unknown.jpg"]
    assert labels_of().lookup(path)[1].tolist() == [True, False]
    ambiguous = labels_of(keys=("a/1.jpg", "b/1.jpg", KEYS[0]))
    assert ambiguous.lookup(path)[1].tolist() == [False, False]
    assert ambiguous.lookup(["a/1.jpg"])[0].tolist() == [12.5]


def test_lookups_are_remembered(monkeypatch):
    labels = labels_of()
    path = "/elsewhere/0002_c1s1_000451_03.jpg"
    first = labels.lookup([path])

    def forgotten(*arguments):
        raise AssertionError("looked up again")

    monkeypatch.setattr(KeyIndex, "_find", forgotten)
    assert [tensor.tolist() for tensor in labels.lookup([path])] == [tensor.tolist() for tensor in first]
    with pytest.raises(AssertionError, match="looked up again"):
        labels.lookup([path], root="/elsewhere")  # another root may mean another image


def test_record_keys_match_as_they_are():
    labels = labels_of((1, 2), ("train#17", "train#18"), {})
    assert labels.lookup(["train#18", "train#19"])[0].tolist() == [2.0, 0.0]


def test_label_key():
    assert label_key("../d/Market/train/a.jpg", root="../d/Market", dataset="Market1501") == "Market1501/train/a.jpg"
    with pytest.raises(
        LabelError, match=r"Image outside its data-set folder: got '/x/Market2/a\.jpg'; expected a path below /x/Market"
    ):
        label_key("/x/Market2/a.jpg", root="/x/Market", dataset="Market1501")


def test_made_keys_are_found_again():
    paths = [f"/data/m/train/{number}.jpg" for number in range(3)]
    labels = labels_of(keys=tuple(label_key(path, root="/data/m", dataset="Market1501") for path in paths))
    moved = [path.replace("/data/m", "/mnt/market") for path in paths]
    assert labels.lookup(moved, root="/mnt/market", basenames=False)[1].all()


def test_coverage():
    labels = labels_of((12.5, np.nan, 99.9))
    assert labels.coverage([KEYS[0], KEYS[1], KEYS[2], "x/other.jpg"]) == 0.5
    assert labels.coverage([]) == 1.0


def test_low_coverage_shows_both_sides(tmp_path):
    labels_of().save(tmp_path / "market.npz")
    labels = QualityLabels.load(tmp_path / "market.npz")
    assert require_coverage(labels, KEYS) == 1.0
    assert require_coverage(labels, [*KEYS, "x/1.jpg"], 0.75) == 0.75
    message = (
        r"label file .*market\.npz covers 3 of 6 training images \(50\.0%\); expected at least 99\.0%\. "
        r"Images without a label: msmt/1\.jpg, msmt/2\.jpg\. "
        rf"Keys in the file: {KEYS[0]}, {KEYS[1]}\. Use the label file of this data set"
    )
    with pytest.raises(LabelError, match=message):
        require_coverage(labels, [*KEYS, "msmt/1.jpg", "msmt/2.jpg", "msmt/3.jpg"])


def test_malformed_labels_are_refused():
    with pytest.raises(LabelError, match=r"labels in memory: score: got \(2,\); expected one value for each of 3 keys"):
        labels_of((1, 2))
    with pytest.raises(LabelError, match=r"a key occurs twice: got 'a'"):
        labels_of((1, 2, 3), ("a", "b", "a"))


def test_rescaled_fits_once_and_says_so(tmp_path):
    raw = labels_of((10, 20, 50), meta={"scale": "none"})
    scaled = raw.rescaled("minmax")
    assert scaled.score.tolist() == [0.0, 25.0, 100.0]
    assert scaled.meta == {"scale": "minmax", "scale_fitted_to": [10.0, 50.0]}
    assert raw.rescaled("rank").score.tolist() == [0.0, 50.0, 100.0]
    assert raw.rescaled("none") is raw
    # The generator's labels are on that scale already, though they do not reach its ends.
    assert labels_of().rescaled("minmax").score.tolist() == labels_of().score.tolist()
    # A file that does not name its scale is fitted when asked.
    assert labels_of((10, 20, 50), meta={}).rescaled("minmax").score.tolist() == [0.0, 25.0, 100.0]


def test_controlled_notes_the_control():
    reversed_ = labels_of((10, 20, 50)).controlled("reverse", seed=0)
    assert reversed_.score.tolist() == [90.0, 80.0, 50.0]
    assert reversed_.meta["control"] == "reverse"
    assert reversed_.lookup(KEYS)[0].tolist() == [90.0, 80.0, 50.0]


def test_with_meta_is_saved(tmp_path):
    labels_of(meta={}).with_meta(dataset="Market1501", extractor="norm").save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["header"] == {"dataset": "Market1501", "extractor": "norm"}
