from pathlib import Path

import pytest

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.items import ImageItem, image_files
from qsd_plugin.data.reid_folders import read_folder


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def shown(items, root):
    return [(Path(item.path).relative_to(root).as_posix(), item.identity, item.camera) for item in items]


def test_market_layout(tmp_path):
    touch(
        tmp_path,
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_train/0007_c15s2_000001_01.jpg",
        "query/0003_c4s1_000001_00.jpg",
        "bounding_box_test/0003_c2s1_000001_00.jpg",
        "bounding_box_test/0000_c3s1_000001_00.jpg",
        "bounding_box_test/-1_c3s1_000001_00.jpg",
        "gt_bbox/0003_c2s1_000009_00.jpg",
        "readme.txt",
    )
    splits = read_folder(tmp_path)
    assert shown(splits.train, tmp_path) == [
        ("bounding_box_train/0002_c1s1_000451_03.jpg", "0002", "1"),
        ("bounding_box_train/0007_c15s2_000001_01.jpg", "0007", "15"),
    ]
    assert shown(splits.query, tmp_path) == [("query/0003_c4s1_000001_00.jpg", "0003", "4")]
    assert [item.identity for item in splits.gallery] == ["0000", "0003"]  # the junk box is gone
    assert splits.root == tmp_path
    assert splits.has_cameras
    assert splits.notes == ()


def test_identity_folders_with_test_for_gallery(tmp_path):
    touch(
        tmp_path, "train/anna/a.jpg", "train/anna/sub/b.PNG", "train/bob/c.webp", "query/eve/d.jpg", "test/eve/e.jpeg"
    )
    splits = read_folder(tmp_path)
    assert shown(splits.train, tmp_path) == [
        ("train/anna/a.jpg", "anna", None),
        ("train/anna/sub/b.PNG", "anna", None),
        ("train/bob/c.webp", "bob", None),
    ]
    assert [item.identity for item in splits.query + splits.gallery] == ["eve", "eve"]
    assert not splits.has_cameras
    assert len(splits.notes) == 1
    assert "no camera information" in splits.notes[0]


def test_names_without_camera_in_flat_folders(tmp_path):
    touch(tmp_path, "train/12_a.jpg", "query/3_b.jpg", "gallery/3_c.jpg")
    splits = read_folder(tmp_path)
    assert [item.identity for item in splits.train] == ["12"]
    assert not splits.has_cameras


def test_cameras_known_for_some_images_are_used_for_none(tmp_path):
    touch(tmp_path, "train/0001_c1_0.jpg", "query/0002_c1_0.jpg", "gallery/0002_5.jpg")
    splits = read_folder(tmp_path)
    assert {item.camera for _, item in splits} == {None}
    assert "2 of 3 images name one" in splits.notes[0]


def test_leading_zeros_of_cameras_do_not_matter(tmp_path):
    touch(tmp_path, "train/0001_c01_0.jpg", "query/0002_c001_0.jpg", "gallery/0002_c12_0.jpg")
    assert [item.camera for _, item in read_folder(tmp_path)] == ["1", "1", "12"]


def test_hidden_files_are_no_images(tmp_path):
    touch(tmp_path, "1/._a.jpg", "1/a.jpg", ".cache/b.jpg", "1/notes.txt")
    assert [path.name for path in image_files(tmp_path)] == ["a.jpg"]


def test_gallery_without_query_gets_queries(tmp_path):
    touch(tmp_path, "train/1/a.jpg", *(f"test/{name}/{index}.jpg" for name in "xy" for index in range(8)))
    splits = read_folder(tmp_path, split_seed=3)
    assert [item.identity for item in splits.query] == ["x", "x", "y", "y"]
    assert len(splits.gallery) == 12
    assert set(splits.query).isdisjoint(splits.gallery)
    assert "4 of the test images are queries (seed 3)" in splits.notes[0]
    assert [item.identity for item in splits.train] == ["1"]


def test_plain_identity_folders_are_split_and_the_split_is_kept(tmp_path):
    touch(tmp_path, *(f"id{name}/{index}.jpg" for name in range(10) for index in range(4)))
    first = read_folder(tmp_path, test_fraction=0.3, split_seed=5)
    file = tmp_path / "qsd_split_seed5_test30.csv"
    assert file.read_text().splitlines()[0] == "path,pid,camid,split"
    assert str(file) in first.notes[-1]
    assert "3 identities are held out for testing, 7 trained on" in first.notes[-1]
    # The file decides from now on, whatever the seed would draw.
    rows = file.read_text().replace("train", "held").replace("query", "train").replace("gallery", "train")
    file.write_text(rows.replace("held", "gallery"))
    second = read_folder(tmp_path, test_fraction=0.3, split_seed=5)
    assert {item.identity for item in second.train} == {item.identity for item in first.query}


def test_stored_split_is_itself_an_image_list(tmp_path):
    from qsd_plugin.data.reid_lists import read_list

    touch(tmp_path, *(f"id{name}/{index}_c{index}.jpg" for name in range(4) for index in range(3)))
    splits = read_folder(tmp_path)
    listed = read_list(tmp_path / "qsd_split_seed0_test50.csv")
    assert (listed.train, listed.query, listed.gallery) == (splits.train, splits.query, splits.gallery)


def test_split_goes_to_the_next_folder_where_the_first_cannot_be_written(tmp_path):
    data = touch(tmp_path / "data", *(f"id{name}/{index}.jpg" for name in range(4) for index in range(2)))
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, so no folder can be made of it")
    splits = read_folder(data, split_folders=[blocked / "never", tmp_path / "out"])
    stored = tmp_path / "out" / "qsd_split_seed0_test50.csv"
    assert stored.is_file()
    assert read_folder(data, split_folders=[data, tmp_path / "out"]).query == splits.query
    assert not list(data.glob("*.csv"))


def test_changed_folder_does_not_fit_its_stored_split(tmp_path):
    touch(tmp_path, *(f"id{name}/{index}.jpg" for name in range(4) for index in range(2)))
    read_folder(tmp_path)
    touch(tmp_path, "id9/0.jpg")
    with pytest.raises(DataError, match=r"1 images without a place in it and 0 entries.*id9/0\.jpg.*Delete the file"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"without images: got '.*'; expected files ending in \.bmp, \.jpeg, \.jpg.*Check that the folder"),
        (["train/x/readme.txt", "query/y.txt", "gallery/z.txt"], "without images"),
        (["train/person.jpg"], r"without an identity: got '.*person\.jpg'; expected a Market-1501 name"),
        (["query/1_c1.jpg"], "has queries and nothing to search in"),
        (["train/1_c1.jpg", "test/2_c1.jpg", "gallery/3_c1.jpg"], "more than one gallery folder"),
        (["only/a.jpg", "only/b.jpg"], r"no test set can be split off: got '1 identities, 1 of them"),
        (["x/a.jpg", "y/b.jpg"], "no test set can be split off: got '2 identities, 0 of them"),
    ],
)
def test_unusable_folders_are_refused(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path)


def test_missing_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"Data-set folder: got 'crops'; expected an existing folder\. Relative paths"):
        read_folder("crops")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1])
def test_fraction_out_of_range_is_refused(tmp_path, fraction):
    touch(tmp_path, "x/a.jpg", "x/b.jpg", "y/a.jpg")
    with pytest.raises(ConfigError, match="expected 0 < share < 1"):
        read_folder(tmp_path, test_fraction=fraction, split_folders=())


def test_items_sort_by_path():
    assert sorted([ImageItem("b", "1", None), ImageItem("a", "2", "3")])[0].path == "a"
