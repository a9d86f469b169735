"""Keys of images inside record files, and label tables that are looked up by their paths."""

from __future__ import annotations

import pytest

from qsd_plugin.core.errors import LabelError
from qsd_plugin.quality.keys import KeyIndex, label_key, record_key, split_record_path


def test_paths_in_records() -> None:
    assert split_record_path("/data/train.rec#17") == ("/data/train.rec", 17)
    assert split_record_path("/da#ta/tr.ain.rec#0") == ("/da#ta/tr.ain.rec", 0)
    for path in ("/data/train.rec", "/data/a#1.jpg", "/data/train.rec#", "/data/train.rec#-1", "/data/train.rec#1.jpg"):
        assert split_record_path(path) is None


def test_key_is_stem_and_index_key() -> None:
    assert record_key("/data/faces/train.rec", 17) == "train#17"
    assert label_key("/data/faces/train.rec#17", root="/data/faces", dataset="FaceRecord") == "train#17"
    assert label_key("/data/faces/a/1.jpg", root="/data/faces", dataset="FaceFolder") == "FaceFolder/a/1.jpg"
    with pytest.raises(LabelError, match="Image outside its data-set folder"):
        label_key("/elsewhere/train.rec#17", root="/data/faces", dataset="FaceRecord")


def test_record_is_found_wherever_its_file_lies() -> None:
    index = KeyIndex(["train#1", "train#17"], dataset="FaceRecord")
    paths = ["/data/train.rec#17", "train.rec#1", "/data/train.rec#2", "/data/val.rec#1"]
    assert index.rows(paths).tolist() == [1, 0, -1, -1]
    assert index.rows(paths, root="/data").tolist() == [1, 0, -1, -1]


def test_record_of_another_folder_is_not_taken_where_other_sets_are_looked_up_too() -> None:
    index = KeyIndex(["train#1"], dataset="FaceRecord")
    assert index.rows(["/data/train.rec#1", "/other/train.rec#1"], root="/data", basenames=False).tolist() == [0, -1]
