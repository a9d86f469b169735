import pytest

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.reid_lists import read_list, write_list


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.jpg").write_bytes(b"")
    return tmp_path


def write(folder, text, name="list.csv"):
    (folder / name).write_text(text)
    return folder / name


def test_list_with_its_own_split(folder):
    file = write(
        folder,
        "path,pid,camid,split\nb.jpg,p1,7,train\na.jpg,p1,8,train\nc.jpg,p2,lobby,query\nd.jpg,p2,12,gallery\n",
    )
    splits = read_list(file)
    assert [(item.path, item.identity, item.camera) for item in splits.train] == [
        (str(folder / "a.jpg"), "p1", "8"),
        (str(folder / "b.jpg"), "p1", "7"),
    ]
    assert [item.camera for item in splits.query + splits.gallery] == ["lobby", "12"]
    assert splits.root == folder


def test_columns_in_any_order_with_blanks_byte_order_mark_and_extras(folder):
    file = folder / "list.csv"
    file.write_text("split, camid, note, pid, path\ntrain, 1, x, p1, a.jpg\n", encoding="utf-8-sig")
    (item,) = read_list(file).train
    assert (item.path, item.identity, item.camera) == (str(folder / "a.jpg"), "p1", "1")


def test_paths_are_relative_to_the_list_wherever_the_program_runs(folder, monkeypatch, tmp_path_factory):
    file = write(folder, "path,pid,camid,split\na.jpg,1,1,train\n")
    monkeypatch.chdir(folder)
    relative = read_list(file.name)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert relative.train == read_list(file).train


def test_images_outside_the_lists_folder_move_the_root_up(folder):
    (folder / "lists").mkdir()
    file = write(folder / "lists", f"path,pid,camid,split\n../a.jpg,1,1,train\n{folder}/b.jpg,1,1,train\n")
    splits = read_list(file)
    assert splits.root == folder
    assert [item.path for item in splits.train] == [str(folder / "a.jpg"), str(folder / "b.jpg")]


def test_an_empty_camera_means_no_cameras_at_all(folder):
    splits = read_list(write(folder, "path,pid,camid,split\na.jpg,1,1,train\nb.jpg,1,,train\n"))
    assert not splits.has_cameras
    assert "1 of 2 images name one" in splits.notes[0]


def test_list_without_split_is_split_by_identity(folder):
    file = write(folder, "path,pid,camid\na.jpg,1,\nb.jpg,1,\nc.jpg,2,\nd.jpg,2,\n", "mine.csv")
    splits = read_list(file, test_fraction=0.5, split_seed=1)
    assert (len(splits.train), len(splits.query), len(splits.gallery)) == (2, 1, 1)
    stored = folder / "mine_split_seed1_test50.csv"
    assert read_list(stored).query == splits.query


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,id,camid\na.jpg,1,1\n", "got 'path,id,camid'; expected the columns path,pid,camid.*Add pid"),
        ("", "header line: got ''"),
        ("path,pid,camid\n", "without images"),
        ("path,pid,camid\na.jpg,,1\n", "line 2: got .* expected a path and a pid"),
        ("path,pid,camid,split\na.jpg,1,1,train\nb.jpg,1,1,galery\n", "line 3: split: got 'galery'.*'gallery'"),
        (
            "path,pid,camid,split\na.jpg,1,1,train\nx.jpg,1,1,train\n",
            r"1 of 2 files do not exist: got .*x\.jpg.*relative",
        ),
        ("path,pid,camid,split\na.jpg,1,1,train\n./a.jpg,2,1,train\n", "1 files are listed more than once"),
    ],
)
def test_misformed_lists_are_refused(folder, text, message):
    with pytest.raises(DataError, match=message):
        read_list(write(folder, text))


def test_missing_list_is_refused(folder):
    with pytest.raises(DataError, match=r"Image list: got .*none\.csv'; expected an existing CSV file"):
        read_list(folder / "none.csv")


def market(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_list_of_a_folder_pools_its_parts_without_junk_and_distractors_and_splits_anew(tmp_path):
    people = [
        f"{part}/{pid:04d}_c{cam}s1_{pid}.jpg"
        for part, pids, cams in (
            ("bounding_box_train", (2, 7), (1, 2, 3)),
            ("query", (11, 12), (1,)),
            ("bounding_box_test", (11, 12), (2, 3)),
        )
        for pid in pids
        for cam in cams
    ]
    nobody = ["bounding_box_test/0000_c1s1_0.jpg", "bounding_box_test/-1_c1s1_0.jpg"]
    folder = market(tmp_path / "data", *people, *nobody)
    listed = write_list(folder, tmp_path / "lists" / "all.csv")
    assert sorted(item.path for item in listed.train) == sorted(str(folder / name) for name in people)
    text = (tmp_path / "lists" / "all.csv").read_text().splitlines()
    assert text[0] == "path,pid,camid"
    assert text[1] == f"{folder}/bounding_box_test/0011_c2s1_11.jpg,0011,2"
    splits = read_list(tmp_path / "lists" / "all.csv", split_folders=())
    assert len(splits.train) == len(splits.query) + len(splits.gallery) == 6
    assert not {item.identity for item in splits.train} & {item.identity for item in splits.query}
    for query in splits.query:
        others = {item.camera for item in splits.gallery if item.identity == query.identity}
        assert others - {query.camera}, "a query that cannot be found by another camera"


def test_list_inside_the_folder_has_relative_paths_and_an_identity_called_0_that_is_trained_on_stays(tmp_path):
    folder = market(tmp_path, "train/0/a_c1.jpg", "train/5/a_c1.jpg", "query/0007_c1.jpg", "test/0007_c2.jpg")
    write_list(folder, folder / "all.csv")
    assert (folder / "all.csv").read_text().splitlines()[1:] == [
        "query/0007_c1.jpg,0007,1",
        "test/0007_c2.jpg,0007,2",
        "train/0/a_c1.jpg,0,1",
        "train/5/a_c1.jpg,5,1",
    ]
    assert read_list(folder / "all.csv", split_folders=()).root == folder


def test_list_of_a_missing_folder_is_an_error_and_the_tool_says_so(tmp_path, capsys):
    from tools.build_data import main

    assert main(["reid-list", str(tmp_path / "none"), str(tmp_path / "all.csv")]) == 2
    assert "an existing folder" in capsys.readouterr().err
    assert not (tmp_path / "all.csv").exists()
