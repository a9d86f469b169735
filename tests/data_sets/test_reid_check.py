import importlib.util
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.data.reid_check import check_data

TOOL = Path(__file__).parents[2] / "tools" / "build_data.py"


def write(root, names, size=(8, 16)):
    generator = np.random.default_rng(zlib.crc32("".join(names).encode()))
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = size
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, quality=95)


@pytest.fixture
def sound(tmp_path):
    write(tmp_path, [f"train/{pid:04d}_c{camera}_0.jpg" for pid in (1, 2) for camera in (1, 2, 3)])
    write(tmp_path, ["train/0003_c1_0.jpg"], size=(20, 40))
    write(tmp_path, ["query/0004_c1_0.jpg", "query/0005_c1_0.jpg"])
    write(tmp_path, ["test/0004_c2_0.jpg", "test/0005_c1_1.jpg", "test/0000_c3_0.jpg"], size=(70, 130))
    return tmp_path


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("build_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sound_folder_is_counted(sound):
    report = check_data(sound)
    train, query, gallery = (report.splits[name] for name in ("train", "query", "gallery"))
    assert (train.images, train.identities, train.cameras) == (7, 3, 3)
    assert (query.images, query.identities, query.cameras) == (2, 2, 1)
    assert (gallery.images, gallery.identities, gallery.cameras) == (3, 3, 3)
    assert train.single_image_identities == ["0003"]
    assert train.heights == {"0-31": 6, "32-63": 1, "64-127": 0, "128-255": 0, "256+": 0}
    assert gallery.common_sizes == {"70x130": 3}
    # 0005 was seen by camera 1 only: its gallery image does not count for a query of camera 1.
    assert report.unmatched_queries == ["query/0005_c1_0.jpg"]
    assert report.problems == []
    assert len(report.remarks) == 2


def test_every_problem_is_found(sound):
    shutil.copy(sound / "train/0001_c1_0.jpg", sound / "query/0009_c1_0.jpg")
    shutil.copy(sound / "train/0001_c2_0.jpg", sound / "test/0001_c5_0.jpg")
    (sound / "train/0002_c9_0.jpg").write_bytes((sound / "train/0002_c1_0.jpg").read_bytes()[:-40])
    report = check_data(sound)
    assert report.identical_files == [
        ["query/0009_c1_0.jpg", "train/0001_c1_0.jpg"],
        ["test/0001_c5_0.jpg", "train/0001_c2_0.jpg"],
    ]
    assert report.shared_identities == ["0001"]
    assert list(report.unreadable) == ["train/0002_c9_0.jpg"]
    assert "truncated" in report.unreadable["train/0002_c9_0.jpg"].lower()
    assert [problem.split(":")[0] for problem in report.problems] == [
        "1 files cannot be decoded",
        "1 identities are trained on and tested on",
        "2 images lie in more than one split",
    ]


def test_equal_files_within_a_split_are_no_leak(sound):
    shutil.copy(sound / "train/0001_c1_0.jpg", sound / "train/0001_c1_1.jpg")
    assert check_data(sound).identical_files == []


def test_queries_match_in_any_camera_where_cameras_are_unknown(tmp_path):
    write(tmp_path, ["train/1/a.jpg", "query/2/a.jpg", "query/3/b.jpg", "gallery/2/c.jpg"])
    assert check_data(tmp_path).unmatched_queries == ["query/3/b.jpg"]


def test_data_without_split_is_checked_as_it_would_be_split_and_nothing_is_written(tmp_path):
    write(tmp_path, [f"{name}/{index}.jpg" for name in "abcd" for index in range(2)])
    before = sorted(path for path in tmp_path.rglob("*"))
    report = check_data(tmp_path)
    assert [split.identities for split in report.splits.values()] == [2, 2, 2]
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_list_can_be_checked(sound):
    rows = [f"{path.relative_to(sound)},{path.name[:4]},1,train" for path in sorted((sound / "train").iterdir())]
    (sound / "list.csv").write_text("\n".join(["path,pid,camid,split", *rows]))
    assert check_data(sound / "list.csv").splits["train"].images == 7


def test_tool_prints_a_table_and_succeeds(sound, tool, capsys):
    assert tool.main(["reid-check", str(sound)]) == 0
    out = capsys.readouterr().out
    assert "train             3        7        3  0-31: 6, 32-63: 1" in out
    assert "note: 1 queries have nothing to find in the gallery and do not count: query/0005_c1_0.jpg" in out
    assert out.endswith("no problems found\n")


def test_tool_prints_json_and_fails_on_problems(sound, tool, capsys):
    (sound / "train/0002_c9_0.jpg").write_bytes(b"")
    assert tool.main(["reid-check", "--json", str(sound)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert list(report["unreadable"]) == ["train/0002_c9_0.jpg"]
    assert report["problems"] == ["1 files cannot be decoded: train/0002_c9_0.jpg"]


def test_tool_refuses_what_it_cannot_use(tmp_path, tool, capsys):
    assert tool.main(["reid-check", str(tmp_path / "nothing")]) == 2
    assert "expected an existing folder" in capsys.readouterr().err


def test_tool_writes_synthetic_pedestrians(tmp_path, tool, capsys):
    arguments = "--num-train-identities 2 --num-test-identities 2 --num-distractors 1 --cameras-per-identity 2"
    options = [*arguments.split(), "--images-per-camera", "2", "--workers", "1", "--seed", "4"]
    assert tool.main(["synthetic", str(tmp_path), *options]) == 0
    folder = capsys.readouterr().out.strip()
    assert check_data(folder).splits["train"].images == 8
    assert tool.main(["synthetic", str(tmp_path), *options]) == 0  # found in the cache
    assert capsys.readouterr().out.strip() == folder


@pytest.mark.real_data
def test_market_subset_is_sound():
    root = os.environ.get("QSD_TEST_DATA")
    if not root:
        pytest.skip("QSD_TEST_DATA names no folder of research images")
    report = check_data(Path(root) / "Market-1501-v15.09.15")
    assert report.problems == []
    assert [split.cameras for split in report.splits.values()] == [6, 6, 6]
